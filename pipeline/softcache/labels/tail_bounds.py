"""Bounds of the mass of the dropped classes at temperatures below 1, where a record's grid does not reach.

Shape suffixes: `P` positions, `G` grid of temperatures.
"""

from typing import Any

from array_api_compat import array_namespace, is_torch_array

from softcache.errors import TemperatureError
from softcache.labels.tail import inverse_temperature, working_dtype

__all__ = ["log_tail_bounds_below_one"]

Array = Any  # a NumPy array or a torch tensor


def log_tail_bounds_below_one(
    log_tail_PG: Array,
    temperatures: tuple[float, ...],
    T: Any,
    *,
    log_support_P: Array,
    highest_log_prob_P: Array,
    slope_at_one_P: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Lower and upper bound of the log of the sum over the dropped classes of p_j^(1/T) below T = 1, and halfway.

    With b = 1/T - 1, x = log p and the mean E under p among the dropped, F - F(1) = log E[e^(b x)]. Known are E[x] =
    F'(1), E[e^(-c x)] at c = 1 - 1/T_2 (1 for a grid of one; then from the count), and the largest x. Lower: b F'(1)
    (Jensen). Upper: two atoms, one at the largest x; no distribution has more, because (1, e^(-c x), x, e^(b x)) is
    a Chebyshev system. Without the slope: the chord of F before 1, and b times the largest x.

    Args:
        log_tail_PG: [P, G] float, its values at the grid; a row of -inf where nothing was dropped.
        temperatures: G grid temperatures.
        T: a number, or an array [] or [P], in (0, 1].
        log_support_P: [P] float, log of the number of dropped classes with p > 0.
        highest_log_prob_P: [P] float, nats, of which no dropped log p at T = 1 is above: in a top-k record the
            last kept log p. inf where none is known; then the tail's whole mass serves.
        slope_at_one_P: [P] float, the mean of log p over the dropped classes weighted by p, or None.

    Returns:
        (lower, upper, middle), [P] float32, or float64 if any input is: -inf where nothing was dropped, the
        stored value at T = 1. True of exact inputs, and of a rounded `log_tail_PG`. Differentiable in T.

    Raises:
        TemperatureError: T above 1, not above 0, or of another kind or shape.

    References:
        Karlin, Studden 1966, "Tchebycheff Systems", chapter III.
    """
    xp = array_namespace(log_tail_PG)
    beta = inverse_temperature(T, temperatures, like=log_tail_PG, lowest=0.0)
    if beta < 1.0 if isinstance(beta, float) else bool(xp.any(beta < 1.0)):
        wanted = "expected at most 1 for these bounds"
        raise TemperatureError(f"temperature: {wanted}; found {T}; use interpolate_log_tail above")
    dtype = working_dtype(log_tail_PG, log_support_P, highest_log_prob_P, beta)
    alive = xp.all(log_tail_PG != -xp.inf, axis=1)
    one = len(temperatures) == 1
    c = 1.0 if one else 1.0 - 1.0 / temperatures[1]
    known = (log_tail_PG[:, 0], log_support_P if one else log_tail_PG[:, 1], highest_log_prob_P)
    tail_P, before_P, highest_P = (xp.where(alive, xp.astype(x, dtype), 0.0) for x in known)
    b = (beta if isinstance(beta, float) else xp.astype(beta, dtype)) - 1.0
    highest_P = xp.minimum(highest_P, tail_P)
    slope_P = xp.minimum((tail_P - before_P) / c, highest_P)
    upper_P = tail_P + b * highest_P
    if slope_at_one_P is not None:
        given_P = xp.where(alive, xp.astype(slope_at_one_P, dtype), 0.0)
        slope_P = xp.minimum(xp.maximum(given_P, slope_P), highest_P)
        rounding_P = float(xp.finfo(log_tail_PG.dtype).eps) * (xp.abs(before_P) + xp.abs(tail_P))
        excess_P = before_P - tail_P + c * slope_P + rounding_P
        upper_P = xp.minimum(upper_P, tail_P + b * slope_P + _most(b, highest_P - slope_P, c, excess_P))
    lower_P = tail_P + b * slope_P
    lower_P, upper_P = (xp.where(alive, xp.maximum(x, lower_P), -xp.inf) for x in (lower_P, upper_P))
    return lower_P, upper_P, 0.5 * (lower_P + upper_P)


def _most(b: Any, room: Array, c: float, excess: Array) -> Array:
    """The largest log E[e^(b x)] of mean-zero x <= `room` with log E[e^(-c x)] <= `excess`: that of two atoms, at `room`
    and at -depth, which bisection finds, without gradients."""
    xp = array_namespace(room)
    room = xp.clip(room, min=1e-12)

    def log_mean(rate: Any, room: Array, depth: Array) -> Array:
        total = xp.log(room + depth)
        return xp.logaddexp(xp.log(room) - total - rate * depth, xp.log(depth) - total + rate * room)

    fixed, target = (x.detach() if is_torch_array(x) else x for x in (room, excess))
    low, high = xp.log(1e-6 + 0.0 * fixed), xp.log(1e4 + 0.0 * fixed)
    for _ in range(40):
        middle = 0.5 * (low + high)
        deep = log_mean(-c, fixed, xp.exp(middle)) > target
        low, high = xp.where(deep, low, middle), xp.where(deep, middle, high)
    return log_mean(b, room, xp.exp(high))
