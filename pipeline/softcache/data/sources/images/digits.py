"""The digits embedded in scikit-learn: 1,797 images of 8x8."""

from __future__ import annotations

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
        from sklearn.datasets import load_digits

        data = load_digits()
        rank = np.zeros(len(data.target), np.int64)  # how many of its class came before
        for digit in range(10):
            members = np.flatnonzero(data.target == digit)
            rank[members] = np.arange(len(members))
        chosen = np.flatnonzero((rank % 6 == 5) == (split == "eval"))[: self.max_samples(split)]
        # Values 0..16 become 0..255.
        images = torch.from_numpy(np.rint(data.images[chosen] * (255 / 16)).astype(np.uint8)).unsqueeze(1)
        keys = [f"digits/{number:04d}" for number in chosen]
        return InMemorySource(
            f"digits/{split}", images, data.target[chosen], keys, [str(d) for d in range(10)]
        )
