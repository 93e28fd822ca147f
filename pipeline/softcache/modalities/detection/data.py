"""A run on images with boxes: detectors as teachers and students, views that move boxes too, mean average precision."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from softcache.data.boxes import DetectionBatch, ViewedScenes
from softcache.data.sources.base import Split
from softcache.data.transforms import ViewSettings
from softcache.errors import ConfigError, IdentityError
from softcache.hashing.digests import digest_weights
from softcache.labels import DetectionLabels
from softcache.labels.sparsify import LabelSettings
from softcache.modalities.images.splits import ImageSplits
from softcache.modalities.images.views import check_channels, views_of
from softcache.models.detection.backbone import read_backbone_state
from softcache.models.detection.build import build_detector
from softcache.models.detection.detector import CellOutputs, Detector, Grid, check_same_grid
from softcache.models.spec import parse_spec
from softcache.models.weights import float32_weights, select_device
from softcache.reader.cache import Cache
from softcache.reader.dataset import SoftLabelDataset, rows_per_sample
from softcache.student.tasks.object_detection import DetectionTask
from softcache.teacher.base import Teacher, TeacherSettings
from softcache.teacher.detection import DenseTeacher, load_detection_teacher

if TYPE_CHECKING:
    from softcache.config.run import RunConfig

__all__ = ["DetectionData"]

SPLITS: tuple[Split, Split] = ("train", "eval")


class DetectionData(ImageSplits):
    """The training and evaluation splits of a config's source, seen through its views."""

    train: ViewedScenes
    evaluation: ViewedScenes
    _decoder: tuple[Detector, CellOutputs] | None = None

    def __init__(self, config: RunConfig) -> None:
        sources = [config.source.open(split) for split in SPLITS]
        first = sources[0].image(0)
        super().__init__(_letterboxed(views_of(config, first)))
        check_channels(self.views.settings, len(first))
        self.train, self.evaluation = (
            ViewedScenes(source, self.views, rows_per_sample=config.labels.positions.top)  # type: ignore[arg-type]
            for source in sources
        )

    @property
    def rows_of(self) -> np.ndarray:
        """[N] label rows of each training sample."""
        return self.train.row_counts()

    def loss_identity(self, config: RunConfig) -> dict[str, Any]:
        """Returns what distinguishes runs with this loss on soft labels from others."""
        return super().loss_identity(config) | {"cells": config.detection_loss.model_dump()}

    def model_identity(self, model: str) -> dict[str, Any]:
        """Returns the digest of the weights that a student's backbone starts with, where its spec names a file."""
        file = parse_spec(model).args.get("backbone_weights")
        return {} if file is None else {"backbone_weights": digest_weights(read_backbone_state(file))}

    def student_data(self, config: RunConfig) -> DetectionData:
        """Returns this: student and teacher see the same images.

        Raises:
            ConfigError: the config has the student read something else.
        """
        if config.student.has_own_input:
            raise ConfigError(
                "student.source and student.views: a detector's student sees the teacher's images, so that a cell is "
                "the same place for both; drop the tables"
            )
        return self

    def train_dataset(self, config: RunConfig, cache: Cache) -> tuple[Any, None]:
        """Returns the student's dataset of labeled samples, and which of them it has (None: all).

        Raises:
            IdentityError: the student's cells are not those of the labels.
        """
        scenes = self.train.with_rows(rows_per_sample(cache))
        dataset = SoftLabelDataset(scenes, cache, **config.reader.fingerprint_checks)
        dataset.rows_of = scenes.row_counts()
        self.check_student(config.student.model, cache)
        return dataset, None

    def grid(self, model: str) -> Grid:
        """Returns the cells that a detector of that spec has for images of this data."""
        detector, outputs = self._outputs(model)
        return detector.grid(outputs)

    def _outputs(self, model: str) -> tuple[Detector, CellOutputs]:
        """Returns a detector of that spec without weights, and its outputs for an image of this data."""
        detector = build_detector(
            model, num_classes=self.num_classes, input_shape=self.input_shape, pretrained=False
        ).eval()
        with torch.no_grad():
            return detector, detector(torch.zeros(1, *self.input_shape))[0]

    def decode_boxes(self, cache: Cache, labels: DetectionLabels) -> np.ndarray:
        """Returns the boxes [P, 4] of a cache's labels, float32: left, top, right, bottom in pixels of the viewed image.

        Raises:
            IdentityError: the teacher that the cache names has other cells for images of this data.
        """
        spec, expected = cache.manifest.identity["teacher"]["spec"], cache.manifest.identity["grid"]["digest"]
        if self._decoder is None:
            self._decoder = self._outputs(spec)
        detector, outputs = self._decoder
        if (found := detector.grid(outputs).digest) != expected:
            raise IdentityError(
                f"cache {cache.url}: expected the grid {expected[:12]}… of its teacher's cells; teacher {spec} has the grid "
                f"{found[:12]}… for images of this config; give the config that made the cache"
            )
        rows = labels.to_torch()
        if "boxes" in rows.columns:
            raw_P4 = rows.columns["boxes"]
        else:
            from softcache.models.detection.distribution_head import expected_distances

            raw_P4 = expected_distances(rows.columns["bins"])
        boxes_P4 = detector.decode(raw_P4.float(), outputs.anchors[0][rows.cells.long()])
        height, width = outputs.images.image_sizes[0]
        scale_2 = torch.tensor([self.input_shape[2] / width, self.input_shape[1] / height])
        return (boxes_P4 * scale_2.repeat(2)).numpy()

    def check_student(self, model: str, cache: Cache) -> None:
        """Raises unless a detector of that spec has the cells that the cache's labels are of.

        Raises:
            IdentityError: cell i is another one for it.
        """
        check_same_grid(model, self.grid(model).digest, cache.manifest.identity["grid"]["digest"])

    def teacher(self, config: RunConfig, settings: TeacherSettings) -> Teacher:
        """Returns the teacher with its weights, on the device and dtype of [capture]."""
        return load_detection_teacher(
            settings,
            num_classes=self.num_classes,
            input_shape=self.input_shape,
            normalize=self.normalize(),
            class_names=self.train.source.class_names,
            device=select_device(config.capture.device),
            dtype=config.capture.dtype,
        )

    def task(self, config: RunConfig, model: str, teacher: Teacher | None = None) -> DetectionTask:
        """Returns what a student of that spec learns; `teacher` labels its batches online.

        Raises:
            IdentityError: the student's cells are not the teacher's.
        """
        self.student_data(config)
        label: Callable[[DetectionBatch], DetectionLabels] | None = None
        if teacher is not None:
            assert isinstance(teacher, DenseTeacher)
            check_same_grid(model, self.grid(model).digest, teacher.grid)
            label = partial(_labeled, teacher, config.labels)
        return DetectionTask(
            lambda: float32_weights(
                build_detector(model, num_classes=self.num_classes, input_shape=self.input_shape), model
            ),
            self.evaluation,
            self.normalize(),
            config.loss,
            config.detection_loss,
            label,
        )


def _letterboxed(settings: ViewSettings) -> ViewSettings:
    """Returns views of which the plain one shows whole images, unless the config has one of the keys of a centre crop."""
    if settings.size is None or {"fit", "eval_share", "geometry"} & settings.model_fields_set:
        return settings
    return settings.model_copy(update={"fit": "letterbox"})


def _labeled(teacher: DenseTeacher, settings: LabelSettings, batch: DetectionBatch) -> DetectionLabels:
    return teacher.label(batch, settings)[0].to_torch(batch.images.device)
