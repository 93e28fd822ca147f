"""Which rows of the arrays belong to which sample."""

from __future__ import annotations

import numpy as np

from softcache.cache.manifest import Plan, RaggedRows, Unit
from softcache.errors import CorruptionError

__all__ = ["RowIndex", "smallest_type"]

GROUP = 16
"""Samples of which `RowIndex` keeps one sum: 1.5 bytes a sample where none has more than 255 rows, 2.5 up to 65,535."""


def smallest_type(counts: np.ndarray) -> np.dtype:
    """Returns the smallest unsigned integers that hold the counts; int64 where there are none that do."""
    if not len(counts):
        return np.dtype(np.uint8)
    is_small = counts.min() >= 0 and counts.max() < 1 << 32
    return np.min_scalar_type(counts.max()) if is_small else np.dtype(np.int64)


class RowIndex:
    """Which rows each sample has: one, or as many as `num_rows` gives.

    Args:
        num_rows: [N] integers; None where every sample has one row.
        rows: the manifest's `rows`; None where there is no manifest yet.

    Raises:
        CorruptionError: the counts are not those of the manifest.
    """

    def __init__(self, plan: Plan, num_rows: np.ndarray | None, rows: RaggedRows | None = None) -> None:
        self._plan = plan
        if num_rows is None:
            self._counts, self._sums = None, np.zeros(0, np.int64)
            return
        self._counts = counts = num_rows.astype(smallest_type(num_rows), copy=False)
        whole = len(counts) // GROUP * GROUP
        # reduceat would make all counts int64 before
        groups = counts[:whole].reshape(-1, GROUP).sum(axis=1, dtype=np.int64)
        self._sums = np.concatenate([[0], groups, [counts[whole:].sum(dtype=np.int64)]])
        np.cumsum(self._sums, out=self._sums)
        if rows is not None:
            self._check(rows)

    def _check(self, rows: RaggedRows) -> None:
        assert self._counts is not None
        if (
            len(self._counts) != self._plan.num_samples
            or self._counts.min() < 0
            or self._rows_of_units().max() > rows.shard_rows
            or self._sums[-1] != rows.num_rows
        ):
            raise CorruptionError(
                f"sample table: its rows are not those of the manifest ({rows.num_rows} together, {rows.shard_rows} of a "
                "unit at most); restore it, or rebuild the cache"
            )

    def _rows_of_units(self) -> np.ndarray:
        assert self._counts is not None
        samples = np.arange(0, len(self._counts) + self._plan.unit_samples, self._plan.unit_samples)
        return np.diff(self._offset(np.minimum(samples, len(self._counts))))

    @property
    def ragged(self) -> bool:
        return self._counts is not None

    def _offset(self, samples: np.ndarray | int) -> np.ndarray:
        """Returns how many rows come before each sample; N is one past the last."""
        assert self._counts is not None
        samples = np.asarray(samples)
        group = samples // GROUP
        others = group[..., None] * GROUP + np.arange(GROUP - 1)
        counts = self._counts[np.minimum(others, len(self._counts) - 1)]
        return self._sums[group] + np.where(others < samples[..., None], counts, 0).sum(-1, dtype=np.int64)

    def counts(self, samples: np.ndarray) -> np.ndarray:
        """Returns the number of rows [len(samples)] int64 of each sample."""
        if self._counts is None:
            return np.ones(len(samples), np.int64)
        return self._counts[samples].astype(np.int64)

    def span(self, unit: Unit, start: int, stop: int) -> tuple[int, int]:
        """Returns the rows, counted from the unit's first, that the samples `start` to `stop` have."""
        if self._counts is None:
            return start - unit.start, stop - unit.start
        base, first, last = self._offset(np.array([unit.start, start, stop])).tolist()
        return first - base, last - base

    def starts(self, samples: np.ndarray, first: int) -> np.ndarray:
        """Returns where each sample's rows begin, counted from the first row of the sample `first`."""
        if self._counts is None:
            return samples - first
        return self._offset(samples) - self._offset(first)

    def first_rows(self, rows: RaggedRows) -> np.ndarray:
        """Returns the number [N] int64 of each sample's first row in the arrays."""
        assert self._counts is not None
        before = np.cumsum(self._counts, dtype=np.int64) - self._counts
        place = np.arange(len(before)) // self._plan.unit_samples
        return place * rows.shard_rows + before - before[place * self._plan.unit_samples]

    def geometry(self, chunk_rows: int) -> RaggedRows:
        """Returns how the rows lie in the arrays, for chunks of so many rows."""
        assert self._counts is not None
        largest = int(self._rows_of_units().max())
        chunk_rows = min(chunk_rows, largest)
        return RaggedRows(
            num_rows=int(self._sums[-1]),
            shard_rows=-(-largest // chunk_rows) * chunk_rows,
            chunk_rows=chunk_rows,
        )
