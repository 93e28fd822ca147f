"""Skew divergences: one side is mixed with a little of the other."""

from pydantic import Field
from torch import Tensor

from softcache.losses.log_space import NEG_INF_SURROGATE, log_mixture
from softcache.losses.registry import LOSSES, divergence
from softcache.settings import Settings


class SkewSettings(Settings):
    """`skew`: share of the other side in the mixture."""

    skew: float = Field(0.1, gt=0, lt=1)


@LOSSES.register("skew_kl")
@divergence(SkewSettings, classwise=True)
def skew_kl(log_p_PB: Tensor, log_s_PB: Tensor, *, skew: float) -> Tensor:
    r"""Skew divergence: the student is mixed with a little of the teacher, per position, in nats.

    .. math:: KL(p \| \alpha p + (1 - \alpha) s)

    with alpha = `skew`. Where the student has no mass it is log(1 / alpha) at most, not infinite.

    References:
        Ko, Kim, Chen, Yun 2024, "DistiLLM", arXiv 2402.03898, section 3.1 (SKL, alpha = 0.1). The authors' code leaves
        out the term sum p log p: the same gradient, another value.
    """
    log_p_PB, log_s_PB = log_p_PB.clamp(min=NEG_INF_SURROGATE), log_s_PB.clamp(min=NEG_INF_SURROGATE)
    return (log_p_PB.exp() * (log_p_PB - log_mixture(log_p_PB, log_s_PB, skew))).sum(dim=1)


@LOSSES.register("skew_reverse_kl")
@divergence(SkewSettings, classwise=True)
def skew_reverse_kl(log_p_PB: Tensor, log_s_PB: Tensor, *, skew: float) -> Tensor:
    r"""Skew reverse divergence: the teacher is mixed with a little of the student, per position, in nats.

    .. math:: KL(s \| (1 - \alpha) p + \alpha s)

    with alpha = `skew`: at most log(1 / alpha), also where the teacher has no mass.

    References:
        Ko, Kim, Chen, Yun 2024, "DistiLLM", arXiv 2402.03898, section 3.1 (SRKL, alpha = 0.1).
    """
    log_p_PB, log_s_PB = log_p_PB.clamp(min=NEG_INF_SURROGATE), log_s_PB.clamp(min=NEG_INF_SURROGATE)
    return (log_s_PB.exp() * (log_s_PB - log_mixture(log_s_PB, log_p_PB, skew))).sum(dim=1)
