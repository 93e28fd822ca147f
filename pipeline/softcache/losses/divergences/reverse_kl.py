"""Reverse Kullback-Leibler divergence."""

from torch import Tensor

from softcache.losses.log_space import LOG_PROB_FLOOR, NEG_INF_SURROGATE
from softcache.losses.registry import LOSSES, divergence


@LOSSES.register("reverse_kl")
@divergence(classwise=True, tails=("bucket", "uniform", "ignore"))
def reverse_kl(log_p_PB: Tensor, log_s_PB: Tensor) -> Tensor:
    r"""Divergence of the teacher from the student, the mode-seeking one, per position, in nats.

    .. math:: \sum_b s_b \log(s_b / p_b)

    over the kept classes and the tail. It is infinite where the student has mass and the teacher none: a masked class,
    padding of the student's vocabulary. There the teacher counts as having e^-100, so that the value is at most 100
    nats and the gradient leads away. So the tail cannot be "renormalize".

    References:
        Gu, Dong, Wei, Huang 2023, "MiniLLM", arXiv 2306.08543, eq. (1), token by token and without sampling from the
        student.
    """
    log_s_PB = log_s_PB.clamp(min=NEG_INF_SURROGATE)
    return (log_s_PB.exp() * (log_s_PB - log_p_PB.clamp(min=LOG_PROB_FLOOR))).sum(dim=1)
