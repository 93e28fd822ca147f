"""What batches and datasets of images, texts and boxes have in common: all that capture, reader and training loop know.

`softcache.data.images`, `bytes`, `boxes` and `tokens` implement it.

Shape suffixes: B batch, P label rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np

from softcache.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from softcache.labels import LabelKind, SoftLabels
    from softcache.labels.positions import PositionSettings

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


class Dataset(ABC):
    """A source as teacher and student see it; picklable, so that loader processes can hold one each.

    What is not abstract holds for sources with one label row per sample, such as images.

    Attributes:
        kind: of its labels, in the manifest of a cache.
        is_ragged: whether samples may have several label rows.
        mean_rows, max_rows: their mean and their largest number.
        uncompared: the part of the ground truth that only the source's digest covers; "" for none.
    """

    kind: ClassVar[LabelKind] = "image"
    is_ragged: ClassVar[bool] = False
    uncompared: ClassVar[str] = ""
    source: Any

    def __len__(self) -> int:
        return len(self.source)

    @abstractmethod
    def identity(self, num_views: int) -> dict[str, dict[str, Any]]:
        """Returns what a cache's identity has besides the source's digest."""

    @abstractmethod
    def load(
        self, samples: Sequence[int] | np.ndarray, view: int, *, fingerprints: bool | np.ndarray = True
    ) -> Any:
        """Returns the batch of `samples`; `fingerprints` may be a mask [B] of those to take."""

    @property
    def decodes(self) -> bool:
        """Whether several views of a sample are cheaper to load one after the other: its file is decoded once."""
        return False

    def sharing_reads(self, samples: Sequence[int] | np.ndarray) -> Self:
        """Returns the dataset with what is decoded of `samples` kept in memory, for the next of their views."""
        return self

    @property
    def class_names(self) -> tuple[str, ...]:
        """[V] names; empty where classes have none."""
        return tuple(self.source.class_names)

    @property
    def mean_rows(self) -> float:
        return 1.0

    @property
    def max_rows(self) -> int:
        return 1

    def label_rows(self, positions: PositionSettings) -> np.ndarray | None:
        """Returns how many label rows each sample gets, [N] int64; None where it is one each.

        Raises:
            ConfigError: rows are to be chosen in a way that is not for this kind of data.
        """
        self._refuse_cells(positions, "drop the table")
        if positions.policy != "all":
            raise ConfigError(
                f"labels.positions: {positions.policy!r}, but samples of source {self.source.name} are images, with one row "
                "each; drop the table"
            )
        return None

    def _refuse_cells(self, positions: PositionSettings, next_step: str) -> None:
        if positions.chooses_cells:
            raise ConfigError(
                f"labels.positions: 'cells' are a detector's, and source {self.source.name} has no boxes; {next_step}"
            )

    def sample_columns(self) -> dict[str, np.ndarray]:
        """Returns the columns of a cache's table of samples that follow from the source, [N] each."""
        return {"targets": self.source.targets()}

    def targets(self, samples: np.ndarray) -> np.ndarray:
        """Returns the ground truth of every row of `samples`, int64."""
        return np.asarray(self.source.targets())[samples]

    def describe_position(self, position: int) -> str:
        """Returns the place of a row in its sample for messages; "" where it is the only one."""
        return ""

    def picture(self, sample: int) -> torch.Tensor | None:
        """Returns the uint8 image [C, H, W] that a report shows of a sample; None where it shows tokens."""
        return self.source.image(sample)
