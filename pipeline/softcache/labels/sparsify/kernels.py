"""Records of float32 rows on the CPU, compiled: each row of logits is read from memory once.

Shape suffixes: `P` positions, `V` classes, `K` slots, `G` grid of temperatures.

On the default grid, 8/8 to 8/1, the mass at each temperature is a sum of powers of exp(x/8), so that one exponential
serves eight temperatures; other grids take one each. A row of V = 4,096, K = 128 costs about 8 microseconds, a tenth
of what torch needs for the same.

Relative error of an exponential: below 1e-6. A row with a fault (`checks.logit_faults`) gives NaN everywhere. Compiled code
is kept next to this file, or in the user's cache folder.
"""

# numba gives these functions their types; by mypy's rules, which are Python's, every number would be another one.
# mypy: disable-error-code="no-untyped-def,assignment,call-arg,var-annotated,misc"

from __future__ import annotations

import numpy as np

from softcache.labels.sparsify.float_bits import (
    BLOCK,
    EIGHTHS,
    FARTHEST,
    LANES,
    LN_2,
    LOWEST_KEY,
    exp2,
    float_of,
    key_of,
    njit_fastmath,
    vectorised_part,
)
from softcache.labels.sparsify.top_k_kernel import select_largest

__all__ = ["fill_log_probs", "fill_records", "is_faulty", "log_prob", "mass_of", "number_of", "range_of"]

_DEAD = np.finfo(np.float32).min  # what is not above it is -inf


@vectorised_part
def _power_sums(x_V, top, sum_G):
    """Adds exp((x - top) n/8) for n = 1 to 8 into `sum_G`."""
    scale = np.float32(1.0 / (EIGHTHS * LN_2))
    for start in range(0, len(x_V), BLOCK):
        zero = np.float32(0.0)
        s1, s2, s3, s4, s5, s6, s7, s8 = zero, zero, zero, zero, zero, zero, zero, zero
        part = x_V[start : start + BLOCK]
        for i in range(len(part)):
            x = max(part[i] - top, FARTHEST)
            e1 = exp2(x * scale)
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


@vectorised_part
def _free_sums(x_V, top, beta_G, sum_G):
    """Adds exp((x - top) beta) for each beta into `sum_G`."""
    for start in range(0, len(x_V), BLOCK):
        part = x_V[start : start + BLOCK]
        for g in range(len(beta_G)):
            scale = np.float32(beta_G[g] / LN_2)
            s = np.float32(0.0)
            for i in range(len(part)):
                x = max(part[i] - top, FARTHEST)
                s += exp2(max(x * scale, np.float32(-126.0)))
            sum_G[g] += s


def _in_order(logit, top, log_mass):
    return (logit - top) - np.float32(log_mass)


log_prob = vectorised_part(_in_order, fastmath=False)
"""Rounded as written, so that a log-probability has the same bits wherever it is asked for, whatever else is kept."""


@vectorised_part
def number_of(key):
    return float_of(key if key >= 0 else key ^ np.int32(2**31 - 1))


@vectorised_part
def mass_of(logits_V, top):
    """The sums of exp(x) and of exp(x) x, x being the logits less the largest."""
    mass, dot = 0.0, 0.0
    for start in range(0, len(logits_V), BLOCK):
        s, d = np.float32(0.0), np.float32(0.0)
        part = logits_V[start : start + BLOCK]
        for i in range(len(part)):
            x = max(part[i] - top, FARTHEST)
            e = exp2(max(x * np.float32(1.0 / LN_2), np.float32(-126.0)))
            s += e
            d += e * x
        mass += s
        dot += d
    return mass, dot


@vectorised_part
def _moments(x_V, top):
    """The number of classes above -inf, and the mean less `top` and the variance of their logits."""
    alive, total, square = 0.0, 0.0, 0.0
    for start in range(0, len(x_V), BLOCK):
        count, s = np.float32(0.0), np.float32(0.0)
        part = x_V[start : start + BLOCK]
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
    for start in range(0, len(x_V), BLOCK):
        s = np.float32(0.0)
        part = x_V[start : start + BLOCK]
        for i in range(len(part)):
            x = part[i] - top
            off = x - middle if x > _DEAD else np.float32(0.0)
            s += off * off
        square += s
    return alive, mean, square / alive


@vectorised_part
def _fill_nan(x_N):
    for i in range(len(x_N)):
        x_N[i] = np.nan


@njit_fastmath
def fill_log_probs(logits_PV, log_probs_PV):
    """Writes the log-probabilities of all classes, the very numbers of `fill_records`; NaN in a row with a fault."""
    for row in range(len(logits_PV)):
        logits_V = logits_PV[row]
        peak, trough = range_of(logits_V)
        if is_faulty(peak, trough):
            _fill_nan(log_probs_PV[row])
            continue
        top = number_of(peak)
        log_mass = np.log(mass_of(logits_V, top)[0])
        for i in range(len(logits_V)):
            log_probs_PV[row, i] = log_prob(logits_V[i], top, log_mass)


@vectorised_part
def range_of(logits_V):
    peak, trough = LOWEST_KEY, np.int32(2**31 - 1)
    for i in range(len(logits_V)):
        key = key_of(logits_V[i])
        peak, trough = max(peak, key), min(trough, key)
    return peak, trough


@vectorised_part
def is_faulty(peak, trough):
    """Whether a logit is NaN (beyond the infinities) or +inf, or all are -inf."""
    infinity, lowest = key_of(np.float32(np.inf)), key_of(np.float32(-np.inf))
    return peak >= infinity or trough < lowest or peak == lowest


@njit_fastmath
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
    key_2V, id_2V = np.empty((2, num_classes + LANES), np.int32), np.empty((2, num_classes), np.int32)
    x_V = np.empty(num_classes, np.float32)
    sum_G = np.empty(max(len(beta_G), EIGHTHS))
    eighths_G = np.empty(len(beta_G), np.int64)
    on_eighths = True
    for g in range(len(beta_G)):
        eighths_G[g] = np.rint(EIGHTHS * beta_G[g])
        on_eighths &= eighths_G[g] >= 1 and abs(eighths_G[g] - EIGHTHS * beta_G[g]) <= 1e-9
    if not on_eighths:
        eighths_G = eighths_G[:0]
    for row in range(num_rows):
        logits_V, ids_K = logits_PV[row], ids_PK[row]
        peak, trough = LOWEST_KEY, np.int32(2**31 - 1)
        for i in range(num_classes):
            key = key_of(logits_V[i])
            key_V[i] = key
            peak, trough = max(peak, key), min(trough, key)
        if is_faulty(peak, trough):
            if select:
                for slot in range(k):
                    ids_K[slot] = slot
            _fill_nan(log_probs_PK[row])
            _fill_nan(tail_PG[row])
            _fill_nan(stats_P4[row])
            target_log_prob_P[row] = np.nan
            continue
        if select:
            select_largest(key_V, peak_S, key_2V, id_2V, ids_K)
        _fill_row(
            logits_V, peak, exact, beta_G, eighths_G, ids_K, target_P[row], x_V, sum_G,
            log_probs_PK[row], tail_PG[row], stats_P4[row], target_log_prob_P[row : row + 1],
        )  # fmt: skip


@vectorised_part
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
    num_classes, top = len(logits_V), number_of(peak)
    mass, dot = mass_of(logits_V, top)
    log_mass = np.log(mass)
    for slot in range(len(ids_K)):
        log_probs_K[slot] = -np.inf
        if ids_K[slot] < num_classes:
            log_probs_K[slot] = log_prob(logits_V[ids_K[slot]], top, log_mass)
    target_log_prob_1[0] = np.nan
    if 0 <= target < num_classes:
        target_log_prob_1[0] = log_prob(logits_V[target], top, log_mass)
    alive, mean, variance = _moments(logits_V, top)
    stats_4[0], stats_4[1] = log_mass - dot / mass, mean - log_mass
    stats_4[2], stats_4[3] = np.sqrt(variance), alive
    for i in range(num_classes):  # an assignment of the whole array is not vectorised
        x_V[i] = logits_V[i]
    for slot in range(exact):
        if ids_K[slot] < num_classes:
            x_V[ids_K[slot]] = -np.inf
    others = LOWEST_KEY
    for i in range(num_classes):
        others = max(others, key_of(x_V[i]))
    for g in range(len(tail_G)):
        tail_G[g] = -np.inf
    if others == key_of(np.float32(-np.inf)):
        return
    others_top = number_of(others)
    below = float(others_top) - top - log_mass
    for g in range(len(sum_G)):
        sum_G[g] = 0.0
    if len(eighths_G):
        _power_sums(x_V, others_top, sum_G)
    else:
        _free_sums(x_V, others_top, beta_G, sum_G)
    for g in range(len(beta_G)):
        place = eighths_G[g] - 1 if len(eighths_G) else g
        tail_G[g] = np.log(sum_G[place]) + below * beta_G[g]
