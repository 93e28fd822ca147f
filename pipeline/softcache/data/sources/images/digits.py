"""The digits embedded in scikit-learn: 1,797 images of 8x8."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from softcache.data.sources.base import SOURCES
from softcache.data.sources.images.base import ImageSourceSettings, InMemorySource, Source, Split

__all__ = ["Digits"]


@SOURCES.register("image/digits")
class Digits(ImageSourceSettings):
    """Every sixth image of each class, in order of appearance, is for evaluation: 296 of 1,797, stratified."""

    name: str = "digits"

    def open(self, split: Split) -> Source:
        images, targets = _load_digits()
        rank = np.zeros(len(targets), np.int64)  # how many of its class came before
        for digit in range(10):
            members = np.flatnonzero(targets == digit)
            rank[members] = np.arange(len(members))
        chosen = np.flatnonzero((rank % 6 == 5) == (split == "eval"))[: self.max_samples(split)]
        keys = [f"digits/{number:04d}" for number in chosen]
        return InMemorySource(
            f"digits/{split}",
            torch.from_numpy(images[chosen]).unsqueeze(1),
            targets[chosen],
            keys,
            [str(d) for d in range(10)],
        )


@cache
def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns the images, uint8 [1797, 8, 8], and their classes; scikit-learn parses a text file at each call."""
    from sklearn.datasets import load_digits

    data = load_digits()
    # Values 0..16 become 0..255.
    return np.rint(data.images * (255 / 16)).astype(np.uint8), data.target
