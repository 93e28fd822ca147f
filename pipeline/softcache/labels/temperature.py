"""A record at one temperature.

Shape suffixes: `P` positions, `K` kept classes, `G` grid of temperatures.

With beta = 1/T, softening p gives p_j^beta / Z(beta). The kept part of Z is known exactly; the dropped part is stored at
a grid of temperatures, known for free at beta = 0 and interpolated in between. Below T = 1 it is only bounded: by what
the largest dropped class can be, and by convexity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from array_api_compat import array_namespace, is_numpy_array, is_torch_array

from softcache.errors import TemperatureError
from softcache.labels.arrays import as_numpy
from softcache.labels.mass_bounds import log_tail_bounds
from softcache.labels.tail import (
    interpolate_log_tail,
    inverse_temperature,
    log_sum_exp,
    working_dtype,
)
from softcache.labels.tail_bounds import log_tail_bounds_below_one
from softcache.runtime.jit import compiled_is_on

if TYPE_CHECKING:
    from softcache.labels.soft_labels import SoftLabels

__all__ = [
    "MASS_TOLERANCE",
    "SoftenedLabels",
    "check_tail_error",
    "num_dropped",
    "soften",
    "soften_buckets",
    "soften_masses",
    "tail_error",
]

MASS_TOLERANCE = 2e-3
"""How far, at most, the mass of the dropped classes may be from the truth below T = 1, for a record to be served."""

Array = Any  # a NumPy array or a torch tensor


@dataclass(frozen=True, eq=False)
class SoftenedLabels:
    """A record at one temperature: kept classes and the rest, normalised together.

    Attributes:
        ids: [P, K] integer, the kept classes; an unused slot holds the number of classes.
        log_probs: [P, K] float32 or float64, log of the softened probability, nats; -inf stays -inf.
        log_tail: [P] float, log of the softened mass of all classes that were not kept, nats; -inf where none
            was dropped. Of a sampled record: of all classes but the exact ones.
        log_weights: None, or of a sampled record [P, K]: a drawn class stands for exp(log_weights) classes like it
            (`Sampling`), and all of them together for the tail.
    """

    ids: Array
    log_probs: Array
    log_tail: Array
    log_weights: Array | None = None

    def map_arrays(self, function: Callable[[Array], Array]) -> Self:
        """The same with a function applied to each of its arrays."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: None if x is None else function(x) for name, x in values.items()})


def soften(labels: SoftLabels, T: Any) -> SoftenedLabels:
    """See `SoftLabels.at_temperature`."""
    xp = array_namespace(labels.ids)
    beta = inverse_temperature(T, labels.temperatures, like=labels.log_probs, lowest=0.0)
    _check_known(T, labels.max_temperature)
    dtype = working_dtype(labels.log_probs, labels.log_tail, beta)
    log_probs = xp.astype(labels.log_probs, dtype)
    beta_PK = beta if isinstance(beta, float) else xp.reshape(xp.astype(beta, dtype), (-1, 1))
    alive = log_probs > -xp.inf  # -inf * beta has a NaN gradient, so scale a stand-in
    scaled = xp.where(alive, xp.where(alive, log_probs, 0.0) * beta_PK, -xp.inf)
    tail = _log_tail(labels, log_probs, T, beta, labels.exact(scaled))
    log_z = log_sum_exp(xp.concat((labels.exact(scaled), tail[:, None]), axis=1))
    dropped = tail > -xp.inf
    return SoftenedLabels(
        ids=labels.ids,
        log_probs=xp.where(alive, scaled - log_z[:, None], -xp.inf),
        log_tail=xp.where(dropped, tail - log_z, -xp.inf),
        log_weights=None
        if labels.sampling is None
        else labels.sampling.log_weights(
            log_probs, labels.log_tail, labels.temperatures, labels.counts, labels.log_threshold
        ),
    )


def soften_buckets(labels: SoftLabels, T: float) -> Array:
    """See `SoftLabels.buckets_at`."""
    import torch

    log_masses, log_tail = soften_masses(labels, T)
    return torch.cat((log_masses, log_tail[:, None]), dim=1).log_softmax(dim=1)


def soften_masses(labels: SoftLabels, T: float) -> tuple[Array, Array]:
    """See `SoftLabels.masses_at`."""
    place = _on_grid(labels, T)
    import torch

    if place is None:
        if _is_interpolated(labels, T):
            return _interpolated_masses(labels, T)
        if labels.ids.device.type == "cpu":  # two hundred small operations, each of which NumPy begins sooner
            softened = soften(labels.to_numpy(), T)
            return torch.from_numpy(softened.log_probs), torch.from_numpy(softened.log_tail)
        softened = soften(labels, T)
        return softened.log_probs, softened.log_tail

    _check_known(T, labels.max_temperature)
    dtype = torch.promote_types(
        torch.float32, torch.promote_types(labels.log_probs.dtype, labels.log_tail.dtype)
    )
    log_probs = labels.log_probs.to(dtype)
    return log_probs if T == 1 else log_probs * (1.0 / float(T)), labels.log_tail[:, place].to(dtype)


def _is_interpolated(labels: SoftLabels, T: float) -> bool:
    """Whether `labels.tail_kernel` serves: plain float32 rows on a CPU, and T above 1."""
    return (
        compiled_is_on()
        and labels.ids.device.type == "cpu"
        and labels.sampling is None
        and str(labels.log_tail.dtype) == "torch.float32"
        and str(labels.log_probs.dtype) != "torch.float64"
        and len(labels.temperatures) > 2
        and 1.0 < T < float("inf")
    )


def _interpolated_masses(labels: SoftLabels, T: float) -> tuple[Array, Array]:
    """`soften_masses` at a T that is not on the grid, where `_is_interpolated`."""
    import torch

    from softcache.labels.tail_kernel import fill_log_tail, plan_interpolation

    _check_known(T, labels.max_temperature)
    log_probs, log_tail = labels.log_probs.detach().to(torch.float32), torch.empty(len(labels))
    stats, dropped = labels.stats, torch.empty(0)
    if stats is None:
        stats, dropped = torch.empty((0, 4)), labels.num_dropped().detach().to(torch.float32)
    segment, nodes_N, fits_F8, reads_ends = plan_interpolation(
        labels.temperatures, T, has_ends=labels.stats is not None
    )
    rows = (x.detach().contiguous().numpy() for x in (labels.log_tail, log_probs, stats, dropped))
    fill_log_tail(*rows, nodes_N, 1.0 / float(T), segment, fits_F8, reads_ends, log_tail.numpy())
    return log_probs * (1.0 / float(T)), log_tail


def tail_error(labels: SoftLabels, T: Any) -> np.ndarray:
    """See `SoftLabels.tail_error`."""
    inverse_temperature(T, labels.temperatures, like=labels.log_probs)  # checks T
    _check_known(T, labels.max_temperature)
    labels = labels.map_arrays(as_numpy)
    temperatures_P = np.broadcast_to(
        np.asarray(as_numpy(T) if is_torch_array(T) else T, np.float64), (len(labels),)
    )
    log_probs_PK = labels.log_probs.astype(np.float64)
    exact_PK = labels.exact(log_probs_PK)
    log_support_P = _tail_ends(labels, log_probs_PK)[0]
    # No dropped class is above the last kept one, which may have been rounded down; in a drawn record the tail has it.
    last_P = np.where(exact_PK > -np.inf, exact_PK, 0.0).min(axis=1, initial=0.0)
    highest_P = last_P + 1e-3 * np.abs(last_P) + max(labels.tail_rounding)
    served = soften(labels, T if is_numpy_array(T) else temperatures_P)
    middle_P = np.exp(served.log_tail.astype(np.float64))
    found_P = np.zeros(len(labels))
    for value in np.unique(temperatures_P):
        rows = temperatures_P == value
        bounds = log_tail_bounds(
            labels.log_tail[rows],
            labels.temperatures,
            float(value),
            log_support_P=log_support_P[rows],
            highest_log_prob_P=highest_P[rows],
            rounding=labels.tail_rounding,
            support_is_exact=labels.stats is not None,
        )
        log_kept_P = log_sum_exp(
            np.concatenate([exact_PK[rows] / value, np.full((int(rows.sum()), 1), -np.inf)], axis=1)
        )
        low_P, high_P = (_share(log_tail_P, log_kept_P) for log_tail_P in bounds)
        found_P[rows] = np.maximum(high_P - middle_P[rows], middle_P[rows] - low_P)
    return np.clip(found_P, 0.0, 1.0)


def _share(log_a_P: np.ndarray, log_b_P: np.ndarray) -> np.ndarray:
    """a / (a + b), and 0 where a is 0."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(log_a_P > -np.inf, 1.0 / (1.0 + np.exp(log_b_P - log_a_P)), 0.0)


def check_tail_error(labels: SoftLabels, T: Any, largest: float) -> None:
    """Raises TemperatureError where the tail of a row is not known to `largest` at temperature T; T from 1 up.

    The row with the widest bounds is named.
    """
    error_P = tail_error(labels, T)
    if not len(error_P) or error_P.max() <= largest:
        return
    row = int(error_P.argmax())
    at = float(np.broadcast_to(as_numpy(T) if is_torch_array(T) else T, (len(labels),))[row])
    grid = ", ".join(f"{t:g}" for t in labels.temperatures)
    raise TemperatureError(
        f"temperature {at:g}, position {row}: the mass of the dropped classes is known to {error_P[row]:.2g} only; "
        f"expected at most {largest:g}; take a temperature of the grid ({grid}), keep more classes, or allow more "
        "(loss.max_tail_error)",
        position=row,
    )


def _on_grid(labels: SoftLabels, T: float) -> int | None:
    """Where on the grid T is, for a torch record whose tail can be read off there."""
    if not labels.is_torch or T not in labels.temperatures:
        return None
    return labels.temperatures.index(T)


def _log_tail(labels: SoftLabels, log_probs: Array, T: Any, beta: Any, scaled_exact: Array) -> Array:
    """Log of the sum of p^beta over the classes without an exact slot, [P]."""
    xp = array_namespace(log_probs)
    if isinstance(beta, float) and float(T) in labels.temperatures:  # as the interpolation would give it
        stored = labels.log_tail[:, labels.temperatures.index(float(T))]
        alive = xp.all(labels.log_tail != -xp.inf, axis=1)
        return xp.where(alive, xp.astype(stored, log_probs.dtype), -xp.inf)
    log_support, ends = _tail_ends(labels, log_probs)
    slopes, curvature = (None, None) if ends is None else (ends[:2], ends[2])

    def above(t: Any) -> Array:
        return interpolate_log_tail(
            labels.log_tail,
            labels.temperatures,
            t,
            log_support_P=log_support,
            end_slopes_P=slopes,
            curvature_P=curvature,
        )

    if isinstance(beta, float):
        if beta <= 1.0:
            return above(T)
        return _below_one(labels, log_probs, T, scaled_exact, log_support, slopes)
    cold = beta > 1.0
    if not bool(xp.any(cold)):
        return above(T)
    T = xp.reshape(T, (-1,)) + xp.zeros_like(log_probs[:, 0])
    below = _below_one(labels, log_probs, xp.where(T < 1.0, T, 1.0), scaled_exact, log_support, slopes)
    return xp.where(cold, below, above(xp.where(T < 1.0, 1.0, T)))


def _below_one(
    labels: SoftLabels, log_probs: Array, T: Any, scaled_exact: Array, log_support: Array, slopes: Any
) -> Array:
    """Halfway between the bounds, if they leave the mass of the tail no more than the tolerance to either side."""
    xp = array_namespace(log_probs)
    values = T.detach() if is_torch_array(T) else T
    coldest = float(xp.min(values) if is_numpy_array(T) or is_torch_array(T) else T)
    if labels.sampling is not None:
        raise TemperatureError(
            f"temperature {coldest:g}: expected at least 1 for classes that were drawn at random, whose normaliser is "
            'stored from there on; raise the temperature, or capture with policy = "dense", which serves every one'
        )
    lowest = xp.min(xp.where(log_probs > -xp.inf, log_probs, 0.0), axis=1)
    lower, upper, middle = log_tail_bounds_below_one(
        labels.log_tail,
        labels.temperatures,
        T,
        log_support_P=log_support,
        highest_log_prob_P=lowest,
        slope_at_one_P=None if slopes is None else slopes[1],
    )

    def mass(tail: Array) -> Array:
        log_z = log_sum_exp(xp.concat((scaled_exact, tail[:, None]), axis=1))
        dropped = tail > -xp.inf
        return xp.where(dropped, xp.exp(xp.where(dropped, tail, 0.0) - log_z), 0.0)

    wrong = xp.maximum(mass(upper) - mass(middle), mass(middle) - mass(lower))
    worst = float(xp.max(wrong.detach() if is_torch_array(wrong) else wrong)) if len(labels) else 0.0
    if not worst <= MASS_TOLERANCE:
        raise TemperatureError(
            f"temperature {coldest:g}: below 1 the mass of the dropped classes is known within bounds only; expected "
            f"bounds of at most {MASS_TOLERANCE:g} to either side; found {worst:.2g}. Raise the temperature, or capture "
            'with policy = "dense", which serves every temperature'
        )
    return middle


def _tail_ends(labels: SoftLabels, log_probs: Array) -> tuple[Array, tuple[Array, Array, Array] | None]:
    """What can be known of the tail besides the grid, [P] each: the log of the count of its classes, and, of F(beta), its
    log-mass, the slopes at beta = 0 and 1 and the curvature at 0.

    Without `stats` every class without a slot counts and the rest is not known, so with masked (-inf) classes the tail
    above the last grid temperature is overestimated. Not meaningful where nothing was dropped.
    """
    xp = array_namespace(labels.ids)
    log_probs = labels.exact(log_probs)
    count = xp.clip(num_dropped(labels, log_probs), min=1.0)
    if labels.stats is None:
        return xp.log(count), None
    stats = xp.astype(labels.stats, log_probs.dtype)
    alive = log_probs > -xp.inf
    finite = xp.where(alive, log_probs, 0.0)
    slope_at_zero = (stats[:, 1] * stats[:, 3] - xp.sum(finite, axis=1)) / count
    # Centred on the tail's own mean: raw second moments would cancel in float32.
    spread = stats[:, 3] * (stats[:, 2] ** 2 + (stats[:, 1] - slope_at_zero) ** 2)
    kept_spread = xp.sum(xp.where(alive, (finite - slope_at_zero[:, None]) ** 2, 0.0), axis=1)
    curvature = xp.clip((spread - kept_spread) / count, min=0.0)
    log_mass = xp.astype(labels.log_tail[:, 0], log_probs.dtype)
    mass = xp.exp(xp.where(log_mass > -xp.inf, log_mass, 0.0))
    slope_at_one = (-stats[:, 0] - xp.sum(xp.exp(log_probs) * finite, axis=1)) / xp.clip(mass, min=1e-30)
    return xp.log(count), (slope_at_zero, slope_at_one, curvature)


def num_dropped(labels: SoftLabels, exact_PK: Array) -> Array:
    """See `SoftLabels.num_dropped`.

    Args:
        exact_PK: log-probabilities of the exact slots.
    """
    xp = array_namespace(exact_PK)
    dtype = working_dtype(exact_PK, labels.log_tail)
    if labels.stats is None:
        used = labels.exact(xp.astype(labels.ids, xp.int64)) < labels.num_classes
        return labels.num_classes - xp.sum(xp.astype(used, dtype), axis=1)
    return xp.astype(labels.stats[:, 3], dtype) - xp.sum(xp.astype(exact_PK > -xp.inf, dtype), axis=1)


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
