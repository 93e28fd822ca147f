"""Records of float32 rows on the CPU, compiled: each row of logits is read from memory once.

Shape suffixes: `P` positions, `V` classes, `K` slots, `G` grid of temperatures.

The largest classes are found by a threshold that is surely low enough (the k-th largest of the maxima of 2k disjoint
sets of classes), above which few others lie; those are sorted. On the default grid, 8/8 to 8/1, the mass at each
temperature is a sum of powers of exp(x/8), so that one exponential serves eight temperatures; other grids take one
each. A row of V = 4,096, K = 128 costs about 8 microseconds, a tenth of what torch needs for the same.

Relative error of an exponential: below 1e-6. A row with a fault (`checks.logit_faults`) gives NaN everywhere. Compiled code
is kept beside this file, or in the user's cache folder.
"""

# numba gives these functions their types; by mypy's rules, which are Python's, every number would be another one.
# mypy: disable-error-code="no-untyped-def,assignment,call-arg,var-annotated,misc"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

__all__ = ["fill_largest", "fill_log_probs", "fill_records"]

# Sums may be taken in vectors; NaN and infinity keep their meaning.
_MATHS = {"reassoc", "contract", "nsz"}
_LN_2 = 0.6931471805599453
_EIGHTHS = 8
_BLOCK = 1024
_DEAD = np.finfo(np.float32).min  # what is not above it is -inf
_FARTHEST = np.float32(-126 * _EIGHTHS * _LN_2)
"""Of a logit from the largest: exp(x/8) is then 2^-126, which is as good as 0 beside the 1 of the largest."""
_LOWEST_KEY = np.int32(-(2**31))
# Taylor coefficients of 2^r; on [-1/2, 1/2] the rest after the sixth power is below 2e-9 relative.
_C1, _C2, _C3, _C4, _C5, _C6 = (np.float32(c) for c in (
    _LN_2, _LN_2**2 / 2, _LN_2**3 / 6, _LN_2**4 / 24, _LN_2**5 / 120, _LN_2**6 / 720,
))  # fmt: skip


def _compiled(function: Callable[..., Any], fastmath: Any = _MATHS) -> Any:
    how: dict[str, Any] = {"nogil": True, "boundscheck": False, "error_model": "numpy", "fastmath": fastmath}
    try:
        return njit(cache=True, **how)(function)
    except RuntimeError:  # no folder can be written: compile once for each process
        return njit(**how)(function)


@intrinsic
def _float_of(typing, bits):
    """The float32 of these 32 bits."""
    return types.float32(types.int32), lambda _c, build, _s, args: build.bitcast(args[0], ir.FloatType())


@intrinsic
def _key_of(typing, value):
    """A float32 as an int32 that is ordered as the numbers are: -0.0 is 0.0, NaN is beyond the infinities."""

    def generate(_context, build, _signature, args):
        word = ir.IntType(32)
        bits = build.bitcast(args[0], word)
        flipped = build.and_(build.ashr(bits, ir.Constant(word, 31)), ir.Constant(word, 2**31 - 1))
        is_minus_0 = build.icmp_signed("==", bits, ir.Constant(word, -(2**31)))
        return build.select(is_minus_0, ir.Constant(word, 0), build.xor(bits, flipped))

    return types.int32(types.float32), generate


@_compiled
def _exp2(y):
    """2^y of a float32 from -126 to 0."""
    whole = np.floor(y + np.float32(0.5))
    r = y - whole
    power = _C1 + r * (_C2 + r * (_C3 + r * (_C4 + r * (_C5 + r * _C6))))
    return (np.float32(1.0) + r * power) * _float_of((np.int32(whole) + np.int32(127)) << np.int32(23))


# -- the k largest -----------------------------------------------------------------------------------------


@_compiled
def _floor_key(key_V, k, peak_S):
    """A key that at least k keys reach, and seldom many more."""
    num_sets = len(peak_S)
    peak_S[:] = key_V[:num_sets]
    for start in range(num_sets, len(key_V), num_sets):
        part = key_V[start : start + num_sets]
        for i in range(len(part)):
            peak_S[i] = max(peak_S[i], part[i])
    lowest, highest = peak_S[0], peak_S[0]
    for i in range(num_sets):
        lowest, highest = min(lowest, peak_S[i]), max(highest, peak_S[i])
    low, high = np.int64(lowest), np.int64(highest)
    reached = num_sets  # by the maxima, at `low`
    while high > low and reached > k + k // 16:
        middle = np.int32((low + high + 1) >> 1)
        count = np.int32(0)
        for i in range(num_sets):
            count += np.int32(1) if peak_S[i] >= middle else np.int32(0)
        if count >= k:
            low, reached = np.int64(middle), count
        else:
            high = np.int64(middle) - 1
    return np.int32(low)


@_compiled
def _sorted(key_N, id_N, many, key_scratch_N, id_scratch_N):
    """Sorts the first keys and their ids by key, descending, equal ones as they are; returns the ids."""
    low, high = np.int64(key_N[0]), np.int64(key_N[0])
    for i in range(many):
        low, high = min(low, np.int64(key_N[i])), max(high, np.int64(key_N[i]))
    place = np.empty(256, np.int32)
    shift = np.int64(0)
    while (high - low) >> shift:
        place[:] = 0
        for i in range(many):
            place[((high - np.int64(key_N[i])) >> shift) & 255] += 1
        before = 0
        for digit in range(256):
            count = place[digit]
            place[digit] = before
            before += count
        for i in range(many):
            digit = ((high - np.int64(key_N[i])) >> shift) & 255
            to = place[digit]
            place[digit] = to + 1
            key_scratch_N[to], id_scratch_N[to] = key_N[i], id_N[i]
        key_N, key_scratch_N = key_scratch_N, key_N
        id_N, id_scratch_N = id_scratch_N, id_N
        shift += 8
    return id_N


@_compiled
def _reaching(key_V, floor, is_high_V, key_N, id_N):
    """Writes the keys that are at least `floor` and their ids, in order; returns how many."""
    num_classes, many = len(key_V), 0
    for i in range(num_classes):
        is_high_V[i] = np.uint8(1) if key_V[i] >= floor else np.uint8(0)
    eights = is_high_V.view(np.uint64)
    for eight in range(len(eights)):
        if eights[eight]:
            # No branch: every one is written, and kept where the count moves on.
            for i in range(8 * eight, min(8 * eight + 8, num_classes)):
                key_N[many], id_N[many] = key_V[i], i
                many += np.int64(is_high_V[i])
    return many


@_compiled
def _select(key_V, peak_S, is_high_V, key_2V, id_2V, ids_K):
    """Writes the ids of the largest keys, descending; equal ones by ascending id."""
    k = len(ids_K)
    floor = _floor_key(key_V, k, peak_S) if len(peak_S) else _LOWEST_KEY
    many = _reaching(key_V, floor, is_high_V, key_2V[0], id_2V[0])
    ids_K[:] = _sorted(key_2V[0], id_2V[0], many, key_2V[1], id_2V[1])[:k]


@_compiled
def fill_largest(values_PV, ids_PK):
    """Writes the ids of the largest float32 values of each row, descending; equal ones by ascending id."""
    num_rows, num_classes = values_PV.shape
    k = ids_PK.shape[1]
    peak_S = np.empty(2 * k if 4 * k <= num_classes else 0, np.int32)
    key_V, is_high_V = np.empty(num_classes, np.int32), np.zeros((num_classes + 7) // 8 * 8, np.uint8)
    key_2V, id_2V = np.empty((2, num_classes + 1), np.int32), np.empty((2, num_classes + 1), np.int32)
    for row in range(num_rows):
        values_V = values_PV[row]
        for i in range(num_classes):
            key_V[i] = _key_of(values_V[i])
        _select(key_V, peak_S, is_high_V, key_2V, id_2V, ids_PK[row])


# -- the sums ----------------------------------------------------------------------------------------------


@_compiled
def _power_sums(x_V, top, sum_G):
    """Adds exp((x - top) n/8) for n = 1 to 8 into `sum_G`."""
    scale = np.float32(1.0 / (_EIGHTHS * _LN_2))
    for start in range(0, len(x_V), _BLOCK):
        zero = np.float32(0.0)
        s1, s2, s3, s4, s5, s6, s7, s8 = zero, zero, zero, zero, zero, zero, zero, zero
        part = x_V[start : start + _BLOCK]
        for i in range(len(part)):
            x = max(part[i] - top, _FARTHEST)
            e1 = _exp2(x * scale)
            e2 = e1 * e1
            e4 = e2 * e2
            s1 += e1
            s2 += e2
            s3 += e1 * e2
            s4 += e4
            s5 += e1 * e4
            s6 += e2 * e4
            s7 += e1 * (e2 * e4)
            s8 += e4 * e4
        for n, s in enumerate((s1, s2, s3, s4, s5, s6, s7, s8)):
            sum_G[n] += s


@_compiled
def _free_sums(x_V, top, beta_G, sum_G):
    """Adds exp((x - top) beta) for each beta into `sum_G`."""
    for start in range(0, len(x_V), _BLOCK):
        part = x_V[start : start + _BLOCK]
        for g in range(len(beta_G)):
            scale = np.float32(beta_G[g] / _LN_2)
            s = np.float32(0.0)
            for i in range(len(part)):
                x = max(part[i] - top, _FARTHEST)
                s += _exp2(max(x * scale, np.float32(-126.0)))
            sum_G[g] += s


def _in_order(logit, top, log_mass):
    return (logit - top) - np.float32(log_mass)


_log_prob = _compiled(_in_order, fastmath=False)
"""Rounded as written, so that a log-probability has the same bits wherever it is asked for, whatever else is kept."""


@_compiled
def _number_of(key):
    return _float_of(key if key >= 0 else key ^ np.int32(2**31 - 1))


@_compiled
def _mass_of(logits_V, top):
    """The sums of exp(x) and of exp(x) x, x being the logits less the largest."""
    mass, dot = 0.0, 0.0
    for start in range(0, len(logits_V), _BLOCK):
        s, d = np.float32(0.0), np.float32(0.0)
        part = logits_V[start : start + _BLOCK]
        for i in range(len(part)):
            x = max(part[i] - top, _FARTHEST)
            e = _exp2(max(x * np.float32(1.0 / _LN_2), np.float32(-126.0)))
            s += e
            d += e * x
        mass += s
        dot += d
    return mass, dot


@_compiled
def _moments(x_V, top):
    """The number of classes above -inf, and the mean less `top` and the variance of their logits."""
    alive, total, square = 0.0, 0.0, 0.0
    for start in range(0, len(x_V), _BLOCK):
        count, s = np.float32(0.0), np.float32(0.0)
        part = x_V[start : start + _BLOCK]
        for i in range(len(part)):
            x = part[i] - top
            x_or_0 = x if x > _DEAD else np.float32(0.0)
            one_or_0 = np.float32(1.0) if x > _DEAD else np.float32(0.0)
            s += x_or_0
            count += one_or_0
        alive += count
        total += s
    mean = total / alive
    middle = np.float32(mean)
    for start in range(0, len(x_V), _BLOCK):
        s = np.float32(0.0)
        part = x_V[start : start + _BLOCK]
        for i in range(len(part)):
            x = part[i] - top
            off = x - middle if x > _DEAD else np.float32(0.0)
            s += off * off
        square += s
    return alive, mean, square / alive


@_compiled
def fill_log_probs(logits_PV, log_probs_PV):
    """Writes the log-probabilities of all classes, the very numbers of `fill_records`; NaN in a row with a fault."""
    for row in range(len(logits_PV)):
        logits_V = logits_PV[row]
        peak, trough = _range_of(logits_V)
        if _is_faulty(peak, trough):
            log_probs_PV[row] = np.nan
            continue
        top = _number_of(peak)
        log_mass = np.log(_mass_of(logits_V, top)[0])
        for i in range(len(logits_V)):
            log_probs_PV[row, i] = _log_prob(logits_V[i], top, log_mass)


@_compiled
def _range_of(logits_V):
    peak, trough = _LOWEST_KEY, np.int32(2**31 - 1)
    for i in range(len(logits_V)):
        key = _key_of(logits_V[i])
        peak, trough = max(peak, key), min(trough, key)
    return peak, trough


@_compiled
def _is_faulty(peak, trough):
    """Whether a logit is NaN (beyond the infinities) or +inf, or all are -inf."""
    infinity, lowest = _key_of(np.float32(np.inf)), _key_of(np.float32(-np.inf))
    return peak >= infinity or trough < lowest or peak == lowest


@_compiled
def fill_records(
    logits_PV, select, exact, beta_G, ids_PK, target_P, log_probs_PK, tail_PG, target_log_prob_P, stats_P4
):
    """Writes the records of some rows.

    Args:
        logits_PV: float32.
        select: whether `ids_PK` is written with the K largest classes; else it is read, V marking an unused slot.
        exact: slots whose classes are taken out of the tail.
        beta_G: float64 inverse temperatures, the first 1.
        target_P: int64 classes; one outside of the range gives NaN.
    """
    num_rows, num_classes = logits_PV.shape
    k = ids_PK.shape[1]
    num_sets = 2 * k if select and 4 * k <= num_classes else 0
    peak_S = np.empty(num_sets, np.int32)
    key_V = np.empty(num_classes, np.int32)
    is_high_V = np.zeros((num_classes + 7) // 8 * 8, np.uint8)
    key_2V, id_2V = np.empty((2, num_classes + 1), np.int32), np.empty((2, num_classes + 1), np.int32)
    x_V = np.empty(num_classes, np.float32)
    sum_G = np.empty(max(len(beta_G), _EIGHTHS))
    eighths_G = np.rint(_EIGHTHS * beta_G)
    if np.abs(eighths_G - _EIGHTHS * beta_G).max() > 1e-9 or eighths_G.min() < 1:
        eighths_G = eighths_G[:0]
    for row in range(num_rows):
        logits_V, ids_K = logits_PV[row], ids_PK[row]
        peak, trough = _LOWEST_KEY, np.int32(2**31 - 1)
        for i in range(num_classes):
            key = _key_of(logits_V[i])
            key_V[i] = key
            peak, trough = max(peak, key), min(trough, key)
        if _is_faulty(peak, trough):
            if select:
                ids_K[:] = np.arange(k)
            log_probs_PK[row], tail_PG[row], stats_P4[row] = np.nan, np.nan, np.nan
            target_log_prob_P[row] = np.nan
            continue
        if select:
            _select(key_V, peak_S, is_high_V, key_2V, id_2V, ids_K)
        _fill_row(
            logits_V, peak, exact, beta_G, eighths_G, ids_K, target_P[row], x_V, sum_G,
            log_probs_PK[row], tail_PG[row], stats_P4[row], target_log_prob_P[row : row + 1],
        )  # fmt: skip


@_compiled
def _fill_row(
    logits_V,
    peak,
    exact,
    beta_G,
    eighths_G,
    ids_K,
    target,
    x_V,
    sum_G,
    log_probs_K,
    tail_G,
    stats_4,
    target_log_prob_1,
):
    num_classes, top = len(logits_V), _number_of(peak)
    mass, dot = _mass_of(logits_V, top)
    log_mass = np.log(mass)
    for slot in range(len(ids_K)):
        log_probs_K[slot] = -np.inf
        if ids_K[slot] < num_classes:
            log_probs_K[slot] = _log_prob(logits_V[ids_K[slot]], top, log_mass)
    target_log_prob_1[0] = np.nan
    if 0 <= target < num_classes:
        target_log_prob_1[0] = _log_prob(logits_V[target], top, log_mass)
    alive, mean, variance = _moments(logits_V, top)
    stats_4[0], stats_4[1] = log_mass - dot / mass, mean - log_mass
    stats_4[2], stats_4[3] = np.sqrt(variance), alive
    x_V[:] = logits_V
    for slot in range(exact):
        if ids_K[slot] < num_classes:
            x_V[ids_K[slot]] = -np.inf
    others = _LOWEST_KEY
    for i in range(num_classes):
        others = max(others, _key_of(x_V[i]))
    tail_G[:] = -np.inf
    if others == _key_of(np.float32(-np.inf)):
        return
    others_top = _number_of(others)
    below = float(others_top) - top - log_mass
    sum_G[:] = 0.0
    if len(eighths_G):
        _power_sums(x_V, others_top, sum_G)
    else:
        _free_sums(x_V, others_top, beta_G, sum_G)
    for g in range(len(beta_G)):
        place = np.int64(eighths_G[g]) - 1 if len(eighths_G) else g
        tail_G[g] = np.log(sum_G[place]) + below * beta_G[g]
