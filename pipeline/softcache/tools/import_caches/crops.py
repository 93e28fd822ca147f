"""FKD's crops, shown again to a student: a data set that joins an imported cache by key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from softcache.data.images import ImageBatch, ViewedSource
from softcache.data.transforms import Views, ViewSettings
from softcache.tools.import_caches.formats.fkd import FKD

__all__ = ["FKDCrops"]


class FKDCrops(ViewedSource):
    """A source of images as FKD's own loader shows them: view v is crop v, scaled and mirrored.

    Pillow scales, as there, so pixels are those that FKD's students see. Fingerprints are 0, as those of the cache: FKD has
    none. A batch reads a file for each of its images, as FKD does.

    Args:
        original: opened with the same source (`open_original`).
        size: side of the crops.
        interpolation: of the scaling.
    """

    def __init__(
        self,
        source: Any,
        original: FKD,
        *,
        size: int,
        interpolation: Literal["bilinear", "bicubic"] = "bilinear",
    ) -> None:
        super().__init__(source, Views(ViewSettings()))
        self._original, self._size, self._interpolation = original, size, interpolation

    def load(
        self, samples: Sequence[int] | np.ndarray, view: int, *, fingerprints: bool | np.ndarray = False
    ) -> ImageBatch:
        """Returns crop `view` of `samples`, uint8 [B, C, size, size]."""
        import torch
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as ops

        numbers = np.asarray(samples, np.int64)
        drawn, mode = self._original.parameters(numbers, view), InterpolationMode(self._interpolation)
        images = []
        for image, box, is_flipped in zip(
            self.read(numbers), drawn["box"].tolist(), drawn["flip"], strict=True
        ):
            height, width = image.shape[1:]
            top, left, rows, columns = box[0] * height, box[1] * width, box[2] * height, box[3] * width
            edges = (round(left), round(top), round(left + columns), round(top + rows))
            crop = ops.resize(ops.to_pil_image(image).crop(edges), [self._size, self._size], mode)
            images.append(ops.pil_to_tensor(ops.hflip(crop) if is_flipped else crop))
        targets = torch.from_numpy(self._classes()[numbers])
        return ImageBatch(torch.stack(images), targets, numbers, view, np.zeros(len(numbers), np.uint64))
