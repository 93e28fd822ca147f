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

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

from array_api_compat import array_namespace, is_numpy_array, is_torch_array

from pipeline.errors import LabelError, TemperatureError
from pipeline.labels.sampling import Sampling
from pipeline.labels.softening import SoftenedLabels, soften
from pipeline.tail import check_temperatures, log_sum_exp

__all__ = ["ARRAYS", "STATS", "Array", "SoftLabels"]

STATS = ("entropy", "logit_mean", "logit_std", "support")
"""Columns of `SoftLabels.stats`: entropy of p at T=1 (nats); mean and population standard deviation, over the
classes with p > 0, of the logits shifted so that their logsumexp is 0; support, the number of classes with p
> 0."""

Array = Any  # a NumPy array or a torch tensor
ARRAYS = ("ids", "log_probs", "log_tail", "target_log_prob", "stats", "counts", "log_threshold")


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
        sampling: how the classes behind the first `sampling.exact` were drawn; None where none were. The tail then
            holds all classes but the exact ones, drawn or not.
        counts: [P, K] integer, how often each class was drawn, 0 in exact and unused slots; with
            `sampling.replacement` only.
        log_threshold: [P] float, log of the priority above which a class was taken, -inf where all were; with
            `sampling` without replacement only.

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
            return self.map_arrays(lambda x: x[indices])
        import torch

        if isinstance(indices, slice):
            return self.map_arrays(lambda x: x[indices])
        index = torch.as_tensor(indices, device=self.ids.device)
        index = index if index.dtype == torch.bool else index.to(torch.int64)
        return self.map_arrays(lambda x: _torch_rows(x, index))

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

        return self.map_arrays(convert)

    def to_numpy(self) -> Self:
        """The record as NumPy arrays, detached; on the CPU it shares memory. bfloat16 becomes float32."""

        def convert(x: Array) -> Array:
            if is_numpy_array(x):
                return x
            x = x.detach().cpu()
            return (x.float() if str(x.dtype) == "torch.bfloat16" else x).numpy()

        return self.map_arrays(convert)

    def pin_memory(self) -> Self:
        """The record in page-locked memory (what a torch `DataLoader(pin_memory=True)` calls)."""
        return self.map_arrays(lambda x: x.pin_memory()) if self.is_torch else self.to_torch().pin_memory()

    def at_temperature(self, T: Any) -> SoftenedLabels:
        """The distribution softened to temperature T: log p_j^(1/T) - log Z(T), kept classes and tail.

        The kept classes and the tail are normalised together, so their masses add up to 1 whatever the
        precision of the stored values.

        Args:
            T: a number, or an array [P] (or a scalar array) of the record's kind; above 0 and finite. Below 1 it is
                served where the record pins the tail's mass down to `MASS_TOLERANCE`: where nothing was dropped at
                any T, else close to 1 (`pipeline.tail` says how close). An array, or a T below 1, costs one
                synchronisation on a GPU; another number costs none.

        Returns:
            log_probs [P, K] and log_tail [P], float32 (float64 if any input is). Differentiable in T,
            `log_probs` and `log_tail` when they are torch; gradients are never NaN, -inf entries get a
            gradient of 0.

        Raises:
            TemperatureError: T is lower than the record can serve or above `max_temperature`, not finite, or of a
                shape other than [] or [P].

        References:
            Hinton, Vinyals, Dean 2015, arXiv 1503.02531, eq. (1).
        """
        return soften(self, T)

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

    def exact(self, x: Array) -> Array:
        """The slots of an array [P, K] that were not drawn."""
        return x if self.sampling is None else x[:, : self.sampling.exact]

    def map_arrays(self, function: Callable[[Array], Array]) -> Self:
        """The record with a function applied to each of its arrays."""
        values: dict[str, Any] = {name: getattr(self, name) for name in ARRAYS}
        mapped: dict[str, Any] = {name: None if x is None else function(x) for name, x in values.items()}
        return replace(self, **mapped)


def _check_kinds(labels: SoftLabels) -> None:
    is_kind = is_torch_array if is_torch_array(labels.ids) else is_numpy_array
    for name in ARRAYS:
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
        if is_integer != (name in ("ids", "counts")):
            wanted = "a floating-point" if is_integer else "an integer"
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
    _check_sampling(labels)
    grid = len(labels.temperatures)
    wanted = {
        "log_probs": (num_positions, num_kept),
        "log_tail": (num_positions, grid),
        "target_log_prob": (num_positions,),
        "stats": (num_positions, len(STATS)),
        "counts": (num_positions, num_kept),
        "log_threshold": (num_positions,),
    }
    for name, expected in wanted.items():
        array = getattr(labels, name)
        if array is not None and tuple(array.shape) != expected:
            raise LabelError(
                f"SoftLabels.{name}: expected shape {list(expected)} (ids {list(shape)}, {grid} temperatures)"
                f"; found {list(array.shape)}; give one row per position"
            )


def _check_sampling(labels: SoftLabels) -> None:
    sampling = labels.sampling
    wanted = {
        "counts": sampling is not None and sampling.replacement,
        "log_threshold": sampling is not None and not sampling.replacement,
    }
    for name, needed in wanted.items():
        if (getattr(labels, name) is not None) != needed:
            raise LabelError(
                f"SoftLabels.{name}: expected {'an array' if needed else 'None'} with sampling = {sampling}; "
                f"found {'None' if needed else 'an array'}; give both as the policy made them"
            )
    if sampling is not None and sampling.exact > labels.k:
        raise LabelError(
            f"SoftLabels.sampling: expected at most K = {labels.k} exact slots; found {sampling.exact}; "
            "give it as the policy made it"
        )


def _torch_rows(x: Array, index: Array) -> Array:
    """Rows of a tensor; torch cannot gather uint16 and uint32, so those travel as signed bits."""
    import torch

    signed = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}.get(x.dtype)
    return x[index] if signed is None else x.view(signed)[index].view(x.dtype)
