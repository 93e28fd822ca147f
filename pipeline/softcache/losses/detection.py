"""Losses over a detector's cells: classes of sigmoid heads, and boxes. Pure, one value per cell.

The caller weighs the cells and reduces. Gradients are checked numerically in the tests, at T = 1 and beyond.

Shape suffixes: `P` cells, `V` classes, `K` kept classes.

References:
    Li et al. 2020, Generalized Focal Loss, arXiv 2006.04388, equation 2 (quality focal loss).
    Yang et al. 2023, Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object Detection, arXiv 2308.14286
        (binary cross-entropy per class, weighed by the gap between teacher and student).
    Zheng et al. 2022, Localization Distillation for Dense Object Detection, arXiv 2102.12252 (equation 5).
    Rezatofighi et al. 2019, Generalized Intersection over Union, arXiv 1902.09630.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch.nn.functional import binary_cross_entropy_with_logits, kl_div

from softcache.errors import LabelError
from softcache.labels import BernoulliLabels
from softcache.settings import Settings

__all__ = ["CellLossSettings", "box_giou", "box_l1", "edge_kl", "quality_bce"]


class CellLossSettings(Settings):
    """[detection_loss]: the soft loss of a detector, with the temperature and alpha of [loss].

    `class_weight`, `box_weight` and `centerness_weight` weigh the three parts; `box` is the loss of boxes (of heads with
    distributions over edges it is their KL divergence); `focus` is the
    power of the gap between teacher and student by which a class counts (0: plain binary cross-entropy).
    """

    class_weight: float = Field(1.0, ge=0)
    box_weight: float = Field(1.0, ge=0)
    centerness_weight: float = Field(1.0, ge=0)
    box: Literal["giou", "l1"] = "giou"
    focus: float = Field(1.0, ge=0, le=4)


def quality_bce(
    student_logits_PV: torch.Tensor, labels: BernoulliLabels, *, temperature: Any = 1.0, focus: float = 1.0
) -> torch.Tensor:
    """Returns the sum over classes of |y - q|^focus * BCE(y, q), [P]; y = sigmoid(teacher / T), q = sigmoid(student / T).

    With focus = 1 and T = 1 this is the classification loss of Yang et al.; it is Li et al.'s equation 2 with the
    teacher's probability as quality. A class that the record dropped has y at most b = sigmoid(bound / T); it costs as
    if y were b where q is above b, and nothing below: there nothing is known against the student.

    Args:
        student_logits_PV: [P, V] float.
        labels: of P cells and V classes, torch.
        temperature: T, above 0; a number, or a tensor [P].

    Raises:
        LabelError: the student's classes are not the labels'.
    """
    if tuple(student_logits_PV.shape) != (len(labels), labels.num_classes):
        raise LabelError(
            f"student: expected class logits of shape {(len(labels), labels.num_classes)} (cells, classes of the labels); "
            f"found {tuple(student_logits_PV.shape)}; the student's head must have the teacher's classes"
        )
    soft = labels.at_temperature(temperature)
    per_row = (
        temperature[:, None] if isinstance(temperature, torch.Tensor) and temperature.ndim else temperature
    )
    student_PV = student_logits_PV / per_row
    bound_P1 = soft.dropped_bound[:, None].to(student_PV.dtype)
    # Unknown below the bound: taken for what the student has, which has no gap and so no loss.
    known_PV = torch.minimum(student_PV.detach(), bound_P1.expand_as(student_PV))
    teacher_PV = known_PV.scatter(1, labels.ids.long(), soft.logits.to(student_PV.dtype)).sigmoid()
    loss_PV = binary_cross_entropy_with_logits(student_PV, teacher_PV, reduction="none")
    gap_PV = (student_PV.sigmoid() - teacher_PV).abs()
    if focus == 0:  # the entropy of y, which no gap hides here, would count where nothing is known
        unknown_PV = torch.ones_like(gap_PV).scatter(1, labels.ids.long(), 0.0) * (student_PV <= bound_P1)
        return (loss_PV * (1 - unknown_PV)).sum(1)
    return (loss_PV * gap_PV**focus).sum(1)


def box_l1(student_P4: torch.Tensor, teacher_P4: torch.Tensor) -> torch.Tensor:
    """Returns the sum of absolute differences of four raw box outputs, [P]."""
    return (student_P4 - teacher_P4).abs().sum(1)


def edge_kl(student_P4N: torch.Tensor, teacher_P4N: torch.Tensor, *, temperature: Any = 1.0) -> torch.Tensor:
    """Returns T^2 * KL(softmax(teacher / T) || softmax(student / T)), the mean over the four edges of a box, [P].

    Args:
        student_P4N, teacher_P4N: logits of the distance of each edge.

    Raises:
        LabelError: the two have other numbers of distances.
    """
    if student_P4N.shape != teacher_P4N.shape:
        raise LabelError(
            f"student: expected logits of edges of shape {tuple(teacher_P4N.shape)} (cells, edges, distances); found "
            f"{tuple(student_P4N.shape)}; the student's head must have the teacher's bins"
        )
    student = (student_P4N / temperature).log_softmax(-1)
    teacher = (teacher_P4N / temperature).log_softmax(-1)
    return temperature**2 * kl_div(student, teacher, reduction="none", log_target=True).sum(-1).mean(-1)


def box_giou(student_P4: torch.Tensor, teacher_P4: torch.Tensor) -> torch.Tensor:
    """Returns 1 - GIoU of decoded boxes (left, top, right, bottom), [P], in [0, 2]."""
    from torchvision.ops import generalized_box_iou_loss

    return generalized_box_iou_loss(student_P4, teacher_P4, reduction="none")
