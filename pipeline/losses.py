"""Distillation losses between a student's logits and cached soft labels: pure, per position, the caller
reduces.

Shape suffixes: `P` positions, `V` classes, `K` kept classes.

A loss over the kept classes alone is not a divergence: it goes negative, and the mass that the student puts
    elsewhere is
free. So all dropped classes count as one more bucket, on both sides. The result is a true divergence (of the
two distributions over K + 1 buckets), a lower bound of the full one, and equal to it at K = V. Each loss
costs three [P, V] temporaries beside the student's logits; `pipeline.fused` computes the same without logits.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import LabelError
from pipeline.labels import SoftenedLabels, SoftLabels
from pipeline.tail import log_sum_exp

__all__ = [
    "check_alpha",
    "check_vocabulary",
    "cross_entropy",
    "distillation_loss",
    "fit_vocabulary",
    "forward_kl",
    "uld",
    "weighted_difference",
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

    Args:
        student_logits: [P, V] floating point; half precision is promoted to float32. -inf masks a class.
        labels: torch record of the same P positions and V classes, on the same device.
        temperature: a number or a tensor [P], at least the first grid temperature of the labels.
        tail: "bucket".
        padded_vocabulary: accept a student of another number of classes, where the two differ in unused ids
            at the end only; what that means is in `fit_vocabulary`.

    Returns:
        [P] float32 or float64, at least 0 up to rounding; +inf where the student masks a class that has p >
        0. Differentiable in the logits and in a tensor temperature.

    Raises:
        LabelError: shapes, classes or kinds differ, or `tail` is unknown.
        TemperatureError: the labels cannot serve this temperature.

    Examples:
        >>> import torch
        >>> from pipeline.sparsify import top_k
        >>> logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
        >>> labels = top_k(logits, k=2)
        >>> float(forward_kl(logits, labels, temperature=4.0).abs()) < 1e-6
        True

    References:
        Hinton, Vinyals, Dean 2015, arXiv 1503.02531, eq. (1) and section 2.1.
    """
    if tail != "bucket":
        raise LabelError(f"loss.tail: expected 'bucket'; found {tail!r}; set tail = 'bucket'")
    _check_student(student_logits, labels)
    num_student_classes = student_logits.shape[1]
    check_vocabulary(labels.num_classes, num_student_classes, padded_vocabulary=padded_vocabulary)
    softened = fit_vocabulary(labels.at_temperature(temperature), labels.num_classes, num_student_classes)
    student_PK, student_tail_P = _student_buckets(student_logits, softened.ids, temperature)
    kept_P = weighted_difference(softened.log_probs, student_PK).sum(dim=1)
    return kept_P + weighted_difference(softened.log_tail, student_tail_P)


def cross_entropy(student_logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of the ground-truth class at T=1, per position, in nats.

    Args:
        student_logits: [P, V] floating point; half precision is promoted to float32.
        targets: [P] integer classes; a position with -100 contributes 0.

    Returns:
        [P] float32 or float64.
    """
    return F.cross_entropy(_promoted(student_logits), targets.long(), reduction="none")


def distillation_loss(
    student_logits: Tensor,
    labels: SoftLabels | None,
    targets: Tensor | None,
    *,
    temperature: Any,
    alpha: float,
    mask: Tensor | None = None,
    padded_vocabulary: bool = False,
) -> Tensor:
    """Masked mean of (1 - alpha) * cross-entropy + alpha * T^2 * forward KL.

    T^2 keeps the gradient of the soft part at the same scale for every T. It multiplies the loss itself, so
    the reported value and the gradient belong to one function.

    Args:
        student_logits: [P, V] floating point.
        labels: torch record of the P positions; may be None when alpha is 0.
        targets: [P] integer classes; may be None when alpha is 1.
        temperature: a number or a tensor [P]; not read when alpha is 0.
        alpha: weight of the soft part, in [0, 1].
        mask: [P] bool or non-negative weights; None counts every position once.
        padded_vocabulary: as in `forward_kl`.

    Returns:
        Scalar; 0 with a zero gradient where the mask is empty.

    Raises:
        LabelError: alpha out of range, labels or targets missing where needed, or as in `forward_kl`.
        TemperatureError: the labels cannot serve this temperature.

    References:
        Hinton, Vinyals, Dean 2015, arXiv 1503.02531, eq. (1) and section 2.1 (T^2).
    """
    check_alpha(alpha)
    terms = []
    if alpha < 1.0:
        if targets is None:
            raise LabelError(
                "distillation_loss: expected targets for alpha below 1; found None; pass them or alpha=1"
            )
        terms.append((1.0 - alpha) * cross_entropy(student_logits, targets))
    if alpha > 0.0:
        if labels is None:
            raise LabelError(
                "distillation_loss: expected labels for alpha above 0; found None; pass them or alpha=0"
            )
        divergence_P = forward_kl(
            student_logits, labels, temperature=temperature, padded_vocabulary=padded_vocabulary
        )
        terms.append(alpha * temperature**2 * divergence_P)
    loss_P = terms[0] if len(terms) == 1 else terms[0] + terms[1]
    weight_P = torch.ones_like(loss_P) if mask is None else mask.to(loss_P.dtype)
    total = weight_P.sum()
    return (loss_P * weight_P).where(weight_P > 0, 0.0).sum() / total.where(total > 0, 1.0)


def uld(student_logits: Tensor, labels: SoftLabels, *, temperature: Any) -> Tensor:
    r"""Universal Logit Distillation: distance of the sorted distributions, per position, in [0, 2].

    .. math:: \sum_{i \le K} |p_{(i)} - s_{(i)}| + |p_{tail} - s_{tail}|

    where p and s are softened to T and sorted, largest first, and s_tail is the student's mass beyond its K
    largest. Ranks are compared, not classes, so teacher and student may have different vocabularies. A lower
    bound of the distance over all ranks, and equal to it where the teacher keeps every class. The paper adds
    it to the cross-entropy with a factor lambda and no T^2; so does `fused.fused_uld_loss`.

    Args:
        student_logits: [P, V'] floating point, V' classes of its own; half precision is promoted to float32.
        labels: torch record of the same P positions, of any number of classes, on the same device.
        temperature: a number or a tensor [P], at least the first grid temperature of the labels.

    Returns:
        [P] float32 or float64. Differentiable in the logits and in a tensor temperature; at equal mass the
        derivative of the absolute value counts as 0.

    Raises:
        LabelError: shapes or kinds differ.
        TemperatureError: the labels cannot serve this temperature.

    Examples:
        >>> import torch
        >>> from pipeline.sparsify import dense
        >>> teacher = torch.tensor([[2.0, 1.0, 0.0]])
        >>> student = torch.tensor([[-9.0, 0.0, 2.0, 1.0]])  # one class more, another order
        >>> float(uld(student, dense(teacher), temperature=1.0)) < 1e-4
        True

    References:
        Boizard, El Haddad, Hudelot, Colombo 2024, arXiv 2402.12030, eqs. (4) and (5).
    """
    _check_student(student_logits, labels)
    softened = labels.at_temperature(temperature)
    teacher_PK = softened.log_probs.exp().sort(dim=1, descending=True).values
    probs_PV = _over_temperature(_promoted(student_logits), temperature).softmax(dim=1)
    top = probs_PV.topk(min(labels.k, probs_PV.shape[1]), dim=1)
    tail_P = probs_PV.scatter(1, top.indices, 0.0).sum(dim=1)
    student_PK = F.pad(top.values, (0, labels.k - top.values.shape[1]))
    return (teacher_PK - student_PK).abs().sum(dim=1) + (softened.log_tail.exp() - tail_P).abs()


def fit_vocabulary(softened: SoftenedLabels, num_classes: int, num_student_classes: int) -> SoftenedLabels:
    """The same distribution, told in the student's classes, where both vocabularies start alike.

    The student stays normalised over all its classes. Where it has more of them, the teacher gives the extra
    ones 0: they become R = num_student_classes - num_classes kept classes of log_prob -inf, and the tail is
    the dropped classes of the teacher alone. Where it has fewer, the mass of kept classes it lacks moves to
    the tail.

    Args:
        softened: torch record at one temperature.
        num_classes: V, the teacher's.
        num_student_classes: V', the student's.

    Returns:
        ids [P, K] or [P, K + R] int64, in which an unused slot holds V'; `softened` itself where V' = V.
    """
    if num_student_classes == num_classes:
        return softened
    ids_PK = softened.ids.long()
    lacking = ids_PK >= min(num_classes, num_student_classes)
    # Unused slots (id V) are among the lacking, with a mass of 0.
    folded_PK = softened.log_probs.masked_fill(~lacking, -torch.inf)
    log_tail_P = log_sum_exp(torch.cat([folded_PK, softened.log_tail[:, None]], dim=1))
    extra_R = torch.arange(num_classes, max(num_classes, num_student_classes), device=ids_PK.device)
    extra_PR = extra_R.expand(len(ids_PK), -1)
    log_probs_PK = softened.log_probs.masked_fill(lacking, -torch.inf)
    return SoftenedLabels(
        ids=torch.cat([ids_PK.masked_fill(lacking, num_student_classes), extra_PR], dim=1),
        log_probs=F.pad(log_probs_PK, (0, len(extra_R)), value=-torch.inf),
        log_tail=log_tail_P,
    )


def check_alpha(alpha: float) -> None:
    """Raises LabelError unless alpha, the weight of the soft part, is in [0, 1]."""
    if not 0.0 <= alpha <= 1.0:
        raise LabelError(
            f"loss.alpha: expected a weight in [0, 1]; found {alpha}; 0 is hard labels only, 1 soft only"
        )


def check_vocabulary(num_classes: int, num_student_classes: int, *, padded_vocabulary: bool) -> None:
    """Raises LabelError where the student's number of classes is another, unless that is allowed."""
    if num_student_classes != num_classes and not padded_vocabulary:
        raise LabelError(
            f"student logits: expected {num_classes} classes as in the labels; found {num_student_classes}; "
            f"build the student with {num_classes} outputs or rebuild the cache; "
            "padded_vocabulary=True is for two paddings of one vocabulary"
        )


def weighted_difference(log_p: Tensor, log_s: Tensor) -> Tensor:
    """p * (log p - log s), and 0 with a zero gradient where p is 0."""
    p = log_p.exp()
    return p * (log_p - log_s).where(p > 0, 0.0)


def _student_buckets(student_logits: Tensor, ids_PK: Tensor, temperature: Any) -> tuple[Tensor, Tensor]:
    """The student's log-probabilities at T of the kept classes [P, K] and of all the others together [P]."""
    scaled_PV = _over_temperature(_promoted(student_logits), temperature)
    num_positions, num_classes = scaled_PV.shape
    ids_PK = ids_PK.long()
    # One column more than classes, for the unused slots to fall into.
    kept_PV = torch.zeros((num_positions, num_classes + 1), dtype=torch.bool, device=scaled_PV.device)
    kept_PV.scatter_(1, ids_PK, True)
    log_z_P = scaled_PV.logsumexp(dim=1)
    log_tail_P = log_sum_exp(scaled_PV.masked_fill(kept_PV[:, :num_classes], -torch.inf)) - log_z_P
    log_kept_PK = scaled_PV.gather(1, ids_PK.clamp(max=num_classes - 1)) - log_z_P[:, None]
    return log_kept_PK, log_tail_P


def _over_temperature(logits_PV: Tensor, temperature: Any) -> Tensor:
    if not isinstance(temperature, Tensor):
        return logits_PV / temperature
    # -inf / T would have a NaN gradient in T
    masked = logits_PV == -torch.inf
    divisor = temperature.to(logits_PV.device).reshape(-1, 1)
    return (logits_PV.masked_fill(masked, 0.0) / divisor).masked_fill(masked, -torch.inf)


def _promoted(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _check_student(student_logits: Tensor, labels: SoftLabels) -> None:
    if not labels.is_torch:
        raise LabelError(
            "labels: expected torch tensors; found NumPy arrays; call labels.to_torch(device) first"
        )
    if student_logits.ndim != 2 or student_logits.shape[0] != len(labels):
        raise LabelError(
            f"student logits: expected [{len(labels)}, {labels.num_classes}], a row per labelled position; "
            f"found {list(student_logits.shape)}; flatten batch and positions as the labels are"
        )
