"""Losses of two heads: a teacher's on its stored hidden states, a student's on its own, without the logits of either.

Both heads make their logits a block of rows and classes at a time, in three passes over the classes of some rows:

    log Z         of the teacher at T, and of the student at T and, for cross-entropy, at 1
    the loss      sum over the classes of f(log p, log s), and of its slopes g = df / d log s
    gradient      of a logit at T: (g - s sum g) / T, into those of hidden states, weight and bias before the next block

A loss that is linear in log s has the slopes -p, whose sum is -1, and takes the last two in one. Where a block has all
classes its logits are kept over the passes; else they are made again in each, so that two products of each head more are
the price of a vocabulary that does not fit.

Memory, besides gradients as in `fused_distillation_loss`: about ten blocks of `BLOCK_ELEMENTS`, whatever rows and classes.

Shape suffixes: `P` positions, `D` width of a hidden state, `V` classes, `B` classes of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from softcache.errors import LabelError
from softcache.labels import OutputHead, VectorLabels
from softcache.labels.vectors import finish_logits
from softcache.losses.buckets import MAX_LACKING_MASS, check_vocabulary
from softcache.losses.distillation import check_alpha
from softcache.losses.fused.autograd import Gradients, HeadLoss
from softcache.losses.fused.distillation import fused_distillation_loss
from softcache.losses.fused.head import Head
from softcache.losses.fused.rows import Rows
from softcache.losses.registry import Loss, as_loss
from softcache.losses.target_class import IGNORED
from softcache.runtime.linear import matmul_float32

__all__ = ["fused_hidden_loss"]

BLOCK_ELEMENTS = 2**23
MIN_ROWS = 256
"""Rows of a block, where there are as many: products of fewer read the weights for too little work."""


def fused_hidden_loss(
    hidden_PD: Tensor,
    weight_VD: Tensor,
    labels: VectorLabels,
    targets_P: Tensor | None,
    *,
    temperature: Any,
    alpha: float,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    weights_P: Tensor | None = None,
    padded_vocabulary: bool = False,
    chunk_positions: int | None = None,
    chunk_classes: int | None = None,
    loss: Loss | str = "forward_kl",
) -> Tensor:
    """Weighted mean of (1 - alpha) * cross-entropy + alpha * T^2 * soft loss against a teacher's whole distributions.

    Equal to `fused_distillation_loss` with labels of all classes, `dense(labels.head_logits())`, at every temperature above
    0; the teacher's distributions are those of its stored states, exactly. Arguments and the rest as there, but for:

    Args:
        labels: torch record of the P positions on the same device, with a head.
        padded_vocabulary: accept a head of another number of classes than the teacher's: classes that the teacher lacks have
            the probability 0, and of those that the student lacks the teacher's may sum to `MAX_LACKING_MASS`.
        chunk_positions, chunk_classes: rows and classes of a block of logits; None: at least 256 rows, 2^23 numbers.
        loss: a sum over classes (`LossSpec.classwise`).

    Raises:
        LabelError: as `fused_distillation_loss`, and for a loss that is no such sum, or `standardize`.

    Example:
        >>> from softcache.labels import encode_vectors
        >>> class Fixed:
        ...     load = staticmethod(lambda device: OutputHead(torch.eye(4), None, 1.0, None))
        >>> labels = VectorLabels(encode_vectors(torch.randn(6, 4), "float32"), {"hidden": "float32"}, 4, Fixed())
        >>> same = labels.vectors()
        >>> round(float(fused_hidden_loss(same, torch.eye(4), labels, None, temperature=2.0, alpha=1.0)), 6)
        0.0
    """
    loss = as_loss(loss)
    check_alpha(alpha)
    if alpha == 0.0:
        how: dict[str, Any] = {
            "bias_V": bias_V,
            "softcap": softcap,
            "logit_scale": logit_scale,
            "weights_P": weights_P,
        }
        return fused_distillation_loss(
            hidden_PD, weight_VD, None, targets_P, temperature=1.0, alpha=0.0, **how
        )
    _check(loss, labels, hidden_PD, targets_P, temperature, alpha)
    head = Head(hidden_PD, weight_VD, bias_V, softcap, logit_scale, chunk_positions)
    check_vocabulary(labels.num_classes, head.num_classes, padded_vocabulary=padded_vocabulary)
    rows = Rows(head, cast(Any, labels), targets_P, weights_P, checks_ids=False)  # no ids to check
    needs = tuple(
        x is not None and x.requires_grad and torch.is_grad_enabled() for x in (hidden_PD, weight_VD, bias_V)
    )
    pair = _TwoHeads(loss, head, rows, labels, alpha, rows.temperature(temperature, head.dtype), softcap)
    num_rows = chunk_positions or max(MIN_ROWS, BLOCK_ELEMENTS // head.num_classes)
    pair.size = num_rows, chunk_classes or max(1, BLOCK_ELEMENTS // num_rows)
    value: Tensor = _HiddenLoss.apply(hidden_PD, weight_VD, bias_V, head, rows, pair, needs)
    return value


def _check(
    loss: Loss,
    labels: VectorLabels,
    hidden_PD: Tensor,
    targets_P: Tensor | None,
    temperature: Any,
    alpha: float,
) -> None:
    if not loss.kind.classwise or loss.standardize:
        what = "standardized logits" if loss.standardize else f"loss {loss.name}"
        raise LabelError(
            f"{what}: not made for labels of hidden states, whose classes are seen a block at a time; use a loss that sums "
            "over classes, such as forward_kl, reverse_kl or jsd, or labels of classes"
        )
    if not labels.is_torch or labels.head is None or len(labels) != len(hidden_PD):
        raise LabelError(
            f"labels: expected a torch record of {len(hidden_PD)} positions with a head; found {len(labels)} positions, "
            f"{'torch' if labels.is_torch else 'NumPy'}, {'no head' if labels.head is None else 'a head'}; read them from "
            "a cache, and flatten batch and positions as the hidden states are"
        )
    if isinstance(temperature, Tensor) and temperature.requires_grad:
        raise LabelError(
            "loss.temperature: expected a constant; found a tensor that requires a gradient; detach it, or use labels of "
            "classes with losses.distillation_loss"
        )
    if alpha < 1.0 and targets_P is None:
        raise LabelError(
            "fused hidden loss: expected targets for alpha below 1; found None; pass them or alpha=1"
        )


class _TwoHeads:
    """Two heads on the active rows, a block of logits at a time.

    Attributes:
        size: rows and classes of a block.
    """

    size: tuple[int, int]

    def __init__(
        self,
        loss: Loss,
        head: Head,
        rows: Rows,
        labels: VectorLabels,
        alpha: float,
        T: Any,
        softcap: float | None,
    ) -> None:
        assert labels.head is not None
        self._loss, self._head, self._rows = loss, head, rows
        self._alpha, self._T, self._softcap = alpha, T, softcap
        self._labels = labels if rows.index_P is None else labels.take(rows.index_P)
        self._teacher: OutputHead = labels.head.load(head.weight_VD.device)

    def run(self, part: slice, hidden_cD: Tensor, gradients: _BlockGradients | None) -> Tensor:
        """Returns the loss [P] of some rows; adds to the gradients, where there are any."""
        T, head, loss = (
            self._T[part, None] if isinstance(self._T, Tensor) else self._T,
            self._head,
            self._loss,
        )
        blocks = self._blocks(part, hidden_cD)
        targets_P = None if self._alpha == 1.0 else self._rows.targets_P
        targets_P = None if targets_P is None else targets_P[part]
        never = torch.full((len(hidden_cD), 1), -torch.inf, dtype=head.dtype, device=hidden_cD.device)
        log_z_p = log_z_s = log_z_1 = at_target = never
        for classes, z_p, z_s in blocks():
            log_z_p = torch.logaddexp(log_z_p, (z_p / T).logsumexp(1, keepdim=True))
            log_z_s = torch.logaddexp(log_z_s, (z_s / T).logsumexp(1, keepdim=True))
            if targets_P is not None:
                log_z_1 = torch.logaddexp(log_z_1, z_s.logsumexp(1, keepdim=True))
                here, place = _within(targets_P, classes)
                at_target = torch.where(here, z_s.gather(1, place), at_target)
        self._check_lacking(part, T, log_z_p)
        factor = self._alpha * T**loss.kind.temperature_power
        hard_P1 = torch.zeros_like(never)
        if targets_P is not None:
            hard_P1 = (1.0 - self._alpha) * (targets_P != IGNORED)[:, None].to(head.dtype)
        value_P1, total_P1 = torch.zeros_like(never), -torch.ones_like(never)
        if not loss.kind.linear:
            total_P1 = torch.zeros_like(never)
            for _, z_p, z_s in blocks():
                value, slope_PB = _terms(loss, z_p / T - log_z_p, z_s / T - log_z_s)
                value_P1, total_P1 = value_P1 + value, total_P1 + slope_PB.sum(1, keepdim=True)
        for classes, z_p, z_s in blocks() if gradients is not None or loss.kind.linear else ():
            log_s = z_s / T - log_z_s
            value, slope_PB = _terms(loss, z_p / T - log_z_p, log_s)
            value_P1 = value_P1 + value if loss.kind.linear else value_P1
            if gradients is None:
                continue
            gradient_PB = slope_PB.addcmul_(log_s.exp_(), total_P1, value=-1.0).mul_(factor / T)
            if targets_P is not None:
                gradient_PB += hard_P1 * (z_s - log_z_1).exp_()
                here, place = _within(targets_P, classes)
                gradient_PB.scatter_add_(1, place, -hard_P1 * here)
            if self._softcap is not None:  # d tanh = 1 - tanh^2
                gradient_PB.addcmul_(gradient_PB, (z_s / self._softcap).square_(), value=-1.0)
            gradients.add_block(part, classes, hidden_cD, gradient_PB)
        value_P1 = factor * value_P1
        if targets_P is not None:
            value_P1 = value_P1 + hard_P1 * (log_z_1 - at_target).where(hard_P1 > 0, 0.0)
        return value_P1[:, 0]

    def _blocks(self, part: slice, hidden_cD: Tensor) -> Callable[[], Iterator[tuple[slice, Tensor, Tensor]]]:
        """Returns what yields classes and both heads' logits [P, B] of them, from the first block on at each call."""
        total, size = self._head.num_classes, self.size[1]
        if size < total:
            return lambda: (
                self._block(part, hidden_cD, slice(start, min(start + size, total)))
                for start in range(0, total, size)
            )
        whole = self._block(part, hidden_cD, slice(0, total))
        return lambda: iter((whole,))

    def _block(self, part: slice, hidden_cD: Tensor, classes: slice) -> tuple[slice, Tensor, Tensor]:
        head = self._head
        z_s = self._product(hidden_cD, head.weight_VD[classes])
        bias_B = None if head.tensors[2] is None else head.tensors[2].detach()[classes].to(head.dtype)
        z_s = finish_logits(z_s, None, bias_B, head.scale, self._softcap)
        return classes, self._teacher_logits(part, classes), z_s

    def _teacher_logits(self, part: slice, classes: slice) -> Tensor:
        """The teacher's logits [P, B]; -inf for classes that it has not."""
        teacher, dtype = self._teacher, self._head.dtype
        numbers_PD, scale_P = self._labels.take(part).numbers()
        weight_BD = teacher.weight[classes]
        bias_B = None if teacher.bias is None else teacher.bias[classes].to(dtype)
        z_p = self._product(numbers_PD, weight_BD)
        z_p = finish_logits(z_p, scale_P, bias_B, teacher.logit_scale, teacher.softcap)
        lacking = classes.stop - classes.start - len(weight_BD)
        return torch.nn.functional.pad(z_p, (0, lacking), value=-torch.inf) if lacking else z_p

    def _product(self, inputs_PD: Tensor, weight_BD: Tensor) -> Tensor:
        """inputs @ weight.T in the loss's dtype; of half-precision inputs on CUDA with a float32 accumulator."""
        dtype = torch.promote_types(inputs_PD.dtype, weight_BD.dtype)
        if (
            inputs_PD.is_cuda
            and dtype in (torch.bfloat16, torch.float16)
            and self._head.dtype == torch.float32
        ):
            return matmul_float32(inputs_PD.to(dtype), weight_BD.to(dtype).T)
        return inputs_PD.to(self._head.dtype) @ weight_BD.to(self._head.dtype).T

    def _check_lacking(self, part: slice, T: Any, log_z_P1: Tensor) -> None:
        """Raises where the teacher gives more than `MAX_LACKING_MASS` to classes that the student has not."""
        have, of_teacher = self._head.num_classes, self._labels.num_classes
        log_more = torch.full_like(log_z_P1, -torch.inf)
        for start in range(have, of_teacher, self.size[1]):
            z_p = self._teacher_logits(part, slice(start, min(start + self.size[1], of_teacher)))
            log_more = torch.logaddexp(log_more, (z_p / T).logsumexp(1, keepdim=True))
        if have >= of_teacher:
            return
        lost_P = (log_more - torch.logaddexp(log_more, log_z_P1)).exp()[:, 0]
        if bool((lost_P > MAX_LACKING_MASS).any()):
            position = part.start + int(lost_P.argmax())
            raise LabelError(
                f"student logits: {have} classes, to all others of which the teacher gives {float(lost_P.max()):.2g} at "
                f"labeled row {position}; expected at most {MAX_LACKING_MASS:g}, as of padding; build the student with the "
                "teacher's classes",
                position=position,
            )


def _within(targets_P: Tensor, classes: slice) -> tuple[Tensor, Tensor]:
    """Whether each target is among the classes of a block, [P, 1], and where; 0 where it is not."""
    place_P1 = (targets_P - classes.start)[:, None]
    here_P1 = (place_P1 >= 0) & (place_P1 < classes.stop - classes.start)
    return here_P1, place_P1.where(here_P1, 0)


def _terms(loss: Loss, log_p_PB: Tensor, log_s_PB: Tensor) -> tuple[Tensor, Tensor]:
    """The loss's sum over the classes of a block [P, 1], and its slopes by log s [P, B]."""
    formula = loss.kind.formula
    assert formula is not None
    if loss.kind.linear:
        return formula(log_p_PB, log_s_PB, **loss.parameters).sum(1, keepdim=True), log_p_PB.exp().neg_()
    with torch.enable_grad():
        log_s_PB = log_s_PB.detach().requires_grad_()
        value_P = formula(log_p_PB, log_s_PB, **loss.parameters)
        (slope_PB,) = torch.autograd.grad(value_P.sum(), log_s_PB)
    return value_P.detach()[:, None], slope_PB


class _BlockGradients(Gradients):
    """Sums of gradients over blocks of rows and classes."""

    def __init__(self, head: Head, rows: Rows, needs: tuple[bool, bool, bool]) -> None:
        super().__init__(head, rows, needs)
        if self.hidden_PD is not None:
            self.hidden_PD.zero_()

    def add_block(self, part: slice, classes: slice, hidden_cD: Tensor, gradient_PB: Tensor) -> None:
        """Adds those of a block of logits, before the head's scale."""
        head, share_P = self._head, self._rows.share_P
        share = torch.ones_like(gradient_PB[:, 0]) if share_P is None else share_P[part]
        if self.bias_V is not None:
            self.bias_V[classes].addmv_(gradient_PB.T, share)
        narrow_PB = gradient_PB.to(head.product_dtype)
        product = torch.mm if head.product_dtype == head.dtype else matmul_float32
        if self.hidden_PD is not None:
            self.hidden_PD[part] += product(narrow_PB, head.weight_VD[classes])
        if self.weight_VD is not None:
            weighed_cD = hidden_cD if share_P is None else hidden_cD * share[:, None].to(hidden_cD.dtype)
            self.weight_VD[classes] += product(narrow_PB.T, weighed_cD)


class _HiddenLoss(HeadLoss):
    """Value and gradients together; backward multiplies by the gradient that comes in."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden_PD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: Head,
        rows: Rows,
        pair: _TwoHeads,
        needs: tuple[bool, bool, bool],
    ) -> Tensor:
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden_PD, weight_VD, bias_V)]
        with torch.autocast(hidden_PD.device.type, enabled=False):
            gradients = _BlockGradients(head, rows, needs)
            loss_P = torch.zeros(rows.num_active, dtype=head.dtype, device=hidden_PD.device)
            for part, hidden_cD in head.chunks(rows.take(hidden_PD.detach()), pair.size[0]):
                loss_P[part] = pair.run(part, hidden_cD, gradients if any(needs) else None)
            ctx.save_for_backward(*gradients.finish())
            weighted_P = loss_P if rows.share_P is None else loss_P * rows.share_P
            return weighted_P.sum() * rows.scale
