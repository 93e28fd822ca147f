"""Rows of logits into their gradients, compiled for CPUs: two or three passes over a row that stays in the cache.

A loss that is linear in the student's log-masses, with weights w of the kept classes and of the tail and W their sum,
constants o of each, and cross-entropy of weight h:

    loss    = factor (sum w_k (o_k - log s_k) + w_tail (o_tail - log s_tail)) + h (log Z - z_y)
    d / d z = (factor / T) (W s_k - w_k) + h (q_k - [k = y])                              k kept
              (factor / T) (W s_tail - w_tail) s_j / s_tail + h (q_j - [j = y])           j dropped

s is the student at T and q at 1. The dropped classes are summed by themselves, so that they are right however little
they weigh. At T = 1 one exponential serves both parts; at 2, 4 and 8 the other one is a power of the first.

Importing this module takes numba along, so import it where it is used.

Shape suffixes: `P` positions, `V` classes, `K` kept classes.
"""

from __future__ import annotations

import math

import numpy as np

from softcache.losses.cpu_kernel import exp_shifted, largest, total
from softcache.runtime.jit import njit_in_subprocess, njit_inline

__all__ = ["mix_records", "mix_rows"]


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
    for slot in range(len(shares_K)):
        shares_K[slot] /= norm
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


@njit_inline
def _raise(soft_V, times, out_V):  # type: ignore[no-untyped-def]
    """Writes soft^(2^times); returns the sum."""
    for j in range(len(soft_V)):
        square = soft_V[j] * soft_V[j]
        out_V[j] = square
    for _ in range(times - 1):
        for j in range(len(out_V)):
            out_V[j] *= out_V[j]
    return total(out_V)


@njit_inline
def _mix_row(  # type: ignore[no-untyped-def]
    z_V, ids_K, own_K, own_tail, weights_K, weight_tail, factor, T, hard, target, scratch_3V, scratch_4K
):
    """Turns the logits of a row into their gradient, in place; returns the loss."""
    classes, slots = len(z_V), len(ids_K)
    beta, slope, none = np.float32(1.0 / T), factor / T, np.float32(-np.inf)
    soft_V, hard_V, scaled_V = scratch_3V[0], scratch_3V[1], scratch_3V[2]
    kept_K, scaled_K, s_K, q_K = scratch_4K[0], scratch_4K[1], scratch_4K[2], scratch_4K[3]
    at_target = np.float64(z_V[target]) if hard > 0.0 else 0.0
    weight = np.float64(weight_tail)
    for slot in range(slots):
        number = ids_K[slot]
        kept_K[slot] = z_V[number] if number < classes else none
        scaled_K[slot] = kept_K[slot] * beta
        weight += weights_K[slot]
    for slot in range(slots):
        if ids_K[slot] < classes:
            z_V[ids_K[slot]] = none
    peak = largest(z_V)
    peak = peak if peak > none else np.float32(0)

    rest = _soften(z_V, scaled_V, beta, peak, soft_V)
    log_rest = np.float64(peak * beta) + math.log(rest) if rest != 0.0 else -np.inf
    log_norm = _normalise(log_rest, scaled_K, s_K)
    value = 0.0
    for slot in range(slots):
        if weights_K[slot] != 0.0:
            value += weights_K[slot] * (np.float64(own_K[slot]) - (scaled_K[slot] - log_norm))
    if weight_tail != 0.0:
        value += weight_tail * (np.float64(own_tail) - (log_rest - log_norm))
    loss = factor * value
    by_soft, by_hard = 0.0, 0.0
    if rest != 0.0:  # also where it is NaN
        by_soft = slope * (weight * math.exp(log_rest - log_norm) - weight_tail) / rest

    if hard > 0.0:
        if beta == 1.0:
            log_z = log_norm
            q_K[:] = s_K
            by_soft += hard * math.exp(log_rest - log_norm) / rest if rest != 0.0 else 0.0
        else:
            doublings = 1 if T == 2.0 else 2 if T == 4.0 else 3 if T == 8.0 else 0
            if doublings > 0:
                rest = _raise(soft_V, doublings, hard_V)
            else:
                rest = _soften(z_V, scaled_V, np.float32(1), peak, hard_V)
            log_rest = np.float64(peak) + math.log(rest) if rest != 0.0 else -np.inf
            log_z = _normalise(log_rest, kept_K, q_K)
            by_hard = hard * math.exp(log_rest - log_z) / rest if rest != 0.0 else 0.0
        loss += hard * (log_z - at_target)

    to_soft, to_hard = np.float32(by_soft), np.float32(by_hard)
    if by_hard != 0.0:
        for j in range(classes):
            z_V[j] = to_soft * soft_V[j] + to_hard * hard_V[j]
    else:
        for j in range(classes):
            z_V[j] = to_soft * soft_V[j]
    for slot in range(slots):
        if ids_K[slot] < classes:
            of_soft = slope * (weight * s_K[slot] - weights_K[slot])
            z_V[ids_K[slot]] = of_soft + (hard * q_K[slot] if hard > 0.0 else 0.0)
    if hard > 0.0:
        z_V[target] -= np.float32(hard)
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
    scratch_4K = np.empty((4, ids_PK.shape[1]), np.float32)
    for row in range(first, stop):
        loss_P[row] = _mix_row(
            z_PV[row], ids_PK[row], own_PK[row], own_tail_P[row], weights_PK[row], weight_tail_P[row],
            factor, T, np.float64(hard_P[row]), targets_P[row], scratch_3V, scratch_4K,
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
    scratch_3V, scratch_4K = np.empty((3, classes), np.float32), np.empty((4, slots), np.float32)
    own_K, weights_K, ids_K = (
        np.empty(slots, np.float32),
        np.empty(slots, np.float32),
        np.empty(slots, np.int64),
    )
    for row in range(first, stop):
        tail = np.float64(log_tail_P[row])
        for slot in range(slots):
            ids_K[slot] = ids_PK[row, slot]
            own_K[slot] = log_masses_PK[row, slot]
            if not (0 <= ids_K[slot] < classes or (ids_K[slot] == classes and own_K[slot] == -np.inf)):
                bad_N[0] = row
                return
        log_norm = _normalise(tail, own_K, weights_K)
        own_tail = np.float32(tail - log_norm)
        weight_tail = np.float32(math.exp(tail - log_norm))
        for slot in range(slots):
            own_K[slot] = own_K[slot] - log_norm if is_divergence else np.float32(0)
        loss_P[row] = _mix_row(
            z_PV[row], ids_K, own_K, own_tail if is_divergence else np.float32(0), weights_K, weight_tail,
            factor, T, np.float64(hard_P[row]), targets_P[row], scratch_3V, scratch_4K,
        )  # fmt: skip
