"""Logit standardisation: each position's logits are divided by their standard deviation before the temperature.

Shape suffixes: `P` positions, `V` classes.

The softmax does not see a shift, so the z-scores of logits z at a base temperature T are z at the temperature T std(z):
the teacher's is a temperature that the labels serve, from `stats`; the student's its own, and differentiable. A student
that finds the teacher's order and proportions has a loss of 0, whatever the scale of its logits.
"""

from typing import Any

import torch
from torch import Tensor

from softcache.errors import LabelError, TemperatureError
from softcache.labels import STATS, SoftLabels
from softcache.labels.temperature import check_tail_error
from softcache.losses.buckets import check_student, promote_dtype
from softcache.losses.registry import Loss

__all__ = ["LEAST_STD", "MAX_TEMPERATURE", "check_tails", "standardized", "teacher_temperature"]

MAX_TEMPERATURE = 100.0
"""Of `loss.temperature`: beyond, T^2 only magnifies the rounding of the divergence."""
LEAST_STD = 1e-3
"""Below it a student's logits count as so far apart: equal logits have no direction, and their gradient no bound. A
teacher's count as equal: uniform at every temperature."""


def standardized(
    student_logits: Tensor, labels: SoftLabels, *, temperature: Any, active_P: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits and temperatures with which any loss of this package is the loss of z-scores.

    Args:
        student_logits: [P, V] floating point; -inf masks a class, which counts for nothing here.
        labels: torch record with `stats`, or of all classes.
        temperature: the base temperature, a number or a tensor [P].
        active_P: [P] bool, the positions that count; the others may hold anything. None: all.

    Returns:
        The student's logits, centred, and scaled to the teacher's standard deviation, [P, V]; and the teacher's
        temperatures [P], base times standard deviation, for both.

    Raises:
        LabelError: the labels do not know their logits' standard deviation.
        TemperatureError: a position's temperature would be too low for the labels; 1 never is.

    Examples:
        >>> from softcache.losses import forward_kl
        >>> from softcache.labels.sparsify import top_k
        >>> teacher = torch.tensor([[4.0, 1.0, 0.0, -3.0]])
        >>> labels = top_k(teacher, k=2)
        >>> logits, temperature = standardized(teacher / 10 + 5, labels, temperature=2.0)
        >>> bool(forward_kl(logits, labels, temperature=temperature).abs() < 1e-6)
        True

    References:
        Sun, Ren, Li, Wang, Cao 2024, "Logit standardization in knowledge distillation", CVPR, arXiv 2403.01427, the
        z-score of its algorithm. The standard deviation is that of the population, as printed there; the authors'
        code takes the sample's, which is a base temperature larger by sqrt(V / (V - 1)), on both sides.
    """
    check_student(student_logits, labels)
    teacher_P = teacher_temperature(labels, temperature, active_P=active_P)
    logits_PV = promote_dtype(student_logits)
    alive_PV = logits_PV > -torch.inf
    count_P1 = alive_PV.sum(dim=1, keepdim=True).clamp(min=1)
    finite_PV = logits_PV.where(alive_PV, 0.0)
    centred_PV = (finite_PV - finite_PV.sum(dim=1, keepdim=True) / count_P1).where(alive_PV, 0.0)
    variance_P1 = centred_PV.square().sum(dim=1, keepdim=True) / count_P1
    std_P1 = variance_P1.clamp(min=LEAST_STD**2).sqrt()
    base = temperature if not isinstance(temperature, Tensor) else temperature.detach().reshape(-1, 1)
    scale_P1 = (teacher_P.detach()[:, None] / base).to(logits_PV.dtype)
    return (centred_PV * (scale_P1 / std_P1)).masked_fill(~alive_PV, -torch.inf), teacher_P


def teacher_temperature(labels: SoftLabels, temperature: Any, *, active_P: Tensor | None = None) -> Tensor:
    """Base temperature times the standard deviation of the teacher's logits, [P]; errors as in `standardized`.

    The check waits for a GPU. Positions that are not active get the base temperature.
    """
    std_P = _teacher_std(labels)
    free_P = std_P < LEAST_STD  # all logits alike: the same distribution at every temperature
    if active_P is not None:
        free_P = free_P | ~active_P
    base = torch.as_tensor(temperature, dtype=std_P.dtype).to(std_P.device)
    teacher_P = (temperature * std_P).where(~free_P, base.clamp(min=labels.temperatures[0]))
    low_P = ~(teacher_P >= labels.temperatures[0])
    if bool(low_P.any()):
        try:  # labels of all classes, or of a light tail, serve lower ones too
            labels.take(low_P).at_temperature(teacher_P[low_P])
        except TemperatureError as error:
            position = int(teacher_P.where(low_P, torch.inf).nan_to_num(nan=-torch.inf).argmin())
            std = float(std_P[position])
            least = labels.temperatures[0] / max(std, 1e-6)
            way_out = (
                f"expected a loss.temperature of at least {least:.3g}, which multiplies it; raise it, or "
            )
            raise TemperatureError(
                f"loss.standardize, position {position}: the teacher's logits have a standard deviation of {std:.3g}, at "
                f"which its temperature is {float(teacher_P[position]):.3g}, too low for these labels; "
                f"{way_out if least <= MAX_TEMPERATURE else ''}set standardize = false",
                position=position,
            ) from error
    return teacher_P


def _teacher_std(labels: SoftLabels) -> Tensor:
    if labels.stats is not None:
        return labels.stats[:, STATS.index("logit_std")]
    if labels.k != labels.num_classes or labels.sampling is not None:
        raise LabelError(
            "loss.standardize: expected labels with stats, which say how far apart the teacher's logits are; found "
            'none; capture with labels.statistics = "all", or set standardize = false'
        )
    alive_PK = labels.log_probs > -torch.inf
    finite_PK = promote_dtype(labels.log_probs).where(alive_PK, 0.0)
    count_P1 = alive_PK.sum(dim=1, keepdim=True).clamp(min=1)
    centred_PK = (finite_PK - finite_PK.sum(dim=1, keepdim=True) / count_P1).where(alive_PK, 0.0)
    return (centred_PK.square().sum(dim=1) / count_P1[:, 0]).sqrt()


def check_tails(loss: Loss, labels: SoftLabels, temperature: Any, *, active_P: Tensor | None = None) -> None:
    """Raises TemperatureError where a position's tail is not known to `loss.max_tail_error` at the teacher's temperature."""
    if loss.max_tail_error is None:
        return
    T = teacher_temperature(labels, temperature, active_P=active_P) if loss.standardize else temperature
    if active_P is not None:
        labels = labels.take(active_P)
        T = T[active_P] if isinstance(T, Tensor) and T.numel() == len(active_P) else T
    check_tail_error(labels, T.detach() if isinstance(T, Tensor) else T, loss.max_tail_error)
