"""The label record: a teacher's distribution over V classes, kept in a few numbers, good at every
temperature from 1 up; how good, each row bounds (`SoftLabels.tail_error`).

Shape suffixes: `P` positions (an image view, a token, a cell), `V` classes, `K` kept classes, `G` grid of
    temperatures.

With beta = 1/T, softening p gives p_j^beta / Z(beta). The kept part of Z is known exactly from `log_probs`;
the dropped part, `log_tail`, is stored at a grid of temperatures, known for free at beta = 0 (the number of
dropped classes) and interpolated in between (`softcache.labels.tail`). So one record serves every temperature and
every loss.

The arrays of a record are all NumPy or all torch, and the maths is written once for both; this module imports
torch only when it is asked for torch. Half-precision `log_probs` (float16, bfloat16) are promoted to float32
before any maths; float64 stays float64.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from array_api_compat import array_namespace, is_torch_array

from softcache.errors import TemperatureError
from softcache.labels.arrays import Array, as_numpy, as_pinned, as_torch, row_index, rows
from softcache.labels.base import LabelsBase, dense_log_probs
from softcache.labels.sampling import Sampling
from softcache.labels.tail import log_sum_exp
from softcache.labels.temperature import (
    SoftenedLabels,
    check_tail_error,
    num_dropped,
    soften,
    soften_buckets,
    soften_masses,
    tail_error,
)
from softcache.labels.validate import ARRAYS, STATS, check_array_types, check_grid, check_shapes

__all__ = ["ARRAYS", "STATS", "Array", "SoftLabels"]


@dataclass(frozen=True, eq=False, repr=False)
class SoftLabels(LabelsBase):
    """The teacher's distribution at P positions.

    Attributes:
        ids: [P, K] integer, most likely first. An unused slot has id `num_classes` and log_prob -inf.
        log_probs: [P, K] float, log p over *all* classes at T=1, nats.
        log_tail: [P, G] float32, log of the sum over the dropped classes of p_j^(1/T_g). Not normalised by
            Z(T_g).
        num_classes: V.
        temperatures: the G grid temperatures; the first is 1, strictly increasing, finite.
        target_log_prob: [P] float32, log p of the ground-truth class at T=1, or None.
        stats: [P, 4] float32, columns `STATS`, or None.
        tail_rounding: how far `log_tail` may be from the truth at T=1 and above, nats, besides float32.
        max_temperature: the highest temperature at which the record is known; None for no limit. Labels that were
            imported from a server's log-probabilities are known at T=1 only: it is unknown how the mass outside of the
            kept classes is spread.
        sampling: how the classes behind the first `sampling.exact` were drawn; None where none were. The tail then
            holds all classes but the exact ones, drawn or not.
        counts: [P, K] integer, how often each class was drawn, 0 in exact and unused slots; with
            `sampling.replacement` only.
        log_threshold: [P] float, log of the priority above which a class was taken, -inf where all were; with
            `sampling` without replacement only.
        class_names: [V] names of the classes, for people; () where they have none.

    Raises:
        LabelError: a shape, dtype or kind of array breaks the contract.
        TemperatureError: the grid of temperatures does.

    Example:
        >>> import numpy as np
        >>> labels = SoftLabels(
        ...     ids=np.array([[2, 0]]),
        ...     log_probs=np.log(np.array([[0.5, 0.25]])),
        ...     log_tail=np.log(np.array([[0.25]])),  # two dropped classes of 1/8 each
        ...     num_classes=4,
        ...     temperatures=(1.0,),
        ... )
        >>> np.exp(labels.at_temperature(1.0).log_probs).round(3).tolist()
        [[0.5, 0.25]]
    """

    ids: Array
    log_probs: Array
    log_tail: Array
    num_classes: int
    temperatures: tuple[float, ...]
    target_log_prob: Array | None = None
    stats: Array | None = None
    max_temperature: float | None = None
    sampling: Sampling | None = None
    counts: Array | None = None
    log_threshold: Array | None = None
    tail_rounding: tuple[float, float] = (0.0, 0.0)
    class_names: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperatures", tuple(float(t) for t in self.temperatures))
        check_grid(self.temperatures)
        if self.max_temperature is not None and not self.max_temperature >= self.temperatures[-1]:
            raise TemperatureError(
                f"SoftLabels.max_temperature: expected at least {self.temperatures[-1]}, the last of the grid; "
                f"found {self.max_temperature}; raise it, or shorten the grid"
            )
        check_array_types(self)
        check_shapes(self)

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    @property
    def k(self) -> int:
        """Number of slots per position, K."""
        return int(self.ids.shape[1])

    @property
    def is_torch(self) -> bool:
        """True when the arrays are torch tensors, False when they are NumPy arrays."""
        return bool(is_torch_array(self.ids))

    def take(self, indices: Any) -> Self:
        """The record of some positions, in the order given.

        Args:
            indices: a slice, a list, or an integer or boolean array over the P positions.

        Returns:
            A record with one position per index; a slice shares memory.
        """
        index = row_index(indices, self.ids)
        if isinstance(index, slice):
            return self._derived(lambda x: rows(x, index))
        return self.map_arrays(lambda x: rows(x, index))

    def to_torch(self, device: Any = None, *, non_blocking: bool = False) -> Self:
        """The record as torch tensors.

        Args:
            device: where to put them; None leaves NumPy arrays on the CPU and tensors where they are.
            non_blocking: passed to `Tensor.to`; use with `pin_memory`.

        Returns:
            A record on the device. On the CPU it shares memory with this one; read-only NumPy arrays (a
            memory map) are copied, because writing to a tensor over them would crash the process.
        """
        return self._derived(lambda x: as_torch(x, device, non_blocking=non_blocking))

    def to_numpy(self) -> Self:
        """The record as NumPy arrays, detached; on the CPU it shares memory. bfloat16 becomes float32."""
        return self._derived(as_numpy)

    def pin_memory(self) -> Self:
        """The record in page-locked memory (what a torch `DataLoader(pin_memory=True)` calls)."""
        return self._derived(as_pinned)

    def at_temperature(self, T: Any, *, max_tail_error: float | None = None) -> SoftenedLabels:
        """The distribution softened to temperature T: log p_j^(1/T) - log Z(T), kept classes and tail.

        The kept classes and the tail are normalised together, so their masses add up to 1 whatever the
        precision of the stored values.

        Args:
            T: a number, or an array [P] (or a scalar array) of the record's kind; above 0 and finite. Below 1 it is
                served where the record pins the tail's mass down to `MASS_TOLERANCE`: where nothing was dropped at
                any T, else close to 1 (how close: `softcache.labels.tail`). An array, or a T below 1, costs one
                synchronisation on a GPU; another number costs none.
            max_tail_error: refuse a row whose `tail_error` at T is above this; None refuses none. T from 1 up; costs
                more than the rest of this method.

        Returns:
            log_probs [P, K] and log_tail [P], float32 (float64 if any input is). Differentiable in T,
            `log_probs` and `log_tail` when they are torch; gradients are never NaN, -inf entries get a
            gradient of 0.

        Raises:
            TemperatureError: T is lower than the record can serve or above `max_temperature`, not finite, of a
                shape other than [] or [P], or of a row whose tail is not known to `max_tail_error`; that row is named.

        References:
            Hinton, Vinyals, Dean 2015, arXiv 1503.02531, eq. (1).
        """
        if max_tail_error is not None:
            check_tail_error(self, T, max_tail_error)
        return soften(self, T)

    def tail_error(self, T: Any) -> np.ndarray:
        """How far, at most, the mass of the dropped classes is from the teacher's at temperature T, given the kept ones.

        A bound for each row, true whatever the teacher's logits: from the stored values next to T, convexity, and what
        moments leave open of a distribution between 0 and the largest dropped class (`softcache.labels.mass_bounds`). On
        the grid it is the rounding of the stored values. Between, it is hardly wider than the error (docs/fidelity.md has
        both, by family of logits), and wide above the grid where log-probabilities are spread over tens of nats.

        Args:
            T: a number of at least 1, or an array [] or [P] of such.

        Returns:
            [P] float64 NumPy, in [0, 1]; 0 where nothing was dropped.

        Raises:
            TemperatureError: as `at_temperature`, and below 1 (served there only where it is known to 2e-3).

        Example:
            >>> import torch
            >>> from softcache.labels.sparsify import top_k
            >>> labels = top_k(torch.randn(4, 1000), k=10)
            >>> bool((labels.tail_error(3.0) < 1e-3).all())
            True
        """
        return tail_error(self, T)

    def buckets_at(self, T: float) -> Array:
        """The distribution softened to temperature T as one array: kept classes, and the tail as the last column.

        `at_temperature` for losses that take all buckets alike; the same values, in a fifth of the operations where T
        is on the grid. Not for records whose classes were drawn.

        Args:
            T: a number.

        Returns:
            log-probabilities [P, K + 1], float32 (float64 if any input is), nats; constants.

        Raises:
            TemperatureError: as `at_temperature`.
        """
        return soften_buckets(self, T)

    def masses_at(self, T: float) -> tuple[Array, Array]:
        """`buckets_at` before it is normalised: log p^(1/T) of kept classes [P, K] and the tail [P], up to a number per
        row; of a torch record, as constants."""
        return soften_masses(self, T)

    def kept_mass(self, T: Any) -> Array:
        """Mass of the kept classes at temperature T, [P] in [0, 1]; see `at_temperature`. Drawn classes do not count."""
        log_probs = self.at_temperature(T).log_probs
        xp = array_namespace(log_probs)
        if self.exact(log_probs).shape[1] == 0:
            return xp.zeros_like(log_probs[:, 0])
        log_mass = log_sum_exp(self.exact(log_probs))
        return xp.exp(
            xp.where(log_mass > 0, 0.0, log_mass)
        )  # the sum of a normalised row may round to above 1

    def probabilities(self, T: float = 1.0) -> np.ndarray:
        """The whole distribution at temperature T, [P, V] float32 NumPy in [0, 1]: 4 V bytes a row.

        The kept classes are as they were; the mass of the dropped ones is spread evenly over them. Of drawn labels a drawn
        class has the probability that it stands for, and a row sums to 1 on average.

        Raises:
            TemperatureError: as `at_temperature`.
        """
        return np.exp(dense_log_probs(self, T))

    def _probabilities(self, T: float) -> np.ndarray:
        probs_PK: np.ndarray = np.exp(self.at_temperature(T).log_probs)
        return probs_PK

    def _facts(self) -> list[tuple[str, str]]:
        highest = "up" if self.max_temperature is None else f"to {self.max_temperature:g}"
        facts = [
            ("T", f"from 1 {highest}"),
            ("arrays", f"{'torch' if self.is_torch else 'NumPy'}, {self.log_probs.dtype}"),
        ]
        if self.sampling is not None:
            facts.append(
                ("drawn", f"{self.sampling.draws} classes a row, behind {self.sampling.exact} exact ones")
            )
        return facts

    def num_dropped(self) -> Array:
        """How many classes with p > 0 have no exact slot, [P] float; without `stats` masked classes count as well."""
        return num_dropped(self, self.exact(self.log_probs))

    def exact(self, x: Array) -> Array:
        """The slots of an array [P, K] that were not drawn."""
        return x if self.sampling is None else x[:, : self.sampling.exact]

    def map_arrays(self, function: Callable[[Array], Array]) -> Self:
        """The record with a function applied to each of its arrays."""
        mapped: dict[str, Any] = {name: function(x) for name, x in self.arrays().items()}
        return replace(self, **mapped)

    def arrays(self) -> dict[str, Array]:
        arrays = {name: getattr(self, name) for name in ARRAYS}
        return {name: x for name, x in arrays.items() if x is not None}

    def _derived(self, function: Callable[[Array], Array]) -> Self:
        """`map_arrays` without the checks, which take longer than the rest of a small batch; for functions that keep
        shapes (but for the number of rows, alike for all) and kinds of dtype."""
        return self.with_arrays({name: function(x) for name, x in self.arrays().items()})

    def with_arrays(self, arrays: Mapping[str, Array]) -> Self:
        """The same record of other positions, unchecked: for arrays of the kinds and inner shapes that it has.

        Args:
            arrays: by name, all that the record has; other names are ignored.
        """
        derived = object.__new__(type(self))
        derived.__dict__.update(self.__dict__)
        derived.__dict__.update({name: arrays[name] for name in ARRAYS if name in arrays})
        return derived
