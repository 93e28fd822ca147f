"""A run on images with independent classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from softcache.errors import ConfigError
from softcache.modalities.images.data import ImageData
from softcache.student.tasks.multi_label import MultiLabelTask
from softcache.teacher.multi_label import MultiLabelTeacher

if TYPE_CHECKING:
    from softcache.config.run import RunConfig

__all__ = ["MultiLabelData"]


class MultiLabelData(ImageData):
    """The training and evaluation splits of a config's source, seen through its views."""

    teacher_class, task_class = MultiLabelTeacher, MultiLabelTask

    def student_data(self, config: RunConfig) -> MultiLabelData:
        """Returns this: student and teacher see the same images.

        Raises:
            ConfigError: the config has the student read something else.
        """
        if config.student.has_own_input:
            raise ConfigError(
                'student.source and student.views: for students of source.modality = "image"; a student of images with '
                "several classes sees the teacher's; drop the tables"
            )
        return self
