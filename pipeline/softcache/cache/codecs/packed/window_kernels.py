"""Reading packed records into the rows of larger arrays, compiled; what `kernels` and `decode` do, in three passes.

Shape suffixes: `R` bytes of a record, `P` positions, `K` slots of a record, `G` grid, `N` rows of the larger arrays.

Loops go over blocks of `BLOCK` positions, one cache line of each plane, and within them over slots: see `kernels`. A
field is given as (start, slots, width), width at most 4; of one that is not there all three are 0. Planes have whole blocks.
"""

from __future__ import annotations

import numpy as np

from softcache.cache.codecs.packed.kernels import BLOCK
from softcache.runtime.jit import compiled, njit_inline

__all__ = ["heads", "slots", "tails"]


@njit_inline
def _read(planes_RP, field, slot, begin, out):  # type: ignore[no-untyped-def]
    """Writes the numbers of a slot in a block, [BLOCK] uint32."""
    plane = planes_RP[field[0] + slot, begin : begin + BLOCK]
    for row in range(BLOCK):
        out[row] = plane[row]
    for byte in range(1, field[2]):
        plane, up = planes_RP[field[0] + byte * field[1] + slot, begin : begin + BLOCK], np.uint32(8 * byte)
        for row in range(BLOCK):
            out[row] |= np.uint32(plane[row]) << up


@njit_inline
def _signed(number):  # type: ignore[no-untyped-def]
    """Returns what a zigzag number stands for, int32."""
    return np.int32(number >> np.uint32(1)) ^ -np.int32(number & np.uint32(1))


@compiled
def heads(  # type: ignore[no-untyped-def]
    planes_RP, used, finite, first, tail, target, moments, support, step, substep, halves, out
):
    """Writes what a record has once into `out`.

    Args:
        halves: [65536] uint32, the bits of float32 of each float16.
        out: used_P and finite_P int64, anchor_P float64, mass_P uint32 (bits of the tail at T = 1, or its zigzag steps),
            target_P float32, stats_P4 uint32 (bits).
    """
    used_P, finite_P, anchor_P, mass_P, target_P, stats_P4 = out
    number, anchor = np.empty(BLOCK, np.uint32), np.empty(BLOCK)
    for begin in range(0, len(used_P), BLOCK):
        many = min(BLOCK, len(used_P) - begin)
        end = begin + many
        _read(planes_RP, used, 0, begin, number)
        used_P[begin:end] = number[:many]
        _read(planes_RP, finite, 0, begin, number)
        finite_P[begin:end] = number[:many]
        _read(planes_RP, first, 0, begin, number)
        for row in range(BLOCK):
            anchor[row] = _signed(number[row]) * substep
        anchor_P[begin:end] = anchor[:many]
        _read(planes_RP, target, 0, begin, number)
        for row in range(many):
            target_P[begin + row] = np.float32(anchor[row] - _signed(number[row]) * step)
        _read(planes_RP, tail, 0, begin, number)
        mass_P[begin:end] = number[:many]
        if moments[1]:
            for slot in range(3):
                _read(planes_RP, moments, slot, begin, number)
                for row in range(many):
                    stats_P4[begin + row, slot] = halves[number[row]]
            _read(planes_RP, support, 0, begin, number)
            stats_P4[begin:end, 3] = number[:many]


@compiled
def tails(planes_RP, field, log_count_P, mean_P, log_mass_P, weights, step, out_PG):  # type: ignore[no-untyped-def]
    """Writes the tail [P, G] at all temperatures but the first, from the highest down; adds in the order of `kernels`."""
    rows, grid = out_PG.shape
    known, value, number = np.zeros((grid + 2, BLOCK)), np.empty(BLOCK), np.empty(BLOCK, np.uint32)
    for begin in range(0, rows, BLOCK):
        many = min(BLOCK, rows - begin)
        known[0, :many] = log_count_P[begin : begin + many]
        known[1, :many] = mean_P[begin : begin + many]
        known[2, :many] = log_mass_P[begin : begin + many]
        for visit in range(grid - 1):
            column = grid + 1 - visit
            _read(planes_RP, field, visit, begin, number)
            for row in range(BLOCK):
                value[row] = _signed(number[row]) * step
            for other in range(grid + 2):
                if other < 3 or other > column:
                    weight, of = weights[visit, other], known[other]
                    for row in range(BLOCK):
                        value[row] += weight * of[row]
            known[column] = value
        for row in range(many):
            for column in range(3, grid + 2):
                out_PG[begin + row, column - 2] = known[column, row]


@njit_inline
def _used_planes(planes_RP):  # type: ignore[no-untyped-def]
    """Returns which planes hold anything but 0, [R] bool."""
    out_R = np.zeros(len(planes_RP), np.bool_)
    for byte in range(len(planes_RP)):
        for begin in range(0, planes_RP.shape[1], BLOCK):
            found = np.uint8(0)
            for row in range(begin, begin + BLOCK):
                found |= planes_RP[byte, row]
            if found:
                out_R[byte] = True
                break
    return out_R


@njit_inline
def _read_ids(planes_RP, low, high, high_bits, slot, begin, out):  # type: ignore[no-untyped-def]
    """Writes the ids of a slot in a block, [BLOCK] uint32: one loop for each of the usual widths."""
    if not low[2]:
        out[:] = 0
    elif low[2] == 2:
        plane, upper = (
            planes_RP[low[0] + slot, begin : begin + BLOCK],
            planes_RP[low[0] + low[1] + slot, begin : begin + BLOCK],
        )
        for row in range(BLOCK):
            out[row] = np.uint32(plane[row]) | np.uint32(upper[row]) << np.uint32(8)
    else:
        _read(planes_RP, low, slot, begin, out)
    if high_bits:
        mask, up = np.uint32((1 << high_bits) - 1), np.uint32(8 * low[2])
        plane, down = (
            planes_RP[high[0] + slot * high_bits // 8, begin : begin + BLOCK],
            np.uint32(slot * high_bits % 8),
        )
        for row in range(BLOCK):
            out[row] |= (np.uint32(plane[row]) >> down & mask) << up


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
    ids, values = np.empty((BLOCK, BLOCK), ids_NK.dtype), np.empty((BLOCK, BLOCK), np.float32)
    number, below, anchor = np.empty(BLOCK, np.uint32), np.empty(BLOCK, np.int32), np.zeros(BLOCK)
    is_used_R = _used_planes(planes_RP)
    most, least = np.zeros(BLOCK, np.uint32), np.zeros(BLOCK, np.int32)
    for begin in range(0, rows, BLOCK):
        many = min(BLOCK, rows - begin)
        anchor[:many] = anchor_P[begin : begin + many]
        below[:] = 0
        for slot_0 in range(0, size, BLOCK):
            slot_1 = min(slot_0 + BLOCK, size)
            for slot in range(slot_0, slot_1):
                _read_ids(planes_RP, low, high, high_bits, slot, begin, number)
                to_ids = ids[slot - slot_0]
                for row in range(BLOCK):
                    most[row] = max(most[row], number[row])
                    to_ids[row] = number[row]
                to_values = values[slot - slot_0]
                if slot == 0:
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
            for row in range(many):
                place = places_P[begin + row]
                if place < 0:
                    continue
                out_ids, out_values = ids_NK[place, slot_0:slot_1], log_probs_NK[place, slot_0:slot_1]
                for slot in range(slot_1 - slot_0):
                    out_ids[slot] = ids[slot, row]
                for slot in range(slot_1 - slot_0):
                    out_values[slot] = values[slot, row]
                for slot in range(max(used_P[begin + row] - slot_0, 0), slot_1 - slot_0):
                    out_ids[slot] = num_classes
                for slot in range(max(finite_P[begin + row] - slot_0, 0), slot_1 - slot_0):
                    out_values[slot] = -np.inf
    return most.max(), least.min()
