"""Images with masks: a source seen through its views, and batches of images, their masks and the labels of some cells.

A label row is a cell of a grid over the viewed image, of `labels.positions.stride` pixels a side; its position is
y * width + x. The masks come from the source and the view, never from a cache.

Shape suffixes: B batch, C channels, H height, W width, A cells of the grid, P rows of all images, Q those with a label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch

from softcache.data.images import ViewedTruth
from softcache.data.row_batch import RowBatch
from softcache.data.sources.segmentation.base import IGNORED, MaskSource
from softcache.data.transforms import Views
from softcache.data.transforms.ops import nearest
from softcache.errors import SourceError
from softcache.hashing.digests import digest_json
from softcache.labels import SoftLabels
from softcache.labels.positions import PositionSettings

__all__ = ["Cells", "SegmentationBatch", "ViewedMasks"]


@dataclass(frozen=True)
class Cells:
    """The grid of an image's label rows: `height` x `width` cells, row by row."""

    height: int
    width: int

    def __len__(self) -> int:
        return self.height * self.width

    @classmethod
    def of(cls, height: int, width: int, stride: int) -> Cells:
        """Returns the grid of images of a size; a cell at the right or bottom edge may reach out of the image."""
        return cls(-(-height // stride), -(-width // stride))

    def identity(self) -> dict[str, Any]:
        """Returns the grid's part of a cache's identity."""
        settings = {"height": self.height, "width": self.width}
        return {"digest": digest_json(settings), "num_cells": len(self), "settings": settings}


@dataclass(frozen=True, eq=False)
class SegmentationBatch(RowBatch):
    """Images of one view and their masks; see `softcache.data.batch.Batch`.

    Attributes:
        images: [B, C, H, W] uint8.
        masks: [B, H, W] int16, the class of each pixel; `IGNORED` where there is none.
        cells: the grid.
        rows: [P] int64, the flat cells b * A + position, image by image, ascending.
        targets: [P] int64, the class of the pixel in the middle of each row's cell; `IGNORED` where there is none.
        row_counts: [B] int64 (NumPy), the rows of each image.
        labels: the record of the rows that have a label, where there is one.
        labeled: [Q] int64, which of the P rows they are, ascending; None: all of them.
        label_counts: [B] int64 (NumPy), how many each image has; None: `row_counts`.
    """

    images: torch.Tensor
    masks: torch.Tensor
    cells: Cells
    rows: torch.Tensor
    targets: torch.Tensor
    row_counts: np.ndarray
    samples: np.ndarray
    view: int
    fingerprints: np.ndarray
    unit: int | None = None
    labels: SoftLabels | None = None
    labeled: torch.Tensor | None = None
    label_counts: np.ndarray | None = None

    @property
    def row_stride(self) -> int:
        return len(self.cells)

    def _slice(self, start: int, stop: int) -> SegmentationBatch:
        images = slice(start, stop)
        return replace(
            self, images=self.images[images], masks=self.masks[images], **self._sliced_rows(start, stop)
        )

    def pin_memory(self) -> SegmentationBatch:
        return self._moved(lambda x: x.pin_memory(), self.labels and self.labels.pin_memory())

    def to(self, device: torch.device) -> SegmentationBatch:
        labels = self.labels and self.labels.to_torch(device, non_blocking=True)
        return self._moved(lambda x: x.to(device, non_blocking=True), labels)

    def _moved(self, move: Any, labels: SoftLabels | None) -> SegmentationBatch:
        return replace(
            self,
            images=move(self.images),
            masks=move(self.masks),
            rows=move(self.rows),
            targets=move(self.targets),
            labels=labels,
            labeled=None if self.labeled is None else move(self.labeled),
        )

    @classmethod
    def merge(cls, batches: Sequence[SegmentationBatch]) -> SegmentationBatch:
        """Returns one batch of all images, in order."""
        firsts = np.cumsum([0, *(len(batch) for batch in batches[:-1])])
        rows = [
            batch.rows + int(first) * batch.row_stride for batch, first in zip(batches, firsts, strict=True)
        ]
        return replace(
            batches[0],
            images=torch.cat([batch.images for batch in batches]),
            masks=torch.cat([batch.masks for batch in batches]),
            rows=torch.cat(rows),
            **cls._merged_rows(batches),
        )


class ViewedMasks(ViewedTruth):
    """A source of images with masks through its views.

    Attributes:
        cells: the grid of each image's rows.
    """

    source: MaskSource
    uncompared: ClassVar[str] = "masks"

    def __init__(self, source: MaskSource, views: Views, *, cells: Cells) -> None:
        super().__init__(source, views)
        self.cells = cells

    @classmethod
    def from_identity(
        cls, source: MaskSource, identity: dict[str, Any], *, views: Views | None, rows_per_sample: int
    ) -> Self:
        """Returns a source as the teacher of a cache saw it; see `ViewedSource.from_identity`."""
        assert views is not None
        return cls(source, views, cells=Cells(**identity["grid"]["settings"]))

    @property
    def mean_rows(self) -> float:
        return float(len(self.cells))

    @property
    def max_rows(self) -> int:
        return len(self.cells)

    def row_counts(self) -> np.ndarray:
        """Returns the rows of each image, [N] int64."""
        return np.full(len(self), len(self.cells), np.int64)

    def label_rows(self, positions: PositionSettings) -> np.ndarray:
        self._refuse_cells(positions, 'choose "all", "every", "random" or "entropy"')
        return positions.counts(self.row_counts())

    def sample_columns(self) -> dict[str, np.ndarray]:
        return {"num_rows": self.row_counts()}

    def targets(self, samples: np.ndarray) -> np.ndarray:
        return self.load(samples, 0, fingerprints=False).targets.numpy()

    def describe_position(self, position: int) -> str:
        return f", cell ({position // self.cells.width}, {position % self.cells.width})"

    def with_cells(self, cells: Cells) -> ViewedMasks:
        """Returns the same images with another grid."""
        return ViewedMasks(self.source, self.views, cells=cells)

    def identity(self, num_views: int) -> dict[str, dict[str, Any]]:
        """Returns the part of a cache's identity for the views, the masks in them and the grid."""
        rule = {"resize": "nearest", "ignored": "outside of the image, and erased"}
        return {
            **self._images.identity(num_views),
            "masks": {"digest": digest_json(rule), "settings": rule},
            "grid": self.cells.identity(),
        }

    def load(
        self, samples: Sequence[int] | np.ndarray, view: int, *, fingerprints: bool | np.ndarray = True
    ) -> SegmentationBatch:
        """Returns the images of `samples` as the view shows them, with their masks.

        Raises:
            SourceError: an image or a mask cannot be read, or they differ in size.
            SpecError: the views move pixels in a way that masks cannot follow.
        """
        data = self.sharing_reads(samples)  # size and pixels follow from one image
        batch = data._images.load(samples, view, fingerprints=fingerprints)
        masks = [data._mask(sample, view) for sample in batch.samples.tolist()]
        masks_BHW = torch.stack(masks)
        targets_BA = nearest(masks_BHW, self.cells.height, self.cells.width).flatten(1).long()
        return SegmentationBatch(
            images=batch.images,
            masks=masks_BHW,
            cells=self.cells,
            rows=torch.arange(targets_BA.numel()),
            targets=targets_BA.flatten(),
            row_counts=np.full(len(batch), len(self.cells), np.int64),
            samples=batch.samples,
            view=view,
            fingerprints=batch.fingerprints,
        )

    def _mask(self, sample: int, view: int) -> torch.Tensor:
        """What the view shows of a mask, int16 [H, W]."""
        key, size = self.source.key(sample), self._images.read(np.array([sample]))[0].shape[1:]
        mask = self.source.mask(sample)
        if not isinstance(mask, torch.Tensor) or mask.is_floating_point():
            raise SourceError(
                f"source {self.source.name}: the mask of {key!r} is a {type(mask).__name__} of "
                f"{getattr(mask, 'dtype', None)}; expected a torch tensor, int16 [H, W]"
            )
        if mask.shape != size:
            raise SourceError(
                f"source {self.source.name}: the mask of {key!r} has {mask.shape[0]}x{mask.shape[1]} pixels, its image "
                f"{size[0]}x{size[1]}; expected the same (an image is turned by its EXIF orientation, a mask is not)"
            )
        mask = mask.to(torch.int16)
        wrong = mask[(mask != IGNORED) & ((mask < 0) | (mask >= self.source.num_classes))]
        if len(wrong):
            raise SourceError(
                f"source {self.source.name}: the mask of {key!r} has the values {wrong.unique().tolist()[:10]}; expected 0 "
                f"to {self.source.num_classes - 1}, and {IGNORED} where there is no class"
            )
        return self.views.apply_mask(mask, key=key, view=view, ignored=IGNORED)
