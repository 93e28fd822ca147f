"""A column of a cache, and the columns that several codecs share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from softcache.errors import LabelError
from softcache.labels import Sampling

__all__ = ["Column", "RowPlaces", "ids_dtype", "refuse_wrong", "sampling_column"]


_RUN = 16
"""Rows that lie together in the mean, from which on they are copied run by run."""


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


class RowPlaces:
    """Where the rows of a part of a column go in a larger array.

    Args:
        places_P: [P] int64; a row of place -1 goes nowhere.

    Attributes:
        given: places_P.
        places: [P'] int64, of the rows that go somewhere.
        kept: [P] bool, which do; None: all.
    """

    def __init__(self, places_P: np.ndarray) -> None:
        self.given = places_P
        self.kept = None if not len(places_P) or places_P.min() >= 0 else places_P >= 0
        self.places = places_P if self.kept is None else places_P[self.kept]
        breaks = np.flatnonzero(np.diff(self.places) != 1) + 1
        self._runs: list[tuple[int, int, int]] | None = None
        if len(breaks) < max(1, len(self.places) // _RUN):
            starts = [0, *breaks.tolist()]
            ends = [*starts[1:], len(self.places)]
            self._runs = (
                list(zip(starts, ends, self.places[starts].tolist(), strict=True)) if ends[-1] else []
            )

    def put(self, values: np.ndarray, out: np.ndarray) -> None:
        """Writes `values` [P, ...] to their rows of `out` [N, ...], in C order and of the same dtype.

        `out[places] = values` goes through the numbers of a row one by one. Here runs of rows are copied at once, and single
        rows each as one number of its size.
        """
        if self.kept is not None:
            values = values[self.kept]
        row_bytes = values.nbytes // max(len(values), 1)
        if self._runs is not None:
            for start, end, place in self._runs:
                out[place : place + end - start] = values[start:end]
        elif row_bytes:
            row = np.dtype((np.void, row_bytes))
            flat = np.ascontiguousarray(values).reshape(len(values), -1)
            out.reshape(len(out), -1).view(row)[:, 0][self.places] = flat.view(row)[:, 0]


def sampling_column(sampling: Sampling | None, k: int) -> tuple[Column, ...]:
    """The columns of labels with sampled classes, in addition to those of all labels."""
    if sampling is None:
        return ()
    if not sampling.replacement:
        return (Column("log_threshold", "float32"),)
    return (Column("counts", "uint8" if sampling.draws <= 255 else "uint16", (("rank", k),)),)
