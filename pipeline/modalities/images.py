"""A run on images: classifiers as teachers and students, replayed views, accuracy."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from pipeline.batches import ViewedSource
from pipeline.cache import Cache
from pipeline.config import RunConfig
from pipeline.models import Normalize, build_model, select_device
from pipeline.reader import SoftLabelDataset
from pipeline.sources import SourceSettings, open_source
from pipeline.tasks import ImageTask
from pipeline.teacher import ImageTeacher, Teacher, TeacherSettings, load_image_teacher
from pipeline.views import Views

__all__ = ["ImageData"]


class ImageData:
    """The training and evaluation splits of a config's source, seen through its views."""

    rows_of = None  # one label row per image

    def __init__(self, config: RunConfig) -> None:
        assert isinstance(config.source, SourceSettings)
        views = Views(config.views)
        self.train = ViewedSource(open_source(config.source, split="train"), views)
        self.evaluation = ViewedSource(open_source(config.source, split="eval"), views)
        self._mean, self._std = config.views.mean, config.views.std

    @property
    def num_classes(self) -> int:
        return self.train.source.num_classes

    @cached_property
    def input_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.train.load([0], 0, fingerprints=False).images.shape[1:]
        return channels, height, width

    def normalize(self) -> Normalize:
        """Returns a fresh module that makes model inputs of uint8 images."""
        return Normalize(self._mean, self._std)

    def identity(self) -> dict[str, Any]:
        """Returns what tells runs on this data from others."""
        return {
            "source": self.train.source.digest,
            "views": self.train.views.digest,
            "evaluation": self.evaluation.source.digest,
        }

    def of_student(self, config: RunConfig) -> ImageData:
        """Returns this: student and teacher see the same images."""
        return self

    def labelled(self, config: RunConfig, cache: Cache) -> tuple[Any, None]:
        """Returns the student's dataset of labelled samples, and which of them it has (None: all)."""
        reader = config.reader
        return SoftLabelDataset(
            self.train, cache, check_share=reader.check_share, check_first=reader.check_first
        ), None

    def teacher(self, config: RunConfig, settings: TeacherSettings) -> Teacher:
        """Returns the teacher with its weights, on the device and dtype of [capture]."""
        return load_image_teacher(
            settings,
            num_classes=self.num_classes,
            input_shape=self.input_shape,
            normalize=self.normalize(),
            device=select_device(config.capture.device),
            dtype=config.capture.dtype,
        )

    def task(self, config: RunConfig, model: str, teacher: Teacher | None = None) -> ImageTask:
        """Returns what a student of that spec learns; `teacher` labels its batches on the spot."""
        assert teacher is None or isinstance(teacher, ImageTeacher)
        return ImageTask(
            lambda: build_model(model, num_classes=self.num_classes, input_shape=self.input_shape),
            self.evaluation,
            self.normalize(),
            self.num_classes,
            config.loss,
            teacher,
        )
