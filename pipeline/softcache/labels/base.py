"""What every record of labels shows and how it is indexed: rows as in NumPy, classes by name, whole distributions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from softcache.errors import LabelError
from softcache.labels.arrays import Array
from softcache.runtime.display import Displayed, Summary, shorten_list
from softcache.runtime.indexing import row_numbers

if TYPE_CHECKING:
    from softcache.labels.soft_labels import SoftLabels

__all__ = ["LabelsBase", "TopClasses", "dense_log_probs"]

SHOWN_ROWS = 5
SHOWN_CLASSES = 3

TopClasses = list[list[tuple[str, float]]]
"""Of each row the likeliest classes, likeliest first: pairs of a name and a probability."""


class LabelsBase(Displayed):
    """Base of the records: their display, and `labels[...]`.

    Attributes:
        num_classes: V.
        class_names: [V], as a cache has them; empty where classes have no names, which are then their numbers.
    """

    ids: Array
    num_classes: int
    class_names: Sequence[str] = ()

    @abstractmethod
    def __len__(self) -> int: ...
    @abstractmethod
    def take(self, indices: Any) -> Self: ...
    @abstractmethod
    def to_numpy(self) -> Self: ...
    @abstractmethod
    def arrays(self) -> dict[str, Array]:
        """The record's arrays by name, those that it has, [P, ...] each."""

    @abstractmethod
    def _probabilities(self, T: float) -> np.ndarray:
        """Returns the probabilities [P, K] of the kept classes at T; 0 in unused slots. The record is of NumPy."""

    def __getitem__(self, index: Any) -> Self:
        """The record of the rows that an index chooses, as NumPy chooses them; an integer gives a record of one row.

        Args:
            index: an integer (negative ones count from the end), a slice, or integers or booleans.

        Raises:
            IndexError: a row out of range, a mask of another length, or anything that is not an index.
        """
        if isinstance(index, slice) and (index.step is None or index.step > 0):
            return self.take(index)
        return self.take(row_numbers(index, len(self), type(self).__name__))

    def class_name(self, number: int) -> str:
        """The name of a class, or its number where classes have no names."""
        return str(self.class_names[number]) if number < len(self.class_names) else str(number)

    def with_class_names(self, names: Sequence[str]) -> Self:
        """The same record with names for its classes."""
        named = copy(self)
        object.__setattr__(named, "class_names", names)
        return named

    def top(self, n: int = 5, *, T: float = 1.0) -> TopClasses:
        """The likeliest kept classes of every row by name, with their probabilities.

        Args:
            n: how many; fewer where fewer are kept. Of drawn labels these are the likeliest that were drawn.
            T: the temperature.

        Returns:
            Of each row a list of (name, probability), likeliest first.

        Raises:
            TemperatureError: as `at_temperature`.
            LabelError: n is below 1.

        Example:
            >>> import torch
            >>> from softcache.labels.sparsify import top_k
            >>> labels = top_k(torch.tensor([[0.0, 2.0, 1.0]]), k=2)
            >>> [(name, round(p, 2)) for name, p in labels.top(1)[0]]
            [('1', 0.67)]
        """
        if n < 1:
            raise LabelError(f"top: n is {n}; expected 1 or more classes of each row")
        record = self.to_numpy()
        probs_PK = record._probabilities(T)
        order_PN = np.argsort(-probs_PK, axis=1, kind="stable")[:, :n]
        ids_PN = np.take_along_axis(record.ids, order_PN, axis=1).tolist()
        probs_PN = np.take_along_axis(probs_PK, order_PN, axis=1).tolist()
        return [
            [
                (self.class_name(number), p)
                for number, p in zip(*row, strict=True)
                if number < self.num_classes
            ]
            for row in zip(ids_PN, probs_PN, strict=True)
        ]

    def _facts(self) -> list[tuple[str, str]]:
        """Returns what a record has besides its rows."""
        return []

    def summarize(self) -> Summary:
        facts = self._facts()
        if self.class_names:
            facts.append(("classes", shorten_list(self.class_names)))
        for row, classes in enumerate(self.take(slice(0, SHOWN_ROWS)).top(SHOWN_CLASSES)):
            facts.append((f"row {row}", ", ".join(f"{name}: {p:.2%}" for name, p in classes)))
        if len(self) > SHOWN_ROWS:
            facts.append(("…", f"{len(self) - SHOWN_ROWS:,} more rows"))
        kept = int(self.ids.shape[1])
        return Summary(
            f"{type(self).__name__}: {len(self):,} rows, K = {kept:,} of {self.num_classes:,} classes", facts
        )


def dense_log_probs(labels: SoftLabels, T: float = 1.0) -> np.ndarray:
    """Returns the log-probabilities [P, V] float32 of all classes at T, nats.

    What was kept is as it was; the tail's mass is spread evenly over the classes that were not, which is all that is
    known of them. Of drawn labels a drawn class has what it stands for (`Sampling`), and the others -inf: a row sums to
    1 on average.

    Raises:
        TemperatureError: as `SoftLabels.at_temperature`.
    """
    softened = labels.to_numpy().at_temperature(T)
    num_rows, num_classes = len(labels), labels.num_classes
    ids_PK = softened.ids.astype(np.int64)  # an unused slot is the column behind the last
    log_probs_PK = softened.log_probs
    rest_P = np.full(num_rows, -np.inf)
    if softened.log_weights is None:
        num_left_P = num_classes - (ids_PK < num_classes).sum(1)
        rest_P = softened.log_tail - np.log(np.maximum(num_left_P, 1))
    else:
        log_probs_PK = log_probs_PK + softened.log_weights
    out_PV = np.repeat(rest_P[:, None].astype(np.float32), num_classes + 1, axis=1)
    np.put_along_axis(out_PV, ids_PK, log_probs_PK.astype(np.float32), axis=1)
    return out_PV[:, :num_classes]
