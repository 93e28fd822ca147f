"""What an image source with masks is, and the base of the [source] tables of `modality = "segmentation"`.

The ground truth of an image is its mask: a class for each pixel, or none. It comes from the source (and through the view),
never from a cache; the source's digest covers it.

Shape suffixes: `H` height, `W` width.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal, Protocol, runtime_checkable

import torch

from softcache.data.sources.base import SOURCES, SourceSettings, Split
from softcache.data.sources.images.base import Source
from softcache.data.sources.images.custom import Subset, call_factory, check_source

__all__ = ["IGNORED", "CustomMasks", "MaskSource", "SegmentationSettings"]

IGNORED = -100
"""The class of a pixel that has none: torch's `ignore_index`."""


@runtime_checkable
class MaskSource(Source, Protocol):
    """A `Source` whose images have masks; its `targets()` are not read."""

    def mask(self, sample: int) -> torch.Tensor:
        """Returns the class of each pixel of the image, int16 [H, W]; `IGNORED` where there is none."""
        ...


class SegmentationSettings(SourceSettings):
    """[source] with `modality = "segmentation"`; `open` returns a `MaskSource`."""

    modality: Literal["segmentation"] = "segmentation"

    @abstractmethod
    def open(self, split: Split) -> MaskSource: ...


@SOURCES.register("segmentation/custom")
class CustomMasks(SegmentationSettings):
    """A function of the user's: factory(split="train" | "eval") returns a `MaskSource`."""

    def open(self, split: Split) -> MaskSource:
        source, limit = call_factory(self.name, split), self.max_samples(split)
        check_source(source, self.name, split, ("mask",), of="MaskSource")
        return source if limit is None else MaskSubset(source, limit)


class MaskSubset(Subset):
    """The first images of another source with masks."""

    _source: MaskSource

    def mask(self, sample: int) -> torch.Tensor:
        return self._source.mask(range(self._count)[sample])
