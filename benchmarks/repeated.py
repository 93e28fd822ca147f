"""A source of images many times over, for benchmarks that need many batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from softcache.data.sources.images.base import load_images

__all__ = ["Repeated"]


class Repeated:
    """Images many times over, under keys of their own: enough of them for many batches."""

    def __init__(self, source: Any, copies: int) -> None:
        self._source, self._size = source, len(source)
        self.name, self.digest = f"{source.name} x {copies}", f"{copies:064d}"
        self.num_classes, self.class_names = source.num_classes, source.class_names
        self._keys = [f"{copy}/{key}" for copy in range(copies) for key in source.keys()]  # noqa: SIM118
        self._targets = np.tile(source.targets(), copies)

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, sample: int) -> str:
        return self._keys[sample]

    def keys(self) -> list[str]:
        return self._keys

    def target(self, sample: int) -> int:
        return int(self._targets[sample])

    def targets(self) -> np.ndarray:
        return self._targets

    def image(self, sample: int) -> torch.Tensor:
        return self._source.image(sample % self._size)

    def images(self, samples: np.ndarray) -> Any:
        return load_images(self._source, samples % self._size)
