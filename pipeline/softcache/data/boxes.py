"""Images with boxes: a source seen through its views, and batches of images, their boxes and the labels of some cells.

`softcache.data.images` does the same without boxes. Every image has the same number of label rows, so that rows and images
are matched by count alone. The boxes come from the source and the view, never from the cache.

Shape suffixes: B batch, C channels, H height, W width, N or M boxes of one image, P label rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, ClassVar, Self

import numpy as np
import torch

from softcache.data.images import ViewedTruth
from softcache.data.sent_batch import SentBatch
from softcache.data.sources.detection.base import BoxAnnotations, BoxSource, check_truth
from softcache.data.transforms import Views
from softcache.data.transforms.boxes import MIN_VISIBLE
from softcache.errors import ConfigError, LabelError, SourceError
from softcache.hashing.digests import digest_json
from softcache.labels import DetectionLabels
from softcache.labels.positions import PositionSettings

__all__ = ["DetectionBatch", "ViewedScenes"]


@dataclass(frozen=True, eq=False)
class DetectionBatch(SentBatch):
    """Scenes of one view; see `softcache.data.batch.Batch`.

    Attributes:
        images: [B, C, H, W], uint8 (or what the user's own transform returns).
        boxes: B tensors [N, 4] float32: x0, y0, x1, y1 in pixels of the viewed image; N may be 0.
        classes: B tensors [N] int64, the class of each box.
        rows_per_sample: the label rows of each image, `labels.positions.top`.
        samples, view, fingerprints, unit: as in `Batch`.
        labels: the record of the P = B * rows_per_sample cells, where there is one.

    Raises:
        SourceError: not one tensor of boxes and one of classes per image, or boxes without their classes.
        LabelError: `labels` of another number of rows.
    """

    images: torch.Tensor
    boxes: list[torch.Tensor]
    classes: list[torch.Tensor]
    samples: np.ndarray
    view: int
    fingerprints: np.ndarray
    rows_per_sample: int
    unit: int | None = None
    labels: DetectionLabels | None = None

    def __post_init__(self) -> None:
        counts = {
            len(self.images),
            len(self.boxes),
            len(self.classes),
            len(self.samples),
            len(self.fingerprints),
        }
        if len(counts) != 1:
            raise SourceError(
                f"DetectionBatch: expected images, boxes, classes, samples and fingerprints of one number of images; "
                f"found {len(self.images)}, {len(self.boxes)}, {len(self.classes)}, {len(self.samples)} and "
                f"{len(self.fingerprints)}; give an empty tensor for an image without boxes"
            )
        for sample, boxes, classes in zip(self.samples.tolist(), self.boxes, self.classes, strict=True):
            if boxes.ndim != 2 or boxes.shape[1] != 4 or classes.shape != boxes.shape[:1]:
                raise SourceError(
                    f"sample {sample}: expected boxes [N, 4] and classes [N]; found {list(boxes.shape)} and "
                    f"{list(classes.shape)}; give each box its class"
                )
        if self.labels is not None and len(self.labels) != self.num_rows:
            raise LabelError(
                f"DetectionBatch: expected {self.num_rows} label rows, {self.rows_per_sample} of each of "
                f"{len(self)} images; found {len(self.labels)}; take the labels of the batch's own samples"
            )

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def targets(self) -> list[dict[str, torch.Tensor]]:
        """The ground truth as torchvision's detectors take it: for each image its "boxes" and their "labels"."""
        pairs = zip(self.boxes, self.classes, strict=True)
        return [{"boxes": boxes, "labels": classes} for boxes, classes in pairs]

    @property
    def num_rows(self) -> int:
        return len(self) * self.rows_per_sample

    @property
    def row_counts(self) -> np.ndarray:
        return np.full(len(self), self.rows_per_sample, np.int64)

    @property
    def positions(self) -> np.ndarray:
        """[P] int64, each row's number in its image; its cell is in `labels.cells`."""
        return np.tile(np.arange(self.rows_per_sample, dtype=np.int64), len(self))

    def rows_at(self, positions: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Returns which of the P rows are at these positions, int64; -1 where it is not the next one.

        Args:
            positions: of the labels of each sample, sample by sample.
            counts: [B] how many each sample has.
        """
        rows = np.arange(len(positions))
        expected = self.positions
        if len(positions) != len(expected) or (counts != self.rows_per_sample).any():
            return np.full(len(positions), -1)
        return np.where(positions == expected, rows, -1)

    def split(self, pieces: int) -> list[DetectionBatch]:
        if pieces == 1:
            return [self]
        size = -(-len(self) // pieces)
        return [self._slice(start, min(start + size, len(self))) for start in range(0, len(self), size)]

    def _slice(self, start: int, stop: int) -> DetectionBatch:
        images = slice(start, stop)
        rows = slice(start * self.rows_per_sample, stop * self.rows_per_sample)
        return replace(
            self,
            images=self.images[images],
            boxes=self.boxes[images],
            classes=self.classes[images],
            samples=self.samples[images],
            fingerprints=self.fingerprints[images],
            labels=None if self.labels is None else self.labels.take(rows),
        )

    def pin_memory(self) -> DetectionBatch:
        return replace(
            self,
            images=self.images.pin_memory(),
            boxes=[boxes.pin_memory() for boxes in self.boxes],
            classes=[classes.pin_memory() for classes in self.classes],
            labels=None if self.labels is None else self.labels.pin_memory(),
        )

    def to(self, device: torch.device) -> DetectionBatch:
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            boxes=[boxes.to(device, non_blocking=True) for boxes in self.boxes],
            classes=[classes.to(device, non_blocking=True) for classes in self.classes],
            labels=None if self.labels is None else self.labels.to_torch(device, non_blocking=True),
        )

    @classmethod
    def merge(cls, batches: Sequence[DetectionBatch]) -> DetectionBatch:
        """Returns one batch of all samples, in order; a mix of batches with and without labels raises LabelError."""
        for batch in batches:
            if batch.rows_per_sample != batches[0].rows_per_sample:
                raise LabelError(
                    f"DetectionBatch.merge: expected {batches[0].rows_per_sample} rows per sample as in the first "
                    f"batch; found {batch.rows_per_sample}; merge only batches of one cache"
                )
        labels = [batch.labels for batch in batches if batch.labels is not None]
        return replace(
            batches[0],
            images=torch.cat([batch.images for batch in batches]),
            boxes=list(chain.from_iterable(batch.boxes for batch in batches)),
            classes=list(chain.from_iterable(batch.classes for batch in batches)),
            samples=np.concatenate([batch.samples for batch in batches]),
            fingerprints=np.concatenate([batch.fingerprints for batch in batches]),
            labels=DetectionLabels.concat(labels) if labels else None,
        )


class ViewedScenes(ViewedTruth):
    """A source of images with boxes through its views.

    Attributes:
        rows_per_sample: label rows of each image, `labels.positions.top`.
    """

    source: BoxSource
    uncompared: ClassVar[str] = "boxes"

    def __init__(self, source: BoxSource, views: Views, *, rows_per_sample: int) -> None:
        super().__init__(source, views)
        self.rows_per_sample = rows_per_sample

    @classmethod
    def from_identity(
        cls, source: BoxSource, identity: dict[str, Any], *, views: Views | None, rows_per_sample: int
    ) -> Self:
        """Returns a source as the teacher of a cache saw it; see `ViewedSource.from_identity`."""
        assert views is not None
        return cls(source, views, rows_per_sample=rows_per_sample)

    @property
    def mean_rows(self) -> float:
        return self.rows_per_sample

    @property
    def max_rows(self) -> int:
        return self.rows_per_sample

    def row_counts(self) -> np.ndarray:
        """Returns the label rows of each image, [N] int64."""
        return np.full(len(self), self.rows_per_sample, np.int64)

    def label_rows(self, positions: PositionSettings) -> np.ndarray:
        if not positions.chooses_cells:
            raise ConfigError(
                f"labels.positions: {positions.policy!r}, but of the images of source {self.source.name} a detector's cells "
                'are kept; expected policy = "cells", with top = the number of cells of each image'
            )
        return positions.counts(np.ones(len(self), np.int64))

    def sample_columns(self) -> dict[str, np.ndarray]:
        return {}

    def with_rows(self, rows_per_sample: int) -> ViewedScenes:
        """Returns the same scenes with so many label rows each."""
        return ViewedScenes(self.source, self.views, rows_per_sample=rows_per_sample)

    def identity(self, num_views: int) -> dict[str, dict[str, Any]]:
        """Returns the part of a cache's identity for the views and the boxes in them."""
        rule = {"min_visible": MIN_VISIBLE}
        return {**self._images.identity(num_views), "boxes": {"digest": digest_json(rule), "settings": rule}}

    def load(
        self, samples: Sequence[int] | np.ndarray, view: int, *, fingerprints: bool | np.ndarray = True
    ) -> DetectionBatch:
        """Returns the images of `samples` as the view shows them, with the boxes that are to be found in them.

        Raises:
            SourceError: an image cannot be read, or the images differ in shape.
            SpecError: the views move pixels in a way that boxes cannot follow.
        """
        scenes = self.sharing_reads(samples)  # pixels and boxes follow from one image
        batch = scenes._images.load(samples, view, fingerprints=fingerprints)
        truths = scenes._seen(batch.samples, view)
        truths = [truth.take(~truth.crowd) for truth in truths]
        return DetectionBatch(
            images=batch.images,
            boxes=[torch.from_numpy(truth.boxes) for truth in truths],
            classes=[torch.from_numpy(truth.classes) for truth in truths],
            samples=batch.samples,
            view=view,
            fingerprints=batch.fingerprints,
            rows_per_sample=self.rows_per_sample,
        )

    def in_original(
        self, samples: Sequence[int] | np.ndarray, boxes: Sequence[np.ndarray]
    ) -> tuple[list[np.ndarray], list[BoxAnnotations]]:
        """Returns boxes that were found in the plain view of `samples`, and their truth, to be scored against each other.

        Where the plain view shows the whole image, both are in pixels of the image as it is, as COCO scores them; where it
        is a crop, in pixels of the view, and the truth is what the crop shows.
        """
        numbers = np.asarray(samples, np.int64)
        settings = self.views.settings
        if settings.size is not None and settings.fit == "crop":
            return list(boxes), self._seen(numbers, 0)
        if settings.size is None:
            return list(boxes), [self.source.truth(int(sample)) for sample in numbers]
        placed = [
            self.views.original_boxes(found, height=height, width=width)
            for found, (height, width) in zip(boxes, self._sizes(numbers), strict=True)
        ]
        return placed, [self.source.truth(int(sample)) for sample in numbers]

    def _sizes(self, samples: np.ndarray) -> list[tuple[int, int]]:
        """Returns height and width of images as they are in the source, which need not be read where it has them at hand."""
        if (size_of := getattr(self.source, "image_size", None)) is not None:
            return [size_of(int(sample)) for sample in samples]
        return [(image.shape[1], image.shape[2]) for image in self._images.read(samples)]

    def _seen(self, samples: np.ndarray, view: int) -> list[BoxAnnotations]:
        sizes = self._sizes(samples)
        return [self._seen_one(int(sample), view, *size) for sample, size in zip(samples, sizes, strict=True)]

    def _seen_one(self, sample: int, view: int, height: int, width: int) -> BoxAnnotations:
        truth, key = self.source.truth(sample), self.source.key(sample)
        check_truth(
            truth, height, width, self.source.num_classes, f"source {self.source.name}: sample {key!r}"
        )
        if view == 0 and self.views.settings.size is None:  # as it is
            return truth
        boxes_M4, kept_M = self.views.apply_boxes(truth.boxes, key=key, view=view, height=height, width=width)
        return BoxAnnotations(boxes_M4, truth.classes, truth.crowd).take(kept_M)
