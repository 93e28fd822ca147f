"""The k largest of each row, compiled.

A threshold that is surely low enough (the k-th largest of the maxima of 2k disjoint sets of classes) is found first; few
others lie above it, and those are sorted.

Shape suffixes: `P` positions, `V` classes, `K` slots, `S` sets, `N` found.
"""

# numba gives these functions their types; by mypy's rules, which are Python's, every number would be another one.
# mypy: disable-error-code="no-untyped-def,assignment,call-arg,var-annotated,misc"

from __future__ import annotations

import numpy as np

from softcache.labels.sparsify.float_bits import LOWEST_KEY, key_of, njit_fastmath, vectorised_part

__all__ = ["fill_largest", "select_largest"]


@vectorised_part
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


@vectorised_part
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


@vectorised_part
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


@vectorised_part
def select_largest(key_V, peak_S, is_high_V, key_2V, id_2V, ids_K):
    """Writes the ids of the largest keys, descending; equal ones by ascending id."""
    k = len(ids_K)
    floor = _floor_key(key_V, k, peak_S) if len(peak_S) else LOWEST_KEY
    many = _reaching(key_V, floor, is_high_V, key_2V[0], id_2V[0])
    ids_K[:] = _sorted(key_2V[0], id_2V[0], many, key_2V[1], id_2V[1])[:k]


@njit_fastmath
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
            key_V[i] = key_of(values_V[i])
        select_largest(key_V, peak_S, is_high_V, key_2V, id_2V, ids_PK[row])
