"""Draws of classes of float32 rows on the CPU, compiled; the classes that the policies' operations of torch draw.

Without replacement a class has the priority log q - log u (`policies.hybrid`). The logarithm of u is first taken off the
bits of a float, 0.09 too low at most, to base 2; only what may be among the highest then gets its own, in float64. With
replacement weights are summed in blocks, among which the block of a draw is searched, and then its class in there.

Shape suffixes: `P` positions, `V` classes, `K` slots, `N` draws, `S` sets, `B` blocks.
"""

# numba gives these functions their types; by mypy's rules, which are Python's, every number would be another one.
# mypy: disable-error-code="no-untyped-def,assignment,call-arg,var-annotated,misc"

from __future__ import annotations

import math

import numpy as np

from softcache.hashing.splitmix import SPLITMIX64_GAMMA
from softcache.labels.sparsify.float_bits import (
    LANES,
    LN_2,
    LOWEST_KEY,
    key_of,
    njit_fastmath,
    vectorised_part,
)
from softcache.labels.sparsify.kernels import is_faulty, log_prob, mass_of, number_of, range_of
from softcache.labels.sparsify.top_k_kernel import floor_key, reaching, select_largest, sorted_ids

__all__ = ["draw_by_priority", "draw_by_weight"]

_GAMMA = np.uint64(SPLITMIX64_GAMMA % 2**64)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_STEP = 2.0**-52
_BLOCK = 32
_FEWEST = np.int32(16)
"""Of the 31 bits of u that are looked at first: a smaller number would have too few digits."""
_SLACK = np.float32(0.2)
"""Of priorities by bits, to base 2: 0.087 of the logarithm, 0.088 of the bits left out, and rounding."""
_ROUNDING = np.float32(1e-6)
_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.4426950408889634, 6.93147180369123816490e-01, 1.90821492927058770002e-10
_MAGIC, _LEAST = 1.5 * 2.0**52, -708.0
# Taylor coefficients of e^r; on half of ln 2 to either side the rest after the 13th power is below 1e-17.
_C3, _C4, _C5, _C6, _C7, _C8, _C9, _C10, _C11, _C12, _C13 = (1.0 / math.factorial(n) for n in range(3, 14))


@vectorised_part
def _mixed(counter):
    """The output of splitmix64, as of `hashing.splitmix`."""
    x = (counter ^ (counter >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def _of_bits(mixed):
    return (np.float64(mixed >> np.uint64(12)) + 0.5) * _STEP


_uniform = vectorised_part(_of_bits, fastmath=False)
"""As of `sampled.uniform`."""


def _in_order(log_prob, exponent, uniform):
    return log_prob * exponent - np.float32(np.log(uniform))


_priority = vectorised_part(_in_order, fastmath=False)
"""Rounded as torch rounds it."""


def _power(y):
    """e^y of a float64 of at most 0, 0 below e^-708; within two units in the last place."""
    bounded = max(y, _LEAST)
    shifted = bounded * _LOG2_E + _MAGIC
    whole = shifted - _MAGIC
    r = (bounded - whole * _LN2_HIGH) - whole * _LN2_LOW
    low = ((_C13 * r + _C12) * r + _C11) * r + _C10
    middle = (((low * r + _C9) * r + _C8) * r + _C7) * r + _C6
    series = (((((middle * r + _C5) * r + _C4) * r + _C3) * r + 0.5) * r + 1.0) * r + 1.0
    bits = np.float64(shifted).view(np.int64)
    power = np.int64((bits + np.int64(1023)) << np.int64(52)).view(np.float64)
    return series * power if y >= _LEAST else 0.0


_exp64 = vectorised_part(_power, fastmath={"contract"})


@vectorised_part
def _fill_keys(logits_V, top, scale, seed, key_V):
    """Writes keys of priorities by bits, to base 2; returns the least of the numbers that were looked at."""
    least = np.int32(2**31 - 1)
    step = np.float32(2.0**-23)
    for i in range(len(logits_V)):
        high = np.int32(_mixed(seed + np.uint64(i + 1) * _GAMMA) >> np.uint64(33))
        least = min(least, high)
        key_V[i] = key_of((logits_V[i] - top) * scale - np.float32(key_of(np.float32(high))) * step)
    return least


@njit_fastmath
def draw_by_priority(logits_PV, k, exponent, seeds_P, ids_PK, threshold_P, is_tied_P):
    """Writes the k largest classes of each row, then those drawn of the others, the most likely first, V in unused slots.

    Args:
        logits_PV: float32, contiguous.
        exponent: float32, of the probabilities.
        seeds_P: uint64.
        ids_PK: out, int64; K - k classes are drawn, and K is at most V.
        threshold_P: out, float32, the highest priority of those that were not drawn.
        is_tied_P: out, bool, whether that is one of more classes than there are slots left for.
    """
    num_rows, num_classes = logits_PV.shape
    draws = ids_PK.shape[1] - k
    count = draws + 1
    peak_S = np.empty(2 * k if 4 * k <= num_classes else 0, np.int32)
    drawn_peak_S = np.empty(2 * count if 4 * count <= num_classes else 0, np.int32)
    key_V, lowest = np.empty(num_classes, np.int32), key_of(np.float32(-np.inf))
    key_2V, id_2V = np.empty((2, num_classes + LANES), np.int32), np.empty((2, num_classes), np.int32)
    found_V, class_V, first_N = (
        np.empty(num_classes, np.int32),
        np.empty(num_classes, np.int32),
        np.empty(count, np.int64),
    )
    for row in range(num_rows):
        logits_V, ids_K, seed = logits_PV[row], ids_PK[row], seeds_P[row]
        is_tied_P[row] = False
        peak, trough = LOWEST_KEY, np.int32(2**31 - 1)
        for i in range(num_classes):
            key = key_of(logits_V[i])
            key_V[i] = key
            peak, trough = max(peak, key), min(trough, key)
        if is_faulty(peak, trough):
            for slot in range(len(ids_K)):
                ids_K[slot] = slot
            threshold_P[row] = np.nan
            continue
        select_largest(key_V, peak_S, key_2V, id_2V, ids_K[:k])
        top = number_of(peak)
        log_mass = np.log(mass_of(logits_V, top)[0])
        slack = _SLACK
        if _fill_keys(logits_V, top, np.float32(exponent / LN_2), seed, key_V) < _FEWEST:
            slack = np.float32(0)
            for i in range(num_classes):
                u = _uniform(_mixed(seed + np.uint64(i + 1) * _GAMMA))
                key_V[i] = key_of(_priority(log_prob(logits_V[i], top, log_mass), exponent, u))
        for slot in range(k):
            key_V[ids_K[slot]] = LOWEST_KEY
        floor = floor_key(key_V, count, drawn_peak_S) if len(drawn_peak_S) else LOWEST_KEY
        if floor > lowest:
            value = number_of(floor)
            floor = key_of(value - (slack + np.float32(_ROUNDING * abs(value))))
        many = reaching(key_V, max(floor, np.int32(LOWEST_KEY + 1)), found_V, class_V)
        for i in range(many):
            number = np.int64(class_V[i])
            u = _uniform(_mixed(seed + np.uint64(number + 1) * _GAMMA))
            found_V[i] = key_of(_priority(log_prob(logits_V[number], top, log_mass), exponent, u))
            key_2V[0, i], id_2V[0, i] = found_V[i], i
        threshold = lowest
        if many >= count:
            sorted_ids(key_2V, id_2V, many, first_N)
            threshold = found_V[first_N[draws]]
        taken = 0
        for i in range(many):
            if found_V[i] > threshold:
                key_2V[0, taken] = key_of(log_prob(logits_V[class_V[i]], top, log_mass))
                id_2V[0, taken] = class_V[i]
                taken += 1
        is_tied_P[row] = threshold > lowest and taken < draws
        threshold_P[row] = number_of(threshold)
        ids_K[k + taken :] = num_classes
        sorted_ids(key_2V, id_2V, taken, ids_K[k : k + taken])


@njit_fastmath
def draw_by_weight(logits_PV, exponent, seeds_P, draws, ids_PK, counts_PK):
    """Writes the classes of so many draws with replacement, the most likely first, V in unused slots, and their counts.

    Args:
        logits_PV: float32, contiguous.
        exponent: float64, of the probabilities.
        seeds_P: uint64.
        ids_PK, counts_PK: out, int64; K is the smaller of V and the number of draws.
    """
    num_rows, num_classes = logits_PV.shape
    num_blocks = -(-num_classes // _BLOCK)
    weight_V, reached_B = np.empty(num_blocks * _BLOCK), np.empty(num_blocks + 1)
    weight_V[num_classes:] = 0.0
    reached_B[0] = 0.0
    key_2N, id_2N = np.empty((2, draws + LANES), np.int32), np.empty((2, draws), np.int32)
    drawn_N, order_N, counts_N = (
        np.empty(draws, np.int64),
        np.empty(draws, np.int64),
        np.empty(draws, np.int64),
    )
    for row in range(num_rows):
        logits_V, ids_K, counts_K = logits_PV[row], ids_PK[row], counts_PK[row]
        peak, trough = range_of(logits_V)
        if is_faulty(peak, trough):
            for slot in range(len(ids_K)):
                ids_K[slot] = slot
            counts_K[:] = 0
            counts_K[0] = draws
            continue
        top = number_of(peak)
        log_mass = np.log(mass_of(logits_V, top)[0])
        for i in range(num_classes):
            weight_V[i] = _exp64(np.float64(log_prob(logits_V[i], top, log_mass)) * exponent)
        for block in range(num_blocks):
            whole = 0.0
            for i in range(block * _BLOCK, (block + 1) * _BLOCK):
                whole += weight_V[i]
            reached_B[block + 1] = reached_B[block] + whole
        for n in range(draws):
            u = _uniform(_mixed(seeds_P[row] + np.uint64(n + 1) * _GAMMA))
            key_2N[0, n], id_2N[0, n] = -_class_at(u * reached_B[num_blocks], weight_V, reached_B), n
            order_N[n] = -key_2N[0, n]
        sorted_ids(key_2N, id_2N, draws, drawn_N)
        used = 0
        for n in range(draws):
            number = order_N[drawn_N[n]]
            if used > 0 and id_2N[1, used - 1] == number:
                counts_N[used - 1] += 1
            else:
                id_2N[1, used], counts_N[used] = number, 1
                used += 1
        for n in range(used):
            drawn_N[n] = id_2N[1, n]
            key_2N[0, n] = key_of(log_prob(logits_V[drawn_N[n]], top, log_mass))
        for n in range(used):
            id_2N[0, n] = n
        sorted_ids(key_2N, id_2N, used, order_N[:used])
        ids_K[used:], counts_K[used:] = num_classes, 0
        for n in range(used):
            ids_K[n], counts_K[n] = drawn_N[order_N[n]], counts_N[order_N[n]]


@vectorised_part
def _class_at(wanted, weight_V, reached_B):
    """The first class up to which weights sum to more than that."""
    low, high = 0, len(reached_B) - 2  # blocks
    while low < high:
        middle = (low + high + 1) >> 1
        if reached_B[middle] <= wanted:
            low = middle
        else:
            high = middle - 1
    reached, last = reached_B[low], low * _BLOCK
    for i in range(low * _BLOCK, (low + 1) * _BLOCK):
        if weight_V[i] > 0.0:
            last = i
            reached += weight_V[i]
            if reached > wanted:
                break
    return last
