"""Total variation distance."""

from torch import Tensor

from softcache.losses.registry import LOSSES, divergence


@LOSSES.register("total_variation")
@divergence(classwise=True, temperature_power=0)
def total_variation(log_p_PB: Tensor, log_s_PB: Tensor) -> Tensor:
    r"""Total variation distance, per position, in [0, 1].

    .. math:: \frac{1}{2} \sum_b |p_b - s_b|

    over the kept classes and the tail. At equal masses the derivative of the absolute value counts as 0. Its gradient
    falls as 1/T, not 1/T^2, and no paper scales it, so `distillation_loss` does not either.

    References:
        Wen, Li, Du, Mou 2023, "f-Divergence minimization for sequence-level knowledge distillation", arXiv 2307.15190
        (TVD), token by token.
    """
    return 0.5 * (log_p_PB.exp() - log_s_PB.exp()).abs().sum(dim=1)
