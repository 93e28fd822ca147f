"""Divergences and soft cross-entropy of a student's logits from cached labels: pure, per position, in nats.

Shape suffixes: `P` positions, `V` classes.

All of them take the same arguments and raise the same errors as `forward_kl`, and none holds the factor T^2, which is
`distillation_loss`'s. Where a loss is a sum over classes, its tail modes are those of `softcache.losses.tail_modes`.
"""

from typing import Any

from torch import Tensor

from softcache.labels import SoftLabels
from softcache.losses.bucketed import bucketed_loss
from softcache.losses.registry import make_loss

__all__ = [
    "adaptive_kl",
    "forward_kl",
    "jsd",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "soft_cross_entropy",
    "total_variation",
]


def forward_kl(
    student_logits: Tensor,
    labels: SoftLabels,
    *,
    temperature: Any,
    tail: str = "bucket",
    padded_vocabulary: bool = False,
) -> Tensor:
    r"""Divergence of the student from the teacher at a temperature, per position, in nats.

    .. math:: \sum_{k \in kept} p_k \log(p_k / s_k) + p_{tail} \log(p_{tail} / s_{tail})

    where p and s are softened to T, and the tail is all classes that were not kept. The student's tail is
    summed over those classes, not taken as 1 minus the rest, so it is right where the kept mass rounds to 1.
    Classes with p = 0 and unused slots contribute 0. There is no factor T^2 here: see `distillation_loss`.

    On labels whose classes were drawn at random (policies "sample" and "hybrid") it is

    .. math:: \sum_k w_k p_k \log(p_k / s_k)

    over the slots, a drawn class k standing for w_k classes like it: not a divergence, but the mean over the draws of
    its gradient is that of the full divergence.

    Args:
        student_logits: [P, V] floating point; half precision is promoted to float32. -inf masks a class.
        labels: torch record of the same P positions and V classes, on the same device.
        temperature: a number or a tensor [P], at least the first grid temperature of the labels.
        tail: "bucket", "uniform", "ignore" or "renormalize"; what they mean and cost is in `softcache.losses.tail_modes`.
        padded_vocabulary: accept a student of another number of classes, where the two differ in unused ids
            at the end only; what that means is in `fit_vocabulary`.

    Returns:
        [P] float32 or float64, at least 0 up to rounding (but with "ignore"); +inf where the student masks a class
        that has p > 0. Differentiable in the logits and in a tensor temperature.

    Raises:
        LabelError: shapes, classes or kinds differ, or `tail` means nothing here.
        TemperatureError: the labels cannot serve this temperature.

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
    loss = make_loss("forward_kl", tail=tail)
    return bucketed_loss(
        loss, student_logits, labels, None, temperature=temperature, padded_vocabulary=padded_vocabulary
    )


def reverse_kl(
    student_logits: Tensor,
    labels: SoftLabels,
    *,
    temperature: Any,
    tail: str = "bucket",
    padded_vocabulary: bool = False,
) -> Tensor:
    r"""Divergence of the teacher from the student, the mode-seeking one, per position, in nats.

    .. math:: \sum_b s_b \log(s_b / p_b)

    over the kept classes and the tail. It is infinite where the student has mass and the teacher none: a masked class,
    padding of the student's vocabulary. There the teacher counts as having e^-100, so that the value is at most 100
    nats and the gradient leads away. So the tail cannot be "renormalize".

    Args, Returns, Raises: as `forward_kl`.

    References:
        Gu, Dong, Wei, Huang 2023, "MiniLLM", arXiv 2306.08543, eq. (1), token by token and without sampling from the
        student.
    """
    loss = make_loss("reverse_kl", tail=tail)
    return bucketed_loss(
        loss, student_logits, labels, None, temperature=temperature, padded_vocabulary=padded_vocabulary
    )


def jsd(
    student_logits: Tensor,
    labels: SoftLabels,
    *,
    temperature: Any,
    beta: float = 0.5,
    tail: str = "bucket",
    padded_vocabulary: bool = False,
) -> Tensor:
    r"""Generalised Jensen-Shannon divergence, per position, in nats.

    .. math:: \beta KL(p \| m) + (1 - \beta) KL(s \| m), \quad m = \beta p + (1 - \beta) s

    It is bounded, by the entropy of (beta, 1 - beta): log 2 at one half. Over beta it tends to the forward
    divergence as beta goes to 0, over 1 - beta to the reverse one as beta goes to 1. (The value itself tends to 0; TRL
    takes beta = 0 and 1 for the two divergences, without the factor.)

    Args:
        beta: weight of the teacher, in (0, 1). The others, Returns, Raises: as `forward_kl`.

    References:
        Agarwal et al. 2023, "On-policy distillation of language models" (GKD), arXiv 2306.13649, eq. (1).
    """
    loss = make_loss("jsd", tail=tail, beta=beta)
    return bucketed_loss(
        loss, student_logits, labels, None, temperature=temperature, padded_vocabulary=padded_vocabulary
    )


def skew_kl(
    student_logits: Tensor,
    labels: SoftLabels,
    *,
    temperature: Any,
    skew: float = 0.1,
    tail: str = "bucket",
    padded_vocabulary: bool = False,
) -> Tensor:
    r"""Skew divergence: the student is mixed with a little of the teacher, per position, in nats.

    .. math:: KL(p \| \alpha p + (1 - \alpha) s)

    with alpha = `skew`. Where the student has no mass it is log(1 / alpha) at most, not infinite.

    Args:
        skew: share of the teacher in the mixture, in (0, 1). The others, Returns, Raises: as `forward_kl`.

    References:
        Ko, Kim, Chen, Yun 2024, "DistiLLM", arXiv 2402.03898, section 3.1 (SKL, alpha = 0.1). The authors' code leaves
        out the term sum p log p: the same gradient, another value.
    """
    loss = make_loss("skew_kl", tail=tail, skew=skew)
    return bucketed_loss(
        loss, student_logits, labels, None, temperature=temperature, padded_vocabulary=padded_vocabulary
    )


def skew_reverse_kl(
    student_logits: Tensor,
    labels: SoftLabels,
    *,
    temperature: Any,
    skew: float = 0.1,
    tail: str = "bucket",
    padded_vocabulary: bool = False,
) -> Tensor:
    r"""Skew reverse divergence: the teacher is mixed with a little of the student, per position, in nats.

    .. math:: KL(s \| (1 - \alpha) p + \alpha s)

    with alpha = `skew`: at most log(1 / alpha), also where the teacher has no mass.

    Args:
        skew: share of the student in the mixture, in (0, 1). The others, Returns, Raises: as `forward_kl`.

    References:
        Ko, Kim, Chen, Yun 2024, "DistiLLM", arXiv 2402.03898, section 3.1 (SRKL, alpha = 0.1).
    """
    loss = make_loss("skew_reverse_kl", tail=tail, skew=skew)
    return bucketed_loss(
        loss, student_logits, labels, None, temperature=temperature, padded_vocabulary=padded_vocabulary
    )


def adaptive_kl(
    student_logits: Tensor,
    labels: SoftLabels,
    *,
    temperature: Any,
    mu: float = 0.5,
    tail: str = "bucket",
    padded_vocabulary: bool = False,
) -> Tensor:
    r"""Adaptive divergence: forward and reverse, weighed by where teacher and student are apart; in nats.

    .. math:: \frac{g_h}{g_h + g_t} KL(p \| s) + \frac{g_t}{g_h + g_t} KL(s \| p), \quad g = \sum |p - s|

    g_h sums over the head, the fewest of the most likely classes that hold the teacher's mass `mu`, g_t over all
    others. The weights are constants: no gradient goes through them, as in the authors' code, so the gradient is that
    of the reported value at fixed weights. The bucket of the dropped classes is never in the head, and its one gap is
    at most the sum of theirs: with few classes kept, the forward part weighs more than the full gaps would make it.
    At p = s, where the weights are 0/0, the value is 0.

    The authors' code ends the head before the class that reaches `mu` (and after the first); the paper's text has that
    class within, and so has this.

    Args:
        mu: teacher's mass in the head, in (0, 1]. The others, Returns, Raises: as `reverse_kl`.

    References:
        Wu, Tao, Wang, Yang, Zhao, Wong 2024, "Rethinking Kullback-Leibler divergence in knowledge distillation for
        large language models", arXiv 2404.02657, section on AKL (mu = 0.5).
    """
    loss = make_loss("adaptive_kl", tail=tail, mu=mu)
    return bucketed_loss(
        loss, student_logits, labels, None, temperature=temperature, padded_vocabulary=padded_vocabulary
    )


def total_variation(
    student_logits: Tensor,
    labels: SoftLabels,
    *,
    temperature: Any,
    tail: str = "bucket",
    padded_vocabulary: bool = False,
) -> Tensor:
    r"""Total variation distance, per position, in [0, 1].

    .. math:: \frac{1}{2} \sum_b |p_b - s_b|

    over the kept classes and the tail. At equal masses the derivative of the absolute value counts as 0. Its gradient
    falls as 1/T, not 1/T^2, and no paper scales it, so `distillation_loss` does not either.

    Args, Returns, Raises: as `forward_kl`.

    References:
        Wen, Li, Du, Mou 2023, "f-Divergence minimization for sequence-level knowledge distillation", arXiv 2307.15190
        (TVD), token by token.
    """
    loss = make_loss("total_variation", tail=tail)
    return bucketed_loss(
        loss, student_logits, labels, None, temperature=temperature, padded_vocabulary=padded_vocabulary
    )


def soft_cross_entropy(
    student_logits: Tensor,
    labels: SoftLabels,
    *,
    temperature: Any,
    tail: str = "bucket",
    padded_vocabulary: bool = False,
) -> Tensor:
    r"""Cross-entropy of the student on the labels, per position, in nats; `loss.name = "cross_entropy"`.

    .. math:: -\sum_b p_b \log s_b

    over the kept classes and the tail: `forward_kl` plus the teacher's entropy over the same buckets, so the gradients
    are equal. On labels whose classes were drawn at random, -sum of w_k p_k log s_k over the slots: the loss of
    random-sampling distillation, whose mean over the draws is the full one, in value and in gradient.

    Args, Returns, Raises: as `forward_kl`.

    References:
        Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section 2.
        Anshumann et al. 2025, "Sparse logit sampling", arXiv 2503.16870.
    """
    loss = make_loss("cross_entropy", tail=tail)
    return bucketed_loss(
        loss, student_logits, labels, None, temperature=temperature, padded_vocabulary=padded_vocabulary
    )
