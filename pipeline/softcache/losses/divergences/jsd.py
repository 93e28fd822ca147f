"""Generalized Jensen-Shannon divergence."""

from pydantic import Field
from torch import Tensor

from softcache.losses.log_space import NEG_INF_SURROGATE, log_mixture
from softcache.losses.registry import LOSSES, divergence
from softcache.settings import Settings


class JsdSettings(Settings):
    """`beta`: weight of the teacher in the mixture."""

    beta: float = Field(0.5, gt=0, lt=1)


@LOSSES.register("jsd")
@divergence(JsdSettings, classwise=True)
def jsd(log_p_PB: Tensor, log_s_PB: Tensor, *, beta: float) -> Tensor:
    r"""Generalized Jensen-Shannon divergence, per position, in nats.

    .. math:: \beta KL(p \| m) + (1 - \beta) KL(s \| m), \quad m = \beta p + (1 - \beta) s

    It is bounded, by the entropy of (beta, 1 - beta): log 2 at one half. Over beta it tends to the forward
    divergence as beta goes to 0, over 1 - beta to the reverse one as beta goes to 1. (The value itself tends to 0; TRL
    takes beta = 0 and 1 for the two divergences, without the factor.)

    References:
        Agarwal et al. 2023, "On-policy distillation of language models" (GKD), arXiv 2306.13649, eq. (1).
    """
    log_p_PB, log_s_PB = log_p_PB.clamp(min=NEG_INF_SURROGATE), log_s_PB.clamp(min=NEG_INF_SURROGATE)
    log_m_PB = log_mixture(log_p_PB, log_s_PB, beta)
    of_p_PB = log_p_PB.exp() * (log_p_PB - log_m_PB)
    of_s_PB = log_s_PB.exp() * (log_s_PB - log_m_PB)
    return (beta * of_p_PB + (1.0 - beta) * of_s_PB).sum(dim=1)
