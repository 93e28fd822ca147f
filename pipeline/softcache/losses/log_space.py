"""Sums, mixtures and shares of distributions in log-space, for the formulas of `softcache.losses.divergences`.

Shape suffixes: `P` positions, `B` buckets, of which the last is the tail: all classes that have no bucket of their
own, none of them more likely than one that has.

A bucket of mass 0 has log -inf and contributes 0, with a gradient of 0, except where a loss of the forward kind meets
a student without mass at a class that has some: that is +inf, as it must be. The losses that measure by the student's
mass would be +inf wherever the teacher has none, and a padded vocabulary or a masked class has none; there the teacher
counts as having e^-100, so that the student learns to leave it.
"""

import math

import torch
from torch import Tensor

from softcache.labels.tail import log_sum_exp

__all__ = ["LOG_PROB_FLOOR", "NEG_INF_SURROGATE", "kl_terms", "log_mixture", "split_target"]

NEG_INF_SURROGATE = -1e4
"""In place of -inf: its exponential is 0 in float64 too, but 0 times it is 0, in the gradient as well."""
LOG_PROB_FLOOR = -100.0
"""Nats, in place of a teacher's -inf where a loss would be infinite: below float32's smallest number."""


def kl_terms(log_p: Tensor, log_s: Tensor) -> Tensor:
    """p * (log p - log s), and 0 with a zero gradient where p is 0."""
    p = log_p.exp()
    return p * (log_p - log_s).where(p > 0, 0.0)


def log_mixture(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """log(weight a + (1 - weight) b)."""
    return torch.logaddexp(log_a + math.log(weight), log_b + math.log1p(-weight))


def split_target(log_x_PB: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The ground-truth class [P], all others together [P], and the others among themselves [P, B - 1].

    The ground-truth class is the last bucket but one.
    """
    others_PB = torch.cat([log_x_PB[:, :-2], log_x_PB[:, -1:]], dim=1)
    log_rest_P = log_sum_exp(others_PB)
    # -inf - -inf would be NaN; with nothing to share out, the shares stay -inf.
    within_PB = others_PB - log_rest_P.where(log_rest_P > -torch.inf, 0.0)[:, None]
    return log_x_PB[:, -2], log_rest_P, within_PB
