"""Losses of independent classes, each a probability of its own: pure, one value per row, the mean over classes.

The caller reduces. Gradients are checked numerically in the tests, at T = 1 and beyond.

Shape suffixes: `P` rows, `V` classes, `K` kept classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from softcache.errors import LabelError
from softcache.labels import BernoulliLabels
from softcache.losses.buckets import promote_dtype
from softcache.losses.distillation import check_alpha

__all__ = ["binary_cross_entropy", "binary_distillation_loss", "binary_kl"]


def binary_cross_entropy(student_logits_PV: torch.Tensor, targets_PV: torch.Tensor) -> torch.Tensor:
    """Returns the mean over classes of -(y log q + (1 - y) log(1 - q)), [P], in nats; q = sigmoid(student).

    Args:
        targets_PV: [P, V] from 0 to 1.
    """
    logits_PV = promote_dtype(student_logits_PV)
    return binary_cross_entropy_with_logits(logits_PV, targets_PV.to(logits_PV.dtype), reduction="none").mean(
        1
    )


def binary_kl(
    student_logits_PV: torch.Tensor, labels: BernoulliLabels, *, temperature: Any = 1.0
) -> torch.Tensor:
    """Returns the mean over classes of KL(y || q), [P], in nats; y = sigmoid(teacher / T), q = sigmoid(student / T).

    A class that the record dropped has y at most b = sigmoid(bound / T): it costs as if y were b where q is above b, and
    nothing below, where nothing is known against the student. So the value is a lower bound of the one over all classes, and
    equal to it at K = V.

    Args:
        student_logits_PV: [P, V] float; half precision is promoted to float32.
        labels: of P rows and V classes, torch.
        temperature: T, above 0; a number, or a tensor [P].

    Raises:
        LabelError: the student's classes are not the labels'.
        TemperatureError: T is not above 0 and finite.
    """
    if tuple(student_logits_PV.shape) != (len(labels), labels.num_classes):
        raise LabelError(
            f"student: expected logits of shape {(len(labels), labels.num_classes)} (rows, classes of the labels); found "
            f"{tuple(student_logits_PV.shape)}; the student's head must have the teacher's classes"
        )
    soft = labels.at_temperature(temperature)
    is_per_row = isinstance(temperature, torch.Tensor) and temperature.ndim
    student_PV = promote_dtype(student_logits_PV) / (temperature[:, None] if is_per_row else temperature)
    bound_P1 = soft.dropped_bound[:, None].to(student_PV.dtype)
    # Unknown below the bound: taken for what the student has, which has no loss and no gradient.
    teacher_PV = torch.minimum(student_PV.detach(), bound_P1.expand_as(student_PV))
    teacher_PV = teacher_PV.scatter(1, labels.ids.long(), soft.logits.to(student_PV.dtype))
    y_PV = teacher_PV.sigmoid()
    heads_PV = y_PV * (logsigmoid(teacher_PV) - logsigmoid(student_PV))
    tails_PV = (1 - y_PV) * (logsigmoid(-teacher_PV) - logsigmoid(-student_PV))
    return (heads_PV.where(y_PV > 0, 0.0) + tails_PV.where(y_PV < 1, 0.0)).mean(1)


def binary_distillation_loss(
    student_logits_PV: torch.Tensor,
    labels: BernoulliLabels | None,
    targets_PV: torch.Tensor | None,
    *,
    temperature: Any,
    alpha: float,
) -> torch.Tensor:
    """Returns the mean over rows of (1 - alpha) * binary cross-entropy + alpha * T^2 * binary KL, a scalar.

    Args:
        labels: may be None when alpha is 0.
        targets_PV: [P, V] from 0 to 1; may be None when alpha is 1.

    Raises:
        LabelError: alpha out of range, labels or targets missing where they are needed, or as `binary_kl` raises.
    """
    check_alpha(alpha)
    terms = []
    for given, share, what in ((targets_PV, 1 - alpha, "targets"), (labels, alpha, "labels")):
        if share > 0 and given is None:
            raise LabelError(
                f"binary_distillation_loss: expected {what} for alpha {alpha}; found None; pass them, or another alpha"
            )
    if alpha < 1 and targets_PV is not None:
        terms.append((1 - alpha) * binary_cross_entropy(student_logits_PV, targets_PV))
    if alpha > 0 and labels is not None:
        terms.append(alpha * temperature**2 * binary_kl(student_logits_PV, labels, temperature=temperature))
    return torch.stack(terms).sum(0).mean()
