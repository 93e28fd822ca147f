"""What a record needs of rows of logits, from one pass over them on a GPU (`one_pass_kernels`, in Triton).

Shape suffixes: `P` positions, `V` classes, `K` slots, `G` grid of temperatures.

The logits are read once, in the dtype that they have, and the tiles of eight classes that hold the largest a second time.
Written are, for each row, 2 K places of 8 bytes for each 4,096 classes, and 64 bytes for each 32,768. Which rows are read so
is one function, `is_one_pass`; all others go through torch, which is also what the tests compare with.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from softcache.runtime.triton import is_triton_on, on_its_device

__all__ = ["MAX_LARGEST", "OnePass", "draw", "draw_by_priority", "is_one_pass", "read_rows"]

MAX_LARGEST = 512
"""The most slots: there are no more lanes, whose maxima bound the candidates."""

_PART, _LANES, _BLOCK = 32768, 512, 512
_NUM_SUMS, _NUM_FIGURES, _TILE, _EMPTY = 8, 16, 8, -(2**63)  # of one_pass_kernels


class OnePass(NamedTuple):
    """What one pass over rows of logits gives; NaN in the rows with a fault, whose ids are any classes.

    Attributes:
        ids_PK: int64, the K largest, equal ones by ascending id.
        log_probs_PK: float32, of these, at T = 1.
        log_tail_PG: float32, log of the sum over all other classes of p^(1/T).
        target_log_prob_P: float32, or None.
        stats_P4: the columns of `softcache.labels.STATS`; the support of a row with a fault is minus its code.
        normalizer_P2: the largest logit, and the log of the sum of exp(x - largest).
        last_P: int64, the key of the K-th largest logit above its class, reversed; None where K is 0.
    """

    ids_PK: Tensor
    log_probs_PK: Tensor
    log_tail_PG: Tensor
    target_log_prob_P: Tensor | None
    stats_P4: Tensor
    normalizer_P2: Tensor
    last_P: Tensor | None

    def rows(self, part: slice) -> OnePass:
        """Returns this of some rows."""
        return OnePass(*(x if x is None else x[part] for x in self))  # type: ignore[arg-type]


def is_one_pass(logits_PV: Tensor, num_largest: int, temperatures: tuple[float, ...]) -> bool:
    """Whether `read_rows` makes the records of these logits: where `is_triton_on`, in float32 or half precision, of at most
    `MAX_LARGEST` slots and eight temperatures."""
    return (
        is_triton_on(logits_PV)
        and logits_PV.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and logits_PV.numel() > 0
        and num_largest <= MAX_LARGEST
        and len(temperatures) <= _NUM_SUMS
    )


@on_its_device
def read_rows(
    logits_PV: Tensor, num_largest: int, temperatures: tuple[float, ...], targets_P: Tensor | None = None
) -> OnePass:
    """Returns what a record needs of logits, without waiting for the device.

    Args:
        logits_PV: [P, V] float32, bfloat16 or float16, P and V at least 1.
        num_largest: K, 0 to V.
        temperatures: the grid, at most eight.
        targets_P: [P] int64 on the same device; one outside of the range gives NaN.
    """
    import triton

    from softcache.labels.sparsify.one_pass_kernels import finish_rows, gather_tiles, scan_parts

    if logits_PV.stride(1) != 1:
        logits_PV = logits_PV.contiguous()
    (num_rows, num_classes), k, device = logits_PV.shape, num_largest, logits_PV.device
    parts, places = triton.cdiv(num_classes, _PART), _num_places(num_classes, k)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    candidates = empty(num_rows, parts * places, dtype=torch.int64)
    figures, peaks = empty(num_rows, parts, _NUM_FIGURES), empty(num_rows, parts, dtype=torch.int32)
    betas = [1.0 / t for t in temperatures]
    eighths = tuple(temperatures) == tuple(8.0 / n for n in range(8, 0, -1))
    grid = (*betas, *[1.0] * (_NUM_SUMS - len(betas)))
    scan_parts[(num_rows, parts)](
        logits_PV, logits_PV.stride(0), num_classes, candidates, figures, peaks, *grid,
        NUM=len(betas), EIGHTHS=eighths, K=k, PLACES=places,
        PART=_PART, LANES=_LANES, num_warps=8,
    )  # fmt: skip
    largest = candidates
    if k:
        tiles = candidates.topk(min(k, parts * places), dim=1).values
        packed = empty(num_rows, tiles.shape[1] * _TILE, dtype=torch.int64)
        gather_tiles[(num_rows,)](
            logits_PV, logits_PV.stride(0), num_classes, tiles, packed,
            NUM_TILES=tiles.shape[1], TILES=triton.next_power_of_2(tiles.shape[1]), num_warps=4,
        )  # fmt: skip
        largest = packed.topk(k, dim=1).values
    ids_PK, log_probs_PK = empty(num_rows, k, dtype=torch.int64), empty(num_rows, k)
    log_tail, stats, normalizer = empty(num_rows, _NUM_SUMS), empty(num_rows, 4), empty(num_rows, 2)
    target_log_prob = empty(num_rows)
    finish_rows[(num_rows,)](
        logits_PV, logits_PV.stride(0), num_classes, candidates, figures, peaks, largest,
        stats if targets_P is None else targets_P.contiguous(),
        ids_PK, log_probs_PK, log_tail, target_log_prob, stats, normalizer, parts, *grid,
        NUM=len(betas), EIGHTHS=eighths, HAS_TARGETS=targets_P is not None,
        K=k, SLOTS=triton.next_power_of_2(max(k, 1)), NUM_PLACES=parts * places,
        PARTS=triton.next_power_of_2(parts), LANES=128, num_warps=4,
    )  # fmt: skip
    return OnePass(
        ids_PK,
        log_probs_PK,
        log_tail[:, : len(betas)],
        None if targets_P is None else target_log_prob,
        stats,
        normalizer,
        largest[:, k - 1].contiguous() if k else None,
    )


def _num_places(num_classes: int, k: int) -> int:
    """Candidates of a part, whatever its numbers."""
    return -(-min(num_classes, _PART) // (_TILE * _LANES)) * min(2 * k, _LANES)


@on_its_device
def draw_by_priority(
    logits_PV: Tensor, read: OnePass, seeds_P: Tensor, exponent: float, count: int
) -> tuple[Tensor, Tensor]:
    """Returns the highest priorities of rows and their classes, as of `policies.hybrid`, in a second pass over the logits.

    Args:
        read: of these rows; its K largest classes are left out.
        seeds_P: [P] int64 on the same device.
        count: N, at most `MAX_LARGEST` and V.

    Returns:
        Log-priorities [P, N] float32, descending, -inf where no class is left; classes [P, N] int64.
    """
    import triton

    from softcache.labels.sparsify.draw_kernels import gather_priorities, scan_priorities

    if logits_PV.stride(1) != 1:
        logits_PV = logits_PV.contiguous()
    (num_rows, num_classes), device = logits_PV.shape, logits_PV.device
    parts, places = triton.cdiv(num_classes, _PART), _num_places(num_classes, count)
    like: dict[str, Any] = {"dtype": torch.int64, "device": device}
    candidates = torch.empty((num_rows, parts * places), **like)
    rows = (
        logits_PV, logits_PV.stride(0), num_classes,
        seeds_P.contiguous(), read.normalizer_P2.contiguous(), read.last_P, float(exponent),
    )  # fmt: skip
    # Rounded as torch does: no multiplication is fused with a subtraction.
    how = {"num_warps": 8, "enable_fp_fusion": False}
    scan_priorities[(num_rows, parts)](
        *rows, candidates, K=count, PLACES=places, PART=_PART, LANES=_LANES, **how
    )
    tiles = candidates.topk(min(count, parts * places), dim=1).values
    packed = torch.empty((num_rows, tiles.shape[1] * _TILE), **like)
    gather_priorities[(num_rows,)](
        *rows, tiles, packed, NUM_TILES=tiles.shape[1], TILES=triton.next_power_of_2(tiles.shape[1]), **how
    )
    found = packed.topk(count, dim=1).values
    key = (found >> 32).to(torch.int32)
    priorities = torch.where(key < 0, key ^ 0x7FFFFFFF, key).view(torch.float32)
    is_class = found != _EMPTY
    classes = ((found & 0xFFFFFFFF) ^ 0xFFFFFFFF).where(is_class, 0)
    return priorities.where(is_class, -torch.inf), classes


@on_its_device
def draw(logits_PV: Tensor, read: OnePass, uniform_PN: Tensor, exponent: float) -> Tensor:
    """Returns the classes [P, N] int64 that uniform numbers draw in proportion to p^exponent, with replacement.

    Args:
        read: of these rows.
        uniform_PN: [P, N] float64 in (0, 1) on the same device.
    """
    from softcache.labels.sparsify.draw_kernels import find_draws, sum_weights

    if logits_PV.stride(1) != 1:
        logits_PV = logits_PV.contiguous()
    (num_rows, num_classes), num_blocks = logits_PV.shape, -(-logits_PV.shape[1] // _BLOCK)
    rows = (
        logits_PV, logits_PV.stride(0), num_classes,
        read.normalizer_P2.contiguous(), uniform_PN.new_full((1,), exponent),
    )  # fmt: skip
    sums_PB = uniform_PN.new_empty((num_rows, num_blocks))
    sum_weights[(num_rows, -(-num_blocks // 8))](
        *rows, sums_PB, num_blocks, BLOCKS=8, BLOCK=_BLOCK, num_warps=8
    )
    reached_PB = sums_PB.cumsum(dim=1)
    wanted_PN = uniform_PN * reached_PB[:, -1:]
    block_PN = torch.searchsorted(reached_PB, wanted_PN, right=True).clamp_(max=num_blocks - 1)
    before_PN = reached_PB.gather(1, (block_PN - 1).clamp_(min=0)).where(block_PN > 0, 0.0)
    drawn_PN = torch.empty_like(block_PN)
    find_draws[tuple(drawn_PN.shape)](
        *rows, block_PN, before_PN, wanted_PN, drawn_PN, BLOCK=_BLOCK, num_warps=4
    )
    return drawn_PN.clamp_(max=num_classes - 1)
