"""The record of a sigmoid head (FCOS, RetinaNet): a logit for each kept class, and a bound on the dropped ones.

Each class of such a head is a coin of its own, p_j = sigmoid(logit_j): there is no normaliser, so no log-probabilities
over all classes and no tail that could be softened. What is known of the dropped classes is that none of their logits
is above `dropped_bound`.

Shape suffixes: `P` positions (cells), `V` classes, `K` kept classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from array_api_compat import array_namespace, is_numpy_array, is_torch_array

from softcache.errors import LabelError, TemperatureError
from softcache.labels.arrays import Array, as_numpy, as_pinned, as_torch, row_index, rows
from softcache.labels.base import LabelsBase
from softcache.labels.validate import check_array, check_compatible, join_columns

__all__ = ["BernoulliLabels", "SoftenedBernoulli"]


@dataclass(frozen=True, eq=False)
class SoftenedBernoulli:
    """A `BernoulliLabels` at one temperature.

    Attributes:
        logits: [P, K] float32 (float64 if the record's are), logit / T: the kept class has probability
            sigmoid(logit / T), exactly.
        dropped_bound: [P], bound / T: a dropped class has at most probability sigmoid(bound / T).
    """

    logits: Array
    dropped_bound: Array


@dataclass(frozen=True, eq=False, repr=False)
class BernoulliLabels(LabelsBase):
    """The V independent probabilities of a teacher with a sigmoid head, at P positions.

    Attributes:
        ids: [P, K] integer, most likely first. Every slot is used: K is at most V.
        logits: [P, K] float, of the kept classes at T=1.
        dropped_bound: [P] float, the largest logit of a dropped class; -inf where none was dropped (K = V).
        num_classes: V; a sigmoid head has no class for the background.
        dropped_mass: [P] float, sum of sigmoid(logit) over the dropped classes at T=1, or None.
        class_names: [V] names of the classes, for people; () where they have none.

    Raises:
        LabelError: a shape, dtype or kind of array breaks the contract.

    Example:
        >>> import numpy as np
        >>> labels = BernoulliLabels(
        ...     ids=np.array([[2]]),
        ...     logits=np.array([[3.0]]),
        ...     dropped_bound=np.array([-1.0]),
        ...     num_classes=4,
        ... )
        >>> labels.at_temperature(2.0).logits.tolist()
        [[1.5]]
    """

    ids: Array
    logits: Array
    dropped_bound: Array
    num_classes: int
    dropped_mass: Array | None = None
    class_names: Sequence[str] = ()

    def __post_init__(self) -> None:
        shape = tuple(self.ids.shape)
        if len(shape) != 2 or not 1 <= shape[1] <= self.num_classes:
            raise LabelError(
                f"BernoulliLabels.ids: expected shape [P, K] with K from 1 to num_classes ({self.num_classes}); "
                f"found {list(shape)}; keep fewer classes, or all"
            )
        wanted = {"ids": shape, "logits": shape, "dropped_bound": shape[:1], "dropped_mass": shape[:1]}
        for name, array in self.arrays().items():
            check_array(f"BernoulliLabels.{name}", array, wanted[name], like=self.ids, integer=name == "ids")

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    @property
    def k(self) -> int:
        """Number of kept classes per position, K."""
        return int(self.ids.shape[1])

    @property
    def is_torch(self) -> bool:
        """True when the arrays are torch tensors, False when they are NumPy arrays."""
        return bool(is_torch_array(self.ids))

    def at_temperature(self, T: Any) -> SoftenedBernoulli:
        """The logits divided by T, and the bound on the dropped ones.

        Both hold at every T above 0, below 1 as well. `dropped_mass` does not follow: it is known at T=1 only, and at
        another T the dropped classes have together at most (V - K) sigmoid(bound / T).

        Args:
            T: a number, or an array [P] or [] of the record's kind, in which the result is differentiable. An array
                costs one synchronisation on a GPU.

        Raises:
            TemperatureError: T is not above 0 and finite, or of another shape.
        """
        xp = array_namespace(self.logits)
        is_array = is_numpy_array(T) or is_torch_array(T)
        if is_array and (tuple(T.shape) not in ((), (len(self),)) or is_torch_array(T) != self.is_torch):
            raise TemperatureError(
                f"temperature: expected a number or an array [{len(self)}] of the kind of the record; found "
                f"{type(T).__name__} {list(T.shape)}; give one temperature, or one per position"
            )
        valid = bool(xp.all((T > 0) & xp.isfinite(T))) if is_array else math.isfinite(T) and T > 0
        if not valid:
            raise TemperatureError(
                f"temperature: expected above 0 and finite; found {T}; use 1 for the plain logits"
            )
        per_row = T[:, None] if is_array and len(T.shape) else T
        return SoftenedBernoulli(_exact(self.logits) / per_row, _exact(self.dropped_bound) / T)

    def take(self, indices: Any) -> Self:
        """The record of some positions, in the order given; a slice shares memory. See `SoftLabels.take`."""
        index = row_index(indices, self.ids)
        return self.map_arrays(lambda x: rows(x, index))

    def to_torch(self, device: Any = None, *, non_blocking: bool = False) -> Self:
        """The record as torch tensors; see `SoftLabels.to_torch`."""
        return self.map_arrays(lambda x: as_torch(x, device, non_blocking=non_blocking))

    def to_numpy(self) -> Self:
        """The record as NumPy arrays; see `SoftLabels.to_numpy`."""
        return self.map_arrays(as_numpy)

    def pin_memory(self) -> Self:
        """The record in page-locked memory."""
        return self.map_arrays(as_pinned)

    def map_arrays(self, function: Callable[[Array], Array]) -> Self:
        """The record with a function applied to each of its arrays."""
        mapped: dict[str, Any] = {name: function(x) for name, x in self.arrays().items()}
        return replace(self, **mapped)

    def with_arrays(self, arrays: Mapping[str, Array]) -> Self:
        """The same record of other positions, unchecked; see `SoftLabels.with_arrays`."""
        derived = object.__new__(type(self))
        derived.__dict__.update(self.__dict__)
        derived.__dict__.update({name: arrays[name] for name in self.arrays()})
        return derived

    def arrays(self) -> dict[str, Array]:
        values = {name: getattr(self, name) for name in ("ids", "logits", "dropped_bound", "dropped_mass")}
        return {name: x for name, x in values.items() if x is not None}

    def _probabilities(self, T: float) -> np.ndarray:
        return np.exp(-np.logaddexp(0.0, -np.asarray(self.at_temperature(T).logits, np.float64)))

    @classmethod
    def concat(cls, records: Sequence[BernoulliLabels]) -> BernoulliLabels:
        """One record of all positions, in order; the arrays are new.

        Raises:
            LabelError: no records, or records that differ in more than their positions.
        """
        check_compatible("BernoulliLabels", records, ("num_classes", "k", "is_torch"))
        parts = [record.arrays() for record in records]
        joined = join_columns("BernoulliLabels", parts)
        return replace(records[0], **joined)


def _exact(x: Array) -> Array:
    """float32 of half-precision values; others as they are."""
    xp = array_namespace(x)
    return xp.astype(x, xp.float32) if x.dtype.itemsize < 4 else x
