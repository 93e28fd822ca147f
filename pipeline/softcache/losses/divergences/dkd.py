"""Decoupled knowledge distillation."""

from pydantic import Field
from torch import Tensor

from softcache.losses.log_space import kl_terms, split_target
from softcache.losses.registry import LOSSES, divergence
from softcache.settings import Settings


class DkdSettings(Settings):
    """`dkd_alpha`: weight of the target part; `dkd_beta`: that of the other classes, 8 in the paper on CIFAR-100 and 0.5
    on ImageNet, depending on the teacher."""

    dkd_alpha: float = Field(1.0, ge=0)
    dkd_beta: float = Field(8.0, ge=0)


@LOSSES.register("dkd")
@divergence(DkdSettings, tails=("bucket", "uniform"), needs_target=True)
def dkd(log_p_PB: Tensor, log_s_PB: Tensor, *, dkd_alpha: float, dkd_beta: float) -> Tensor:
    r"""Decoupled distillation: how sure of the ground truth, and how the rest is shared out; in nats.

    .. math:: \alpha KL([p_t, 1 - p_t] \| [s_t, 1 - s_t]) + \beta KL(\hat p \| \hat s)

    where p-hat and s-hat are the other classes, normalized among themselves; 1 - p_t is summed over them. With alpha =
    1 and beta = 1 - p_t it is the forward divergence. (The paper raises the weight of this loss over the first 20 epochs;
    that is a schedule, and not done here.)

    References:
        Zhao, Cui, Song, Qiu, Liang 2022, "Decoupled knowledge distillation", arXiv 2203.08679, eq. (7).
    """
    log_p_P, log_rest_p_P, log_within_p_PB = split_target(log_p_PB)
    log_s_P, log_rest_s_P, log_within_s_PB = split_target(log_s_PB)
    target_P = kl_terms(log_p_P, log_s_P) + kl_terms(log_rest_p_P, log_rest_s_P)
    others_P = kl_terms(log_within_p_PB, log_within_s_PB).sum(dim=1)
    return dkd_alpha * target_P + dkd_beta * others_P
