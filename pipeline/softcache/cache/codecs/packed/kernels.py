"""Reading packed records, compiled: numbers out of planes of bytes.

Shape suffixes: `R` bytes of a record, `P` positions, `S` slots of a field, `K` slots of a record, `G` grid.

A plane holds one byte of every position, so that 64 positions of it are one cache line; loops go over such blocks of
positions, and within them over slots, and what they write stays in the fastest cache. Compiled code is kept next to
this file, or in the user's cache folder; importing this module takes numba along, so import it only to decode.
"""

from __future__ import annotations

import numpy as np

from softcache.runtime.jit import compiled

__all__ = ["BLOCK", "fill_from", "ids", "log_probs", "numbers", "planes_of", "tails"]

BLOCK = 64


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


@compiled
def numbers(planes_RP, rows, start, slots, width):  # type: ignore[no-untyped-def]
    """Returns the numbers of a field, [S, P] int64."""
    out_SP = np.empty((slots, rows), np.int64)
    for slot in range(slots):
        for row in range(rows):
            out_SP[slot, row] = planes_RP[start + slot, row]
        for byte in range(1, width):
            for row in range(rows):
                out_SP[slot, row] |= np.int64(planes_RP[start + byte * slots + slot, row]) << 8 * byte
    return out_SP


# The two below do most of the work. Their inner loops are over exactly BLOCK positions, so that they become vector
# instructions, and write to a tile; the tile is turned on its way out.


@compiled
def ids(planes_RP, start, width, high_start, high_bits, out_PK):  # type: ignore[no-untyped-def]
    """Writes ids [P, K]."""
    rows, slots = out_PK.shape
    tile = np.empty((BLOCK, BLOCK), np.uint32)
    mask, up = np.uint32((1 << high_bits) - 1), np.uint32(8 * width)
    for first in range(0, rows, BLOCK):
        for slot_0 in range(0, slots, BLOCK):
            slot_1 = min(slot_0 + BLOCK, slots)
            for slot in range(slot_0, slot_1):
                block = tile[slot - slot_0]
                block[:] = 0
                for byte in range(width):
                    plane = planes_RP[start + byte * slots + slot, first : first + BLOCK]
                    for row in range(BLOCK):
                        block[row] |= np.uint32(plane[row]) << np.uint32(8 * byte)
                if high_bits:
                    plane = planes_RP[high_start + slot * high_bits // 8, first : first + BLOCK]
                    shift = np.uint32(slot * high_bits % 8)
                    for row in range(BLOCK):
                        block[row] |= ((np.uint32(plane[row]) >> shift) & mask) << up
            for row in range(min(BLOCK, rows - first)):
                out_K = out_PK[first + row, slot_0:slot_1]
                for slot in range(slot_1 - slot_0):
                    out_K[slot] = tile[slot, row]


@compiled
def log_probs(planes_RP, start, width, anchor_P, step, out_PK):  # type: ignore[no-untyped-def]
    """Writes log-probabilities [P, K] float32: the anchor less all steps so far."""
    rows, slots = out_PK.shape
    tile, anchor = np.empty((BLOCK, BLOCK), np.float32), np.empty(BLOCK)
    below = np.empty(BLOCK, np.int32)
    for first in range(0, rows, BLOCK):
        many = min(BLOCK, rows - first)
        anchor[:many] = anchor_P[first : first + many]
        below[:] = 0
        for slot_0 in range(0, slots, BLOCK):
            slot_1 = min(slot_0 + BLOCK, slots)
            for slot in range(slot_0, slot_1):
                if slot:
                    for byte in range(width):
                        plane = planes_RP[start + byte * (slots - 1) + slot - 1, first : first + BLOCK]
                        for row in range(BLOCK):
                            below[row] += np.int32(plane[row]) << np.int32(8 * byte)
                block = tile[slot - slot_0]
                for row in range(BLOCK):
                    block[row] = np.float32(anchor[row] - below[row] * step)
            for row in range(many):
                out_K = out_PK[first + row, slot_0:slot_1]
                for slot in range(slot_1 - slot_0):
                    out_K[slot] = tile[slot, row]


@compiled
def fill_from(first_P, value, out_PK):  # type: ignore[no-untyped-def]
    """Writes a value into the slots of each row from the given one on."""
    for row in range(len(first_P)):
        for slot in range(first_P[row], out_PK.shape[1]):
            out_PK[row, slot] = value


@compiled
def tails(zigzag_SP, log_count_P, mean_P, log_mass_P, weights, step, out_PG):  # type: ignore[no-untyped-def]
    """Writes the tail [P, G] at all temperatures but the first, from the highest down; see `prediction`."""
    rows, grid = out_PG.shape
    known = np.zeros(grid + 2)
    for row in range(rows):
        known[0], known[1], known[2] = log_count_P[row], mean_P[row], log_mass_P[row]
        for visit in range(grid - 1):
            column = grid + 1 - visit
            number = zigzag_SP[visit, row]
            value = ((number >> 1) ^ -(number & 1)) * step
            for other in range(3):
                value += weights[visit, other] * known[other]
            for other in range(column + 1, grid + 2):
                value += weights[visit, other] * known[other]
            known[column] = value
            out_PG[row, column - 2] = value
