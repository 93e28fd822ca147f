"""Batches whose samples have many label rows, of which some have a label: what texts and masks share.

Shape suffixes: B batch, P rows of all samples together, Q those of them that have a label.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from softcache.data.sent_batch import SentBatch
from softcache.labels import SoftLabels, concat_labels

if TYPE_CHECKING:
    import torch

__all__ = ["RowBatch", "span"]


class RowBatch(SentBatch, ABC):
    """The rows of a batch's samples; see `softcache.data.batch.Batch`. A subclass is a frozen dataclass of the attributes.

    Attributes:
        rows: [P] int64, the flat positions b * `row_stride` + position, sample by sample, ascending.
        targets: [P] int64, the ground truth of each row.
        row_counts: [B] int64 (NumPy), the rows of each sample.
        labels: the record of the rows that have a label, where there is one.
        labeled: [Q] int64, which of the P rows they are, ascending; None: all of them.
        label_counts: [B] int64 (NumPy), how many each sample has; None: `row_counts`.
    """

    rows: torch.Tensor
    targets: torch.Tensor
    row_counts: np.ndarray
    samples: np.ndarray
    fingerprints: np.ndarray
    labels: SoftLabels | None
    labeled: torch.Tensor | None
    label_counts: np.ndarray | None

    @property
    @abstractmethod
    def row_stride(self) -> int:
        """Positions of a sample, those without a row included."""

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    def num_labeled(self) -> int:
        """Q, of a batch with labels."""
        return self.num_rows if self.labeled is None else len(self.labeled)

    @property
    def labeled_rows(self) -> torch.Tensor:
        """[Q] int64, the flat positions that have a label."""
        return self.rows if self.labeled is None else self.rows[self.labeled]

    @property
    def positions(self) -> np.ndarray:
        return (self.rows % max(self.row_stride, 1)).cpu().numpy()

    def split(self, pieces: int) -> list[Self]:
        if pieces == 1:
            return [self]
        size = -(-len(self) // pieces)
        return [self._slice(start, min(start + size, len(self))) for start in range(0, len(self), size)]

    @abstractmethod
    def _slice(self, start: int, stop: int) -> Self:
        """Returns the batch of some samples."""

    def _sliced_rows(self, start: int, stop: int) -> dict[str, Any]:
        """Returns the attributes of this class for some samples."""
        samples, rows = slice(start, stop), span(self.row_counts, start, stop)
        labeled = rows if self.label_counts is None else span(self.label_counts, start, stop)
        return {
            "rows": self.rows[rows] - start * self.row_stride,
            "targets": self.targets[rows],
            "row_counts": self.row_counts[samples],
            "samples": self.samples[samples],
            "fingerprints": self.fingerprints[samples],
            "labels": self.labels and self.labels.take(labeled),
            "labeled": None if self.labeled is None else self.labeled[labeled] - rows.start,
            "label_counts": None if self.label_counts is None else self.label_counts[samples],
        }

    def select(self, chosen: np.ndarray) -> Self:
        """Returns the batch with some of its rows only, without labels.

        Args:
            chosen: int64, which of the P rows, ascending.
        """
        import torch

        index = torch.from_numpy(chosen).to(self.rows.device)
        sample_P = np.repeat(np.arange(len(self)), self.row_counts)
        changes: dict[str, Any] = {
            "rows": self.rows[index],
            "targets": self.targets[index],
            "row_counts": np.bincount(sample_P[chosen], minlength=len(self)),
            "labels": None,
            "labeled": None,
            "label_counts": None,
        }
        return replace(self, **changes)  # type: ignore[type-var]

    def rows_at(self, positions: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Returns which of the P rows are at these positions, int64; -1 where there is none, or not in order.

        Args:
            positions: of some rows of each sample, ascending, sample by sample.
            counts: [B] how many of them each sample has.
        """
        rows_P = self.rows.cpu().numpy()
        flat = np.repeat(np.arange(len(self)) * self.row_stride, counts)
        np.add(flat, positions, out=flat, casting="unsafe")
        inside = (positions >= 0) & (positions < self.row_stride)  # beyond, it would be one of another sample
        if np.array_equal(flat, rows_P) and inside.all():  # all of them, as a rule
            return np.arange(len(rows_P))
        found = np.searchsorted(rows_P, flat)
        good = found < len(rows_P)
        good[good] = rows_P[found[good]] == flat[good]
        good &= inside
        good[1:] &= np.diff(flat) > 0
        return np.where(good, found, -1)

    @staticmethod
    def _merged_rows(batches: Sequence[RowBatch]) -> dict[str, Any]:
        """Returns the attributes of this class, but for `rows`, of all samples in order."""
        import torch

        labels = [batch.labels for batch in batches if batch.labels is not None]
        labeled: torch.Tensor | None = None
        label_counts: np.ndarray | None = None
        if not all(batch.labeled is None for batch in batches):
            places, before = [], 0
            for batch in batches:
                here = batch.labeled
                if here is None:
                    here = torch.arange(batch.num_rows, device=batch.rows.device)
                places.append(here + before)
                before += batch.num_rows
            labeled = torch.cat(places)
            label_counts = np.concatenate(
                [batch.row_counts if batch.label_counts is None else batch.label_counts for batch in batches]
            )
        return {
            "targets": torch.cat([batch.targets for batch in batches]),
            "row_counts": np.concatenate([batch.row_counts for batch in batches]),
            "samples": np.concatenate([batch.samples for batch in batches]),
            "fingerprints": np.concatenate([batch.fingerprints for batch in batches]),
            "labels": concat_labels(labels) if labels else None,
            "labeled": labeled,
            "label_counts": label_counts,
        }


def span(counts: np.ndarray, start: int, stop: int) -> slice:
    """The rows of the samples `start` to `stop`, of so many rows each."""
    return slice(int(counts[:start].sum()), int(counts[:stop].sum()))
