"""What is told alike of the training and the held-out split, whatever models see them: sizes, shapes, identity.

The data of a modality is one of these, and adds what teachers and students of it are.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from softcache.data.tokens import TokenData
from softcache.data.transforms import Views, ViewSettings
from softcache.models.image import Normalize

__all__ = ["ImageSplits", "TokenSplits"]


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

    def identity(self) -> dict[str, Any]:
        """Returns what tells runs on this data from others."""
        return {
            "source": self.train.source.digest,
            "views": self.views.digest,
            "evaluation": self.evaluation.source.digest,
        }


class TokenSplits:
    """Two splits of tokens."""

    train: TokenData
    evaluation: TokenData

    @property
    def num_classes(self) -> int:
        return self.train.source.vocab_size

    @cached_property
    def rows_of(self) -> np.ndarray:
        return self.train.source.num_rows()

    def identity(self) -> dict[str, Any]:
        """Returns what tells runs on this data from others."""
        return {
            "source": self.train.source.digest,
            "tokenizer": self.train.source.tokenizer_digest,
            "evaluation": self.evaluation.source.digest,
        }
