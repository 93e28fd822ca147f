"""A column of a cache, and the columns that several codecs share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from softcache.errors import LabelError
from softcache.labels import Sampling

__all__ = ["Column", "ids_dtype", "refuse_wrong", "sampling_column"]


@dataclass(frozen=True)
class Column:
    """One array of a cache, beyond its (view, sample) axes.

    Attributes:
        name: of the column.
        dtype: NumPy's name.
        dims: (name, size) of the inner axes.
        per_sample: one value for a sample, however many rows it has.
        planar: bytes of a record; a store keeps equal places of neighbouring rows together, where they compress.
        level: of zstd, in which such a column is compressed.
        is_vector: numbers of a vector, whose exponents compress and whose mantissas do not.
    """

    name: str
    dtype: str
    dims: tuple[tuple[str, int], ...] = ()
    per_sample: bool = False
    planar: bool = False
    level: int = 1
    is_vector: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(size for _, size in self.dims)


def ids_dtype(num_classes: int) -> str:
    """The smallest that holds V, the mark of an unused slot, as well as every class."""
    return "uint16" if num_classes <= 65535 else "uint32"


def refuse_wrong(name: str, values: np.ndarray, wrong: np.ndarray, expected: str) -> None:
    """Raises where a column [P, ...] has wrong values.

    Args:
        wrong: bool, of the shape of `values`.
        expected: what they should be.

    Raises:
        LabelError: there is one; the first one's row is named.
    """
    if wrong.any():
        place = tuple(np.argwhere(wrong)[0])
        raise LabelError(
            f"column {name}: {values[place]} in row {place[0]}; expected {expected}", position=int(place[0])
        )


def sampling_column(sampling: Sampling | None, k: int) -> tuple[Column, ...]:
    """The columns of labels with sampled classes, in addition to those of all labels."""
    if sampling is None:
        return ()
    if not sampling.replacement:
        return (Column("log_threshold", "float32"),)
    return (Column("counts", "uint8" if sampling.draws <= 255 else "uint16", (("rank", k),)),)
