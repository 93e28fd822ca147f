"""What the loss of a chunk is, and its gradient by the chunk's logits.

Shape suffixes: `P` positions, `V` classes, `K` kept classes.

The dropped classes of a row need not be distinguished: within their bucket the gradient is the student's own
distribution times one number per row, so one softmax over them, with the kept classes taken out, serves the
value and the gradient. With s the student at T, normalised over all its classes, and P = sum of p (1, up to
rounding):

    d(T^2 KL) / dz_k = T (P s_k - p_k)                          k kept
    d(T^2 KL) / dz_j = T (P s_tail - p_tail) s_j / s_tail       j dropped

With standardised logits T is the base temperature times the row's standard deviation, itself a function of the logits:
a gradient g at a fixed T, and z less their mean, make

    dL / dz_j = g_j - z_j (sum g z) / (V std^2)
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from softcache.losses.fused.head import Head
from softcache.losses.fused.soft import ChunkLoss, StudentBuckets
from softcache.losses.standardize import LEAST_STD
from softcache.losses.target_class import IGNORED

__all__ = ["ChunkObjective", "hard_term", "is_one", "student_buckets", "summed", "take_out"]


class _Term(NamedTuple):
    """A part of the loss, [P], and its gradient: by the kept logits, and by the tail's as a whole.

    Where there is an `even_P`, that is added to the gradient of every logit, the kept ones too.
    """

    loss_P: Tensor
    kept_PK: Tensor
    tail_P: Tensor
    even_P: Tensor | None = None


class ChunkObjective:
    """hard weight * cross-entropy + alpha * T^power * soft loss of a chunk, and its gradient.

    With s the student's masses at T and u the soft loss's derivatives by log s, the gradient is (u_k - s_k
    sum(u)) / T for a kept class; the dropped ones share (u_tail - s_tail sum(u)) / T as the student shares
    its tail among them.

    Args:
        targets_P: of the active rows; None for a loss without cross-entropy.
        alpha: weight of the soft loss.
        soft: None for cross-entropy alone.
        T: a number, or a tensor over the active rows.
        standardize: T is to be multiplied by the standard deviation of the row's logits.
        truth_P: of the active rows, what the soft loss adds to the weight of their cross-entropy, over alpha; or None.
    """

    def __init__(
        self,
        targets_P: Tensor | None,
        alpha: float,
        soft: ChunkLoss | None,
        T: Any,
        *,
        standardize: bool = False,
        truth_P: Tensor | None = None,
    ) -> None:
        self.targets_P, self.alpha, self.soft, self.T = targets_P, alpha, soft, T
        self.standardize, self.truth_P = standardize and soft is not None, truth_P

    def __call__(
        self, head: Head, logits_PV: Tensor, part: slice, needs_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """The loss [P] and, if needed, the gradient [P, V]; both overwrite the logits."""
        soft, base = self.soft, self.T[part, None] if isinstance(self.T, Tensor) else self.T
        targets_P = None if self.targets_P is None else self.targets_P[part]
        at_target_P = None if targets_P is None else _pick(logits_PV, targets_P)
        scores, T = None, base
        if self.standardize:
            scores = _Scores(head, logits_PV)
            T = base * scores.std_P1
        if soft is None:
            ids_PK = torch.empty((len(logits_PV), 0), dtype=torch.int64, device=logits_PV.device)
        else:
            ids_PK = soft.kept(logits_PV, part)
        dropped = _Dropped(head, logits_PV, ids_PK) if soft is not None and soft.even else None
        ids_PK, kept_PK = take_out(logits_PV, ids_PK)
        peak_P1 = logits_PV.amax(dim=1, keepdim=True)
        # A softmax over nothing would be NaN. This one's factor is 0.
        logits_PV[:, :1].masked_fill_(peak_P1 == -torch.inf, 0.0)

        terms: list[tuple[Tensor, _Term]] = []  # each with what its tail is shared out by
        if targets_P is not None and at_target_P is not None:
            apart = soft is not None and not is_one(T)
            within_PV = head.buffer("second", len(logits_PV)) if apart else logits_PV
            masses = _soften(logits_PV, kept_PK, peak_P1, within_PV)
            weight_P = self.hard_weight(part, targets_P, at_target_P.dtype)
            terms.append((within_PV, hard_term(masses, weight_P, at_target_P)))
        correction = None
        if soft is not None:
            if not terms or not is_one(T):
                logits_PV.mul_(1.0 / T)
                masses = _soften(logits_PV, kept_PK / T, peak_P1 / T, logits_PV)
            term = self.soft_term(masses, part, base, T, dropped)
            terms.append((logits_PV, term))
            if scores is not None and needs_gradient:
                correction = scores.slope(ids_PK, term.kept_PK, logits_PV, term.tail_P)
        loss_P = summed([term.loss_P for _, term in terms])
        if not needs_gradient:
            return loss_P, logits_PV
        gradient_PV = _shared_out(terms)
        if dropped is not None and term.even_P is not None:
            gradient_PV.add_(term.even_P[:, None])
        gradient_PV.scatter_add_(1, ids_PK, summed([term.kept_PK for _, term in terms]))
        if targets_P is not None:
            one_P = self.hard_weight(part, targets_P, loss_P.dtype)
            gradient_PV.scatter_add_(1, targets_P.clamp(min=0)[:, None], -one_P[:, None])
        if scores is not None and correction is not None:
            gradient_PV.addcmul_(scores.centred_PV, correction)
        return loss_P, gradient_PV

    def hard_weight(self, part: slice, targets_P: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight [P] of each row's cross-entropy, 0 where there is no target."""
        weight_P = (1.0 - self.alpha) * (targets_P != IGNORED).to(dtype)
        if self.truth_P is None:
            return weight_P
        return weight_P + (self.alpha * self.truth_P[part]).where(targets_P != IGNORED, 0.0)

    def soft_term(
        self, masses: StudentBuckets, part: slice, base: Any, T: Any, dropped: "_Dropped | None"
    ) -> _Term:
        """The soft part of a chunk whose kept classes were asked for, of the student's masses at T."""
        assert self.soft is not None
        if dropped is not None:
            mean_P = (dropped.mean_P1 / T)[:, 0] - masses.log_z_P
            masses = masses._replace(mean_P=mean_P, num_dropped_P=dropped.num_P)
        slopes = self.soft.slopes(masses, part)
        total_P = slopes.kept_PK.sum(dim=1) + slopes.tail_P
        total_P = total_P if slopes.mean_P is None else total_P + slopes.mean_P
        factor = self.alpha * base**self.soft.temperature_power  # a number, or [P, 1]
        kept_PK = (slopes.kept_PK - masses.kept_PK.exp() * total_P[:, None]) * (factor / T)
        tail_P = (slopes.tail_P - masses.tail_P.exp() * total_P)[:, None] * (factor / T)
        even_P = None
        if dropped is not None and slopes.mean_P is not None:
            even_P = ((slopes.mean_P / dropped.num_P.clamp(min=1))[:, None] * (factor / T))[:, 0]
            kept_PK = kept_PK - even_P[:, None] * dropped.used_PK
        return _Term(
            loss_P=(slopes.value_P[:, None] * factor)[:, 0],
            kept_PK=kept_PK,
            tail_P=tail_P[:, 0].where(masses.tail_P > -torch.inf, 0.0),
            even_P=even_P,
        )


def hard_term(masses: StudentBuckets, weight_P: Tensor, at_target_P: Tensor) -> _Term:
    """The cross-entropy, of which the target's own gradient, minus the weight, is left out."""
    return _Term(
        loss_P=weight_P * (masses.log_z_P - at_target_P).where(weight_P > 0, 0.0),
        kept_PK=weight_P[:, None] * masses.kept_PK.exp(),
        tail_P=weight_P * masses.tail_P.exp(),
    )


class _Scores:
    """A chunk's logits less their means, and their standard deviations, over the classes that are not masked."""

    def __init__(self, head: Head, logits_PV: Tensor) -> None:
        self.centred_PV = head.buffer("centred", len(logits_PV)).copy_(logits_PV)
        masked_PV = logits_PV == -torch.inf
        count_P1 = (logits_PV.shape[1] - masked_PV.sum(dim=1, keepdim=True)).clamp(min=1).to(logits_PV.dtype)
        self.centred_PV.masked_fill_(masked_PV, 0.0)
        self.centred_PV.sub_(self.centred_PV.sum(dim=1, keepdim=True) / count_P1).masked_fill_(masked_PV, 0.0)
        std_P1 = torch.linalg.vector_norm(self.centred_PV, dim=1, keepdim=True) / count_P1.sqrt()
        self.std_P1 = std_P1.clamp(min=LEAST_STD)
        # By d std / dz_j = z_j / (V std), and d loss / d std = -(sum g z) / std.
        self._share_P1 = torch.where(std_P1 > LEAST_STD, -1.0 / (count_P1 * self.std_P1.square()), 0.0)

    def slope(self, ids_PK: Tensor, kept_PK: Tensor, shares_PV: Tensor, tail_P: Tensor) -> Tensor:
        """What the centred logits count in the gradient, [P, 1], of a soft term's gradient at a fixed temperature."""
        of_kept_P = (kept_PK * self.centred_PV.gather(1, ids_PK)).sum(dim=1)
        of_tail_P = tail_P * torch.einsum("pv,pv->p", shares_PV, self.centred_PV)
        return (of_kept_P + of_tail_P)[:, None] * self._share_P1


class _Dropped:
    """Of a chunk's dropped classes the number [P], and the mean of the logits [P, 1], -inf where one is masked."""

    def __init__(self, head: Head, logits_PV: Tensor, ids_PK: Tensor) -> None:
        num_classes, dtype = logits_PV.shape[1], logits_PV.dtype
        self.used_PK = ids_PK < num_classes
        kept_PK = logits_PV.gather(1, ids_PK.where(self.used_PK, 0)).where(self.used_PK, 0.0)
        finite_PV = torch.nan_to_num(logits_PV, neginf=0.0, out=head.buffer("second", len(logits_PV)))
        total_P1 = finite_PV.sum(dim=1, keepdim=True) - kept_PK.nan_to_num(neginf=0.0).sum(
            dim=1, keepdim=True
        )
        num_masked_P = (logits_PV == -torch.inf).sum(dim=1) - (kept_PK == -torch.inf).sum(dim=1)
        self.num_P = (num_classes - self.used_PK.sum(dim=1)).to(dtype)
        mean_P1 = total_P1 / self.num_P.clamp(min=1)[:, None]
        self.mean_P1 = mean_P1.masked_fill(num_masked_P[:, None] > 0, -torch.inf)


def take_out(logits_PV: Tensor, ids_PK: Tensor) -> tuple[Tensor, Tensor]:
    """Masks the kept classes; returns their ids, now all valid, and their logits, -inf in unused slots."""
    used_PK = ids_PK < logits_PV.shape[1]
    ids_PK = ids_PK.where(used_PK, 0)
    kept_PK = logits_PV.gather(1, ids_PK).where(used_PK, -torch.inf)
    # Adding, not setting: an unused slot must leave the class that it points at alone, be that kept or not.
    logits_PV.scatter_add_(1, ids_PK, torch.zeros_like(kept_PK).masked_fill_(used_PK, -torch.inf))
    return ids_PK, kept_PK


def _soften(logits_PV: Tensor, kept_PK: Tensor, peak_P1: Tensor, out_PV: Tensor) -> StudentBuckets:
    """Softmax of the dropped classes alone, into `out_PV`, and the masses of all.

    The log-sum-exp of the dropped ones is their largest logit, less the log of its softmax: exact however
    little they weigh against the kept ones, and -inf where there are none.
    """
    torch.softmax(logits_PV, dim=1, out=out_PV)
    tail_P1 = peak_P1 - out_PV.amax(dim=1, keepdim=True).log()
    return student_buckets(kept_PK, tail_P1)


def student_buckets(kept_PK: Tensor, tail_P1: Tensor) -> StudentBuckets:
    """The masses of the logits of kept classes and of the log-sum-exp of all others."""
    log_z_P1 = torch.cat([kept_PK, tail_P1], dim=1).logsumexp(dim=1, keepdim=True)
    return StudentBuckets(kept_PK - log_z_P1, (tail_P1 - log_z_P1)[:, 0], log_z_P1[:, 0])


def _shared_out(terms: list[tuple[Tensor, _Term]]) -> Tensor:
    """Sum over the terms of their tails' gradients times the shares [P, V], in place."""
    (first_PV, first), *others = terms
    if others and others[0][0] is first_PV:
        return first_PV.mul_((first.tail_P + others[0][1].tail_P)[:, None])
    first_PV.mul_(first.tail_P[:, None])
    for other_PV, other in others:
        first_PV.addcmul_(other_PV, other.tail_P[:, None])
    return first_PV


def summed(parts: list[Tensor]) -> Tensor:
    """The sum of one or two parts."""
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _pick(logits_PV: Tensor, targets_P: Tensor) -> Tensor:
    return logits_PV.gather(1, targets_P.clamp(min=0)[:, None])[:, 0]


def is_one(T: Any) -> bool:
    """Whether a temperature is the number 1."""
    return not isinstance(T, Tensor) and T == 1.0
