"""A run on images with masks: models of semantic segmentation, views that move masks too, mean intersection over union."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from softcache.data.masks import Cells, ViewedMasks
from softcache.errors import ConfigError
from softcache.modalities.images.splits import ImageSplits
from softcache.modalities.images.views import check_channels, views_of
from softcache.models.segmentation import build_segmenter
from softcache.models.weights import float32_weights
from softcache.reader.cache import Cache
from softcache.reader.dataset import SoftLabelDataset
from softcache.student.tasks.semantic_segmentation import SegmentationTask
from softcache.teacher.base import Teacher, TeacherSettings
from softcache.teacher.segmentation import SegmentationTeacher

if TYPE_CHECKING:
    from softcache.config.run import RunConfig

__all__ = ["SegmentationData"]


class SegmentationData(ImageSplits):
    """The training and evaluation splits of a config's source, seen through its views."""

    train: ViewedMasks
    evaluation: ViewedMasks

    def __init__(self, config: RunConfig) -> None:
        train, evaluation = config.source.open("train"), config.source.open("eval")
        first = train.image(0)
        super().__init__(views_of(config, first))
        check_channels(self.views.settings, len(first))
        sides = self.views.settings.sides(*first.shape[1:])
        cells = Cells.of(*sides, config.labels.positions.cell_side)
        self.train = ViewedMasks(train, self.views, cells=cells)
        self.evaluation = ViewedMasks(evaluation, self.views, cells=cells)
        if (
            self.views.settings.augments
        ):  # masks that cannot follow a view are found here, and not in a teacher's pass
            self.train.load([0], 1, fingerprints=False)

    @property
    def rows_of(self) -> np.ndarray:
        """[N] label rows of each training sample."""
        return self.train.row_counts()

    def student_data(self, config: RunConfig) -> SegmentationData:
        """Returns this: student and teacher see the same images.

        Raises:
            ConfigError: the config has the student read something else.
        """
        if config.student.has_own_input:
            raise ConfigError(
                "student.source and student.views: a student of masks sees the teacher's images, so that a cell is the same "
                "place for both; drop the tables"
            )
        return self

    def train_dataset(self, config: RunConfig, cache: Cache) -> tuple[Any, None]:
        """Returns the student's dataset of labeled samples, and which of them it has (None: all)."""
        settings = cache.manifest.identity["grid"].get("settings", {})
        if settings.keys() == {"height", "width"}:  # else the check of the cache names what it is of
            self.train = self.train.with_cells(Cells(**settings))
        return SoftLabelDataset(self.train, cache, **config.reader.fingerprint_checks), None

    def teacher(self, config: RunConfig, settings: TeacherSettings) -> Teacher:
        """Returns the teacher with its weights, on the device and dtype of [capture]."""
        return self.load_teacher(config, settings, SegmentationTeacher)

    def task(self, config: RunConfig, model: str, teacher: Teacher | None = None) -> SegmentationTask:
        """Returns what a student of that spec learns; `teacher` labels its batches online."""
        self.student_data(config)
        return SegmentationTask(
            lambda: float32_weights(
                build_segmenter(model, num_classes=self.num_classes, input_shape=self.input_shape), model
            ),
            self.evaluation,
            self.normalize(),
            self.num_classes,
            config.loss,
            teacher,
        )
