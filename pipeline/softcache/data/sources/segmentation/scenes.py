"""The scenes of `softcache.data.sources.detection.synthetic` with a mask instead of boxes: segmentation with no download."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from softcache.data.sources.base import SOURCES, Split
from softcache.data.sources.detection.synthetic import Scenes, compose_scenes
from softcache.data.sources.images.base import InMemorySource
from softcache.hashing.digests import digest_bytes, digest_source

__all__ = ["MaskedScenes", "SegmentedScenes"]


class MaskedScenes(InMemorySource):
    """Composed scenes, all in memory, with their masks; class 0 is the background."""

    def __init__(
        self,
        name: str,
        images: torch.Tensor,
        masks_NHW: np.ndarray,
        keys: list[str],
        class_names: list[str],
    ) -> None:
        super().__init__(name, images, np.zeros(len(keys), np.int64), keys, class_names)
        self._masks = torch.from_numpy(masks_NHW.astype(np.int16))
        content = {"pixels": digest_bytes(self._images.numpy().data), "masks": digest_bytes(masks_NHW.data)}
        self.digest = digest_source(keys, self._targets, content)

    def mask(self, sample: int) -> torch.Tensor:
        return self._masks[sample]


@SOURCES.register("segmentation/scenes")
class SegmentedScenes(Scenes):
    """Scenes composed from `originals`, with the class of each object at its inked pixels.

    `size` is the side of a scene in pixels, `train_scenes` and `eval_scenes` are how many there are.
    """

    modality: Literal["segmentation"] = "segmentation"  # type: ignore[assignment]

    def open(self, split: Split) -> MaskedScenes:  # type: ignore[override]
        made = compose_scenes(self, split)
        return MaskedScenes(made.name, made.images, made.masks, made.keys, ["background", *made.class_names])
