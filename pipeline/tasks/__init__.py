"""What a student learns and how it is scored, by modality: everything that the training loop leaves open."""

from pipeline.losses import LossSettings
from pipeline.tasks.encoded import ByteTask
from pipeline.tasks.images import ImageTask
from pipeline.tasks.task import Task, my_share
from pipeline.tasks.token_student import TokenStudent
from pipeline.tasks.tokens import TokenTask
from pipeline.tasks.translation import TranslationTask

__all__ = [
    "ByteTask",
    "ImageTask",
    "LossSettings",
    "Task",
    "TokenStudent",
    "TokenTask",
    "TranslationTask",
    "my_share",
]
