"""The label record: a teacher's distribution over V classes, kept in a few numbers, good at every
temperature.

Shape suffixes: `P` positions (an image view, a token, a cell), `V` classes, `K` kept classes, `G` grid of
    temperatures.

With beta = 1/T, softening p gives p_j^beta / Z(beta). The kept part of Z is known exactly from `log_probs`;
the dropped part, `log_tail`, is stored at a grid of temperatures, known for free at beta = 0 (the number of
dropped classes) and interpolated in between (`pipeline.tail`). So one record serves every temperature and
every loss.

The arrays of a record are all NumPy or all torch, and the maths is written once for both; this module imports
torch only when it is asked for torch. Half-precision `log_probs` (float16, bfloat16) are promoted to float32
before any maths; float64 stays float64.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from array_api_compat import array_namespace, is_numpy_array, is_torch_array

from pipeline.errors import LabelError, TemperatureError
from pipeline.tail import (
    check_temperatures,
    interpolate_log_tail,
    inverse_temperature,
    log_sum_exp,
    working_dtype,
)

__all__ = ["DEFAULT_TEMPERATURES", "STATS", "SoftLabels", "SoftenedLabels", "collect", "concat"]

STATS = ("entropy", "logit_mean", "logit_std", "support")
"""Columns of `SoftLabels.stats`: entropy of p at T=1 (nats); mean and population standard deviation, over the
classes with p > 0, of the logits shifted so that their logsumexp is 0; support, the number of classes with p
> 0."""

DEFAULT_TEMPERATURES = (1.0, 1.1, 1.25, 1.5, 1.8, 2.5, 4.0, 8.0)

Array = Any  # a NumPy array or a torch tensor
_ARRAYS = ("ids", "log_probs", "log_tail", "target_log_prob", "stats")


@dataclass(frozen=True, eq=False)
class SoftenedLabels:
    """A record at one temperature: kept classes and the rest, normalised together.

    Attributes:
        ids: [P, K] integer, the kept classes; an unused slot holds the number of classes.
        log_probs: [P, K] float32 or float64, log of the softened probability, nats; -inf stays -inf.
        log_tail: [P] float, log of the softened mass of all classes that were not kept, nats; -inf where none
            was dropped.
    """

    ids: Array
    log_probs: Array
    log_tail: Array


@dataclass(frozen=True, eq=False)
class SoftLabels:
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
        max_temperature: the highest temperature at which the record is known; None for no limit. Labels that were
            imported from a server's log-probabilities are known at T=1 only: nothing says how the mass outside of the
            kept classes is spread.

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

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperatures", tuple(float(t) for t in self.temperatures))
        check_temperatures(self.temperatures)
        if self.max_temperature is not None and not self.max_temperature >= self.temperatures[-1]:
            raise TemperatureError(
                f"SoftLabels.max_temperature: expected at least {self.temperatures[-1]}, the last of the grid; "
                f"found {self.max_temperature}; raise it, or shorten the grid"
            )
        _check_kinds(self)
        _check_shapes(self)

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
        if not self.is_torch:
            return self._map(lambda x: x[indices])
        import torch

        if isinstance(indices, slice):
            return self._map(lambda x: x[indices])
        index = torch.as_tensor(indices, device=self.ids.device)
        index = index if index.dtype == torch.bool else index.to(torch.int64)
        return self._map(lambda x: _torch_rows(x, index))

    def to_torch(self, device: Any = None, *, non_blocking: bool = False) -> Self:
        """The record as torch tensors.

        Args:
            device: where to put them; None leaves NumPy arrays on the CPU and tensors where they are.
            non_blocking: passed to `Tensor.to`; use with `pin_memory`.

        Returns:
            A record on the device. On the CPU it shares memory with this one; read-only NumPy arrays (a
            memory map) are copied, because writing to a tensor over them would crash the process.
        """
        import torch

        def convert(x: Array) -> Array:
            if is_numpy_array(x):
                x = torch.from_numpy(x if x.flags.writeable else x.copy())
            return x if device is None else x.to(device, non_blocking=non_blocking)

        return self._map(convert)

    def to_numpy(self) -> Self:
        """The record as NumPy arrays, detached; on the CPU it shares memory. bfloat16 becomes float32."""

        def convert(x: Array) -> Array:
            if is_numpy_array(x):
                return x
            x = x.detach().cpu()
            return (x.float() if str(x.dtype) == "torch.bfloat16" else x).numpy()

        return self._map(convert)

    def pin_memory(self) -> Self:
        """The record in page-locked memory (what a torch `DataLoader(pin_memory=True)` calls)."""
        return self._map(lambda x: x.pin_memory()) if self.is_torch else self.to_torch().pin_memory()

    def at_temperature(self, T: Any) -> SoftenedLabels:
        """The distribution softened to temperature T: log p_j^(1/T) - log Z(T), kept classes and tail.

        The kept classes and the tail are normalised together, so their masses add up to 1 whatever the
        precision of the stored values.

        Args:
            T: a number, or an array [P] (or a scalar array) of the record's kind; at least `temperatures[0]`,
                finite. An array on a GPU costs one synchronisation, to check its range; a number costs none.

        Returns:
            log_probs [P, K] and log_tail [P], float32 (float64 if any input is). Differentiable in T,
            `log_probs` and `log_tail` when they are torch; gradients are never NaN, -inf entries get a
            gradient of 0.

        Raises:
            TemperatureError: T below the grid or above `max_temperature`, not finite, or of a shape other than []
                or [P].

        References:
            Hinton, Vinyals, Dean 2015, arXiv 1503.02531, eq. (1).
        """
        xp = array_namespace(self.ids)
        beta = inverse_temperature(T, self.temperatures, like=self.log_probs)
        _check_known(T, self.max_temperature)
        dtype = working_dtype(self.log_probs, self.log_tail, beta)
        log_probs = xp.astype(self.log_probs, dtype)
        log_support, end_slopes = self._tail_ends(log_probs)
        tail = interpolate_log_tail(
            self.log_tail, self.temperatures, T, log_support_P=log_support, end_slopes_P=end_slopes
        )
        beta_PK = beta if isinstance(beta, float) else xp.reshape(xp.astype(beta, dtype), (-1, 1))
        alive = log_probs > -xp.inf  # -inf * beta has a NaN gradient, so scale a stand-in
        scaled = xp.where(alive, xp.where(alive, log_probs, 0.0) * beta_PK, -xp.inf)
        log_z = log_sum_exp(xp.concat((scaled, tail[:, None]), axis=1))
        dropped = tail > -xp.inf
        return SoftenedLabels(
            ids=self.ids,
            log_probs=xp.where(alive, scaled - log_z[:, None], -xp.inf),
            log_tail=xp.where(dropped, tail - log_z, -xp.inf),
        )

    def kept_mass(self, T: Any) -> Array:
        """Mass of the kept classes at temperature T, [P] in [0, 1]; see `at_temperature`."""
        log_mass = log_sum_exp(self.at_temperature(T).log_probs)
        xp = array_namespace(log_mass)
        return xp.exp(
            xp.where(log_mass > 0, 0.0, log_mass)
        )  # the sum of a normalised row may round to above 1

    def _tail_ends(self, log_probs: Array) -> tuple[Array, tuple[Array, Array] | None]:
        """What `interpolate_log_tail` can know beside the grid: the count of dropped classes and two slopes,
        [P] each.

        Without `stats` every class without a slot counts and the slopes are not known, so with masked (-inf)
        classes the tail above the last grid temperature is overestimated. Not meaningful where nothing was
        dropped.
        """
        xp = array_namespace(self.ids)
        if self.stats is None:
            used = xp.astype(self.ids, xp.int64) < self.num_classes
            count = self.num_classes - xp.sum(xp.astype(used, log_probs.dtype), axis=1)
            return xp.log(xp.clip(count, min=1.0)), None
        stats = xp.astype(self.stats, log_probs.dtype)
        alive = log_probs > -xp.inf
        finite = xp.where(alive, log_probs, 0.0)
        count = xp.clip(stats[:, 3] - xp.sum(xp.astype(alive, log_probs.dtype), axis=1), min=1.0)
        slope_at_zero = (stats[:, 1] * stats[:, 3] - xp.sum(finite, axis=1)) / count
        log_mass = xp.astype(self.log_tail[:, 0], log_probs.dtype)
        mass = xp.exp(xp.where(log_mass > -xp.inf, log_mass, 0.0))
        slope_at_one = (-stats[:, 0] - xp.sum(xp.exp(log_probs) * finite, axis=1)) / xp.clip(mass, min=1e-30)
        return xp.log(count), (slope_at_zero, slope_at_one)

    def _map(self, function: Callable[[Array], Array]) -> Self:
        values: dict[str, Any] = {name: getattr(self, name) for name in _ARRAYS}
        mapped: dict[str, Any] = {name: None if x is None else function(x) for name, x in values.items()}
        return replace(self, **mapped)


def concat(records: Sequence[SoftLabels]) -> SoftLabels:
    """One record of all positions, in order.

    Args:
        records: at least one; all of one kind, K, number of classes, grid and `max_temperature`, with the same optional
            columns.

    Returns:
        A record of sum(P) positions; the arrays are new.

    Raises:
        LabelError: no records, or records that differ in more than their positions.
    """
    if not records:
        raise LabelError(
            "concat: expected at least one label record; found none; check that the source is not empty"
        )
    first = records[0]
    for index, record in enumerate(records):
        for name in ("num_classes", "temperatures", "max_temperature", "k", "is_torch"):
            expected, found = getattr(first, name), getattr(record, name)
            if expected != found:
                raise LabelError(
                    f"concat, record {index}: expected {name} {expected} as in record 0; found {found}; "
                    "join only records of one cache or one label policy"
                )
    columns: dict[str, Array] = {}
    xp = array_namespace(first.ids)
    for name in _ARRAYS:
        arrays = [getattr(record, name) for record in records]
        present = [x is not None for x in arrays]
        if any(present) and not all(present):
            raise LabelError(
                f"concat: expected {name} in every record or in none; record {present.index(False)} has none"
                f"; drop it with dataclasses.replace(record, {name}=None) or compute it for all"
            )
        columns[name] = xp.concat(arrays, axis=0) if all(present) else None
    return replace(first, **columns)


def _check_known(T: Any, highest: float | None) -> None:
    """Raises above the highest temperature at which a record is known; T has been checked otherwise."""
    is_array = is_numpy_array(T) or is_torch_array(T)
    if highest is None or (is_array and 0 in T.shape):
        return
    hottest = float(array_namespace(T).max(T) if is_array else T)
    if hottest <= highest:
        return
    raise TemperatureError(
        f"temperature: at most {highest:g} for these labels; found {hottest:g}. They were "
        f"imported from a server's log-probabilities, which fix T={highest:g} only: how the mass outside of the kept "
        f"classes is spread is not known. Set loss.temperature = {highest:g}, or capture with "
        "`softcache teacher-logits` for other temperatures"
    )


def collect(records: Iterable[SoftLabels], num_positions: int) -> SoftLabels:
    """One record of all positions, in order, each copied into its place as it comes.

    Like `concat`, but no part is kept: small parts that stay behind between large temporaries would keep the allocator
    from using their memory again (seen: 9 GB where 70 MB are needed).

    Args:
        records: torch records of one K, number of classes and grid, with the same optional columns.
        num_positions: of all together.

    Raises:
        LabelError: no records, or not so many positions.
    """
    whole: SoftLabels | None = None
    start = 0
    for record in records:
        if len(record) == num_positions:
            return record
        if whole is None:
            whole = record._map(lambda x: x.new_empty((num_positions, *x.shape[1:])))
        stop = start + len(record)
        for name in _ARRAYS:
            if (array := getattr(record, name)) is not None and stop <= num_positions:
                getattr(whole, name)[start:stop] = array
        start = stop
    if whole is None or start != num_positions:
        raise LabelError(
            f"collect: expected records of {num_positions} positions; found {start}; check the chunks"
        )
    return whole


def _check_kinds(labels: SoftLabels) -> None:
    is_kind = is_torch_array if is_torch_array(labels.ids) else is_numpy_array
    for name in _ARRAYS:
        array = getattr(labels, name)
        if array is None:
            continue
        if not is_kind(array):
            raise LabelError(
                f"SoftLabels.{name}: expected arrays of one kind, all NumPy or all torch; "
                f"found {type(array).__name__} beside ids of {type(labels.ids).__name__}; "
                "convert with torch.from_numpy or Tensor.numpy"
            )
        is_integer = array_namespace(array).isdtype(array.dtype, "integral")
        if is_integer != (name == "ids"):
            wanted = "an integer" if name == "ids" else "a floating-point"
            raise LabelError(
                f"SoftLabels.{name}: expected {wanted} dtype; found {array.dtype}; cast it first"
            )


def _check_shapes(labels: SoftLabels) -> None:
    shape = tuple(labels.ids.shape)
    if len(shape) != 2 or shape[1] < 1:
        raise LabelError(
            f"SoftLabels.ids: expected shape [P, K] with K >= 1; found {list(shape)}; reshape it"
        )
    num_positions, num_kept = shape
    if labels.num_classes < num_kept:
        raise LabelError(
            f"SoftLabels: expected at most num_classes ({labels.num_classes}) kept classes; "
            f"found K = {num_kept}; lower k or use the dense policy"
        )
    grid = len(labels.temperatures)
    wanted = {
        "log_probs": (num_positions, num_kept),
        "log_tail": (num_positions, grid),
        "target_log_prob": (num_positions,),
        "stats": (num_positions, len(STATS)),
    }
    for name, expected in wanted.items():
        array = getattr(labels, name)
        if array is not None and tuple(array.shape) != expected:
            raise LabelError(
                f"SoftLabels.{name}: expected shape {list(expected)} (ids {list(shape)}, {grid} temperatures)"
                f"; found {list(array.shape)}; give one row per position"
            )


def _torch_rows(x: Array, index: Array) -> Array:
    """Rows of a tensor; torch cannot gather uint16 and uint32, so those travel as signed bits."""
    import torch

    signed = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}.get(x.dtype)
    return x[index] if signed is None else x.view(signed)[index].view(x.dtype)
