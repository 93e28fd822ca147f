"""Classification of encoded files by their bytes: as of images, served with the padding that files of one length need."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from softcache.student.tasks.image_classification import ImageTask
from softcache.student.tasks.inference import ByteServing

__all__ = ["ByteTask"]


@dataclass(frozen=True)
class ByteTask(ImageTask):
    """Classification of files.

    Attributes:
        max_bytes: the longest file of both splits.
    """

    max_bytes: int = 1

    def serve(self, model: nn.Module) -> ByteServing:
        """Returns a student of this task as a function of padded bytes; the model is moved to the CPU."""
        return ByteServing(model, self.normalize, self.max_bytes)
