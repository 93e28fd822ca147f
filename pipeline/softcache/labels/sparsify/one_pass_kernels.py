"""Records of rows of logits on a GPU, in Triton: a row is read from memory once.

Shape suffixes: `P` rows, `V` classes, `K` slots, `S` parts of a row, `N` candidates of a row.

A tile is eight classes next to each other, 32 bytes of float32. `scan_parts` reads a part of a row, block by block, a lane
holding one tile of each. The tiles whose largest logit may be among the row's K largest are its candidates: those above a
bound that at least K logits before reach, which is the K-th largest of the lanes' maxima so far, each of other logits than
the next. All other tiles are summed at every temperature, each lane against its own running maximum. The K first of the
candidates hold the K largest logits; `gather_tiles` lists their logits, and `finish_rows` adds all logits of candidates that
are not among the K largest. So the sum of the classes outside the record is one of positive numbers, of those classes
alone, and has all its digits however small it is.

On a grid of eighths (8/8 to 1/8, the default) one exponential serves all temperatures. Blocks and parts depend on V alone:
a row's record has the same bits in every batch.
"""

# triton gives these functions their types; by mypy's rules, which are Python's, every number would be another one.
# mypy: disable-error-code="no-untyped-def,misc,assignment,operator,attr-defined,no-redef"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "EMPTY",
    "LOWEST",
    "NO_CANDIDATE",
    "NUM_FIGURES",
    "NUM_SUMS",
    "REVERSED_ID",
    "TILE",
    "TILE_SIZE",
    "fill_places",
    "finish_rows",
    "gather_tiles",
    "keep_tiles",
    "key_of",
    "scan_parts",
]

NUM_SUMS = 8  # temperatures that one launch serves
NUM_FIGURES = 16  # float32 of a part
EMPTY = -(2**63)  # a candidate's place that is not used
TILE = 8  # classes

LOG2_E = tl.constexpr(1.4426950408889634)
FARTHEST = tl.constexpr(-698.0)  # exp(FARTHEST / 8) is the smallest normal float32
LOWEST = tl.constexpr(-(2**31))  # the key of columns outside of the row
HIGHEST = tl.constexpr(2**31 - 1)  # the key of NaN
KEY_OF_INFINITY = tl.constexpr(0x7F800000)
KEY_OF_MINUS_INFINITY = tl.constexpr(-2139095041)
NO_CANDIDATE = tl.constexpr(EMPTY)
REVERSED_ID = tl.constexpr(2**32 - 1)
FIGURES = tl.constexpr(NUM_FIGURES)
TILE_SIZE = tl.constexpr(TILE)


@triton.jit
def key_of(x):
    """An int32 in the order of the floats; -0.0 is 0.0, and NaN the highest."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x == x, key, HIGHEST)


@triton.jit
def _number_of(key):
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _powers(d, b0, b1, b2, b3, b4, b5, b6, b7, NUM: tl.constexpr, EIGHTHS: tl.constexpr):
    """exp(d b) for each of the first NUM b; where EIGHTHS, b is 8/8 to 1/8."""
    if EIGHTHS:
        p1 = tl.exp2(d * (LOG2_E / 8))
        p2 = p1 * p1
        p3 = p1 * p2
        p4 = p2 * p2
        return p4 * p4, p3 * p4, p2 * p4, p1 * p4, p4, p3, p2, p1
    else:
        e0 = tl.exp2(d * b0 * LOG2_E)
        e1 = tl.exp2(d * b1 * LOG2_E) if NUM > 1 else e0
        e2 = tl.exp2(d * b2 * LOG2_E) if NUM > 2 else e0
        e3 = tl.exp2(d * b3 * LOG2_E) if NUM > 3 else e0
        e4 = tl.exp2(d * b4 * LOG2_E) if NUM > 4 else e0
        e5 = tl.exp2(d * b5 * LOG2_E) if NUM > 5 else e0
        e6 = tl.exp2(d * b6 * LOG2_E) if NUM > 6 else e0
        e7 = tl.exp2(d * b7 * LOG2_E) if NUM > 7 else e0
        return e0, e1, e2, e3, e4, e5, e6, e7


@triton.jit
def _moved(top, to):
    """How far `top` is below `to`: at most 0, and -inf where both are."""
    return top - tl.where(to == float("-inf"), 0.0, to)


@triton.jit
def _finite(off, power, EIGHTHS: tl.constexpr):
    """`off`, or where exp(off) is 0 any number."""
    return off if EIGHTHS else tl.where(power > 0.0, off, 0.0)


@triton.jit
def _add_tiles(
    x, largest, top, s0, s1, s2, s3, s4, s5, s6, s7, dot,
    b0, b1, b2, b3, b4, b5, b6, b7, NUM: tl.constexpr, EIGHTHS: tl.constexpr,
):  # fmt: skip
    """Adds tiles [C, TILE], the largest of each of which is given, to the lanes' sums [C] of exp((x - top) b) and of
    exp(x - top) (x - top). A tile whose `largest` is given as -inf is left out."""
    new = tl.maximum(top, largest)
    off = _moved(top, new)
    # Subtracting infinity leaves a tile out.
    d = x - tl.where(largest == float("-inf"), float("inf"), new)[:, None]
    if EIGHTHS:
        off, d = tl.maximum(off, FARTHEST), tl.maximum(d, FARTHEST)
    f0, f1, f2, f3, f4, f5, f6, f7 = _powers(off, b0, b1, b2, b3, b4, b5, b6, b7, NUM, EIGHTHS)
    e0, e1, e2, e3, e4, e5, e6, e7 = _powers(d, b0, b1, b2, b3, b4, b5, b6, b7, NUM, EIGHTHS)
    dot = f0 * (dot + _finite(off, f0, EIGHTHS) * s0) + tl.sum(e0 * _finite(d, e0, EIGHTHS), axis=1)
    s0 = s0 * f0 + tl.sum(e0, axis=1)
    if NUM > 1:
        s1 = s1 * f1 + tl.sum(e1, axis=1)
    if NUM > 2:
        s2 = s2 * f2 + tl.sum(e2, axis=1)
    if NUM > 3:
        s3 = s3 * f3 + tl.sum(e3, axis=1)
    if NUM > 4:
        s4 = s4 * f4 + tl.sum(e4, axis=1)
    if NUM > 5:
        s5 = s5 * f5 + tl.sum(e5, axis=1)
    if NUM > 6:
        s6 = s6 * f6 + tl.sum(e6, axis=1)
    if NUM > 7:
        s7 = s7 * f7 + tl.sum(e7, axis=1)
    return new, s0, s1, s2, s3, s4, s5, s6, s7, dot


@triton.jit
def _add_lanes(
    top, s0, s1, s2, s3, s4, s5, s6, s7, dot,
    b0, b1, b2, b3, b4, b5, b6, b7, NUM: tl.constexpr, EIGHTHS: tl.constexpr,
):  # fmt: skip
    """The sums of lanes [C] together, against the largest of their maxima."""
    to = tl.max(top, axis=0)
    off = _moved(top, to)
    f0, f1, f2, f3, f4, f5, f6, f7 = _powers(off, b0, b1, b2, b3, b4, b5, b6, b7, NUM, EIGHTHS)
    dot = tl.sum(f0 * (dot + tl.where(f0 > 0.0, off, 0.0) * s0), axis=0)
    s0, s1, s2, s3 = tl.sum(s0 * f0, 0), tl.sum(s1 * f1, 0), tl.sum(s2 * f2, 0), tl.sum(s3 * f3, 0)
    s4, s5, s6, s7 = tl.sum(s4 * f4, 0), tl.sum(s5 * f5, 0), tl.sum(s6 * f6, 0), tl.sum(s7 * f7, 0)
    return to, s0, s1, s2, s3, s4, s5, s6, s7, dot


@triton.jit
def _add_moments(x, count, mean, square):
    """Adds the numbers above -inf of tiles [C, TILE] to the lanes' count, mean and sum of squared distances to the mean."""
    alive = x > float("-inf")
    more = tl.sum(alive.to(tl.float32), axis=1)
    its_mean = tl.sum(tl.where(alive, x, 0.0), axis=1) / tl.maximum(more, 1.0)
    off = tl.where(alive, x - its_mean[:, None], 0.0)
    delta, total = its_mean - mean, count + more
    share = more / tl.maximum(total, 1.0)
    square += tl.sum(off * off, axis=1) + delta * delta * count * share
    return total, mean + delta * share, square


@triton.jit
def _count(flag):
    return tl.sum(flag.to(tl.int32), axis=0)


@triton.jit
def _kth_largest(key, least, K: tl.constexpr):
    """The K-th largest of keys [C], of which at least K reach `least`."""
    low, high = least, tl.max(key, axis=0)
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # their mean, rounded up
        many = _count(key >= middle)
        # With K keys at or above it, exactly, the K-th is the smallest of them.
        high = tl.where(many >= K, high, middle - 1)
        low = tl.where(many >= K, middle, low)
        if many == K:
            low = tl.min(tl.where(key >= middle, key, HIGHEST), axis=0)
            high = low
    return low


@triton.jit
def keep_tiles(key, peak, bound, filled, tile, places_ptr, K: tl.constexpr):
    """Writes the tiles [C] of a block that may hold one of the K largest: whose `key` is above a bound that K others reach.

    Args:
        key: of the largest number of each tile; peak: of the lanes, the largest so far.
        bound: so far; where it is reached by too many, it is raised to the K-th largest of `peak`.
        filled: places of `places_ptr` that are used; at most 2 K more of a block.

    Returns:
        Which tiles were written, the bound, and the number of places that are used.
    """
    chosen = key > bound
    if _count(chosen) > K // 2:
        raised = _kth_largest(peak, tl.maximum(bound, tl.min(peak, axis=0)), K)
        if raised > bound:  # of equal ones, the first K
            equal = key == raised
            chosen = (key > raised) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= K))
            bound = raised
    many = _count(chosen)
    if many > 0:
        at = filled + tl.cumsum(chosen.to(tl.int32), 0) - 1
        packed = (key.to(tl.int64) << 32) | (tile.to(tl.int64) ^ REVERSED_ID)
        tl.store(places_ptr + at, packed, mask=chosen)
    return chosen, bound, filled + many


@triton.jit
def fill_places(places_ptr, filled, PLACES: tl.constexpr, LANES: tl.constexpr):
    """Writes EMPTY into the places that are not used."""
    for start in range(filled, PLACES, LANES):
        place = start + tl.arange(0, LANES)
        tl.store(places_ptr + place, NO_CANDIDATE, mask=place < PLACES)


@triton.jit
def scan_parts(
    logits_ptr, row_stride, num_classes, candidates_ptr, figures_ptr, peaks_ptr,
    b0, b1, b2, b3, b4, b5, b6, b7, NUM: tl.constexpr, EIGHTHS: tl.constexpr,
    K: tl.constexpr, PLACES: tl.constexpr, PART: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Reads the parts of rows: writes their candidates, and the sums of all other classes at each temperature.

    Args:
        logits_ptr: [P, V] with `row_stride` elements from row to row; float32 or half precision.
        candidates_ptr: out, [P, S, PLACES] int64: the key of a tile's largest logit above its number, reversed; then EMPTY.
        figures_ptr: out, [P, S, NUM_FIGURES] float32: of the classes in no candidate the largest logit, the sums of
            exp((x - largest) b), and that of exp(x - largest) (x - largest); of all the count, mean and sum of squares.
        peaks_ptr: out, [P, S] int32, the key of the largest logit; HIGHEST where one is NaN.
        K: slots, at most LANES; PLACES: candidates of all blocks of a part, min(2 K, LANES) each.
        PART: columns of a part; LANES: tiles of a block.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = row * tl.num_programs(1) + part
    begin = part * PART
    first_ptr = logits_ptr + row * row_stride + begin
    width = tl.minimum(num_classes - begin, PART)
    lane = tl.arange(0, LANES)
    # Two loads of 16 bytes: so a tile lies in one thread.
    half = lane[:, None] * TILE_SIZE + tl.arange(0, TILE_SIZE // 2)[None, :]
    nothing = tl.zeros([LANES], tl.float32)
    top = nothing + float("-inf")
    s0, s1, s2, s3, s4, s5, s6, s7, dot = (
        nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing,
    )  # fmt: skip
    count, mean, square = nothing, nothing, nothing
    peak = tl.zeros([LANES], tl.int32) + LOWEST
    bound, filled = tl.zeros([], tl.int32) + LOWEST, tl.zeros([], tl.int32)
    for start in range(0, width, LANES * TILE_SIZE):
        # Columns outside of the row are -inf, and come after all others.
        here, there = start + half, start + half + TILE_SIZE // 2
        left = tl.load(first_ptr + here, mask=here < width, other=float("-inf")).to(tl.float32)
        right = tl.load(first_ptr + there, mask=there < width, other=float("-inf")).to(tl.float32)
        x = tl.reshape(tl.join(left, right), [LANES, TILE_SIZE])
        largest = tl.max(x, axis=1)
        key = tl.where(tl.max((x != x).to(tl.int32), axis=1) > 0, HIGHEST, key_of(largest))
        peak = tl.maximum(peak, key)
        count, mean, square = _add_moments(x, count, mean, square)
        if K > 0:
            tile = (begin + start) // TILE_SIZE + lane
            chosen, bound, filled = keep_tiles(
                key, peak, bound, filled, tile, candidates_ptr + place * PLACES, K
            )
            largest = tl.where(chosen, float("-inf"), largest)
        top, s0, s1, s2, s3, s4, s5, s6, s7, dot = _add_tiles(
            x, largest, top, s0, s1, s2, s3, s4, s5, s6, s7, dot,
            b0, b1, b2, b3, b4, b5, b6, b7, NUM, EIGHTHS,
        )  # fmt: skip
    fill_places(candidates_ptr + place * PLACES, filled, PLACES, LANES)
    top, s0, s1, s2, s3, s4, s5, s6, s7, dot = _add_lanes(
        top, s0, s1, s2, s3, s4, s5, s6, s7, dot, b0, b1, b2, b3, b4, b5, b6, b7, NUM, EIGHTHS
    )
    alive = tl.sum(count, axis=0)
    middle = tl.sum(mean * count, axis=0) / tl.maximum(alive, 1.0)
    spread = tl.sum(square + count * (mean - middle) * (mean - middle), axis=0)
    out = figures_ptr + place * FIGURES
    tl.store(peaks_ptr + place, tl.max(peak, axis=0))
    tl.store(out, top)
    tl.store(out + 1, s0)
    tl.store(out + 2, s1)
    tl.store(out + 3, s2)
    tl.store(out + 4, s3)
    tl.store(out + 5, s4)
    tl.store(out + 6, s5)
    tl.store(out + 7, s6)
    tl.store(out + 8, s7)
    tl.store(out + 9, dot)
    tl.store(out + 10, alive)
    tl.store(out + 11, middle)
    tl.store(out + 12, spread)


@triton.jit
def _load_tiles(logits_ptr, row_stride, num_classes, row, found):
    """The logits of candidates [C]: [C, TILE] float32 and, packed, their keys above their classes, reversed.

    EMPTY, and -inf, where there is no candidate or no such class.
    """
    tile = ((found & REVERSED_ID) ^ REVERSED_ID).to(tl.int32)
    column = tile[:, None] * TILE_SIZE + tl.arange(0, TILE_SIZE)[None, :]
    inside = (found != NO_CANDIDATE)[:, None] & (column < num_classes)
    x = tl.load(logits_ptr + row * row_stride + column, mask=inside, other=float("-inf")).to(tl.float32)
    packed = (key_of(x).to(tl.int64) << 32) | (column.to(tl.int64) ^ REVERSED_ID)
    return x, tl.where(inside, packed, NO_CANDIDATE)


@triton.jit
def gather_tiles(
    logits_ptr, row_stride, num_classes, tiles_ptr, packed_ptr, NUM_TILES: tl.constexpr, TILES: tl.constexpr
):
    """Lists the logits of the first candidates of rows.

    Args:
        tiles_ptr: [P, NUM_TILES] int64, as `scan_parts` writes them.
        packed_ptr: out, [P, NUM_TILES, TILE] int64, the key of each logit above its class, reversed.
        TILES: a power of two, at least NUM_TILES.
    """
    row, place = tl.program_id(0).to(tl.int64), tl.arange(0, TILES)
    used = place < NUM_TILES
    found = tl.load(tiles_ptr + row * NUM_TILES + place, mask=used, other=NO_CANDIDATE)
    _, packed = _load_tiles(logits_ptr, row_stride, num_classes, row, found)
    at = (row * NUM_TILES + place)[:, None] * TILE_SIZE + tl.arange(0, TILE_SIZE)[None, :]
    tl.store(packed_ptr + at, packed, mask=used[:, None])


@triton.jit
def _lane(figures, lane, used, NUMBER: tl.constexpr, empty):
    return tl.load(figures + lane * FIGURES + NUMBER, mask=used, other=empty)


@triton.jit
def _joined(one, other, b, top, one_top, other_top):
    """Two sums against their own maxima, together against `top`."""
    return one * tl.exp2(_moved(one_top, top) * b * LOG2_E) + other * tl.exp2(
        _moved(other_top, top) * b * LOG2_E
    )


@triton.jit
def _store_tail(out, slot: tl.constexpr, NUM: tl.constexpr, total, below, b, faulty):
    if slot < NUM:
        value = tl.where(below > float("-inf"), tl.log(total) + below * b, float("-inf"))
        tl.store(out + slot, tl.where(faulty, float("nan"), value))


@triton.jit
def finish_rows(
    logits_ptr, row_stride, num_classes, candidates_ptr, figures_ptr, peaks_ptr, largest_ptr, targets_ptr,
    ids_ptr, log_probs_ptr, log_tail_ptr, target_log_prob_ptr, stats_ptr, normalizer_ptr, num_parts,
    b0, b1, b2, b3, b4, b5, b6, b7, NUM: tl.constexpr, EIGHTHS: tl.constexpr, HAS_TARGETS: tl.constexpr,
    K: tl.constexpr, SLOTS: tl.constexpr, NUM_PLACES: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Makes the record of rows from what `scan_parts` wrote.

    Args:
        largest_ptr: [P, K] int64, the largest of what `gather_tiles` lists, descending.
        targets_ptr: [P] int64, read where HAS_TARGETS; one outside of the range gives NaN.
        ids_ptr, log_probs_ptr: out, [P, K] int64 and float32.
        log_tail_ptr: out, [P, NUM_SUMS] float32, at the first NUM of b.
        target_log_prob_ptr: out, [P] float32.
        stats_ptr: out, [P, 4] float32, the columns of `softcache.labels.STATS`; of a faulty row NaN, and as support the
            code of `logit_faults`, negative.
        normalizer_ptr: out, [P, 2] float32: the largest logit, and the log of the sum of exp(x - largest).
        SLOTS, PARTS: powers of two, at least K and `num_parts`; NUM_PLACES: candidates of a row, used or not.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    used = part < num_parts
    figures = figures_ptr + row * num_parts * FIGURES
    peak = tl.max(tl.load(peaks_ptr + row * num_parts + part, mask=used, other=LOWEST), axis=0)
    code = tl.where(peak == HIGHEST, 1.0, tl.where(peak == KEY_OF_INFINITY, 2.0, 0.0))
    code = tl.where(peak == KEY_OF_MINUS_INFINITY, 3.0, code)
    faulty = code > 0.0
    highest = tl.where(faulty, 0.0, _number_of(peak))

    top, s0, s1, s2, s3, s4, s5, s6, s7, dot = _add_lanes(
        _lane(figures, part, used, 0, float("-inf")),
        _lane(figures, part, used, 1, 0.0),
        _lane(figures, part, used, 2, 0.0),
        _lane(figures, part, used, 3, 0.0),
        _lane(figures, part, used, 4, 0.0),
        _lane(figures, part, used, 5, 0.0),
        _lane(figures, part, used, 6, 0.0),
        _lane(figures, part, used, 7, 0.0),
        _lane(figures, part, used, 8, 0.0),
        _lane(figures, part, used, 9, 0.0),
        b0, b1, b2, b3, b4, b5, b6, b7, NUM, EIGHTHS,
    )  # fmt: skip
    mass, weighted = tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    if K > 0:
        slot = tl.arange(0, SLOTS)
        kept = slot < K
        packed = tl.load(largest_ptr + row * K + slot, mask=kept, other=NO_CANDIDATE)
        fewest = tl.load(largest_ptr + row * K + K - 1)
        nothing = tl.zeros([LANES], tl.float32)
        m = nothing + float("-inf")
        t0, t1, t2, t3, t4, t5, t6, t7, t_dot = (
            nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing,
        )  # fmt: skip
        for start in range(0, NUM_PLACES, LANES):
            place = start + tl.arange(0, LANES)
            found = tl.load(
                candidates_ptr + row * NUM_PLACES + place, mask=place < NUM_PLACES, other=NO_CANDIDATE
            )
            if tl.max(found, axis=0) != NO_CANDIDATE:
                x, of_tile = _load_tiles(logits_ptr, row_stride, num_classes, row, found)
                x = tl.where((of_tile < fewest) & (of_tile != NO_CANDIDATE), x, float("-inf"))
                m, t0, t1, t2, t3, t4, t5, t6, t7, t_dot = _add_tiles(
                    x, tl.max(x, axis=1), m, t0, t1, t2, t3, t4, t5, t6, t7, t_dot,
                    b0, b1, b2, b3, b4, b5, b6, b7, NUM, EIGHTHS,
                )  # fmt: skip
        m, t0, t1, t2, t3, t4, t5, t6, t7, t_dot = _add_lanes(
            m, t0, t1, t2, t3, t4, t5, t6, t7, t_dot, b0, b1, b2, b3, b4, b5, b6, b7, NUM, EIGHTHS
        )
        rest = tl.maximum(top, m)
        one, other = _moved(top, rest), _moved(m, rest)
        dot = tl.exp2(one * LOG2_E) * (dot + tl.where(s0 > 0.0, one, 0.0) * s0) + tl.exp2(other * LOG2_E) * (
            t_dot + tl.where(t0 > 0.0, other, 0.0) * t0
        )
        s0, s1 = _joined(s0, t0, b0, rest, top, m), _joined(s1, t1, b1, rest, top, m)
        s2, s3 = _joined(s2, t2, b2, rest, top, m), _joined(s3, t3, b3, rest, top, m)
        s4, s5 = _joined(s4, t4, b4, rest, top, m), _joined(s5, t5, b5, rest, top, m)
        s6, s7 = _joined(s6, t6, b6, rest, top, m), _joined(s7, t7, b7, rest, top, m)
        top = rest
        d = tl.where(kept, _number_of((packed >> 32).to(tl.int32)) - highest, float("-inf"))
        e = tl.exp2(d * LOG2_E)
        mass += tl.sum(e, axis=0)
        weighted += tl.sum(e * tl.where(e > 0.0, d, 0.0), axis=0)
        column = tl.maximum(tl.minimum((packed & REVERSED_ID) ^ REVERSED_ID, num_classes - 1), 0)

    off = top - highest
    scale = tl.exp2(off * LOG2_E)
    mass += scale * s0
    weighted += scale * (dot + tl.where(scale > 0.0, off, 0.0) * s0)
    log_mass = tl.log(mass)
    if K > 0:
        tl.store(ids_ptr + row * K + slot, column, mask=kept)
        tl.store(log_probs_ptr + row * K + slot, tl.where(faulty, float("nan"), d - log_mass), mask=kept)
    below = off - log_mass
    tails = log_tail_ptr + row * 8
    _store_tail(tails, 0, NUM, s0, below, b0, faulty)
    _store_tail(tails, 1, NUM, s1, below, b1, faulty)
    _store_tail(tails, 2, NUM, s2, below, b2, faulty)
    _store_tail(tails, 3, NUM, s3, below, b3, faulty)
    _store_tail(tails, 4, NUM, s4, below, b4, faulty)
    _store_tail(tails, 5, NUM, s5, below, b5, faulty)
    _store_tail(tails, 6, NUM, s6, below, b6, faulty)
    _store_tail(tails, 7, NUM, s7, below, b7, faulty)
    if HAS_TARGETS:
        target = tl.load(targets_ptr + row)
        is_class = (target >= 0) & (target < num_classes)
        x = tl.load(logits_ptr + row * row_stride + target, mask=is_class, other=0.0).to(tl.float32)
        value = (x - highest) - log_mass
        tl.store(target_log_prob_ptr + row, tl.where(is_class & (code == 0.0), value, float("nan")))
    counts, means = _lane(figures, part, used, 10, 0.0), _lane(figures, part, used, 11, 0.0)
    alive = tl.sum(counts, axis=0)
    mean = tl.sum(means * counts, axis=0) / alive
    off_P = means - mean
    spread = tl.sum(_lane(figures, part, used, 12, 0.0) + counts * off_P * off_P, axis=0)
    tl.store(stats_ptr + row * 4, tl.where(faulty, float("nan"), log_mass - weighted / mass))
    tl.store(stats_ptr + row * 4 + 1, tl.where(faulty, float("nan"), (mean - highest) - log_mass))
    tl.store(stats_ptr + row * 4 + 2, tl.where(faulty, float("nan"), tl.sqrt(spread / alive)))
    tl.store(stats_ptr + row * 4 + 3, tl.where(faulty, -code, alive))
    tl.store(normalizer_ptr + row * 2, tl.where(faulty, float("nan"), highest))
    tl.store(normalizer_ptr + row * 2 + 1, tl.where(faulty, float("nan"), log_mass))
