"""A student's loss: cross-entropy with the ground truth and a soft part, mixed, as a masked mean over positions.

Shape suffixes: `P` positions, `V` classes.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from softcache.errors import LabelError
from softcache.labels import MixedTargets, SoftLabels
from softcache.losses.bucketed import bucketed_loss
from softcache.losses.buckets import check_student, check_vocabulary, promote_dtype
from softcache.losses.direct import direct_loss, is_fast_path
from softcache.losses.registry import Loss, as_loss
from softcache.losses.sampled import check_samples
from softcache.losses.standardize import check_tails, standardized
from softcache.losses.target_class import IGNORED, check_targets, teacher_log_probs

__all__ = ["add_truth_part", "check_alpha", "check_needs", "cross_entropy", "distillation_loss"]


def cross_entropy(
    student_logits: Tensor, targets: Tensor | MixedTargets, *, label_smoothing: float = 0.0
) -> Tensor:
    """Negative log-likelihood of the ground-truth class at T=1, per position, in nats.

    Args:
        student_logits: [P, V] floating point; half precision is promoted to float32.
        targets: [P] integer classes; a position with -100 contributes 0. Of a mixed image it is the mean over its two
            classes by their shares, which is the cross-entropy with their mixture.
        label_smoothing: e; the target is (1 - e) of the class and e / V of each of the V classes.

    Returns:
        [P] float32 or float64.
    """
    if isinstance(targets, MixedTargets):
        first_P, second_P = (
            cross_entropy(student_logits, classes_P, label_smoothing=label_smoothing)
            for classes_P in (targets.first, targets.second)
        )
        return targets.shares * first_P + (1.0 - targets.shares) * second_P
    return F.cross_entropy(
        promote_dtype(student_logits), targets.long(), reduction="none", label_smoothing=label_smoothing
    )


def distillation_loss(
    student_logits: Tensor,
    labels: SoftLabels | None,
    targets: Tensor | MixedTargets | None,
    *,
    temperature: Any,
    alpha: float,
    mask: Tensor | None = None,
    padded_vocabulary: bool = False,
    loss: Loss | str = "forward_kl",
    soft_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    sampling_log_probs: Tensor | None = None,
) -> Tensor:
    """Masked mean of (1 - alpha) * cross-entropy + alpha * T^2 * soft loss.

    T^2 keeps the gradient of the soft part at the same scale for every T. It multiplies the loss itself, so
    the reported value and the gradient belong to one function. It goes with every divergence that is smooth where
    teacher and student agree, and with soft cross-entropy, also where the paper has T=1 only; NKD has it in one of
    its terms, and total variation and ULD, whose papers have no factor, have none. With `standardize` T is the base
    temperature.

    Args:
        student_logits: [P, V] floating point.
        labels: torch record of the P positions; may be None when alpha is 0.
        targets: [P] integer classes, or two of each row and their shares; may be None when alpha is 1, but for dkd and nkd.
        temperature: a number or a tensor [P]; not read when alpha is 0.
        alpha: weight of the soft part, in [0, 1].
        mask: [P] bool or non-negative weights; None counts every position once. A row of weight 0 may hold anything.
        padded_vocabulary: as in `forward_kl`.
        loss: the soft part: a name, or what `make_loss` gives. With "uld" the labels' classes may be others.
        soft_weights: [P] non-negative factors of the soft part alone; the mean stays one over positions.
        label_smoothing: of the cross-entropy.
        sampling_log_probs: [P] of the targets by the policy that sampled them; for "policy_gradient".

    Returns:
        Scalar; 0 with a zero gradient where the mask is empty. In the usual case (`losses.direct`) it is one operation
        of autograd, and not twice differentiable.

    Raises:
        LabelError: alpha out of range, labels or targets missing where needed, or as the soft loss raises.
        TemperatureError: the labels cannot serve this temperature, or not to `loss.max_tail_error`.

    Examples:
        >>> import torch
        >>> from softcache.losses import make_loss
        >>> from softcache.labels.sparsify import top_k
        >>> labels, student = top_k(torch.randn(6, 9), k=3), torch.randn(6, 9)
        >>> how = {"temperature": 2.0, "alpha": 1.0, "loss": make_loss("jsd", beta=0.3)}
        >>> float(distillation_loss(student, labels, None, **how)) > 0
        True

    References:
        Hinton, Vinyals, Dean 2015, arXiv 1503.02531, eq. (1) and section 2.1 (T^2).
    """
    loss = as_loss(loss)
    check_needs(loss, labels, targets, alpha, "distillation_loss")
    if alpha > 0.0 and labels is not None:
        check_tails(loss, labels, temperature, active_P=None if mask is None else mask > 0)
    if mask is not None:
        student_logits, labels = _without_ignored(student_logits, labels, mask > 0)
    if (
        mask is None
        and soft_weights is None
        and alpha > 0.0
        and labels is not None
        and is_fast_path(loss, student_logits, labels, temperature)
    ):
        is_plain = not isinstance(targets, MixedTargets) and not label_smoothing
        if alpha == 1.0 or is_plain:
            hard = None if alpha == 1.0 or isinstance(targets, MixedTargets) else targets
            return direct_loss(student_logits, labels, hard, temperature=temperature, alpha=alpha)
        soft = direct_loss(student_logits, labels, None, temperature=temperature, alpha=1.0)
        assert targets is not None
        hard_P = cross_entropy(student_logits, targets, label_smoothing=label_smoothing)
        return (1.0 - alpha) * hard_P.mean() + alpha * soft
    terms = []
    if alpha < 1.0:
        assert targets is not None
        hard_P = cross_entropy(student_logits, targets, label_smoothing=label_smoothing)
        terms.append(hard_P if alpha == 0.0 else (1.0 - alpha) * hard_P)
    if alpha > 0.0:
        assert labels is not None
        soft_P = _soft_part(
            loss,
            student_logits,
            labels,
            targets,
            temperature=temperature,
            padded_vocabulary=padded_vocabulary,
            active_P=None if mask is None else mask > 0,
            log_q_P=sampling_log_probs,
        )
        terms.append(
            alpha * soft_P if soft_weights is None else alpha * soft_weights.to(soft_P.dtype) * soft_P
        )
    loss_P = terms[0] if len(terms) == 1 else terms[0] + terms[1]
    if mask is None:
        return loss_P.sum() / max(1, len(loss_P))
    weight_P = mask.to(loss_P.dtype)
    total = weight_P.sum()
    return (loss_P * weight_P).where(weight_P > 0, 0.0).sum() / total.where(total > 0, 1.0)


def _without_ignored(
    student_logits: Tensor, labels: SoftLabels | None, active_P: Tensor
) -> tuple[Tensor, SoftLabels | None]:
    """Logits and labels with numbers in place of whatever a row without weight holds: 0 times its NaN would be NaN."""
    logits_PV = student_logits.masked_fill(~active_P[:, None], 0.0)
    if labels is None or not labels.is_torch or len(labels) != len(active_P):
        return logits_PV, labels
    return logits_PV, labels.map_arrays(
        lambda x: x.masked_fill(~active_P.reshape(-1, *[1] * (x.ndim - 1)), 0)
    )


def check_alpha(alpha: float) -> None:
    """Raises LabelError unless alpha, the weight of the soft part, is in [0, 1]."""
    if not 0.0 <= alpha <= 1.0:
        raise LabelError(
            f"loss.alpha: expected a weight in [0, 1]; found {alpha}; 0 is hard labels only, 1 soft only"
        )


def check_needs(
    loss: Loss, labels: SoftLabels | None, targets: Tensor | MixedTargets | None, alpha: float, where: str
) -> None:
    """Raises LabelError where alpha is out of range, or labels or targets are missing that this mixture reads; also where
    it reads the one ground-truth class of images that have two."""
    check_alpha(alpha)
    if alpha < 1.0 and targets is None:
        raise LabelError(f"{where}: expected targets for alpha below 1; found None; pass them or alpha=1")
    if alpha > 0.0 and labels is None:
        raise LabelError(f"{where}: expected labels for alpha above 0; found None; pass them or alpha=0")
    if alpha > 0.0 and loss.kind.needs_target and targets is None:
        raise LabelError(
            f"{where}: expected targets for loss {loss.name}, which reads the ground-truth class; found "
            "None; pass them, or use another loss"
        )
    reads_target = loss.kind.needs_target or loss.kind.weighs_truth
    if alpha > 0.0 and reads_target and isinstance(targets, MixedTargets):
        raise LabelError(
            f"{where}: loss {loss.name} reads the ground-truth class; found targets of mixed images, which have two each; "
            "use a loss without it, such as forward_kl, or labels of views that are not mixed"
        )


def _soft_part(
    loss: Loss,
    student_logits: Tensor,
    labels: SoftLabels,
    targets_P: Tensor | MixedTargets | None,
    *,
    temperature: Any,
    padded_vocabulary: bool,
    active_P: Tensor | None,
    log_q_P: Tensor | None,
) -> Tensor:
    """The soft loss [P], with its factor T^2."""
    if loss.kind.of_samples is not None:
        assert isinstance(targets_P, Tensor)
        return _sampled_part(
            loss, student_logits, labels, targets_P.long(), log_q_P, temperature, padded_vocabulary, active_P
        )
    logits_PV, T = student_logits, temperature
    if loss.standardize:
        logits_PV, T = standardized(student_logits, labels, temperature=temperature, active_P=active_P)
    if loss.kind.of_logits is not None:
        value_P = loss.kind.of_logits(logits_PV, labels, temperature=T)
        return temperature**loss.kind.temperature_power * value_P
    if isinstance(targets_P, MixedTargets):
        targets_P = None  # read by no loss that gets here
    value_P = bucketed_loss(
        loss, logits_PV, labels, targets_P, temperature=T, padded_vocabulary=padded_vocabulary
    )
    value_P = temperature**loss.kind.temperature_power * value_P
    if loss.kind.weighs_truth:
        assert targets_P is not None
        value_P = add_truth_part(value_P, student_logits, labels, targets_P)
    return value_P


def _sampled_part(
    loss: Loss,
    student_logits: Tensor,
    labels: SoftLabels,
    targets_P: Tensor,
    log_q_P: Tensor | None,
    temperature: Any,
    padded_vocabulary: bool,
    active_P: Tensor | None,
) -> Tensor:
    """The loss [P] of the sampled tokens, which are the targets; 0 where there is none."""
    check_student(student_logits, labels)
    loss.check_labels(labels)
    num_student_classes = student_logits.shape[1]
    check_vocabulary(labels.num_classes, num_student_classes, padded_vocabulary=padded_vocabulary)
    check_targets(labels, targets_P, num_student_classes)
    log_q_P = check_samples(loss, temperature, log_q_P, targets_P, active_P=active_P)
    log_p_P = teacher_log_probs(labels, targets_P)
    assert loss.kind.of_samples is not None
    log_s_P = -cross_entropy(student_logits, targets_P)
    value_P: Tensor = loss.kind.of_samples(log_s_P, log_p_P, log_q_P, **loss.parameters)
    return value_P.where(targets_P != IGNORED, 0.0)


def add_truth_part(value_P: Tensor, student_logits: Tensor, labels: SoftLabels, targets_P: Tensor) -> Tensor:
    """The loss [P] with the cross-entropy at T=1 times the teacher's probability of the ground-truth class added."""
    truth_P = teacher_log_probs(labels, targets_P.long()).exp()
    return value_P + truth_P * cross_entropy(student_logits, targets_P)
