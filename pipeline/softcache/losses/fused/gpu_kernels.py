"""A chunk of logits to its sums, and to its gradient, on a GPU, in Triton: two passes over a row.

What is done with the sums, [P] numbers and those of the kept classes, [P, K], is torch's (`fused.gpu`), so that the two
kernels serve every loss of a student's masses in buckets.

Shape suffixes: `P` positions, `V` classes.
"""

# triton gives these functions their types; by mypy's rules, which are Python's, every number would be another one.
# mypy: disable-error-code="no-untyped-def,misc,assignment,operator,attr-defined,no-redef"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["share_out", "sum_rows"]

LOG2_E = tl.constexpr(1.4426950408889634)
TILE = tl.constexpr(8)


@triton.jit
def _number(x):
    """`x`, or 0 where it is -inf, for what is subtracted."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def sum_rows(
    z_ptr,
    num_classes,
    beta_ptr,
    at_one_ptr,
    softened_ptr,
    HARD: tl.constexpr,
    SOFT: tl.constexpr,
    LANES: tl.constexpr,
):
    """Writes the log-sum-exp of rows of logits, and of the same times beta; -inf where all of a row are masked.

    Args:
        z_ptr: [P, V] float32, contiguous; -inf is left out.
        beta_ptr: [P] float32, read where SOFT.
        at_one_ptr, softened_ptr: out, [P] float32; written where HARD and where SOFT.
    """
    row = tl.program_id(0)
    row_ptr = z_ptr + row.to(tl.int64) * num_classes
    beta = tl.load(beta_ptr + row) if SOFT else 1.0
    # Two loads of 16 bytes: so that all numbers of a lane lie in one thread, whatever is summed.
    half = tl.arange(0, LANES)[:, None] * TILE + tl.arange(0, TILE // 2)[None, :]
    top = tl.zeros([LANES], tl.float32) + float("-inf")
    by_one, by_beta = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    for start in range(0, num_classes, LANES * TILE):
        here, there = start + half, start + half + TILE // 2
        left = tl.load(row_ptr + here, mask=here < num_classes, other=float("-inf"))
        right = tl.load(row_ptr + there, mask=there < num_classes, other=float("-inf"))
        x = tl.reshape(tl.join(left, right), [LANES, TILE])
        # A NaN is lost in a maximum; in the sums it stays.
        new = tl.maximum(top, tl.max(x, axis=1))
        off, d = top - _number(new), x - _number(new)[:, None]
        if HARD:
            by_one = by_one * tl.exp2(off * LOG2_E) + tl.sum(tl.exp2(d * LOG2_E), axis=1)
        if SOFT:
            scale = beta * LOG2_E
            by_beta = by_beta * tl.exp2(off * scale) + tl.sum(tl.exp2(d * scale), axis=1)
        top = new
    peak = tl.max(top, axis=0)
    off = top - _number(peak)
    if HARD:
        total = tl.sum(by_one * tl.exp2(off * LOG2_E), axis=0)
        tl.store(at_one_ptr + row, tl.where(total == 0.0, float("-inf"), peak + tl.log(total)))
    if SOFT:
        total = tl.sum(by_beta * tl.exp2(off * (beta * LOG2_E)), axis=0)
        tl.store(softened_ptr + row, tl.where(total == 0.0, float("-inf"), peak * beta + tl.log(total)))


@triton.jit
def share_out(
    z_ptr, out_ptr, num_classes, beta_ptr, at_one_ptr, softened_ptr, by_one_ptr, by_beta_ptr, targets_ptr, hard_ptr,
    softcap, HARD: tl.constexpr, SOFT: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes by_one exp(z - at_one) + by_beta exp(z beta - softened), less `hard` at the target.

    Args:
        z_ptr: [P, V] float32, contiguous.
        out_ptr: [P, V], float32 or half precision; may be `z_ptr`.
        at_one_ptr, softened_ptr: [P] float32, of `sum_rows`.
        by_one_ptr, by_beta_ptr: [P] float32, what the classes of a row share; read where HARD and where SOFT.
        targets_ptr, hard_ptr: [P] int64 and float32, read where HARD; -1 for no target here.
        softcap: where CAPPED the gradient is one by the logits before it: multiplied by 1 - (z / softcap)^2.
    """
    row, part = tl.program_id(0), tl.program_id(1)
    column = part * BLOCK + tl.arange(0, BLOCK)
    inside, base = column < num_classes, row.to(tl.int64) * num_classes
    z = tl.load(z_ptr + base + column, mask=inside, other=float("-inf"))
    gradient = tl.zeros([BLOCK], tl.float32)
    if HARD:
        share = tl.exp2((z - _number(tl.load(at_one_ptr + row))) * LOG2_E)
        gradient += tl.load(by_one_ptr + row) * share
        target = tl.load(targets_ptr + row)
        gradient = tl.where(column == target, gradient - tl.load(hard_ptr + row), gradient)
    if SOFT:
        share = tl.exp2((z * tl.load(beta_ptr + row) - _number(tl.load(softened_ptr + row))) * LOG2_E)
        gradient += tl.load(by_beta_ptr + row) * share
    if CAPPED:
        capped = z / softcap
        # A masked class has no gradient, and infinity squared would make it NaN.
        gradient = tl.where(gradient == 0.0, 0.0, gradient * (1.0 - capped * capped))
    tl.store(out_ptr + base + column, gradient.to(out_ptr.dtype.element_ty), mask=inside)
