"""The record of a dense predictor (a detector): distributions at some cells of its grid, and its other outputs there.

Two facts are separate. The head's output for the classes is a record of its own: `SoftLabels` of a softmax with
background (SSD), `BernoulliLabels` of sigmoids (FCOS, RetinaNet). Where a position is, and the head's other outputs there,
are columns next to it. Boxes are the head's raw outputs: only the grid, whose digest names it, can decode them.

Shape suffixes: `P` positions, `A` cells of the teacher's grid (anchors or locations).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Self

import numpy as np

from softcache.errors import LabelError
from softcache.labels.arrays import Array, as_numpy, as_pinned, as_torch, row_index, rows
from softcache.labels.base import LabelsBase
from softcache.labels.bernoulli import BernoulliLabels, SoftenedBernoulli
from softcache.labels.join import concat
from softcache.labels.soft_labels import SoftLabels
from softcache.labels.temperature import SoftenedLabels
from softcache.labels.validate import check_array, check_compatible, join_columns
from softcache.labels.vectors import VectorLabels

__all__ = ["COLUMNS", "DetectionLabels", "concat_labels"]

COLUMNS = ("boxes", "bins", "centerness")
"""What `DetectionLabels.columns` may hold."""


@dataclass(frozen=True, eq=False, repr=False)
class DetectionLabels(LabelsBase):
    """The outputs of a dense teacher at P cells.

    Attributes:
        labels: of the P cells, categorical or one coin per class.
        cells: [P] integer, each cell's index in the teacher's grid, 0 to A - 1; the cache's identity names the grid.
        columns: the head's other outputs at these cells, by name; all float:
            "boxes" [P, 4], raw box regression, or "bins" [P, 4, n + 1], logits of the distribution of each side
            (a DFL head), not both; "centerness" [P], a logit.

    Raises:
        LabelError: a shape, dtype, kind of array or name of a column breaks the contract.
    """

    labels: SoftLabels | BernoulliLabels
    cells: Array
    columns: Mapping[str, Array]

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", MappingProxyType(dict(self.columns)))
        like, num_positions = self.labels.ids, len(self.labels)
        check_array("DetectionLabels.cells", self.cells, (num_positions,), like=like, integer=True)
        unknown = sorted(set(self.columns) - set(COLUMNS))
        if unknown or {"boxes", "bins"} <= set(self.columns):
            raise LabelError(
                f"DetectionLabels.columns: expected some of {', '.join(COLUMNS)}, and boxes or bins, not both; found "
                f"{', '.join(sorted(self.columns))}; leave out what is not the head's"
            )
        for name, array in self.columns.items():
            wanted = {"boxes": (num_positions, 4), "centerness": (num_positions,)}.get(name)
            if wanted is None:
                shape = tuple(array.shape)
                wanted = (num_positions, 4, max(shape[2], 2) if len(shape) == 3 else 2)
            check_array(f"DetectionLabels.{name}", array, wanted, like=like, integer=False)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """V of the distribution; of a softmax the background is one of them."""
        return self.labels.num_classes

    @property
    def ids(self) -> Array:  # type: ignore[override]
        """[P, K] integer, the kept classes of the P cells."""
        return self.labels.ids

    @property
    def class_names(self) -> Sequence[str]:  # type: ignore[override]
        """[V] names of the classes, for people; () where they have none."""
        return self.labels.class_names

    @property
    def k(self) -> int:
        """Number of kept classes per cell, K."""
        return self.labels.k

    @property
    def is_torch(self) -> bool:
        """True when the arrays are torch tensors, False when they are NumPy arrays."""
        return self.labels.is_torch

    def at_temperature(self, T: Any) -> SoftenedLabels | SoftenedBernoulli:
        """The distributions at temperature T; see `at_temperature` of `SoftLabels` and `BernoulliLabels`."""
        return self.labels.at_temperature(T)

    def _probabilities(self, T: float) -> np.ndarray:
        return self.labels._probabilities(T)

    def arrays(self) -> dict[str, Array]:
        return {**self.labels.arrays(), "cells": self.cells, **self.columns}

    def with_class_names(self, names: Sequence[str]) -> Self:
        named = copy(self)
        object.__setattr__(named, "labels", self.labels.with_class_names(names))
        return named

    def _facts(self) -> list[tuple[str, str]]:
        return [("columns", ", ".join(["cells", *self.columns]))]

    def take(self, indices: Any) -> Self:
        """The record of some positions, in the order given; a slice shares memory. See `SoftLabels.take`."""
        index = row_index(indices, self.cells)
        return self._with(self.labels.take(indices), lambda x: rows(x, index))

    def to_torch(self, device: Any = None, *, non_blocking: bool = False) -> Self:
        """The record as torch tensors; see `SoftLabels.to_torch`."""
        labels = self.labels.to_torch(device, non_blocking=non_blocking)
        return self._with(labels, lambda x: as_torch(x, device, non_blocking=non_blocking))

    def to_numpy(self) -> Self:
        """The record as NumPy arrays; see `SoftLabels.to_numpy`."""
        return self._with(self.labels.to_numpy(), as_numpy)

    def pin_memory(self) -> Self:
        """The record in page-locked memory."""
        return self._with(self.labels.pin_memory(), as_pinned)

    def with_arrays(self, arrays: Mapping[str, Array]) -> Self:
        """The same record of other positions, unchecked; see `SoftLabels.with_arrays`."""
        derived = object.__new__(type(self))
        columns = MappingProxyType({name: arrays[name] for name in self.columns})
        labels = self.labels.with_arrays(arrays)
        derived.__dict__.update(labels=labels, cells=arrays["cells"], columns=columns)
        return derived

    def _with(self, labels: SoftLabels | BernoulliLabels, function: Callable[[Array], Array]) -> Self:
        columns = {name: function(x) for name, x in self.columns.items()}
        return replace(self, labels=labels, cells=function(self.cells), columns=columns)

    @classmethod
    def concat(cls, records: Sequence[DetectionLabels]) -> DetectionLabels:
        """One record of all positions, in order; the arrays are new.

        Raises:
            LabelError: no records, or records that differ in more than their positions.
        """
        check_compatible("DetectionLabels", records, ("num_classes", "k", "is_torch"))
        joined = join_columns(
            "DetectionLabels", [{**record.columns, "cells": record.cells} for record in records]
        )
        cells = joined.pop("cells")
        return cls(_joined_labels([record.labels for record in records]), cells, joined)


def concat_labels(records: Sequence[Any]) -> Any:
    """Returns one record of all positions, in order, of records of one kind; raises as `concat` of that kind."""
    if isinstance(records[0], DetectionLabels | BernoulliLabels | VectorLabels):
        return type(records[0]).concat(records)
    return concat(records)


def _joined_labels(parts: Sequence[SoftLabels | BernoulliLabels]) -> SoftLabels | BernoulliLabels:
    soft = [part for part in parts if isinstance(part, SoftLabels)]
    coins = [part for part in parts if isinstance(part, BernoulliLabels)]
    if soft and coins:
        raise LabelError(
            f"DetectionLabels.concat: expected one kind of distribution; found {len(soft)} records of SoftLabels and "
            f"{len(coins)} of BernoulliLabels; join only records of one teacher"
        )
    return concat(soft) if soft else BernoulliLabels.concat(coins)
