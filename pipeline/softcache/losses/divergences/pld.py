"""Plackett-Luce distillation."""

import torch
from torch import Tensor

from softcache.losses.log_space import NEG_INF_SURROGATE
from softcache.losses.registry import LOSSES, divergence


@LOSSES.register("pld")
@divergence(tails=("bucket", "uniform"), temperature_power=0, needs_target=True)
def pld(log_p_PB: Tensor, log_s_PB: Tensor) -> Tensor:
    r"""Plackett-Luce distillation: the likelihood of the teacher's order of classes, choice by choice; in nats.

    .. math:: \sum_k p_{\pi_k} (-\log s_{\pi_k} + \log \sum_{l \ge k} s_{\pi_l})

    where the order pi has the ground truth first, then the teacher's classes, likeliest first. Each choice is among all
    classes that are not placed yet, of which the student's tail is a part, so the first K choices are exact on K kept
    classes; the choices among the dropped ones are left out, each of which would add to it. At K = V it is the paper's.
    It is not 0 where teacher and student agree, and has no factor of T, as its paper.

    References:
        Bassam, Zhu, Bian 2025, "PLD: a choice-theoretic list-wise knowledge distillation", arXiv 2506.12542, section 4.
    """
    log_s_PB = log_s_PB.clamp(min=NEG_INF_SURROGATE)
    order_PB = log_p_PB[:, :-2].argsort(dim=1, descending=True, stable=True)
    p_PK, log_s_PK = log_p_PB.gather(1, order_PB).exp(), log_s_PB.gather(1, order_PB)
    left_PB = torch.cat(
        [log_s_PK, log_s_PB[:, -1:]], dim=1
    )  # of the choices after the first; the tail is chosen last
    left_PB = left_PB.flip(1).logcumsumexp(dim=1).flip(1)
    others_P = (p_PK * (left_PB[:, :-1] - log_s_PK)).sum(dim=1)
    return others_P - log_p_PB[:, -2].exp() * log_s_PB[:, -2]
