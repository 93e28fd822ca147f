"""Rows of logits into their gradients, compiled for CPUs: two or three passes over a row that stays in the cache.

A loss that is linear in the student's log-masses, with weights w of the kept classes and of the tail and W their sum,
constants o of each, and cross-entropy of weight h:

    loss    = factor (sum w_k (o_k - log s_k) + w_tail (o_tail - log s_tail)) + h (log Z - z_y)
    d / d z = (factor / T) (W s_k - w_k) + h (q_k - [k = y])                              k kept
              (factor / T) (W s_tail - w_tail) s_j / s_tail + h (q_j - [j = y])           j dropped

s is the student at T and q at 1. The dropped classes are summed by themselves, so that they are right however little
they weigh. At T = 1 one exponential serves both parts; at 2, 3, 4 and 8 the other one is a power of the first.

Importing this module takes numba along, so import it where it is used.

Shape suffixes: `P` positions, `V` classes, `K` kept classes.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from softcache.losses.cpu_kernel import exp_shifted, largest, total
from softcache.runtime.jit import njit_in_subprocess, njit_inline

__all__ = ["mix_records", "mix_rows"]


_LANES = 64
# Of sums against a peak that is not their own: an exponent of 16 is rounded to 1e-6, and e^60 can be multiplied.
_LEAST, _LEAST_AT_1 = math.exp(-16.0), math.exp(-60.0)
_sum = partial(njit_inline, fastmath={"reassoc", "contract"})


@njit_inline
def _largest_of_many(x_V, peak_L):  # type: ignore[no-untyped-def]
    """`largest`, by as many comparisons at once as there are lanes."""
    whole = len(x_V) // _LANES * _LANES
    if whole == 0:
        return largest(x_V)
    peak_L[:] = np.float32(-np.inf)
    for start in range(0, whole, _LANES):
        part = x_V[start : start + _LANES]
        for lane in range(_LANES):
            peak_L[lane] = part[lane] if part[lane] > peak_L[lane] else peak_L[lane]
    return max(largest(peak_L), largest(x_V[whole:]))


@njit_inline
def _normalise(log_rest, kept_K, shares_K):  # type: ignore[no-untyped-def]
    """Writes the kept classes' shares and returns the log of the normaliser, of float32 logits of kept and rest."""
    top = max(np.float64(largest(kept_K)), log_rest)
    if not top > -np.inf:
        top = 0.0  # all masked: a NaN or -inf, as the definition has it
    exp_shifted(kept_K, np.float32(top), shares_K)
    # The peak was rounded to float32: the rest is taken against the same one.
    top = np.float64(np.float32(top))
    norm = total(shares_K) + math.exp(log_rest - top)
    inverse = np.float32(1.0 / norm)
    for slot in range(len(shares_K)):
        shares_K[slot] *= inverse
    return top + math.log(norm)


@njit_inline
def _soften(z_V, scaled_V, beta, peak, out_V):  # type: ignore[no-untyped-def]
    """Writes e^(beta (z - peak)) of the classes that are not taken out; returns their sum."""
    if beta == 1.0:
        exp_shifted(z_V, peak, out_V)
    else:
        for j in range(len(z_V)):
            scaled_V[j] = (z_V[j] - peak) * beta
        exp_shifted(scaled_V, np.float32(0), out_V)
    return total(out_V)


@_sum
def _sum_of_powers(soft_V, T):  # type: ignore[no-untyped-def]
    """The sum of soft^T, T from 2 to 4 or 8."""
    whole = 0.0
    if T == 2.0:
        for j in range(len(soft_V)):
            whole += soft_V[j] * soft_V[j]
    elif T == 3.0:
        for j in range(len(soft_V)):
            whole += soft_V[j] * soft_V[j] * soft_V[j]
    elif T == 4.0:
        for j in range(len(soft_V)):
            square = soft_V[j] * soft_V[j]
            whole += square * square
    else:
        for j in range(len(soft_V)):
            square = soft_V[j] * soft_V[j]
            fourth = square * square
            whole += fourth * fourth
    return whole


@njit_inline
def _second_sum(z_V, soft_V, scaled_V, T, is_power, peak, hard_V):  # type: ignore[no-untyped-def]
    """The sum of e^(z - peak), of powers of `soft_V` or written to `hard_V`."""
    if is_power:
        return _sum_of_powers(soft_V, T)
    return _soften(z_V, scaled_V, np.float32(1), peak, hard_V)


@njit_inline
def _add_powers(soft_V, T, to_soft, to_hard, out_V):  # type: ignore[no-untyped-def]
    """Writes to_soft * soft + to_hard * soft^T."""
    if T == 2.0:
        for j in range(len(soft_V)):
            out_V[j] = soft_V[j] * (to_soft + to_hard * soft_V[j])
    elif T == 3.0:
        for j in range(len(soft_V)):
            out_V[j] = soft_V[j] * (to_soft + to_hard * (soft_V[j] * soft_V[j]))
    elif T == 4.0:
        for j in range(len(soft_V)):
            square = soft_V[j] * soft_V[j]
            out_V[j] = soft_V[j] * (to_soft + to_hard * (square * soft_V[j]))
    else:
        for j in range(len(soft_V)):
            square = soft_V[j] * soft_V[j]
            cube = square * soft_V[j]
            out_V[j] = soft_V[j] * (to_soft + to_hard * (square * square * cube))


@_sum
def _value_of(weights_K, own_K, scaled_K, log_norm):  # type: ignore[no-untyped-def]
    value = 0.0
    for slot in range(len(weights_K)):
        term = weights_K[slot] * (np.float64(own_K[slot]) - (np.float64(scaled_K[slot]) - log_norm))
        value += term if weights_K[slot] != 0.0 else 0.0
    return value


@njit_inline
def _mix_row(  # type: ignore[no-untyped-def]
    z_V,
    ids_K,
    own_K,
    own_tail,
    weights_K,
    weight_tail,
    factor,
    T,
    hard,
    target,
    scratch_3V,
    scratch_5K,
    peak_L,
):
    """Turns the logits of a row into their gradient, in place; returns the loss."""
    classes, slots = len(z_V), len(ids_K)
    beta, slope, none = np.float32(1.0 / T), factor / T, np.float32(-np.inf)
    soft_V, hard_V, scaled_V = scratch_3V[0], scratch_3V[1], scratch_3V[2]
    kept_K, scaled_K, s_K, q_K, gradient_K = (
        scratch_5K[0],
        scratch_5K[1],
        scratch_5K[2],
        scratch_5K[3],
        scratch_5K[4],
    )
    at_target = np.float64(z_V[target]) if hard > 0.0 else 0.0
    weight = np.float64(weight_tail) + total(weights_K)
    for slot in range(slots):
        number = ids_K[slot]
        kept_K[slot] = z_V[number] if number < classes else none
    for slot in range(slots):
        scaled_K[slot] = kept_K[slot] * beta
    for slot in range(slots):
        if ids_K[slot] < classes:
            z_V[ids_K[slot]] = none
    # The rest is summed against the largest of the kept, which spares a pass for its own largest, unless they are far apart.
    peak, is_power, both = (
        largest(kept_K),
        T == 2.0 or T == 3.0 or T == 4.0 or T == 8.0,
        hard > 0.0 and beta != 1.0,
    )
    rest, rest_at_1 = 0.0, 1.0
    if peak > none:
        rest = _soften(z_V, scaled_V, beta, peak, soft_V)
        if both:
            rest_at_1 = _second_sum(z_V, soft_V, scaled_V, T, is_power, peak, hard_V)
    if rest < _LEAST or rest > 1.0 / _LEAST or rest_at_1 < _LEAST_AT_1 or rest_at_1 > 1.0 / _LEAST_AT_1:
        peak = _largest_of_many(z_V, peak_L)
        peak = peak if peak > none else np.float32(0)
        rest = _soften(z_V, scaled_V, beta, peak, soft_V)
        if both:
            rest_at_1 = _second_sum(z_V, soft_V, scaled_V, T, is_power, peak, hard_V)
    log_rest = np.float64(peak * beta) + math.log(rest) if rest != 0.0 else -np.inf
    log_norm = _normalise(log_rest, scaled_K, s_K)
    value = _value_of(weights_K, own_K, scaled_K, log_norm)
    if weight_tail != 0.0:
        value += weight_tail * (np.float64(own_tail) - (log_rest - log_norm))
    loss = factor * value
    by_soft, by_hard = 0.0, 0.0
    if rest != 0.0:  # also where it is NaN
        by_soft = slope * (weight * math.exp(log_rest - log_norm) - weight_tail) / rest

    if hard > 0.0:
        if beta == 1.0:
            log_z = log_norm
            for slot in range(slots):
                q_K[slot] = s_K[slot]
            by_soft += hard * math.exp(log_rest - log_norm) / rest if rest != 0.0 else 0.0
        else:
            rest = rest_at_1
            log_rest = np.float64(peak) + math.log(rest) if rest != 0.0 else -np.inf
            log_z = _normalise(log_rest, kept_K, q_K)
            by_hard = hard * math.exp(log_rest - log_z) / rest if rest != 0.0 else 0.0
        loss += hard * (log_z - at_target)

    to_soft, to_hard = np.float32(by_soft), np.float32(by_hard)
    if by_hard == 0.0:
        for j in range(classes):
            z_V[j] = to_soft * soft_V[j]
    elif is_power:
        _add_powers(soft_V, T, to_soft, to_hard, z_V)
    else:
        for j in range(classes):
            z_V[j] = to_soft * soft_V[j] + to_hard * hard_V[j]
    of_s, of_w, of_q = np.float32(slope * weight), np.float32(slope), np.float32(hard)
    if hard > 0.0:
        for slot in range(slots):
            gradient_K[slot] = of_s * s_K[slot] - of_w * weights_K[slot] + of_q * q_K[slot]
    else:
        for slot in range(slots):
            gradient_K[slot] = of_s * s_K[slot] - of_w * weights_K[slot]
    for slot in range(slots):
        if ids_K[slot] < classes:
            z_V[ids_K[slot]] = gradient_K[slot]
    if hard > 0.0:
        z_V[target] -= of_q
    return loss


@njit_in_subprocess
def mix_rows(  # type: ignore[no-untyped-def]
    z_PV,
    ids_PK,
    own_PK,
    own_tail_P,
    weights_PK,
    weight_tail_P,
    factor,
    T,
    hard_P,
    targets_P,
    loss_P,
    first,
    stop,
):
    """Turns rows [first, stop) of logits into gradients, in place.

    Args:
        z_PV: [P, V] float32, contiguous.
        ids_PK: [P, K] int64; V in unused slots; otherwise each at most once a row.
        own_PK, own_tail_P: [P, K] and [P] float32, o; not read where w is 0.
        weights_PK, weight_tail_P: [P, K] and [P] float32, w; 0 in unused slots.
        factor: of the soft part.
        T: temperature of the soft part.
        hard_P: [P] float32, the weight of cross-entropy; where it is 0 the target is not read.
        targets_P: [P] int64.
        loss_P: out, float32.
    """
    scratch_3V = np.empty((3, z_PV.shape[1]), np.float32)
    scratch_5K, peak_L = np.empty((5, ids_PK.shape[1]), np.float32), np.empty(_LANES, np.float32)
    for row in range(first, stop):
        loss_P[row] = _mix_row(
            z_PV[row], ids_PK[row], own_PK[row], own_tail_P[row], weights_PK[row], weight_tail_P[row],
            factor, T, np.float64(hard_P[row]), targets_P[row], scratch_3V, scratch_5K, peak_L,
        )  # fmt: skip


@njit_in_subprocess
def mix_records(  # type: ignore[no-untyped-def]
    z_PV,
    ids_PK,
    log_masses_PK,
    log_tail_P,
    is_divergence,
    factor,
    T,
    hard_P,
    targets_P,
    loss_P,
    bad_N,
    first,
    stop,
):
    """The same for a record as it is: w are the masses, normalised here, and o their logs, or 0.

    Args:
        ids_PK: [P, K] integer; V in unused slots.
        log_masses_PK, log_tail_P: [P, K] and [P] float32, log-masses at T of the kept classes, -inf in unused slots, and of
            all others together; not normalised.
        is_divergence: whether o are the logs of w.
        bad_N: out, the first of these rows with an id out of range goes to the end; stops there. Others are left.
    """
    classes, slots = z_PV.shape[1], ids_PK.shape[1]
    scratch_3V, scratch_5K = np.empty((3, classes), np.float32), np.empty((5, slots), np.float32)
    peak_L = np.empty(_LANES, np.float32)
    own_K, weights_K, ids_K = (
        np.empty(slots, np.float32),
        np.empty(slots, np.float32),
        np.empty(slots, np.int64),
    )
    for row in range(first, stop):
        tail = np.float64(log_tail_P[row])
        num_bad = 0
        for slot in range(slots):
            number, mass = np.int64(ids_PK[row, slot]), log_masses_PK[row, slot]
            ids_K[slot], own_K[slot] = number, mass
            is_unused = (number == classes) & (mass == -np.inf)
            num_bad += 0 if ((number >= 0) & (number < classes)) | is_unused else 1
        if num_bad:
            bad_N[0] = row
            return
        log_norm = _normalise(tail, own_K, weights_K)
        own_tail = np.float32(tail - log_norm)
        weight_tail = np.float32(math.exp(tail - log_norm))
        for slot in range(slots):
            own_K[slot] = own_K[slot] - log_norm if is_divergence else np.float32(0)
        loss_P[row] = _mix_row(
            z_PV[row], ids_K, own_K, own_tail if is_divergence else np.float32(0), weights_K, weight_tail,
            factor, T, np.float64(hard_P[row]), targets_P[row], scratch_3V, scratch_5K, peak_L,
        )  # fmt: skip
