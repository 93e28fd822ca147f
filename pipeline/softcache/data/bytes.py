"""Batches of encoded files: the bytes of each sample, padded to the longest of its batch.

A byte is its value, 0 to 255; 256 stands where a shorter file has ended. There is one label row per sample, as of images,
and `softcache.data.images` does the rest.

Shape suffixes: B batch, L bytes of the longest file of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from softcache.data.batch import Dataset
from softcache.data.images import ImageBatch

if TYPE_CHECKING:
    import torch

    from softcache.data.sources.images.encoded import EncodedSource, FileSource

__all__ = ["PADDING", "ByteBatch", "ByteData"]

PADDING = 256


@dataclass(frozen=True, eq=False)
class ByteBatch(ImageBatch):
    """Encoded files; see `ImageBatch`.

    Attributes:
        images: [B, L] int16, the bytes, `PADDING` behind them.
    """

    @property
    def lengths(self) -> torch.Tensor:
        """[B] int64, the bytes of each sample."""
        return (self.images != PADDING).sum(1)

    @classmethod
    def merge(cls, batches: Sequence[ImageBatch]) -> ImageBatch:
        import torch

        longest = max(batch.images.shape[1] for batch in batches)
        padded = [
            torch.nn.functional.pad(batch.images, (0, longest - batch.images.shape[1]), value=PADDING)
            for batch in batches
        ]
        return super().merge(
            [replace(batch, images=images) for batch, images in zip(batches, padded, strict=True)]
        )


class ByteData(Dataset):
    """A source of bytes as a student reads it. It has one view, the file, and one label row per sample."""

    def __init__(self, source: EncodedSource | FileSource) -> None:
        self.source = source

    def identity(self, num_views: int) -> dict[str, dict[str, Any]]:
        """Returns nothing: there is no transform."""
        return {}

    def load(
        self, samples: Sequence[int] | np.ndarray, view: int, *, fingerprints: bool | np.ndarray = True
    ) -> ByteBatch:
        """Returns the bytes of `samples`, of whatever view; no cache holds fingerprints of them, so none are taken.

        Raises:
            SourceError: a file cannot be read, or is not what it was.
        """
        import torch

        numbers = np.asarray(samples, np.int64)
        contents = [self.source.content(sample) for sample in numbers.tolist()]
        padded_BL = np.full((len(numbers), max(map(len, contents), default=0)), PADDING, np.int16)
        for row, content in enumerate(contents):
            padded_BL[row, : len(content)] = content
        targets = torch.from_numpy(self.source.targets()[numbers])
        return ByteBatch(
            torch.from_numpy(padded_BL), targets, numbers, view, np.zeros(len(numbers), np.uint64)
        )
