"""A source with boxes, seen through its views: pixels and boxes move together.

Shape suffixes: `B` images, `M` boxes of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from softcache.data.batch import ViewedSource
from softcache.data.boxes import DetectionBatch
from softcache.data.sources.detection.base import BoxAnnotations, BoxSource
from softcache.data.sources.images.base import load_images
from softcache.data.transforms import Views
from softcache.data.transforms.boxes import MIN_VISIBLE
from softcache.hashing.digests import digest_json

__all__ = ["ViewedScenes"]


class ViewedScenes:
    """A source of images with boxes through its views; picklable.

    Attributes:
        rows_per_sample: label rows of each image, `labels.positions.top`.
    """

    kind: Literal["image", "tokens", "cells"] = "cells"

    def __init__(self, source: BoxSource, views: Views, *, rows_per_sample: int) -> None:
        self.source, self.views, self.rows_per_sample = source, views, rows_per_sample
        self._images = ViewedSource(source, views)

    def __len__(self) -> int:
        return len(self.source)

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
        batch = self._images.load(samples, view, fingerprints=fingerprints)
        truths = self._seen(batch.samples, view)
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

    def truths(self, samples: Sequence[int] | np.ndarray, view: int) -> list[BoxAnnotations]:
        """Returns the truth of each of `samples` as the view shows it, crowds included: what detections are scored by."""
        return self._seen(np.asarray(samples, np.int64), view)

    def _seen(self, samples: np.ndarray, view: int) -> list[BoxAnnotations]:
        plain = view == 0 and self.views.settings.size is None
        images = [None] * len(samples) if plain else load_images(self.source, samples)
        return [
            self._seen_one(int(sample), view, image) for sample, image in zip(samples, images, strict=True)
        ]

    def _seen_one(self, sample: int, view: int, image: torch.Tensor | None) -> BoxAnnotations:
        truth = self.source.truth(sample)
        if image is None:  # as it is
            return truth
        height, width = image.shape[1:]
        boxes_M4, kept_M = self.views.apply_boxes(
            truth.boxes, key=self.source.key(sample), view=view, height=height, width=width
        )
        return BoxAnnotations(boxes_M4, truth.classes, truth.crowd).take(kept_M)
