"""The losses as functions of two distributions over the same buckets. Fused and unfused losses share these.

Shape suffixes: `P` positions, `B` buckets, of which the last is the tail: all classes that have no bucket of their
own, none of them more likely than one that has.

Everything is in log-space. A bucket of mass 0 has log -inf and contributes 0, with a gradient of 0, except where a
loss of the forward kind meets a student without mass at a class that has some: that is +inf, as it must be. The losses
that measure by the student's mass would be +inf wherever the teacher has none, and a padded vocabulary or a masked
class has none; there the teacher counts as having e^-100, so that the student learns to leave it.
"""

import math

import torch
from torch import Tensor

from softcache.labels.tail import log_sum_exp

__all__ = [
    "adaptive_kl",
    "cross_entropy_terms",
    "dkd",
    "forward_kl_terms",
    "jsd",
    "kl_terms",
    "nkd",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "total_variation",
]

# In place of -inf: its exponential is 0 in float64 too, but 0 times it is 0, in the gradient as well.
_NEVER = -1e4
_FAINT = (
    -100.0
)  # nats, in place of a teacher's -inf where a loss would be infinite: below float32's smallest number


def kl_terms(log_p: Tensor, log_s: Tensor) -> Tensor:
    """p * (log p - log s), and 0 with a zero gradient where p is 0."""
    p = log_p.exp()
    return p * (log_p - log_s).where(p > 0, 0.0)


def forward_kl_terms(log_p: Tensor, log_s: Tensor) -> Tensor:
    """p log(p / s), bucket by bucket."""
    return kl_terms(log_p, log_s)


def cross_entropy_terms(log_p: Tensor, log_s: Tensor) -> Tensor:
    """-p log s, bucket by bucket."""
    p = log_p.exp()
    return -p * log_s.where(p > 0, 0.0)


def reverse_kl(log_p_PB: Tensor, log_s_PB: Tensor) -> Tensor:
    """sum s log(s / p)."""
    log_s_PB = log_s_PB.clamp(min=_NEVER)
    return (log_s_PB.exp() * (log_s_PB - log_p_PB.clamp(min=_FAINT))).sum(dim=1)


def jsd(log_p_PB: Tensor, log_s_PB: Tensor, *, beta: float) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(s || m) with m = beta p + (1 - beta) s."""
    log_p_PB, log_s_PB = log_p_PB.clamp(min=_NEVER), log_s_PB.clamp(min=_NEVER)
    log_m_PB = _log_mixture(log_p_PB, log_s_PB, beta)
    of_p_PB = log_p_PB.exp() * (log_p_PB - log_m_PB)
    of_s_PB = log_s_PB.exp() * (log_s_PB - log_m_PB)
    return (beta * of_p_PB + (1.0 - beta) * of_s_PB).sum(dim=1)


def skew_kl(log_p_PB: Tensor, log_s_PB: Tensor, *, skew: float) -> Tensor:
    """KL(p || skew p + (1 - skew) s)."""
    log_p_PB, log_s_PB = log_p_PB.clamp(min=_NEVER), log_s_PB.clamp(min=_NEVER)
    return (log_p_PB.exp() * (log_p_PB - _log_mixture(log_p_PB, log_s_PB, skew))).sum(dim=1)


def skew_reverse_kl(log_p_PB: Tensor, log_s_PB: Tensor, *, skew: float) -> Tensor:
    """KL(s || (1 - skew) p + skew s)."""
    log_p_PB, log_s_PB = log_p_PB.clamp(min=_NEVER), log_s_PB.clamp(min=_NEVER)
    return (log_s_PB.exp() * (log_s_PB - _log_mixture(log_s_PB, log_p_PB, skew))).sum(dim=1)


def total_variation(log_p_PB: Tensor, log_s_PB: Tensor) -> Tensor:
    """sum |p - s| / 2."""
    return 0.5 * (log_p_PB.exp() - log_s_PB.exp()).abs().sum(dim=1)


def adaptive_kl(log_p_PB: Tensor, log_s_PB: Tensor, *, mu: float) -> Tensor:
    """w KL(p || s) + (1 - w) KL(s || p), w the share of sum |p - s| that lies in the head; w is a constant."""
    with torch.no_grad():
        p_PB = log_p_PB.exp()
        gap_PB = (p_PB - log_s_PB.exp()).abs()
        kept_PB, order_PB = p_PB[:, :-1].sort(dim=1, descending=True)
        head_PB = kept_PB.cumsum(dim=1) - kept_PB < mu
        head_P = gap_PB.gather(1, order_PB).where(head_PB, 0.0).sum(dim=1)
        whole_P = gap_PB.sum(dim=1)
        weight_P = head_P / whole_P.where(whole_P > 0, 1.0)
    forward_P = kl_terms(log_p_PB, log_s_PB).sum(dim=1)
    return weight_P * forward_P + (1.0 - weight_P) * reverse_kl(log_p_PB, log_s_PB)


def dkd(log_p_PB: Tensor, log_s_PB: Tensor, *, dkd_alpha: float, dkd_beta: float) -> Tensor:
    """dkd_alpha TCKD + dkd_beta NCKD; the last bucket but one is the ground-truth class."""
    (log_p_P, log_rest_p_P, log_within_p_PB), (log_s_P, log_rest_s_P, log_within_s_PB) = (
        _split_target(log_p_PB),
        _split_target(log_s_PB),
    )
    target_P = kl_terms(log_p_P, log_s_P) + kl_terms(log_rest_p_P, log_rest_s_P)
    others_P = kl_terms(log_within_p_PB, log_within_s_PB).sum(dim=1)
    return dkd_alpha * target_P + dkd_beta * others_P


def nkd(log_p_PB: Tensor, log_s_PB: Tensor, *, nkd_gamma: float) -> Tensor:
    """The part of NKD over the other classes; the last bucket but one is the ground-truth class."""
    return nkd_gamma * cross_entropy_terms(_split_target(log_p_PB)[2], _split_target(log_s_PB)[2]).sum(dim=1)


def _split_target(log_x_PB: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The ground-truth class [P], all others together [P], and the others among themselves [P, B - 1]."""
    others_PB = torch.cat([log_x_PB[:, :-2], log_x_PB[:, -1:]], dim=1)
    log_rest_P = log_sum_exp(others_PB)
    # -inf - -inf would be NaN; with nothing to share out, the shares stay -inf.
    within_PB = others_PB - log_rest_P.where(log_rest_P > -torch.inf, 0.0)[:, None]
    return log_x_PB[:, -2], log_rest_P, within_PB


def _log_mixture(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """log(weight a + (1 - weight) b)."""
    return torch.logaddexp(log_a + math.log(weight), log_b + math.log1p(-weight))
