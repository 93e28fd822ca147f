"""Adaptive Kullback-Leibler divergence."""

import torch
from pydantic import Field
from torch import Tensor

from softcache.losses.divergences.reverse_kl import reverse_kl
from softcache.losses.log_space import kl_terms
from softcache.losses.registry import LOSSES, divergence
from softcache.settings import Settings


class AdaptiveKlSettings(Settings):
    """`mu`: the teacher's mass in the head."""

    mu: float = Field(0.5, gt=0, le=1)


@LOSSES.register("adaptive_kl")
@divergence(AdaptiveKlSettings, tails=("bucket", "uniform", "ignore"))
def adaptive_kl(log_p_PB: Tensor, log_s_PB: Tensor, *, mu: float) -> Tensor:
    r"""Adaptive divergence: forward and reverse, weighed by where teacher and student are apart; in nats.

    .. math:: \frac{g_h}{g_h + g_t} KL(p \| s) + \frac{g_t}{g_h + g_t} KL(s \| p), \quad g = \sum |p - s|

    g_h sums over the head, the fewest of the most likely classes that hold the teacher's mass `mu`, g_t over all
    others. The weights are constants: no gradient goes through them, as in the authors' code, so the gradient is that
    of the reported value at fixed weights. The bucket of the dropped classes is never in the head, and its one gap is
    at most the sum of theirs: with few classes kept, the forward part weighs more than the full gaps would make it.
    At p = s, where the weights are 0/0, the value is 0.

    The authors' code ends the head before the class that reaches `mu` (and after the first); the paper's text has that
    class within, and so has this.

    References:
        Wu, Tao, Wang, Yang, Zhao, Wong 2024, "Rethinking Kullback-Leibler divergence in knowledge distillation for
        large language models", arXiv 2404.02657, section on AKL (mu = 0.5).
    """
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
