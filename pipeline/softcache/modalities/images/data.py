"""A run on images: classifiers as teachers and students, replayed views, accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from softcache.data.batch import Dataset
from softcache.data.images import ViewedSource
from softcache.modalities.images.splits import ImageSplits
from softcache.modalities.images.student import StudentImages
from softcache.modalities.images.views import check_channels, check_replays, views_of
from softcache.models.image import build_model
from softcache.models.weights import float32_weights
from softcache.reader.cache import Cache
from softcache.runtime.logging import log_info
from softcache.student.tasks import ImageTask
from softcache.teacher.base import Teacher, TeacherSettings
from softcache.teacher.image import ImageTeacher

if TYPE_CHECKING:
    from softcache.config.run import RunConfig

__all__ = ["ImageData"]


class ImageData(ImageSplits):
    """The training and evaluation splits of a config's source, seen through its views."""

    train: ViewedSource
    evaluation: ViewedSource
    teacher_class: type[ImageTeacher] = ImageTeacher
    task_class: type[ImageTask] = ImageTask

    def __init__(self, config: RunConfig) -> None:
        train, evaluation = config.source.open("train"), config.source.open("eval")
        first = train.image(0)
        super().__init__(views_of(config, first))
        check_channels(self.views.settings, len(first))
        if self.views.settings.augments and config.labels.num_views == 1:
            log_info(
                "views: the table augments images, but labels.num_views is 1: only the plain view is labeled, and a "
                "student of the cache sees no augmentation; set labels.num_views to how many views each image is to have"
            )
        check_replays(self.views, train)
        self.train = ViewedSource(train, self.views)
        self.evaluation = ViewedSource(evaluation, self.views)
        self._of_students: dict[str, StudentImages] = {}

    def student_data(self, config: RunConfig) -> ImageData | StudentImages:
        """Returns this, or what the student reads where that is not what the teacher sees; opened once."""
        if not config.student.has_own_input:
            return self
        name = config.student.model_dump_json(include={"source", "views", "pairing"})
        if name not in self._of_students:
            self._of_students[name] = StudentImages(config, self.train)
        return self._of_students[name]

    def replays_teacher_views(self, config: RunConfig) -> bool:
        """Returns whether the student sees every view that the teacher saw; else it has its plain view only."""
        student = self.student_data(config)
        return student is self or (isinstance(student, StudentImages) and student.replays)

    def train_dataset(self, config: RunConfig, cache: Cache) -> tuple[Any, Any]:
        """Returns the student's dataset of labeled samples, and which of them it has (None: all)."""
        student = self.student_data(config)
        labeled, chosen = super().train_dataset(config, cache)
        return student.train_dataset(labeled) if isinstance(student, StudentImages) else (labeled, chosen)

    def unlabeled_dataset(self, config: RunConfig) -> Dataset:
        """Returns the student's samples without labels; with what an online teacher sees of them, where it is to label."""
        student = self.student_data(config)
        if isinstance(student, StudentImages) and config.train.labels == "online":
            return student.with_teacher_images()
        return student.train

    def teacher(self, config: RunConfig, settings: TeacherSettings) -> Teacher:
        """Returns the teacher with its weights, on the device and dtype of [capture]."""
        return self.load_teacher(config, settings, self.teacher_class)

    def task(self, config: RunConfig, model: str, teacher: Teacher | None = None) -> ImageTask:
        """Returns what a student of that spec learns; `teacher` labels its batches online."""
        assert teacher is None or isinstance(teacher, ImageTeacher)
        student = self.student_data(config)
        if isinstance(student, StudentImages):
            return student.task(config, model, teacher)
        return self.task_class(
            lambda: float32_weights(
                build_model(model, num_classes=self.num_classes, input_shape=self.input_shape), model
            ),
            self.evaluation,
            self.normalize(),
            self.num_classes,
            config.loss,
            teacher,
            config.train.label_smoothing,
        )
