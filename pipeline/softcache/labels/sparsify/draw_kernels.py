"""Draws of classes on a GPU, in Triton: numbers of all classes of a row are made, compared and forgotten, tile by tile.

A class of probability p gets the priority p^exponent / u, u uniform of the row's seed and the class (`sampled.uniform`).
As `one_pass_kernels` does with logits, `scan_priorities` sets aside the tiles that may hold one of the highest, and
`gather_priorities` lists those of the first. Logarithms of u are float64's, as torch takes them. Draws with replacement go
by sums of p^exponent over blocks of classes (`sum_weights`), among which the block of each draw is found, and then the class
in its block (`find_draws`).

Shape suffixes: `P` rows, `V` classes, `S` parts of a row.
"""

# triton gives these functions their types; by mypy's rules, which are Python's, every number would be another one.
# mypy: disable-error-code="no-untyped-def,misc,assignment,operator,attr-defined,no-redef"

from __future__ import annotations

import triton
import triton.language as tl

from softcache.hashing.splitmix import SPLITMIX64_GAMMA
from softcache.labels.sparsify.one_pass_kernels import (
    LOWEST,
    NO_CANDIDATE,
    REVERSED_ID,
    TILE_SIZE,
    fill_places,
    keep_tiles,
    key_of,
)

__all__ = ["find_draws", "gather_priorities", "scan_priorities", "sum_weights"]

GAMMA = tl.constexpr(SPLITMIX64_GAMMA)
MIX_1, MIX_2 = tl.constexpr(0xBF58476D1CE4E5B9 - 2**64), tl.constexpr(0x94D049BB133111EB - 2**64)
MASK_34, MASK_37, MASK_33 = tl.constexpr(2**34 - 1), tl.constexpr(2**37 - 1), tl.constexpr(2**33 - 1)
MASK_52, STEP = tl.constexpr(2**52 - 1), tl.constexpr(2.0**-52)


@triton.jit
def _priorities(x, column, inside, seed, highest, log_mass, exponent, last):
    """The log-priorities of classes, -inf of those that are kept: whose packed logit is at least `last`."""
    mixed = seed + (column.to(tl.int64) + 1) * GAMMA
    mixed = (mixed ^ ((mixed >> 30) & MASK_34)) * MIX_1
    mixed = (mixed ^ ((mixed >> 27) & MASK_37)) * MIX_2
    mixed = mixed ^ ((mixed >> 31) & MASK_33)
    uniform = (((mixed >> 12) & MASK_52).to(tl.float64) + 0.5) * STEP
    packed = (key_of(x).to(tl.int64) << 32) | (column.to(tl.int64) ^ REVERSED_ID)
    priority = ((x - highest) - log_mass) * exponent - tl.log(uniform).to(tl.float32)
    return tl.where(inside & (packed < last), priority, float("-inf"))


@triton.jit
def scan_priorities(
    logits_ptr, row_stride, num_classes, seeds_ptr, normalizer_ptr, last_ptr, exponent, candidates_ptr,
    K: tl.constexpr, PLACES: tl.constexpr, PART: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Writes the candidates for the K highest priorities.

    Args:
        seeds_ptr: [P] int64; normalizer_ptr: [P, 2] float32; last_ptr: [P] int64, all of `finish_rows`' rows.
        candidates_ptr: out, [P, S, PLACES] int64, as of `scan_parts`.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, place = part * PART, row * tl.num_programs(1) + part
    width = tl.minimum(num_classes - begin, PART)
    seed, last = tl.load(seeds_ptr + row), tl.load(last_ptr + row)
    highest, log_mass = tl.load(normalizer_ptr + row * 2), tl.load(normalizer_ptr + row * 2 + 1)
    lane = tl.arange(0, LANES)
    inner = lane[:, None] * TILE_SIZE + tl.arange(0, TILE_SIZE)[None, :]
    peak = tl.zeros([LANES], tl.int32) + LOWEST
    bound, filled = tl.zeros([], tl.int32) + LOWEST, tl.zeros([], tl.int32)
    for start in range(0, width, LANES * TILE_SIZE):
        inside, column = start + inner < width, begin + start + inner
        x = tl.load(logits_ptr + row * row_stride + column, mask=inside, other=float("-inf")).to(tl.float32)
        priority = _priorities(x, column, inside, seed, highest, log_mass, exponent, last)
        key = key_of(tl.max(priority, axis=1))
        peak = tl.maximum(peak, key)
        tile = (begin + start) // TILE_SIZE + lane
        _, bound, filled = keep_tiles(key, peak, bound, filled, tile, candidates_ptr + place * PLACES, K)
    fill_places(candidates_ptr + place * PLACES, filled, PLACES, LANES)


@triton.jit
def gather_priorities(
    logits_ptr, row_stride, num_classes, seeds_ptr, normalizer_ptr, last_ptr, exponent, tiles_ptr, packed_ptr,
    NUM_TILES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Lists the priorities of the first candidates: [P, NUM_TILES, TILE] int64, keys above their classes, reversed."""
    row, place = tl.program_id(0).to(tl.int64), tl.arange(0, TILES)
    seed, last = tl.load(seeds_ptr + row), tl.load(last_ptr + row)
    highest, log_mass = tl.load(normalizer_ptr + row * 2), tl.load(normalizer_ptr + row * 2 + 1)
    used = place < NUM_TILES
    found = tl.load(tiles_ptr + row * NUM_TILES + place, mask=used, other=NO_CANDIDATE)
    tile = ((found & REVERSED_ID) ^ REVERSED_ID).to(tl.int32)
    column = tile[:, None] * TILE_SIZE + tl.arange(0, TILE_SIZE)[None, :]
    inside = (found != NO_CANDIDATE)[:, None] & (column < num_classes)
    x = tl.load(logits_ptr + row * row_stride + column, mask=inside, other=float("-inf")).to(tl.float32)
    priority = _priorities(x, column, inside, seed, highest, log_mass, exponent, last)
    packed = (key_of(priority).to(tl.int64) << 32) | (column.to(tl.int64) ^ REVERSED_ID)
    at = (row * NUM_TILES + place)[:, None] * TILE_SIZE + tl.arange(0, TILE_SIZE)[None, :]
    tl.store(packed_ptr + at, tl.where(inside, packed, NO_CANDIDATE), mask=used[:, None])


@triton.jit
def _weights(logits_ptr, row_stride, num_classes, normalizer_ptr, exponent_ptr, row, column):
    """p^exponent of classes in float64; 0 outside of the row."""
    inside = column < num_classes
    x = tl.load(logits_ptr + row * row_stride + column, mask=inside, other=float("-inf")).to(tl.float32)
    log_prob = (x - tl.load(normalizer_ptr + row * 2)) - tl.load(normalizer_ptr + row * 2 + 1)
    return tl.where(inside, tl.exp(log_prob.to(tl.float64) * tl.load(exponent_ptr)), 0.0)


@triton.jit
def sum_weights(
    logits_ptr, row_stride, num_classes, normalizer_ptr, exponent_ptr, sums_ptr, num_blocks,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the sums of p^exponent over blocks of classes: [P, num_blocks] float64.

    Args:
        exponent_ptr: [1] float64.
        BLOCKS: of one program; BLOCK: classes of each.
    """
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCKS
    block = first + tl.arange(0, BLOCKS)
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    weight = _weights(logits_ptr, row_stride, num_classes, normalizer_ptr, exponent_ptr, row, column)
    tl.store(sums_ptr + row * num_blocks + block, tl.sum(weight, axis=1), mask=block < num_blocks)


@triton.jit
def find_draws(
    logits_ptr, row_stride, num_classes, normalizer_ptr, exponent_ptr, blocks_ptr, before_ptr, wanted_ptr, drawn_ptr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the class of each draw: the first of its block whose cumulative weight is above what is wanted.

    Args:
        blocks_ptr, before_ptr, wanted_ptr: [P, N] int64 and float64: the block, the weight before it, the draw.
        drawn_ptr: out, [P, N] int64; never a class of weight 0.
    """
    row, draw = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = row * tl.num_programs(1) + draw
    offset = tl.arange(0, BLOCK)
    begin = tl.load(blocks_ptr + place) * BLOCK
    weight = _weights(logits_ptr, row_stride, num_classes, normalizer_ptr, exponent_ptr, row, begin + offset)
    reached = tl.load(before_ptr + place) + tl.cumsum(weight, 0)
    # The sums of a block and of its parts may differ in their last bit.
    last = tl.max(tl.where(weight > 0.0, offset, 0), axis=0)
    count = tl.sum((reached <= tl.load(wanted_ptr + place)).to(tl.int32), axis=0)
    tl.store(drawn_ptr + place, begin + tl.minimum(count, last))
