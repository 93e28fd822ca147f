"""The mass of the dropped classes between two temperatures of the grid, compiled: `labels.tail` for float32 rows on a CPU.

At one temperature for all rows it is known beforehand which segment of the curve is asked for and which fits make the slopes
at its ends (`_plan`); the rest is one formula for every row, computed for many rows at a time by vector instructions. Values
are those of `interpolate_log_tail`, to rounding.

Importing this module takes numba along, so import it where it is used.

Shape suffixes: `P` positions, `K` kept classes, `G` grid of temperatures, `N` nodes (0 and the grid), `F` fits, `R` rows of
a block.
"""

# numba gives these functions their types; by mypy's rules, which are Python's, every number would be another one.
# mypy: disable-error-code="no-untyped-def,assignment,call-arg,var-annotated,misc"

from __future__ import annotations

import math
from functools import lru_cache, partial

import numpy as np

from softcache.runtime.jit import njit_in_subprocess, njit_inline
from softcache.runtime.vector_math import exp_parts

__all__ = ["fill_log_tail", "plan_interpolation"]

_ROWS = 256
_TINY, _SHARP, _SKEW = np.float32(1e-7), np.float32(20.0), np.float32(1e3)  # as in `labels.tail`
_ZERO, _HALF, _ONE, _TWO = (np.float32(x) for x in (0.0, 0.5, 1.0, 2.0))
_NONE = np.float32(-np.inf)
_LEAST, _MOST = np.float32(-87.0), np.float32(88.0)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
# Cephes' logf (Moshier 1984).
_L8, _L7, _L6 = np.float32(7.0376836292e-2), np.float32(-1.1514610310e-1), np.float32(1.1676998740e-1)
_L5, _L4, _L3 = np.float32(-1.2420140846e-1), np.float32(1.4249322787e-1), np.float32(-1.6668057665e-1)
_L2, _L1, _L0 = np.float32(2.0000714765e-1), np.float32(-2.4999993993e-1), np.float32(3.3333331174e-1)
_ROOT_HALF, _SMALLEST = np.float32(0.70710678), np.float32(1.2e-38)

_vector = partial(njit_inline, fastmath={"contract"}, error_model="numpy")
_exp_parts = _vector(exp_parts)


def plan_interpolation(
    temperatures: tuple[float, ...], T: float, *, has_ends: bool
) -> tuple[int, np.ndarray, np.ndarray, bool]:
    """Returns what `fill_log_tail` does at T, for G of at least 3 and T above 1 and not on the grid.

    Args:
        has_ends: whether slopes and curvature at the ends of the curve are known, as they are of records with `stats`.

    Returns:
        The segment; the nodes [N]; the fits [F, 8]; whether what is known of the ends is read. A fit has the end of the
        segment whose slope it is for (0 or 1), its share, its own segment or -1 (0 at T = 1) for a known slope, its steps
        from there to the node, the end of the curve by which it is corrected (-1: neither), the steps to that end, the
        slope of its error there and at the node.
    """
    return _plan(temperatures, float(T), has_ends)


@lru_cache(64)
def _plan(
    temperatures: tuple[float, ...], T: float, has_ends: bool
) -> tuple[int, np.ndarray, np.ndarray, bool]:
    nodes = [0.0, *(1.0 / t for t in reversed(temperatures))]
    last, beta = len(nodes) - 1, 1.0 / T
    segment = next(j for j in range(last) if beta <= nodes[j + 1])

    def error_slope(fit: int, node: int) -> float:
        return math.prod(nodes[node] - nodes[m] for m in range(fit - 1, fit + 3) if m != node)

    def steps(fit: int, node: int) -> float:
        return (nodes[node] - nodes[fit]) / (nodes[fit + 1] - nodes[fit])

    fits = []
    for side, node in enumerate((segment, segment + 1)):
        if node in (0, last):
            fit = 1 if node == 0 else last - 2
            one = [-1.0, float(node > 0)] if has_ends else [float(fit), steps(fit, node)]
            fits.append([float(side), 1.0, *one, -1.0, 0.0, 1.0, 0.0])
            continue
        sides = [fit for fit in (node - 1, node) if 1 <= fit <= last - 2]
        weights = [abs(error_slope(fit, node)) for fit in reversed(sides)]
        for fit, weight in zip(sides, weights, strict=True):
            end = 0 if fit == node == 1 else last if fit + 1 == node == last - 1 else -1
            row = [float(side), weight / sum(weights), float(fit), steps(fit, node), -1.0, 0.0, 1.0, 0.0]
            if has_ends and end >= 0:
                row[4:] = [
                    float(end > 0), steps(fit, end), error_slope(fit, end), error_slope(fit, node)
                ]  # fmt: skip
            fits.append(row)
    fits_F8 = np.array(fits)
    reads_ends = segment == 0 or bool(((fits_F8[:, 2] < 0) | (fits_F8[:, 4] >= 0)).any())
    return segment, np.array(nodes), fits_F8, has_ends and reads_ends


@_vector
def _exp(x):
    part, power = _exp_parts(min(max(x, _LEAST), _MOST))
    return (part + _ONE) * power


@_vector
def _expm1(x):
    part, power = _exp_parts(min(max(x, _LEAST), _MOST))
    return part * power + (power - _ONE)


@_vector
def _log(x):
    """Of a positive number."""
    bits = np.float32(max(x, _SMALLEST)).view(np.int32)
    fraction = np.int32((bits & np.int32(0x7FFFFF)) | np.int32(0x3F000000)).view(np.float32)
    exponent = np.float32((bits >> np.int32(23)) - np.int32(126))
    low = fraction < _ROOT_HALF
    exponent = exponent - _ONE if low else exponent
    m = fraction + fraction - _ONE if low else fraction - _ONE
    z = m * m
    series = (((((((_L8 * m + _L7) * m + _L6) * m + _L5) * m + _L4) * m + _L3) * m + _L2) * m + _L1) * m + _L0
    y = series * m * z + exponent * _LN2_LOW - _HALF * z
    return m + y + exponent * _LN2_HIGH


@_vector
def _fit(c0_R, c1_R, c2_R, left, width, right, steps, slope_R, curvature_R, rows):
    """`_Curve._fit` of chords."""
    to_first, to_second = _TWO * width / (left + width), _TWO * width / (right + width)
    is_right = steps >= _HALF
    for r in range(rows):
        first_bend, second_bend = (
            max((c1_R[r] - c0_R[r]) * width, _TINY),
            max((c2_R[r] - c1_R[r]) * width, _TINY),
        )
        first_capped, second_capped = min(first_bend, _SHARP), min(second_bend, _SHARP)
        first, second = _expm1(first_capped) * to_first, _expm1(second_capped) * to_second
        ratio = second / first
        root = np.sqrt((_ONE - ratio) * (_ONE - ratio) + _TWO * second * (_ONE + ratio) + second * second)
        large = _HALF * (_ONE + ratio + second + root)
        small = ratio / large
        log_small = _log(small)
        spread = _log(large) - log_small
        odds = _log(max(_ONE - small, _TINY)) - _log(max(large - _ONE, _TINY))
        share = _ONE / (_ONE + _exp(min(max(-odds - steps * spread, np.float32(-60.0)), np.float32(60.0))))
        excess = second_bend - second_capped if is_right else first_capped - first_bend
        slope_R[r] = c1_R[r] + (log_small + share * spread + excess) / width
        curvature_R[r] = share * (_ONE - share) * (spread / width) * (spread / width)


@_vector
def _half_coth(x):
    """x/2 coth(x/2) and its slope, for x > 0."""
    is_small = x < np.float32(0.3)
    safe = _ONE if is_small else x
    value = _HALF * safe * (_ONE + _exp(-safe)) / -_expm1(-safe)
    slope = (value - value * value + np.float32(0.25) * safe * safe) / safe
    near = x * x if is_small else _ZERO
    series = _ONE + near / np.float32(12.0) * (
        _ONE - near / np.float32(60.0) * (_ONE - near / np.float32(42.0))
    )
    series_slope = x / np.float32(6.0) * (_ONE - near / np.float32(30.0) * (_ONE - near / np.float32(28.0)))
    return (series if is_small else value), (series_slope if is_small else slope)


@_vector
def _guess(fall_R, rise_R, a_R, g_R, rows):
    """The first guess of `tail._rates`, of the larger of both first."""
    for r in range(rows):
        fall, rise = fall_R[r], rise_R[r]
        total, product = fall + rise, fall * rise
        skew = abs(fall - rise) / total
        gap = (
            skew * total
            + np.float32(1.5) * skew * (_ONE - skew * skew / np.float32(3.0)) * total * total / product
        )
        both = total + product * (_TWO + total) / (np.float32(6.0) + total)
        a = _HALF * (gap + np.sqrt(gap * gap + np.float32(4.0) * both))
        a_R[r], g_R[r] = a, both / a


@_vector
def _improve(fall_R, rise_R, a_R, g_R, rows):
    """A Newton step of `tail._rates`."""
    for r in range(rows):
        a, g, total = a_R[r], g_R[r], fall_R[r] + rise_R[r]
        skew = abs(fall_R[r] - rise_R[r]) / total
        half_skew, quarter = _HALF * skew, np.float32(0.25) * skew
        ka, da = _half_coth(a)
        kg, dg = _half_coth(g)
        first = ka - kg - half_skew * (a + g)
        second = a * g - total * (_HALF * (ka + kg) - quarter * (a - g))
        j11, j12 = (da - half_skew) * a, -(dg + half_skew) * g
        j21 = (g - total * (_HALF * da - quarter)) * a
        j22 = (a - total * (_HALF * dg + quarter)) * g
        det = j11 * j22 - j12 * j21
        to_a, to_g = (j12 * second - j22 * first) / det, (j21 * first - j11 * second) / det
        a_R[r], g_R[r] = a * _exp(min(max(to_a, -_ONE), _ONE)), g * _exp(min(max(to_g, -_ONE), _ONE))


@_vector
def _sag(fall_R, rise_R, bend_R, t, u, scratch_4R, out_R, rows):
    """`tail._sag`."""
    narrow_R, high_R, a_R, g_R = scratch_4R[0], scratch_4R[1], scratch_4R[2], scratch_4R[3]
    for r in range(rows):
        fall, rise = max(fall_R[r], _TINY), max(rise_R[r], _TINY)
        fall, rise = min(fall, _SKEW * rise), min(rise, _SKEW * fall)
        narrow_R[r], high_R[r] = fall, rise
    _guess(narrow_R, high_R, a_R, g_R, rows)
    for _ in range(3):
        _improve(narrow_R, high_R, a_R, g_R, rows)
    for r in range(rows):
        fall, rise, bend = narrow_R[r], high_R[r], bend_R[r]
        is_flipped = fall < rise
        a, g = g_R[r] if is_flipped else a_R[r], a_R[r] if is_flipped else g_R[r]
        log_low = _log(fall + rise) - g - _log(-_expm1(-g))
        one, other = _log(g + fall) - a * t, log_low + g * t
        peak = max(one, other)
        value = peak + _log(_exp(one - peak) + _exp(other - peak)) - _log(a + g)
        at_left = _exp(log_low) * (g + fall)
        least = min(at_left, (a + rise) * max(g - rise, _ZERO))
        more = min(max(bend - at_left, -least), _TWO * least)
        value += _HALF * more * (t * u) * (t * u) if bend >= _ZERO else _ZERO
        tangent = max(-fall * t, -rise * u)
        bounded = max(value, tangent) if value < _ZERO else tangent
        out_R[r] = -bounded if (fall_R[r] > _TINY) & (rise_R[r] > _TINY) else _ZERO


@partial(njit_inline, fastmath={"contract", "reassoc"}, error_model="numpy")
def _num_kept(log_probs_K):
    kept = _ZERO
    for slot in range(len(log_probs_K)):
        kept += _ONE if log_probs_K[slot] > _NONE else _ZERO
    return kept


@partial(njit_inline, fastmath={"contract", "reassoc"}, error_model="numpy")
def _ends(log_probs_K, stats_4, log_mass, count):
    """`temperature._tail_ends`: slopes at 0 and 1, and the curvature at 0."""
    total, weighted = _ZERO, _ZERO
    for slot in range(len(log_probs_K)):
        x = log_probs_K[slot]
        finite = x if x > _NONE else _ZERO
        total += finite
        weighted += _exp(finite) * finite
    at_zero = (float(stats_4[1]) * stats_4[3] - total) / count
    kept_spread, middle = _ZERO, np.float32(at_zero)
    for slot in range(len(log_probs_K)):
        x = log_probs_K[slot]
        off = x - middle if x > _NONE else _ZERO
        kept_spread += off * off
    off = float(stats_4[1]) - at_zero
    spread = stats_4[3] * (float(stats_4[2]) * stats_4[2] + off * off)
    at_one = (-float(stats_4[0]) - weighted) / max(math.exp(log_mass), 1e-30)
    return at_zero, at_one, max((spread - kept_spread) / count, 0.0)


@partial(njit_in_subprocess, error_model="numpy", fastmath={"contract"})
def fill_log_tail(
    log_tail_PG, log_probs_PK, stats_P4, num_dropped_P, nodes_N, beta, segment, fits_F8, reads_ends, out_P
):
    """Writes the log of the sum over the dropped classes of p^beta, beta between two nodes.

    Args:
        log_tail_PG: float32, of the grid's temperatures; a row with -inf in it gives -inf.
        log_probs_PK: float32.
        stats_P4: float32; [0, 4] where `num_dropped_P` is given.
        num_dropped_P: float32, how many classes were dropped; [0] where `stats_P4` is given.
        nodes_N, segment, fits_F8, reads_ends: of `plan_interpolation`.
        out_P: float32.
    """
    num_rows, last = len(log_tail_PG), len(nodes_N) - 1
    value_NR, chord_NR = np.empty((last + 1, _ROWS), np.float32), np.empty((last, _ROWS), np.float32)
    end_3R, slope_2R = np.zeros((3, _ROWS), np.float32), np.empty((2, _ROWS), np.float32)
    fit_R, curvature_R = np.empty(_ROWS, np.float32), np.empty(_ROWS, np.float32)
    at_end_R, end_curvature_R = np.empty(_ROWS, np.float32), np.empty(_ROWS, np.float32)
    scratch_4R, sag_R = np.empty((4, _ROWS), np.float32), np.empty(_ROWS, np.float32)
    shift_R = np.empty(_ROWS, np.float32)  # 0, -inf where nothing was dropped
    knows_bend = segment == 0 and reads_ends
    width = np.float32(nodes_N[segment + 1] - nodes_N[segment])
    away = np.float32(nodes_N[segment + 1] - beta)
    u = np.float32((nodes_N[segment + 1] - beta) / (nodes_N[segment + 1] - nodes_N[segment]))
    for start in range(0, num_rows, _ROWS):
        rows = min(_ROWS, num_rows - start)
        for r in range(rows):
            row = start + r
            alive, whole = True, _ZERO
            for g in range(last):
                alive &= log_tail_PG[row, g] != _NONE
                whole += log_tail_PG[row, g]
            for g in range(last):
                value_NR[last - g, r] = log_tail_PG[row, g] if alive else _ZERO
            count = stats_P4[row, 3] - _num_kept(log_probs_PK[row]) if len(stats_P4) else num_dropped_P[row]
            # A NaN stays visible, which a larger or smaller number of two would hide.
            shift_R[r] = (whole + count) * _ZERO if alive else _NONE
            count = max(count, _ONE)
            value_NR[0, r] = max(_log(count) if alive else _ZERO, value_NR[1, r])
            if reads_ends and alive:
                at_zero, at_one, curvature = _ends(
                    log_probs_PK[row], stats_P4[row], float(log_tail_PG[row, 0]), float(count)
                )
                end_3R[0, r], end_3R[1, r], end_3R[2, r] = at_zero, at_one, curvature
            elif reads_ends:
                end_3R[0, r], end_3R[1, r], end_3R[2, r] = _ZERO, _ZERO, _ZERO
        for g in range(last):
            inverse = np.float32(1.0 / (nodes_N[g + 1] - nodes_N[g]))
            for r in range(rows):
                chord_NR[g, r] = min((value_NR[g + 1, r] - value_NR[g, r]) * inverse, _ZERO)
        slope_2R[:] = _ZERO
        for f in range(len(fits_F8)):
            side, share, fit, end = (
                int(fits_F8[f, 0]),
                np.float32(fits_F8[f, 1]),
                int(fits_F8[f, 2]),
                int(fits_F8[f, 4]),
            )
            if fit < 0:
                for r in range(rows):
                    slope_2R[side, r] = end_3R[int(fits_F8[f, 3]), r]
                continue
            left, middle, right = (
                np.float32(nodes_N[fit] - nodes_N[fit - 1]),
                np.float32(nodes_N[fit + 1] - nodes_N[fit]),
                np.float32(nodes_N[fit + 2] - nodes_N[fit + 1]),
            )
            c0_R, c1_R, c2_R = chord_NR[fit - 1], chord_NR[fit], chord_NR[fit + 1]
            _fit(c0_R, c1_R, c2_R, left, middle, right, np.float32(fits_F8[f, 3]), fit_R, curvature_R, rows)
            if end >= 0:
                steps = np.float32(fits_F8[f, 5])
                _fit(c0_R, c1_R, c2_R, left, middle, right, steps, at_end_R, end_curvature_R, rows)
                size, at_node = np.float32(fits_F8[f, 6]), np.float32(fits_F8[f, 7])
                x1, x2, x3 = nodes_N[1], nodes_N[2], nodes_N[3]
                bend = np.float32(2.0 * (x1 * x2 + x1 * x3 + x2 * x3))
                nudge = np.float32(x1) / (_TWO * size)
                for r in range(rows):
                    error = (end_3R[end, r] - at_end_R[r]) / size
                    more = (end_3R[2, r] - end_curvature_R[r] - error * bend) * nudge
                    error = error + more if end == 0 else error
                    fit_R[r] += error * at_node
            for r in range(rows):
                slope_2R[side, r] += share * fit_R[r]
        for side in range(2):
            node = segment + side
            for r in range(rows):
                slope = slope_2R[side, r]
                slope = max(slope, chord_NR[node - 1, r]) if node > 0 else slope
                slope_2R[side, r] = min(slope, chord_NR[node, r] if node < last else _ZERO)
        fall_R, rise_R, bend_R = fit_R, curvature_R, at_end_R  # no longer read
        for r in range(rows):
            chord = chord_NR[segment, r]
            fall_R[r], rise_R[r] = (chord - slope_2R[0, r]) * width, (slope_2R[1, r] - chord) * width
            bend_R[r] = end_3R[2, r] * width * width if knows_bend else -_ONE
        _sag(fall_R, rise_R, bend_R, _ONE - u, u, scratch_4R, sag_R, rows)
        for r in range(rows):
            out_P[start + r] = value_NR[segment + 1, r] - chord_NR[segment, r] * away - sag_R[r] + shift_R[r]
