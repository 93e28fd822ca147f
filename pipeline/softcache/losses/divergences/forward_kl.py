"""Forward Kullback-Leibler divergence."""

from torch import Tensor

from softcache.losses.log_space import kl_terms
from softcache.losses.registry import LOSSES, divergence


@LOSSES.register("forward_kl")
@divergence(linear=True, classwise=True, fast_paths=("logits", "hidden"))
def forward_kl(log_p_PB: Tensor, log_s_PB: Tensor) -> Tensor:
    r"""Divergence of the student from the teacher at a temperature, per position, in nats.

    .. math:: \sum_{k \in kept} p_k \log(p_k / s_k) + p_{tail} \log(p_{tail} / s_{tail})

    where p and s are softened to T, and the tail is all classes that were not kept. The student's tail is
    summed over those classes, not taken as 1 minus the rest, so it is right where the kept mass rounds to 1.
    Classes with p = 0 and unused slots contribute 0. It is +inf where the student masks a class that has p > 0.

    On labels whose classes were drawn at random (policies "sample" and "hybrid") it is

    .. math:: \sum_k w_k p_k \log(p_k / s_k)

    over the slots, a drawn class k standing for w_k classes like it: not a divergence, but the mean over the draws of
    its gradient is that of the full divergence.

    Examples:
        >>> import torch
        >>> from softcache.labels.sparsify import top_k
        >>> logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
        >>> labels = top_k(logits, k=2)
        >>> float(forward_kl(logits, labels, temperature=4.0).abs()) < 1e-6
        True

    References:
        Hinton, Vinyals, Dean 2015, arXiv 1503.02531, eq. (1) and section 2.1.
        Anshumann et al. 2025, "Sparse logit sampling", arXiv 2503.16870 (drawn classes).
    """
    return kl_terms(log_p_PB, log_s_PB)
