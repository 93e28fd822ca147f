"""Universal Logit Distillation: distributions compared by rank, over different vocabularies.

Shape suffixes: `P` positions, `V` classes, `K` kept classes.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from softcache.labels import SoftLabels
from softcache.losses.buckets import check_student, over_temperature, promote_dtype
from softcache.losses.registry import LOSSES, Loss, LossSpec

__all__ = ["uld"]


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
        >>> from softcache.labels.sparsify import dense
        >>> teacher = torch.tensor([[2.0, 1.0, 0.0]])
        >>> student = torch.tensor([[-9.0, 0.0, 2.0, 1.0]])  # one class more, another order
        >>> float(uld(student, dense(teacher), temperature=1.0)) < 1e-4
        True

    References:
        Boizard, El Haddad, Hudelot, Colombo 2024, arXiv 2402.12030, eqs. (4) and (5).
    """
    check_student(student_logits, labels)
    Loss("uld").check_labels(labels)
    softened = labels.at_temperature(temperature)
    teacher_PK = softened.log_probs.exp().sort(dim=1, descending=True).values
    probs_PV = over_temperature(promote_dtype(student_logits), temperature).softmax(dim=1)
    top = probs_PV.topk(min(labels.k, probs_PV.shape[1]), dim=1)
    tail_P = probs_PV.scatter(1, top.indices, 0.0).sum(dim=1)
    student_PK = F.pad(top.values, (0, labels.k - top.values.shape[1]))
    return (teacher_PK - student_PK).abs().sum(dim=1) + (softened.log_tail.exp() - tail_P).abs()


LOSSES.register("uld")(LossSpec(None, tails=("bucket",), temperature_power=0, of_logits=uld))
