"""What the loss of a chunk is, and its gradient by the chunk's logits.

Shape suffixes: `P` positions, `V` classes, `K` kept classes.

The dropped classes of a row need not be told apart: within their bucket the gradient is the student's own
distribution times one number per row, so one softmax over them, with the kept classes taken out, serves the
value and the gradient. With s the student at T, normalised over all its classes, and P = sum of p (1, up to
rounding):

    d(T^2 KL) / dz_k = T (P s_k - p_k)                          k kept
    d(T^2 KL) / dz_j = T (P s_tail - p_tail) s_j / s_tail       j dropped
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pipeline.fused.head import Head
from pipeline.fused.rows import IGNORED, Rows
from pipeline.labels import SoftenedLabels
from pipeline.losses import fit_vocabulary, weighted_difference

__all__ = ["BucketKl", "Mixture", "Soft", "Uld"]


class Soft(Protocol):
    """A loss of the student's masses in K kept buckets and the bucket of all other classes."""

    temperature_power: int  # the loss is multiplied by T to this power

    def kept(self, logits_PV: Tensor, part: slice) -> Tensor:
        """[P, K] int64 ids of the kept classes of a chunk; V in unused slots."""

    def value_and_slopes(
        self, log_kept_PK: Tensor, log_tail_P: Tensor, part: slice
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss [P] and its derivatives by the student's log-masses [P, K] and [P], -inf where empty."""


class BucketKl:
    """`losses.forward_kl`."""

    temperature_power = 2

    def __init__(self, softened: SoftenedLabels, num_classes: int, num_student_classes: int) -> None:
        self._softened, self._sizes = softened, (num_classes, num_student_classes)
        self._chunk = softened

    def kept(self, logits_PV: Tensor, part: slice) -> Tensor:
        whole = self._softened
        chunk = SoftenedLabels(whole.ids[part], whole.log_probs[part], whole.log_tail[part])
        self._chunk = fit_vocabulary(chunk, *self._sizes)
        return self._chunk.ids

    def value_and_slopes(
        self, log_kept_PK: Tensor, log_tail_P: Tensor, part: slice
    ) -> tuple[Tensor, Tensor, Tensor]:
        log_p_PK, log_p_P = self._chunk.log_probs, self._chunk.log_tail
        value_P = weighted_difference(log_p_PK, log_kept_PK).sum(dim=1)
        value_P += weighted_difference(log_p_P, log_tail_P)
        return value_P, -log_p_PK.exp(), -log_p_P.exp()


class Uld:
    """`losses.uld`: the kept classes are the student's own K largest."""

    temperature_power = 0

    def __init__(self, softened: SoftenedLabels) -> None:
        self._probs_PK = softened.log_probs.exp().sort(dim=1, descending=True).values
        self._tail_P = softened.log_tail.exp()

    def kept(self, logits_PV: Tensor, part: slice) -> Tensor:
        num_kept = min(self._probs_PK.shape[1], logits_PV.shape[1])
        return logits_PV.topk(num_kept, dim=1).indices

    def value_and_slopes(
        self, log_kept_PK: Tensor, log_tail_P: Tensor, part: slice
    ) -> tuple[Tensor, Tensor, Tensor]:
        probs_PK, num_kept = self._probs_PK[part], log_kept_PK.shape[1]
        student_PK, student_P = log_kept_PK.exp(), log_tail_P.exp()
        more_PK, more_P = student_PK - probs_PK[:, :num_kept], student_P - self._tail_P[part]
        value_P = more_PK.abs().sum(dim=1) + probs_PK[:, num_kept:].sum(dim=1) + more_P.abs()
        return value_P, more_PK.sign() * student_PK, more_P.sign() * student_P


class _Masses(NamedTuple):
    """A student's log-masses at one temperature, its logits' log-sum-exp being log_z."""

    kept_PK: Tensor
    tail_P: Tensor
    log_z_P: Tensor


class _Term(NamedTuple):
    """A part of the loss, [P], and its gradient: by the kept logits, and by the tail's as a whole."""

    loss_P: Tensor
    kept_PK: Tensor
    tail_P: Tensor


class Mixture:
    """hard_weight * cross-entropy + soft_weight * T^power * soft loss of a chunk, and its gradient.

    With s the student's masses at T and u the soft loss's derivatives by log s, the gradient is (u_k - s_k
    sum(u)) / T for a kept class; the dropped ones share (u_tail - s_tail sum(u)) / T as the student shares
    its tail among them.
    """

    def __init__(self, rows: Rows, alpha: float, soft: Soft | None, T: Any) -> None:
        self._targets_P, self._alpha, self._soft, self._T = rows.targets_P, alpha, soft, T

    def __call__(
        self, head: Head, logits_PV: Tensor, part: slice, needs_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """The loss [P] and, if needed, the gradient [P, V]; both overwrite the logits."""
        soft, T = self._soft, self._T[part, None] if isinstance(self._T, Tensor) else self._T
        targets_P = None if self._targets_P is None else self._targets_P[part]
        at_target_P = None if targets_P is None else _pick(logits_PV, targets_P)
        if soft is None:
            ids_PK = torch.empty((len(logits_PV), 0), dtype=torch.int64, device=logits_PV.device)
        else:
            ids_PK = soft.kept(logits_PV, part)
        ids_PK, kept_PK, peak_P1 = _take_out(logits_PV, ids_PK)

        terms: list[tuple[Tensor, _Term]] = []  # each with what its tail is shared out by
        if targets_P is not None and at_target_P is not None:
            apart = soft is not None and not _is_one(T)
            within_PV = head.buffer("second", len(logits_PV)) if apart else logits_PV
            masses = _soften(logits_PV, kept_PK, peak_P1, within_PV)
            terms.append((within_PV, self._hard_term(masses, targets_P, at_target_P)))
        if soft is not None:
            if not terms or not _is_one(T):
                logits_PV.mul_(1.0 / T)
                masses = _soften(logits_PV, kept_PK / T, peak_P1 / T, logits_PV)
            terms.append((logits_PV, self._soft_term(masses, part, T)))
        loss_P = torch.stack([term.loss_P for _, term in terms]).sum(dim=0)
        if not needs_gradient:
            return loss_P, logits_PV
        gradient_PV = _shared_out(terms)
        gradient_PV.scatter_add_(1, ids_PK, torch.stack([term.kept_PK for _, term in terms]).sum(dim=0))
        if targets_P is not None:
            one_P = (1.0 - self._alpha) * (targets_P != IGNORED).to(loss_P.dtype)
            gradient_PV.scatter_add_(1, targets_P.clamp(min=0)[:, None], -one_P[:, None])
        return loss_P, gradient_PV

    def _hard_term(self, masses: _Masses, targets_P: Tensor, at_target_P: Tensor) -> _Term:
        counts_P = targets_P != IGNORED
        factor_P = (1.0 - self._alpha) * counts_P.to(at_target_P.dtype)
        return _Term(
            loss_P=factor_P * (masses.log_z_P - at_target_P).where(counts_P, 0.0),
            kept_PK=factor_P[:, None] * masses.kept_PK.exp(),
            tail_P=factor_P * masses.tail_P.exp(),
        )

    def _soft_term(self, masses: _Masses, part: slice, T: Any) -> _Term:
        assert self._soft is not None
        value_P, slope_PK, slope_P = self._soft.value_and_slopes(masses.kept_PK, masses.tail_P, part)
        total_P = slope_PK.sum(dim=1) + slope_P
        factor = self._alpha * T**self._soft.temperature_power  # a number, or [P, 1]
        kept_PK = (slope_PK - masses.kept_PK.exp() * total_P[:, None]) * (factor / T)
        tail_P = (slope_P - masses.tail_P.exp() * total_P)[:, None] * (factor / T)
        return _Term(
            loss_P=(value_P[:, None] * factor)[:, 0],
            kept_PK=kept_PK,
            tail_P=tail_P[:, 0].where(masses.tail_P > -torch.inf, 0.0),
        )


def _take_out(logits_PV: Tensor, ids_PK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Masks the kept classes; returns their ids, now all valid, their logits, and the largest other logit."""
    used_PK = ids_PK < logits_PV.shape[1]
    ids_PK = ids_PK.where(used_PK, 0)
    kept_PK = logits_PV.gather(1, ids_PK).where(used_PK, -torch.inf)
    # Adding, not setting: an unused slot must leave the class that it points at alone, be that kept or not.
    logits_PV.scatter_add_(1, ids_PK, torch.zeros_like(kept_PK).masked_fill_(used_PK, -torch.inf))
    peak_P1 = logits_PV.amax(dim=1, keepdim=True)
    # A softmax over nothing would be NaN. This one's factor is 0.
    logits_PV[:, :1].masked_fill_(peak_P1 == -torch.inf, 0.0)
    return ids_PK, kept_PK, peak_P1


def _soften(logits_PV: Tensor, kept_PK: Tensor, peak_P1: Tensor, out_PV: Tensor) -> _Masses:
    """Softmax of the dropped classes alone, into `out_PV`, and the masses of all.

    The log-sum-exp of the dropped ones is their largest logit, less the log of its softmax: exact however
    little they weigh beside the kept ones, and -inf where there are none.
    """
    torch.softmax(logits_PV, dim=1, out=out_PV)
    tail_P1 = peak_P1 - out_PV.amax(dim=1, keepdim=True).log()
    log_z_P1 = torch.cat([kept_PK, tail_P1], dim=1).logsumexp(dim=1, keepdim=True)
    return _Masses(kept_PK - log_z_P1, (tail_P1 - log_z_P1)[:, 0], log_z_P1[:, 0])


def _shared_out(terms: list[tuple[Tensor, _Term]]) -> Tensor:
    """Sum over the terms of their tails' gradients times the shares [P, V], in place."""
    (first_PV, first), *others = terms
    if others and others[0][0] is first_PV:
        return first_PV.mul_((first.tail_P + others[0][1].tail_P)[:, None])
    first_PV.mul_(first.tail_P[:, None])
    for other_PV, other in others:
        first_PV.addcmul_(other_PV, other.tail_P[:, None])
    return first_PV


def _pick(logits_PV: Tensor, targets_P: Tensor) -> Tensor:
    return logits_PV.gather(1, targets_P.clamp(min=0)[:, None])[:, 0]


def _is_one(T: Any) -> bool:
    return not isinstance(T, Tensor) and T == 1.0
