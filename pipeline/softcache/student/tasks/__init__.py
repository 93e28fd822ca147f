"""What a student learns and how it is scored, by modality: everything that the training loop leaves open."""

from softcache.losses import LossSettings
from softcache.student.tasks.base import RowMeans, Task, even_batches, shard_batches
from softcache.student.tasks.image_classification import ByteTask, ImageTask
from softcache.student.tasks.language_modeling import TokenTask
from softcache.student.tasks.token_student import TokenStudent
from softcache.student.tasks.translation import TranslationTask

__all__ = [
    "ByteTask",
    "ImageTask",
    "LossSettings",
    "RowMeans",
    "Task",
    "TokenStudent",
    "TokenTask",
    "TranslationTask",
    "even_batches",
    "shard_batches",
]
