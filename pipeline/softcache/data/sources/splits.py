"""Which samples a split has, and in what order, where a dataset has no split of its own.

A hash of a sample's key decides whether it is held out, another one its place in the order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from softcache.data.sources.base import Split

__all__ = ["choose_samples"]


def _key_numbers(key: str) -> tuple[int, int]:
    """Two 64-bit numbers that a key alone decides (unlike Python's salted hash): one for the hold-out, one
    for the order."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8]), int.from_bytes(digest[8:16])


def choose_samples(
    keys: Iterable[str], split: Split, *, eval_share: float | None, shuffle: bool
) -> np.ndarray:
    """Returns the numbers [N] int64 of the keys that are of the split, in order.

    Args:
        eval_share: of the keys, which are held out; None where all keys are of the split.
    """
    numbers = np.fromiter((_key_numbers(key) for key in keys), np.dtype(("<u8", 2)))
    chosen = np.arange(len(numbers))
    if eval_share is not None:
        held_out = numbers[:, 0] < np.uint64(eval_share * 2**64)
        chosen = np.flatnonzero(held_out == (split == "eval"))
    return chosen[np.argsort(numbers[chosen, 1], kind="stable")] if shuffle else chosen
