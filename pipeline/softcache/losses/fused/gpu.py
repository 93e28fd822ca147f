"""`fused.chunk` by kernels in Triton (`fused.gpu_kernels`), on a GPU: for every loss of the student's masses in buckets, at
one temperature or one for each row; not with standardised logits, nor with a tail that is uniform.

torch takes about fifteen passes over a chunk for the same. Here one reads it and one turns it into its gradient, through the
softcap and in the dtype of the matrix products; between them are [P, K] numbers, by the very functions of `fused.chunk`.

Shape suffixes: `P` positions, `V` classes, `K` kept classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softcache.losses.fused.chunk import ChunkObjective, hard_term, is_one, student_buckets, summed, take_out
from softcache.losses.fused.head import Head
from softcache.runtime.triton import is_triton_on, on_its_device

__all__ = ["RowSums", "TritonObjective", "is_triton"]

_LANES, _BLOCK = 512, 2048


def is_triton(head: Head, mixture: ChunkObjective) -> bool:
    """Whether `TritonObjective` can take the place of a mixture."""
    return (
        is_triton_on(head.weight_VD)
        and head.dtype == torch.float32
        and not mixture.standardize
        and (mixture.soft is None or not mixture.soft.even)
    )


class TritonObjective:
    """The same loss and gradient as the mixture that it is made of; the gradient is one by the logits before the softcap."""

    def __init__(self, head: Head, mixture: ChunkObjective) -> None:
        self._mixture = mixture
        head.keeps_squares = False

    def __call__(
        self, head: Head, logits_PV: Tensor, part: slice, needs_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """The loss [P] and, if needed, the gradient [P, V]: in the place of the logits, or in the products' dtype."""
        mixture, soft = self._mixture, self._mixture.soft
        num_rows, num_classes = logits_PV.shape
        base = mixture.T[part, None] if isinstance(mixture.T, Tensor) else mixture.T
        targets_P = None if mixture.targets_P is None else mixture.targets_P[part]
        at_target_P = None
        if targets_P is not None:
            at_target_P = logits_PV.gather(1, targets_P.clamp(min=0)[:, None])[:, 0]
        ids_PK = torch.empty((num_rows, 0), dtype=torch.int64, device=logits_PV.device)
        if soft is not None:
            ids_PK = soft.kept(logits_PV, part)
        used_PK = ids_PK < num_classes
        ids_PK, kept_PK = take_out(logits_PV, ids_PK)

        apart = soft is not None and not is_one(base)
        sums = RowSums(logits_PV, base if apart else None, at_one=targets_P is not None or not apart)
        by_one_P, by_beta_P, terms = None, None, []
        if targets_P is not None and at_target_P is not None:
            weight_P = mixture.hard_weight(part, targets_P, logits_PV.dtype)
            term = hard_term(student_buckets(kept_PK, sums.at_one_P[:, None]), weight_P, at_target_P)
            terms.append(term)
            by_one_P = term.tail_P
        if soft is not None:
            tail_P = sums.softened_P if apart else sums.at_one_P
            masses = student_buckets(kept_PK / base if apart else kept_PK, tail_P[:, None])
            term = mixture.soft_term(masses, part, base, base, None)
            terms.append(term)
            if apart:
                by_beta_P = term.tail_P
            else:
                by_one_P = term.tail_P if by_one_P is None else by_one_P + term.tail_P
        loss_P = summed([term.loss_P for term in terms])
        if not needs_gradient:
            return loss_P, logits_PV
        of_kept_PK = summed([term.kept_PK for term in terms])
        if targets_P is None:
            hard_P, targets_P = torch.zeros_like(loss_P), torch.full_like(ids_PK[:, 0], -1)
        else:
            hard_P = mixture.hard_weight(part, targets_P, loss_P.dtype)
            is_target_PK = (ids_PK == targets_P[:, None]) & used_PK
            of_kept_PK = of_kept_PK - hard_P[:, None] * is_target_PK
            targets_P = targets_P.masked_fill(is_target_PK.any(dim=1), -1)
        if head.softcap is not None:
            of_kept_PK = of_kept_PK * (1.0 - (kept_PK.where(used_PK, 0.0) / head.softcap).square())
        gradient_PV = head.gradient_buffer(logits_PV)
        sums.share_out(gradient_PV, by_one_P, by_beta_P, targets_P, hard_P, head.softcap)
        gradient_PV.scatter_add_(1, ids_PK, of_kept_PK.to(gradient_PV.dtype))
        return loss_P, gradient_PV


class RowSums:
    """The log-sum-exps [P] of a chunk's logits that are not masked: as they are (`at_one_P`), and over T (`softened_P`)."""

    def __init__(self, logits_PV: Tensor, T: Tensor | float | None, *, at_one: bool) -> None:
        from softcache.losses.fused.gpu_kernels import sum_rows

        num_rows = len(logits_PV)
        self._logits_PV, self._flags = logits_PV, {"HARD": at_one, "SOFT": T is not None}
        self.at_one_P, self.softened_P = logits_PV.new_empty(num_rows), logits_PV.new_empty(num_rows)
        self._beta_P = logits_PV.new_ones(num_rows)
        if T is not None:
            self._beta_P = self._beta_P / (T[:, 0] if isinstance(T, Tensor) else T)
        on_its_device(sum_rows[(num_rows,)])(
            logits_PV, logits_PV.shape[1], self._beta_P, self.at_one_P, self.softened_P,
            **self._flags, LANES=_LANES, num_warps=8,
        )  # fmt: skip

    def share_out(
        self,
        out_PV: Tensor,
        by_one_P: Tensor | None,
        by_beta_P: Tensor | None,
        targets_P: Tensor,
        hard_P: Tensor,
        softcap: float | None,
    ) -> None:
        """Writes the gradient of what is not masked, and of the targets."""
        from softcache.losses.fused.gpu_kernels import share_out

        num_rows, num_classes = out_PV.shape
        grid = (num_rows, -(-num_classes // _BLOCK))
        on_its_device(share_out[grid])(
            self._logits_PV, out_PV, num_classes, self._beta_P, self.at_one_P, self.softened_P,
            hard_P if by_one_P is None else by_one_P, hard_P if by_beta_P is None else by_beta_P,
            targets_P, hard_P, 1.0 if softcap is None else float(softcap),
            HARD=by_one_P is not None, SOFT=by_beta_P is not None, CAPPED=softcap is not None,
            BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
