"""The loss as one operation of autograd: gradients are made in the forward pass, and backward only scales.

Shape suffixes: `P` positions, `D` width of the hidden state, `V` classes.

A chunk's logits turn, in place, into the gradient of its loss, which is multiplied into the gradients of the hidden
states and of the head before the next chunk begins; so nothing of a chunk outlives it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from softcache.losses.fused.chunk import ChunkObjective
from softcache.losses.fused.cpu import CompiledMixture, RecordMixture
from softcache.losses.fused.gpu import TritonObjective
from softcache.losses.fused.head import Head
from softcache.losses.fused.rows import Rows
from softcache.losses.fused.sampled import SampledObjective
from softcache.runtime.linear import matmul_float32

__all__ = ["Gradients", "HeadLoss"]


class Gradients:
    """Sums the gradients of hidden states, weight and bias over chunks; None where none is needed.

    Rows come in with a weight of at most 1 and the common factor at the end, so that half precision neither
    overflows nor vanishes.
    """

    def __init__(self, head: Head, rows: Rows, needs: tuple[bool, bool, bool]) -> None:
        self._head, self._rows = head, rows
        hidden_PD, weight_VD, _ = head.tensors
        like: dict[str, Any] = {"dtype": head.dtype, "device": hidden_PD.device}
        width = hidden_PD.shape[1]
        self.hidden_PD = torch.empty((rows.num_active, width), **like) if needs[0] else None
        self.weight_VD = torch.zeros(weight_VD.shape, **like) if needs[1] else None
        self.bias_V = torch.zeros(head.num_classes, **like) if needs[2] else None

    def add(self, part: slice, hidden_PD: Tensor, gradient_PV: Tensor) -> None:
        head, share_P = self._head, self._rows.share_P
        gradient_PV = head.through_softcap(gradient_PV)
        share = torch.ones_like(gradient_PV[:, 0]) if share_P is None else share_P[part]
        if self.bias_V is not None:
            self.bias_V.addmv_(gradient_PV.T, share)
        narrow_PV = head.narrow(gradient_PV)
        if self.hidden_PD is not None:
            self.hidden_PD[part] = torch.mm(narrow_PV, head.weight_VD)
        if self.weight_VD is not None:
            if share_P is not None:
                hidden_PD = hidden_PD * share[:, None].to(hidden_PD.dtype)
            if head.product_dtype == head.dtype:
                self.weight_VD.addmm_(narrow_PV.T, hidden_PD)
            else:
                self.weight_VD.add_(matmul_float32(narrow_PV.T, hidden_PD))

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, factor = self._rows, self._rows.scale * self._head.scale
        for total in (self.hidden_PD, self.weight_VD, self.bias_V):
            if total is not None:
                total.mul_(factor)
        if self.hidden_PD is not None and rows.share_P is not None:
            self.hidden_PD.mul_(rows.share_P[:, None])
        if self.hidden_PD is not None and rows.index_P is not None:
            whole_PD = torch.zeros_like(self._head.tensors[0], dtype=self._head.dtype)
            self.hidden_PD = whole_PD.index_copy_(0, rows.index_P, self.hidden_PD)
        return self.hidden_PD, self.weight_VD, self.bias_V


class HeadLoss(torch.autograd.Function):
    """Value and gradients together; backward multiplies by the gradient that comes in."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_PD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: Head,
        rows: Rows,
        mixture: ChunkObjective | CompiledMixture | RecordMixture | SampledObjective | TritonObjective,
        needs: tuple[bool, bool, bool],
    ) -> Tensor:
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden_PD, weight_VD, bias_V)]
        with torch.autocast(hidden_PD.device.type, enabled=False):
            gradients = Gradients(head, rows, needs)
            loss_P = torch.zeros(rows.num_active, dtype=head.dtype, device=hidden_PD.device)
            for part, hidden_cD in head.chunks(rows.take(hidden_PD.detach())):
                loss_P[part], gradient_PV = mixture(head, head.logits(hidden_cD), part, any(needs))
                if any(needs):
                    gradients.add(part, hidden_cD, gradient_PV)
            ctx.save_for_backward(*gradients.finish())
            weighted_P = loss_P if rows.share_P is None else loss_P * rows.share_P
            return weighted_P.sum() * rows.scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        scaled: list[Tensor | None] = []
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            if gradient is None:
                scaled.append(None)
            else:
                product = gradient * grad_output if _graph_is_kept() else gradient.mul_(grad_output)
                scaled.append(product.to(dtype))
        return (*scaled, None, None, None, None)


def _graph_is_kept() -> bool:
    """Whether the backward pass that runs may be run again. If not, its saved tensors may be written over,
    which spares a second [V, D]."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)  # not public
    return True if asked is None else bool(asked())
