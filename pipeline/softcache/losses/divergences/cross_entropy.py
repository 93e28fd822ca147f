"""Soft cross-entropy."""

from torch import Tensor

from softcache.losses.registry import LOSSES, divergence


@LOSSES.register("cross_entropy")
@divergence(linear=True, classwise=True, has_entropy=False, fast_paths=("hidden",))
def soft_cross_entropy(log_p_PB: Tensor, log_s_PB: Tensor) -> Tensor:
    r"""Cross-entropy of the student on the labels, per position, in nats; `loss.name = "cross_entropy"`.

    .. math:: -\sum_b p_b \log s_b

    over the kept classes and the tail: `forward_kl` plus the teacher's entropy over the same buckets, so the gradients
    are equal. On labels whose classes were drawn at random, -sum of w_k p_k log s_k over the slots: the loss of
    random-sampling distillation, whose mean over the draws is the full one, in value and in gradient.

    References:
        Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section 2.
        Anshumann et al. 2025, "Sparse logit sampling", arXiv 2503.16870.
    """
    p_PB = log_p_PB.exp()
    return -p_PB * log_s_PB.where(p_PB > 0, 0.0)
