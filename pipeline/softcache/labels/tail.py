"""The mass of the dropped classes at any temperature from 1 up; below 1 see `softcache.labels.tail_bounds`.

Shape suffixes: `P` positions, `G` grid of temperatures.

With beta = 1/T, a record stores F(beta) = log sum of p_j^beta over the dropped classes, at the grid. F is convex and
falling; F(0), the log of the number of dropped classes, is free; F'(0), F'(1) and F''(0) follow from the stats.
Between two nodes F is that of two atoms, log(w1 e^(r1 beta) + w2 e^(r2 beta)), through both values and slopes: convex,
falling, exact at the grid, and able to turn sharply where two clusters of classes change places. An inner
slope is the mean of those of the two-atom curves through four nodes (Prony) to either side, weighted so
that their errors cancel.

The tail's mass after normalisation is promised within 2e-3, T = 1 to 1e6, V = 10 to 262144, K = 1 to 256, default grid, on
flat, Zipf, peaky, near one-hot, N(0, 8^2) and bimodal (clusters 5 to 15 apart) logits; the worst seen was 1.9e-3, on
N(0, 8^2). Not promised: clusters 20 to 40 apart (4.2e-3), Student t(2) (3e-2). Eight points, so that 1, 2, 4 and 8 are
on the grid; ten (10/10, ... 10/1) give 1e-3, 1.1e-3 and 3e-2. The table: `python -m benchmarks.tail --seeds 8`.
"""

import math
from itertools import pairwise
from typing import Any

import numpy as np
from array_api_compat import array_namespace, is_numpy_array, is_torch_array

from softcache.errors import TemperatureError

__all__ = [
    "DEFAULT_TEMPERATURES",
    "check_temperatures",
    "interpolate_log_tail",
    "inverse_temperature",
    "log_sum_exp",
    "working_dtype",
]

DEFAULT_TEMPERATURES = tuple(8.0 / k for k in range(8, 0, -1))
"""The grid: T = 1, 1.14, 1.33, 1.6, 2, 2.67, 4, 8; beta at equal distances."""

Array = Any  # a NumPy array or a torch tensor

_TINY = 1e-7  # nats: of bends and sags that count as none
_SHARP = 20.0  # nats: a bend beyond which one atom's share is nothing, and float32 would overflow
_SKEW = 1e3  # of the slopes next to a chord; more changes the curve in a thousandth of a segment


def check_temperatures(temperatures: tuple[float, ...]) -> None:
    """Checks a grid: 1 first (the record's own temperature), strictly increasing, finite.

    Raises:
        TemperatureError: the grid is anything else.
    """
    increasing = all(low < high for low, high in pairwise(temperatures))
    if not temperatures or temperatures[0] != 1.0 or not increasing or not np.isfinite(temperatures[-1]):
        raise TemperatureError(
            f"temperatures: expected 1.0 first, then strictly increasing finite numbers; "
            f"found {list(temperatures)}; the default grid is softcache.labels.DEFAULT_TEMPERATURES"
        )


def inverse_temperature(
    T: Any, temperatures: tuple[float, ...], *, like: Array, lowest: float | None = None
) -> Any:
    """beta = 1 / T > 0, a Python float for a number, an array [1] or [P] for an array; checked.

    Args:
        T: a number, or an array [], [1] or [P] of the kind of `like`.
        temperatures: the grid; its first is the lowest T allowed.
        like: [P, ...] array.
        lowest: allows T down to this instead, 0 for every T > 0; None for the grid's first.

    Raises:
        TemperatureError: T below the lowest allowed, not above 0, not finite, of another kind or shape.
    """
    limit = temperatures[0] if lowest is None else lowest
    if isinstance(T, int | float | np.number):
        if not (limit <= T < float("inf") and T > 0):
            raise _out_of_range(float(T), limit, lowest is None)
        return 1.0 / float(T)
    same_kind = is_torch_array(T) if is_torch_array(like) else is_numpy_array(T)
    if not same_kind or tuple(T.shape) not in ((), (1,), (like.shape[0],)):
        raise TemperatureError(
            f"temperature: expected a number, or {type(like).__name__} of shape [] or [{like.shape[0]}]; found "
            f"{type(T).__name__} of shape {list(getattr(T, 'shape', ()))}; give one temperature, or one per position"
        )
    xp = array_namespace(T)
    values = xp.reshape(T, (-1,))
    bad = ~((values >= limit) & (values < xp.inf) & (values > 0))
    if bool(xp.any(bad)):
        raise _out_of_range(float(values[bad][0]), limit, lowest is None)
    return 1.0 / values


def working_dtype(*arrays: Any) -> Any:
    """float64 when any of the arrays is, else float32; Python numbers do not count."""
    arrays = tuple(x for x in arrays if not isinstance(x, float))
    xp = array_namespace(*arrays)
    return xp.float64 if any(x.dtype == xp.float64 for x in arrays) else xp.float32


def log_sum_exp(x: Array) -> Array:
    """log(sum(exp(x))) over the last axis; a row of -inf gives -inf with gradient 0 (torch: NaN)."""
    xp = array_namespace(x)
    values = x.detach() if is_torch_array(x) else x
    peak = xp.max(values, axis=-1, keepdims=True)
    peak = xp.where(peak == -xp.inf, 0.0, peak)
    total = xp.sum(xp.exp(x - peak), axis=-1)
    return xp.where(total > 0, xp.log(xp.where(total > 0, total, 1.0)) + peak[..., 0], -xp.inf + 0 * total)


def interpolate_log_tail(
    log_tail_PG: Array,
    temperatures: tuple[float, ...],
    T: Any,
    *,
    log_support_P: Array,
    end_slopes_P: tuple[Array, Array] | None = None,
    curvature_P: Array | None = None,
) -> Array:
    """Log of the sum over the dropped classes of p_j^(1/T).

    Args:
        log_tail_PG: [P, G] float, its values at the grid; a row of -inf where nothing was dropped.
        temperatures: G grid temperatures.
        T: a number, or an array [] or [P], in [temperatures[0], inf).
        log_support_P: [P] float, log of the number of dropped classes with p > 0 (the value at beta = 0). Not
            read in rows where nothing was dropped.
        end_slopes_P: [P] float each, the slopes at beta = 0 and 1, or None to estimate them: the means of log
            p over the dropped classes with p > 0, plain and weighted by p.
        curvature_P: [P] float, the second derivative at beta = 0, or None to do without: the population
            variance of log p over the dropped classes with p > 0. Used with `end_slopes_P` only.

    Returns:
        [P] float32, or float64 if any input is. Non-increasing in 1/T, convex between grid points; equal to
        the stored value at the grid (to rounding where T is an array); differentiable in T and the arrays
        when they are torch. Rows with nothing dropped give -inf, with gradients of 0.

    Raises:
        TemperatureError: T below the grid, not finite, or of another kind or shape.
    """
    xp = array_namespace(log_tail_PG)
    beta = inverse_temperature(T, temperatures, like=log_tail_PG)
    dtype = working_dtype(log_tail_PG, log_support_P, beta)
    stored_PG = xp.astype(log_tail_PG, dtype)
    alive = xp.all(stored_PG != -xp.inf, axis=1)  # a NaN stays visible
    stored_PG = xp.where(alive[:, None], stored_PG, 0.0)
    support_P = xp.where(alive, xp.astype(log_support_P, dtype), 0.0)
    values = [stored_PG[:, g] for g in reversed(range(len(temperatures)))]
    values = [xp.where(support_P > values[0], support_P, values[0]), *values]
    known = [xp.where(alive, xp.astype(x, dtype), 0.0) for x in end_slopes_P or ()]
    if known and curvature_P is not None:
        known.append(xp.where(alive, xp.astype(curvature_P, dtype), 0.0))
    beta = beta if isinstance(beta, float) else xp.astype(beta, dtype)
    return xp.where(alive, _Curve(temperatures, values, known).at(beta), -xp.inf)


class _Curve:
    """Falling, through values [P] at the nodes 0 < 1/T_G < ... < 1/T_1, convex between them. `known`: nothing, the
    slopes at both ends, or these and the curvature at 0."""

    def __init__(self, temperatures: tuple[float, ...], values: list[Array], known: list[Array]) -> None:
        self._xp = xp = array_namespace(values[0])
        self._nodes, self._values = [0.0, *(1.0 / t for t in reversed(temperatures))], values
        self._known = known
        self._widths = [high - low for low, high in pairwise(self._nodes)]
        rises = [high - low for low, high in pairwise(values)]
        self._chords = [xp.clip(r / w, max=0.0) for r, w in zip(rises, self._widths, strict=True)]
        self._slopes: dict[int, Array] = {}

    def at(self, beta: Any) -> Array:
        """The values [P] at beta, a number or an array [1] or [P]."""
        last = len(self._widths) - 1
        if isinstance(beta, float):
            if beta in self._nodes:
                return self._values[self._nodes.index(beta)]
            picked = self._segment(next((j for j in range(last) if beta <= self._nodes[j + 1]), last))
        else:
            picked = self._segment(last)
            for j in reversed(range(last)):
                inside, pairs = beta <= self._nodes[j + 1], zip(self._segment(j), picked, strict=True)
                picked = tuple(self._xp.where(inside, new, old) for new, old in pairs)
        right, width, high, chord, fall, rise, bend = picked
        u = (right - beta) / width
        return high - chord * (right - beta) - _sag(fall, rise, bend, 1.0 - u, u)

    def _segment(self, j: int) -> tuple[Array, ...]:
        """Right node, width, value there, chord, and of `_sag` `fall`, `rise` and `bend` (-1: not known)."""
        zero, width, chord = 0.0 * self._values[j], self._widths[j], self._chords[j]
        bend = self._known[2] * width**2 if j == 0 and len(self._known) == 3 else zero - 1.0
        fall, rise = (chord - self._slope(j)) * width, (self._slope(j + 1) - chord) * width
        return zero + self._nodes[j + 1], zero + width, self._values[j + 1], chord, fall, rise, bend

    def _slope(self, j: int) -> Array:
        """At node j, kept between the neighbouring chords."""
        chords, last = self._chords, len(self._chords)
        if j not in self._slopes:
            if self._known and j in (0, last):
                slope = self._known[0 if j == 0 else 1]
            elif last < 3:  # too few nodes for a fit
                slope = 0.5 * (chords[max(j - 1, 0)] + chords[min(j, last - 1)])
            elif j in (0, last):
                slope = self._fit(1 if j == 0 else last - 2, j)[0]
            else:  # weighted so that the leading errors of the fits cancel
                sides = [s for s in (j - 1, j) if 1 <= s <= last - 2]
                weights = [abs(self._error_slope(s, j)) for s in reversed(sides)]
                parts = [w * self._corrected(s, j) for w, s in zip(weights, sides, strict=True)]
                slope = sum(parts) / sum(weights)
            slope = slope if j == 0 else self._xp.maximum(slope, chords[j - 1])
            self._slopes[j] = self._xp.minimum(slope, chords[j] if j < last else 0.0 * slope)
        return self._slopes[j]

    def _corrected(self, segment: int, j: int) -> Array:
        """Slope at node j of a segment's fit, less its error as known from the ends of the curve: the error of a
        fit to four values is (k + l x) (x - x0) ... (x - x3) to leading orders."""
        slope, last = self._fit(segment, j)[0], len(self._widths)
        end = 0 if segment == j == 1 else last if segment + 1 == j == last - 1 else None
        if not self._known or end is None:
            return slope
        (end_slope, curvature), size = self._fit(segment, end), self._error_slope(segment, end)
        error = (self._known[0 if end == 0 else 1] - end_slope) / size
        if end == 0 and len(self._known) == 3:
            x1, x2, x3 = self._nodes[1:4]
            bend = 2.0 * (x1 * x2 + x1 * x3 + x2 * x3)
            error = error + (self._known[2] - curvature - error * bend) * (x1 / (2.0 * size))
        return slope + error * self._error_slope(segment, j)

    def _error_slope(self, segment: int, j: int) -> float:
        """Slope at node j of (x - x0) ... (x - x3), the nodes of a segment's fit."""
        four = range(segment - 1, segment + 3)
        return math.prod(self._nodes[j] - self._nodes[m] for m in four if m != j)

    def _fit(self, segment: int, j: int) -> tuple[Array, Array]:
        """Slope and curvature at node j of two atoms through the four values around a segment (Prony's method).

        Exact at equal gaps. At others the changes of slope at the inner nodes are scaled to the middle gap.
        """
        xp, (_, chord, _) = self._xp, (chords := self._chords[segment - 1 : segment + 2])
        left, width, right = self._widths[segment - 1 : segment + 2]
        steps = (self._nodes[j] - self._nodes[segment]) / width
        bends = [xp.clip((high - low) * width, min=_TINY) for low, high in pairwise(chords)]
        capped = [xp.clip(bend, max=_SHARP) for bend in bends]
        first = xp.expm1(capped[0]) * (2.0 * width / (left + width))
        second = xp.expm1(capped[1]) * (2.0 * width / (right + width))
        ratio = second / first
        root = xp.sqrt((1.0 - ratio) ** 2 + 2.0 * second * (1.0 + ratio) + second**2)
        large = 0.5 * (1.0 + ratio + second + root)
        small = ratio / large
        spread = xp.log(large) - xp.log(small)
        odds = xp.log(xp.clip(1.0 - small, min=_TINY)) - xp.log(xp.clip(large - 1.0, min=_TINY))
        share = 1.0 / (1.0 + xp.exp(xp.clip(-odds - steps * spread, min=-60.0, max=60.0)))
        excess = bends[1] - capped[1] if steps >= 0.5 else capped[0] - bends[0]
        slope = chord + (xp.log(small) + share * spread + excess) / width
        return slope, share * (1.0 - share) * (spread / width) ** 2


def _sag(fall: Array, rise: Array, bend: Array, t: Array, u: Array) -> Array:
    """How far the curve lies below its chord at t = 1 - u of a segment of width 1.

    That of two atoms, log(w exp(-a t) + (1 - w) exp(g t)), whose slopes at the ends are -`fall` and `rise` from the
    chord. Where `bend`, the curvature at t = 0, is known (not negative), t^2 u^2 is added as far as the
    curve stays convex.
    """
    xp = array_namespace(fall)
    solid = (fall > _TINY) & (rise > _TINY)
    fall, rise = xp.clip(fall, min=_TINY), xp.clip(rise, min=_TINY)
    fall, rise = xp.minimum(fall, _SKEW * rise), xp.minimum(rise, _SKEW * fall)
    a, g = _rates(fall, rise)
    log_low = xp.log(fall + rise) - g - xp.log(-xp.expm1(-g))  # of a - fall
    value = xp.logaddexp(xp.log(g + fall) - a * t, log_low + g * t) - xp.log(a + g)
    at_left = xp.exp(log_low) * (g + fall)  # the curvature there
    least = xp.minimum(at_left, (a + rise) * xp.clip(g - rise, min=0.0))
    more = xp.minimum(xp.maximum(bend - at_left, -least), 2.0 * least)
    value = value + xp.where(bend >= 0, 0.5 * more * (t * u) ** 2, 0.0)
    tangent = xp.maximum(-fall * t, -rise * u)  # at the ends of the segment its gradient is the right one
    return xp.where(solid, -xp.where(value < 0, xp.maximum(value, tangent), tangent), 0.0 * value)


def _rates(fall: Array, rise: Array) -> tuple[Array, Array]:
    """a, g > 0 with (a - fall) (e^g - 1) = (g - rise) (e^a - 1) = fall + rise, to 1e-6.

    Three Newton steps on log a and log g, on two combinations that stay well-conditioned where both are small:
    k(a) - k(g) = r (a + g) / 2 and a g = s (k(a) + k(g)) / 2 - r s (a - g) / 4, k(x) = x/2 coth(x/2), s the sum and
    r = (fall - rise) / s. The first guess is exact in all limits.
    """
    xp, flip, total = array_namespace(fall), fall < rise, fall + rise
    skew = xp.abs(fall - rise) / total
    gap = skew * total + 1.5 * skew * (1.0 - skew**2 / 3.0) * total**2 / (fall * rise)
    product = total + fall * rise * (2.0 + total) / (6.0 + total)
    a = 0.5 * (gap + xp.sqrt(gap**2 + 4.0 * product))
    g = product / a
    for _ in range(3):
        (ka, da), (kg, dg) = _half_coth(a), _half_coth(g)
        first = ka - kg - 0.5 * skew * (a + g)
        second = a * g - total * (0.5 * (ka + kg) - 0.25 * skew * (a - g))
        j11, j12 = (da - 0.5 * skew) * a, -(dg + 0.5 * skew) * g
        j21 = (g - total * (0.5 * da - 0.25 * skew)) * a
        j22 = (a - total * (0.5 * dg + 0.25 * skew)) * g
        det = j11 * j22 - j12 * j21
        a = a * xp.exp(xp.clip((j12 * second - j22 * first) / det, min=-1.0, max=1.0))
        g = g * xp.exp(xp.clip((j21 * first - j11 * second) / det, min=-1.0, max=1.0))
    return xp.where(flip, g, a), xp.where(flip, a, g)


def _half_coth(x: Array) -> tuple[Array, Array]:
    """x/2 coth(x/2) and its slope, for x > 0."""
    xp = array_namespace(x)
    small = x < 0.3
    safe = xp.where(small, 1.0, x)
    value = 0.5 * safe * (1.0 + xp.exp(-safe)) / -xp.expm1(-safe)
    slope = (value - value**2 + 0.25 * safe**2) / safe
    near = xp.where(small, x, 0.0) ** 2
    series = 1.0 + near / 12.0 * (1.0 - near / 60.0 * (1.0 - near / 42.0))
    series_slope = x / 6.0 * (1.0 - near / 30.0 * (1.0 - near / 28.0))
    return xp.where(small, series, value), xp.where(small, series_slope, slope)


def _out_of_range(found: float, limit: float, of_grid: bool) -> TemperatureError:
    wanted = f"of at least {limit}" if limit > 0 else "above 0"
    wanted += ", the first of the labels' grid" if of_grid else ""
    return TemperatureError(f"temperature: expected a finite number {wanted}; found {found}; raise it")
