"""What images and images with boxes have in common: two splits seen through views, their sizes and identity."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from softcache.data.transforms import Views, ViewSettings
from softcache.models.image import Normalize
from softcache.reader.cache import Cache

__all__ = ["ImageSplits"]


class ImageSplits:
    """Two splits of images, seen through views."""

    train: Any
    evaluation: Any

    rows_of = None  # as many label rows per image for all

    def __init__(self, settings: ViewSettings) -> None:
        self.views = Views(settings)

    @property
    def num_classes(self) -> int:
        return int(self.train.source.num_classes)

    @cached_property
    def input_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.train.load([0], 0, fingerprints=False).images.shape[1:]
        return channels, height, width

    def normalize(self) -> Normalize:
        """Returns a fresh module that makes model inputs of uint8 images."""
        return Normalize(self.views.settings.mean, self.views.settings.std)

    def check_student(self, model: str, cache: Cache) -> None:
        """Does nothing: a student of any spec can have the cache's labels."""

    def identity(self) -> dict[str, Any]:
        """Returns what distinguishes runs on this data from others."""
        return {
            "source": self.train.source.digest,
            "views": self.views.digest,
            "evaluation": self.evaluation.source.digest,
        }
