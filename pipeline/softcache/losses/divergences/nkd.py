"""Normalized knowledge distillation."""

from pydantic import Field
from torch import Tensor

from softcache.losses.divergences.cross_entropy import soft_cross_entropy
from softcache.losses.log_space import split_target
from softcache.losses.registry import LOSSES, divergence
from softcache.settings import Settings


class NkdSettings(Settings):
    """`nkd_gamma`: weight of the other classes' term, 1.5 in the paper, at T = 1."""

    nkd_gamma: float = Field(1.5, ge=0)


@LOSSES.register("nkd")
@divergence(NkdSettings, tails=("bucket", "uniform"), needs_target=True, weighs_truth=True)
def nkd(log_p_PB: Tensor, log_s_PB: Tensor, *, nkd_gamma: float) -> Tensor:
    r"""Normalized distillation: the teacher's trust in the ground truth, and the others' shares; in nats.

    .. math:: -p_t \log s_t - \gamma T^2 \sum_{j \ne t} \hat p_j \log \hat s_j

    where p_t and s_t are at T=1, and p-hat and s-hat are the other classes at T, normalized among themselves. The
    factor T^2 belongs to one of two terms, so it is here, and `distillation_loss` adds none. (The formula below is the
    second term without it; the first is that of every loss that `weighs_truth`.)

    References:
        Yang, Zeng, Li, Zhang, Yuan, Li 2023, "From knowledge distillation to self-knowledge distillation", arXiv
        2303.13005, the definition of L_nkd. (Copies of the code are about whose mask of the other classes is all
        ones, so that the ground-truth class stays among them; this follows the paper.)
    """
    (_, _, log_within_p_PB), (_, _, log_within_s_PB) = split_target(log_p_PB), split_target(log_s_PB)
    return nkd_gamma * soft_cross_entropy(log_within_p_PB, log_within_s_PB).sum(dim=1)
