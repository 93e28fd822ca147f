"""`losses.direct` for a CPU, compiled: one pass over each row, value and gradient together, on one thread.

For 256 rows of 10 classes torch's thirty operations take several times as long as the numbers in them; this takes
about as long as `F.cross_entropy`. With many classes torch, which may use several threads, is the faster one.

Exponentials are a polynomial (Cephes' expf, Moshier 1984; within 2e-7 of the true value), so that a CPU's vector
instructions do them.

Importing this module takes numba along, so import it where it is used.

Shape suffixes: `P` positions, `V` classes, `K` kept classes.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from softcache.runtime.jit import njit_in_subprocess, njit_inline
from softcache.runtime.vector_math import exp_parts

__all__ = ["exp_shifted", "largest", "mixed_loss", "total"]

_NONE = np.float32(-np.inf)
_LEAST, _ONE, _ZERO = np.float32(-87.0), np.float32(1), np.float32(0)
_exp_parts = njit_inline(exp_parts)


@njit_inline
def exp_shifted(x_V, shift, out_V):  # type: ignore[no-untyped-def]
    """Writes e^(x - shift), 0 below e^-87; x at most `shift`, or NaN."""
    for j in range(len(x_V)):
        t = x_V[j] - shift
        bounded = _LEAST if t < _LEAST else t
        part, power = _exp_parts(bounded)
        value = (part + _ONE) * power
        out_V[j] = _ZERO if t < _LEAST else value


@partial(njit_inline, fastmath={"reassoc"})
def total(x_V):  # type: ignore[no-untyped-def]
    """The sum, float64, in whatever order is fastest."""
    whole = 0.0
    for j in range(len(x_V)):
        whole += x_V[j]
    return whole


@njit_inline
def largest(x_V):  # type: ignore[no-untyped-def]
    """Of those that are numbers; -inf of none."""
    a = b = c = d = _NONE
    whole = len(x_V) // 4 * 4
    for j in range(0, whole, 4):
        a = x_V[j] if x_V[j] > a else a
        b = x_V[j + 1] if x_V[j + 1] > b else b
        c = x_V[j + 2] if x_V[j + 2] > c else c
        d = x_V[j + 3] if x_V[j + 3] > d else d
    for j in range(whole, len(x_V)):
        a = x_V[j] if x_V[j] > a else a
    return max(max(a, b), max(c, d))


@njit_in_subprocess
def mixed_loss(  # type: ignore[no-untyped-def]
    z_PV, log_probs_PK, log_tail_P, ids_PK, targets_P, T, alpha, out_PV
):
    """Writes the gradient by the logits to `out_PV`; returns the mean loss, and -1 or the first row with a bad id or
    target.

    Args:
        z_PV: [P, V] float32, P > 0.
        log_probs_PK: [P, K] float32, log-masses of the kept classes at T, nats; not normalised.
        log_tail_P: [P] float32, that of all other classes together.
        ids_PK: [P, K] integer; V in unused slots.
        targets_P: [P] int64, -100 for none; empty for a loss without cross-entropy.
        T: a number.
        alpha: weight of the soft part, in (0, 1].
        out_PV: [P, V] float32.
    """
    rows, classes = z_PV.shape
    slots, beta, whole = ids_PK.shape[1], np.float32(1.0 / T), 0.0
    soft, slope, hard = alpha * T * T / rows, alpha * T / rows, (1.0 - alpha) / rows
    rest_V, second_V = np.empty(classes, np.float32), np.empty(classes, np.float32)
    log_s_K, p_K, s_K = np.empty(slots), np.empty(slots), np.empty(slots)
    for row in range(rows):
        z_V, out_V = z_PV[row], out_PV[row]
        for j in range(classes):
            rest_V[j] = z_V[j] * beta
        # The kept classes go out of the rest; the peaks of the teacher and of the student's kept.
        peak, top = float(log_tail_P[row]), -np.inf
        for slot in range(slots):
            number = np.int64(ids_PK[row, slot])
            if number < 0 or number > classes:
                return 0.0, row
            peak = max(peak, float(log_probs_PK[row, slot]))
            log_s_K[slot] = z_V[number] * beta if number < classes else -np.inf
            top = max(top, log_s_K[slot])
            if number < classes:
                rest_V[number] = np.float32(-np.inf)
        mass = math.exp(log_tail_P[row] - peak)
        for slot in range(slots):
            p_K[slot] = math.exp(log_probs_PK[row, slot] - peak)
            mass += p_K[slot]
        log_mass = peak + math.log(mass)
        # The student's rest by itself, right however little it weighs, then its normaliser over kept and rest.
        rest_peak = largest(rest_V)
        shift = rest_peak if rest_peak > np.float32(-np.inf) else np.float32(0)
        exp_shifted(rest_V, shift, out_V)
        rest = total(out_V)
        log_rest = -np.inf if rest == 0.0 else shift + math.log(rest)
        top = max(top, float(log_rest))
        norm = math.exp(log_rest - top)
        for slot in range(slots):
            s_K[slot] = math.exp(log_s_K[slot] - top)
            norm += s_K[slot]
        log_norm = top + math.log(norm)

        p_tail = math.exp(log_tail_P[row] - log_mass)
        value = p_tail * (log_tail_P[row] - log_mass - (log_rest - log_norm)) if p_tail > 0.0 else 0.0
        scale = 0.0
        if rest != 0.0:  # also where it is NaN
            scale = slope * (math.exp(log_rest - log_norm) - p_tail) / rest
        for j in range(classes):
            out_V[j] *= np.float32(scale)
        for slot in range(slots):
            number = np.int64(ids_PK[row, slot])
            if number < classes:
                p = p_K[slot] / mass
                out_V[number] = slope * (s_K[slot] / norm - p)
                if p > 0.0:
                    value += p * ((log_probs_PK[row, slot] - log_mass) - (log_s_K[slot] - log_norm))
        whole += soft * value

        if len(targets_P) == 0 or targets_P[row] == -100:
            continue
        target = targets_P[row]
        if target < 0 or target >= classes:
            return 0.0, row
        highest = largest(z_V)
        exp_shifted(z_V, highest, second_V)
        norm = total(second_V)
        whole += hard * (highest + math.log(norm) - z_V[target])
        share = np.float32(hard / norm)
        for j in range(classes):
            out_V[j] += share * second_V[j]
        out_V[target] -= hard
    return whole, -1
