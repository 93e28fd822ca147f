"""Reading packed records into the rows of larger arrays, compiled: planes of bytes in three passes.

Shape suffixes: `R` bytes of a record, `P` positions, `K` slots of a record, `G` grid, `N` rows of the larger arrays.

A plane holds one byte of every position; loops go over blocks of positions, two cache lines of each plane, and within
them over slots. (One line at a time takes a third longer: planes lie far apart, and each is a miss.) Inner loops are over
exactly `BLOCK` positions, so that they become vector instructions, and write to a tile in the fastest cache, which is
turned on its way out. Planes have whole blocks.

A field is given as (start, slots, width); of one that is not there all three are 0. Fields wider than 4 bytes are read
where the scratch memory `number` is uint64.

Importing this module takes numba along, so import it only to decode.
"""

from __future__ import annotations

import numpy as np

from softcache.runtime.jit import compiled, njit_inline

__all__ = ["BLOCK", "heads", "planes_of", "slots", "tails"]

BLOCK, SLOTS = 128, 64
"""Positions, and slots of a tile: 32 KB of 4-byte numbers."""


@compiled
def planes_of(record_PR):  # type: ignore[no-untyped-def]
    """Returns planes [R, P'] of records [P, R], P' the next multiple of `BLOCK`; what is added is 0."""
    rows, size = record_PR.shape
    planes_RP = np.zeros((size, (rows + BLOCK - 1) // BLOCK * BLOCK), np.uint8)
    for first in range(0, rows, BLOCK):
        last = min(first + BLOCK, rows)
        for low in range(0, size, BLOCK):
            for byte in range(low, min(low + BLOCK, size)):
                for row in range(first, last):
                    planes_RP[byte, row] = record_PR[row, byte]
    return planes_RP


@njit_inline
def _read(planes_RP, field, slot, begin, out):  # type: ignore[no-untyped-def]
    """Writes the numbers of a slot in a block, [BLOCK] uint32 or uint64."""
    plane, unsigned = planes_RP[field[0] + slot, begin : begin + BLOCK], out.dtype.type
    for row in range(BLOCK):
        out[row] = plane[row]
    for byte in range(1, field[2]):
        plane, up = planes_RP[field[0] + byte * field[1] + slot, begin : begin + BLOCK], unsigned(8 * byte)
        for row in range(BLOCK):
            out[row] |= unsigned(plane[row]) << up


@njit_inline
def _put_signed(number, scale, out):  # type: ignore[no-untyped-def]
    """Writes what zigzag numbers stand for, times a scale, [BLOCK] float64."""
    if number.itemsize == 4:
        for row in range(BLOCK):
            out[row] = (np.int32(number[row] >> np.uint32(1)) ^ -np.int32(number[row] & np.uint32(1))) * scale
    else:
        for row in range(BLOCK):
            out[row] = (np.int64(number[row] >> np.uint64(1)) ^ -np.int64(number[row] & np.uint64(1))) * scale


@njit_inline
def _put(number, many, begin, out):  # type: ignore[no-untyped-def]
    """Writes the first numbers of a block; numba takes seconds to compile an assignment of slices."""
    for row in range(many):
        out[begin + row] = number[row]


@compiled
def heads(  # type: ignore[no-untyped-def]
    planes_RP, used, finite, first, tail, target, moments, support, step, substep, halves, number, out
):
    """Writes what a record has once into `out`.

    Args:
        halves: [65536] uint32, the bits of float32 of each float16.
        number: scratch memory, [BLOCK].
        out: used_P and finite_P int64, anchor_P float64, mass_P uint64 (bits of the tail at T = 1, or its zigzag steps),
            target_P float32, stats_P4 uint32 (bits).
    """
    used_P, finite_P, anchor_P, mass_P, target_P, stats_P4 = out
    anchor, below = np.empty(BLOCK), np.empty(BLOCK)
    for begin in range(0, len(used_P), BLOCK):
        many = min(BLOCK, len(used_P) - begin)
        _read(planes_RP, used, 0, begin, number)
        _put(number, many, begin, used_P)
        _read(planes_RP, finite, 0, begin, number)
        _put(number, many, begin, finite_P)
        _read(planes_RP, first, 0, begin, number)
        _put_signed(number, substep, anchor)
        _put(anchor, many, begin, anchor_P)
        _read(planes_RP, target, 0, begin, number)
        _put_signed(number, step, below)
        for row in range(many):
            target_P[begin + row] = np.float32(anchor[row] - below[row])
        _read(planes_RP, tail, 0, begin, number)
        _put(number, many, begin, mass_P)
        if moments[1]:
            for slot in range(3):
                _read(planes_RP, moments, slot, begin, number)
                for row in range(many):
                    stats_P4[begin + row, slot] = halves[number[row]]
            _read(planes_RP, support, 0, begin, number)
            for row in range(many):
                stats_P4[begin + row, 3] = number[row]


@compiled
def tails(planes_RP, field, log_count_P, mean_P, log_mass_P, weights, step, number, out_PG):  # type: ignore[no-untyped-def]
    """Writes the tail [P, G] at all temperatures but the first, from the highest down; see `layout`.

    Args:
        number: scratch memory, [BLOCK].
    """
    rows, grid = out_PG.shape
    known, value = np.zeros((grid + 2, BLOCK)), np.empty(BLOCK)
    for begin in range(0, rows, BLOCK):
        many = min(BLOCK, rows - begin)
        for row in range(many):
            known[0, row] = log_count_P[begin + row]
            known[1, row] = mean_P[begin + row]
            known[2, row] = log_mass_P[begin + row]
        for visit in range(grid - 1):
            column = grid + 1 - visit
            _read(planes_RP, field, visit, begin, number)
            _put_signed(number, step, value)
            for other in range(grid + 2):
                weight, of = weights[visit, other], known[other]
                if weight != 0.0:
                    for row in range(BLOCK):
                        value[row] += weight * of[row]
            _put(value, BLOCK, 0, known[column])
        for row in range(many):
            for column in range(3, grid + 2):
                out_PG[begin + row, column - 2] = known[column, row]


@njit_inline
def _used_planes(planes_RP, field):  # type: ignore[no-untyped-def]
    """Returns which planes of a field's upper bytes hold anything but 0, [R] bool."""
    out_R = np.zeros(len(planes_RP), np.bool_)
    for byte in range(field[0] + field[1], field[0] + field[1] * field[2]):
        found = np.uint8(0)
        for row in range(planes_RP.shape[1]):  # without a way out, so that it becomes vector instructions
            found |= planes_RP[byte, row]
        out_R[byte] = found != 0
    return out_R


@njit_inline
def _read_ids(planes_RP, low, high, high_bits, slot, begin, out, most):  # type: ignore[no-untyped-def]
    """Writes the ids of a slot in a block, [BLOCK], and raises `most` to them. What a record has not counts as bits of 0."""
    end = begin + BLOCK
    last = max(low[2] - 1, 0)  # bytes of the ids but the first
    plane = planes_RP[low[0] + slot, begin:end]
    second = planes_RP[low[0] + min(last, 1) * low[1] + slot, begin:end]
    upper = planes_RP[high[0] + slot * high_bits // 8, begin:end]
    of_first = np.uint32(0xFF if low[2] else 0)
    of_second = np.uint32(0xFF if last else 0)
    mask, down, up = np.uint32((1 << high_bits) - 1), np.uint32(slot * high_bits % 8), np.uint32(8 * low[2])
    for row in range(BLOCK):
        number = np.uint32(plane[row]) & of_first | (np.uint32(second[row]) & of_second) << np.uint32(8)
        number |= (np.uint32(upper[row]) >> down & mask) << up
        out[row] = number
        most[row] = max(most[row], number)
    for byte in range(2, low[2]):
        plane, shift = planes_RP[low[0] + byte * low[1] + slot, begin:end], np.uint32(8 * byte)
        for row in range(BLOCK):
            out[row] |= np.uint32(plane[row]) << shift
            most[row] = max(most[row], out[row])


@njit_inline
def _put_rows(tile, places, ends_P, begin, fill, slot_0, slot_1, out_NK):  # type: ignore[no-untyped-def]
    """Writes a tile [slots, rows] to its rows, and `fill` from the end of each on."""
    for row in range(len(places)):
        if places[row] < 0:
            continue
        out = out_NK[places[row], slot_0:slot_1]
        for slot in range(slot_1 - slot_0):
            out[slot] = tile[slot, row]
        for slot in range(max(ends_P[begin + row] - slot_0, 0), slot_1 - slot_0):
            out[slot] = fill


@compiled
def slots(  # type: ignore[no-untyped-def]
    planes_RP,
    low,
    high,
    high_bits,
    gaps,
    used_P,
    finite_P,
    anchor_P,
    step,
    num_classes,
    places_P,
    ids_NK,
    log_probs_NK,
):
    """Writes ids and log-probabilities of positions to the rows `places_P`, none to row -1.

    Returns:
        The highest id of a slot, V not counted; and the lowest number of steps below the first slot, over all positions:
        negative where a sum of steps left its range.
    """
    rows, size = len(places_P), ids_NK.shape[1]
    ids, values = np.empty((SLOTS, BLOCK), ids_NK.dtype), np.empty((SLOTS, BLOCK), np.float32)
    below, anchor = np.empty(BLOCK, np.int32), np.zeros(BLOCK)
    is_used_R = _used_planes(planes_RP, gaps)
    most, least = np.zeros(BLOCK, np.uint32), np.zeros(BLOCK, np.int32)
    for begin in range(0, rows, BLOCK):
        many = min(BLOCK, rows - begin)
        for row in range(many):
            anchor[row] = anchor_P[begin + row]
        for row in range(BLOCK):
            below[row] = 0
        for slot_0 in range(0, size, SLOTS):
            slot_1 = min(slot_0 + SLOTS, size)
            for slot in range(slot_0, slot_1):
                _read_ids(planes_RP, low, high, high_bits, slot, begin, ids[slot - slot_0], most)
            _put_rows(ids, places_P[begin : begin + many], used_P, begin, num_classes, slot_0, slot_1, ids_NK)
            for slot in range(slot_0, slot_1):
                to_values = values[slot - slot_0]
                if slot == 0 or not gaps[1]:
                    for row in range(BLOCK):
                        to_values[row] = np.float32(anchor[row])
                    continue
                for byte in range(1, gaps[2]):
                    if is_used_R[gaps[0] + byte * gaps[1] + slot - 1]:
                        plane = planes_RP[gaps[0] + byte * gaps[1] + slot - 1, begin : begin + BLOCK]
                        for row in range(BLOCK):
                            below[row] += np.int32(plane[row]) << np.int32(8 * byte)
                plane = planes_RP[gaps[0] + slot - 1, begin : begin + BLOCK]
                for row in range(BLOCK):
                    steps = below[row] + np.int32(plane[row])
                    below[row] = steps
                    least[row] = min(least[row], steps)
                    to_values[row] = np.float32(anchor[row] - steps * step)
            _put_rows(
                values, places_P[begin : begin + many], finite_P, begin, -np.inf, slot_0, slot_1, log_probs_NK
            )
    highest, lowest = most[0], least[0]
    for row in range(BLOCK):
        highest, lowest = max(highest, most[row]), min(lowest, least[row])
    return highest, lowest
