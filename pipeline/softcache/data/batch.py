"""What batches and datasets of images, texts and boxes have in common: all that capture, reader and training loop know.

`softcache.data.images`, `bytes`, `boxes` and `tokens` implement it.

Shape suffixes: B batch, P label rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

if TYPE_CHECKING:
    import torch

    from softcache.labels import LabelKind
from softcache.labels import SoftLabels

__all__ = ["Batch", "Dataset", "ranges"]


def ranges(num_samples: int, batch_size: int) -> Iterator[range]:
    """Yields the numbers of all samples, in order, a batch at a time; the last one may be smaller."""
    for start in range(0, num_samples, batch_size):
        yield range(start, min(start + batch_size, num_samples))


class Batch(Protocol):
    """Some samples of one view, with or without labels.

    Attributes:
        targets: [P] int64, the ground truth of every label row.
        samples: [B] int64 (NumPy), sample numbers in the source.
        view: the view's number.
        fingerprints: [B] uint64 (NumPy), content fingerprints; 0 where not asked for.
        unit: the unit of work that the batch belongs to, where there is one.
        labels: the record of the P rows, where there is one.
    """

    targets: Any
    samples: np.ndarray
    view: int
    fingerprints: np.ndarray
    unit: int | None
    labels: SoftLabels | None

    def __len__(self) -> int:
        """Returns B, the number of samples."""
        ...

    @property
    def num_rows(self) -> int:
        """P, the number of label rows."""
        ...

    @property
    def row_counts(self) -> np.ndarray:
        """[B] int64, the rows of each sample."""
        ...

    @property
    def positions(self) -> np.ndarray:
        """[P] int64, where in its sample each row is."""
        ...

    def split(self, pieces: int) -> list[Self]:
        """Returns the batch in at most so many pieces of whole samples, in order."""
        ...

    def pin_memory(self) -> Self: ...
    def to(self, device: torch.device) -> Self: ...

    @classmethod
    def merge(cls, batches: Sequence[Self]) -> Self:
        """Returns one batch of all samples, in order."""
        ...


class Dataset(Protocol):
    """A source as teacher and student see it; picklable, so that loader processes can hold one each."""

    source: Any
    kind: LabelKind

    def __len__(self) -> int: ...
    def identity(self, num_views: int) -> dict[str, dict[str, Any]]: ...

    def load(
        self, samples: Sequence[int] | np.ndarray, view: int, *, fingerprints: bool | np.ndarray = True
    ) -> Any:
        """Returns the batch of `samples`; `fingerprints` may be a mask [B] of those to take."""
        ...
