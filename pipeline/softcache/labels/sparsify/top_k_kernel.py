"""The k largest of each row, compiled.

Arrays are filled by loops: numba takes two seconds to compile what reports the shapes of an assignment.

A threshold that is surely low enough (the k-th largest of the maxima of 2k disjoint sets of classes) is found first; few
others lie above it, and those are sorted.

Shape suffixes: `P` positions, `V` classes, `K` slots, `S` sets, `N` found.
"""

# numba gives these functions their types; by mypy's rules, which are Python's, every number would be another one.
# mypy: disable-error-code="no-untyped-def,assignment,call-arg,var-annotated,misc"

from __future__ import annotations

import numpy as np

from softcache.labels.sparsify.float_bits import (
    LANES,
    LOWEST_KEY,
    above_bits,
    first_bit,
    key_of,
    njit_fastmath,
    num_bits,
    reaching_bits,
    vectorised_part,
)

__all__ = ["fill_largest", "floor_key", "reaching", "select_largest", "sorted_ids"]

_FEW = 256  # of so many, counting the larger ones of each is faster than a radix sort


@vectorised_part
def floor_key(key_V, k, peak_S):
    """A key that at least k keys reach, and seldom many more."""
    num_sets = len(peak_S)
    for i in range(num_sets):
        peak_S[i] = key_V[i]
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


@vectorised_part
def _radix_sorted(key_N, id_N, many, key_scratch_N, id_scratch_N):
    """Sorts the first keys and their ids by key, descending, equal ones as they are; returns the ids."""
    low, high = np.int64(key_N[0]), np.int64(key_N[0])
    for i in range(many):
        low, high = min(low, np.int64(key_N[i])), max(high, np.int64(key_N[i]))
    place = np.empty(256, np.int32)
    shift = np.int64(0)
    while (high - low) >> shift:
        for digit in range(256):
            place[digit] = 0
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


@vectorised_part
def reaching(key_V, floor, key_N, id_N):
    """Writes the keys that are at least `floor` and their ids, in order; returns how many."""
    whole, many = len(key_V) // LANES * LANES, 0
    for start in range(0, whole, LANES):
        bits = reaching_bits(key_V, start, floor)
        while bits:
            i = start + first_bit(bits)
            key_N[many], id_N[many] = key_V[i], i
            many += 1
            bits &= bits - np.uint32(1)
    for i in range(whole, len(key_V)):
        if key_V[i] >= floor:
            key_N[many], id_N[many] = key_V[i], i
            many += 1
    return many


@vectorised_part
def _ranked(key_N, id_N, many, used_N, ids_K):
    """Writes the ids of the largest of a few keys, descending, equal ones as they are: each at the number of larger ones."""
    for i in range(many):
        used_N[i] = 0
    for i in range(many, -(-many // LANES) * LANES):
        key_N[i] = LOWEST_KEY
    for i in range(many):
        rank = 0
        for start in range(0, many, LANES):
            rank += num_bits(above_bits(key_N, start, key_N[i]))
        place = rank + used_N[rank]
        used_N[rank] += 1
        if place < len(ids_K):
            ids_K[place] = id_N[i]


@vectorised_part
def sorted_ids(key_2N, id_2N, many, ids_K):
    """Writes the ids of the largest of the first keys [0], descending, equal ones as they are; the arrays have LANES more
    than there can be keys."""
    if many <= _FEW:
        _ranked(key_2N[0], id_2N[0], many, key_2N[1], ids_K)
    else:
        id_N = _radix_sorted(key_2N[0], id_2N[0], many, key_2N[1], id_2N[1])
        for i in range(len(ids_K)):
            ids_K[i] = id_N[i]


@vectorised_part
def select_largest(key_V, peak_S, key_2V, id_2V, ids_K):
    """Writes the ids of the largest keys, descending; equal ones by ascending id."""
    floor = floor_key(key_V, len(ids_K), peak_S) if len(peak_S) else LOWEST_KEY
    many = reaching(key_V, floor, key_2V[0], id_2V[0])
    sorted_ids(key_2V, id_2V, many, ids_K)


@njit_fastmath
def fill_largest(values_PV, ids_PK):
    """Writes the ids of the largest float32 values of each row, descending; equal ones by ascending id."""
    num_rows, num_classes = values_PV.shape
    k = ids_PK.shape[1]
    peak_S, key_V = np.empty(2 * k if 4 * k <= num_classes else 0, np.int32), np.empty(num_classes, np.int32)
    key_2V, id_2V = np.empty((2, num_classes + LANES), np.int32), np.empty((2, num_classes), np.int32)
    for row in range(num_rows):
        values_V = values_PV[row]
        for i in range(num_classes):
            key_V[i] = key_of(values_V[i])
        select_largest(key_V, peak_S, key_2V, id_2V, ids_PK[row])
