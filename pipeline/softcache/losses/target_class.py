"""The ground-truth class as a bucket of its own, for the losses that distinguish it from the others.

Shape suffixes: `P` positions, `V` classes, `K` kept classes.

Where the teacher kept the class, its slot moves. Where it dropped the class, its log-probability is
`labels.target_log_prob`, and the tail is what then remains of it: log(e^tail - e^target), computed as tail +
log(-expm1(target - tail)). Off the grid of temperatures the tail is interpolated; should the class be heavier than that,
nothing remains. Where it is the only class that was dropped, it is the tail.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from softcache.errors import LabelError
from softcache.labels import SoftenedLabels, SoftLabels
from softcache.labels.tail import log_sum_exp

__all__ = [
    "IGNORED",
    "add_target_bucket",
    "check_targets",
    "dropped_log_probs",
    "teacher_log_probs",
    "unknown_targets",
]

IGNORED = -100  # a target that is none


def dropped_log_probs(labels: SoftLabels, softened: SoftenedLabels, temperature: Any) -> Tensor:
    """Log-probability at T of the ground-truth class, for rows that dropped it, [P]; -inf where it is not known."""
    if labels.target_log_prob is None:
        return torch.full_like(softened.log_tail, -torch.inf)
    dtype = softened.log_probs.dtype
    known_P = labels.target_log_prob > -torch.inf  # a NaN is not
    at_one_P = labels.target_log_prob.to(dtype).where(known_P, 0.0)
    # The normaliser is what lies between a slot before and after: the first slot is always a class.
    first_P = labels.log_probs[:, 0].to(dtype)
    divisor = temperature.to(dtype) if isinstance(temperature, Tensor) else temperature
    log_dropped_P = (at_one_P - first_P) / divisor + softened.log_probs[:, 0]
    # The only dropped class is the tail, to the last bit: what rounding left of it would be mass where no class is.
    log_dropped_P = torch.where(labels.num_dropped() <= 1, softened.log_tail, log_dropped_P)
    return log_dropped_P.where(known_P, -torch.inf)


def add_target_bucket(
    softened: SoftenedLabels, targets_P: Tensor, log_dropped_P: Tensor, num_classes: int
) -> SoftenedLabels:
    """The same distribution, with the ground-truth class in a last slot of its own.

    Args:
        softened: in the student's classes, unused slots with id `num_classes`.
        targets_P: [P] the student's classes; a row with -100 takes class 0, and is for the caller to leave out.
        log_dropped_P: as of `dropped_log_probs`; read where the class has no slot.
        num_classes: the student's.

    Returns:
        K + 1 slots; the one that the class had before is unused.
    """
    targets_P = targets_P.where(targets_P != IGNORED, 0)
    ids_PK = softened.ids.long()
    here_PK = ids_PK == targets_P[:, None]
    log_slot_P = log_sum_exp(softened.log_probs.masked_fill(~here_PK, -torch.inf))
    kept_P = here_PK.any(dim=1)
    return replace(
        softened,
        ids=torch.cat([ids_PK.masked_fill(here_PK, num_classes), targets_P[:, None]], dim=1),
        log_probs=torch.cat(
            [
                softened.log_probs.masked_fill(here_PK, -torch.inf),
                log_slot_P.where(kept_P, log_dropped_P)[:, None],
            ],
            dim=1,
        ),
        log_tail=softened.log_tail.where(kept_P, _log_difference(softened.log_tail, log_dropped_P)),
    )


def teacher_log_probs(labels: SoftLabels, targets_P: Tensor) -> Tensor:
    """The teacher's log-probability of the ground-truth class at T=1, [P]; -inf where it has no such class."""
    softened = labels.at_temperature(1.0)
    here_PK = labels.ids.long() == targets_P[:, None]
    log_slot_P = log_sum_exp(softened.log_probs.masked_fill(~here_PK, -torch.inf))
    log_dropped_P = dropped_log_probs(labels, softened, 1.0)
    has_P = (targets_P >= 0) & (targets_P < labels.num_classes)
    return log_slot_P.where(here_PK.any(dim=1), log_dropped_P).where(has_P, -torch.inf)


def unknown_targets(labels: SoftLabels, targets_P: Tensor) -> Tensor:
    """[P] bool: the teacher's probability of the ground-truth class can be read nowhere in the record."""
    is_class_P = (targets_P >= 0) & (targets_P < labels.num_classes)
    dropped_P = is_class_P & ~(labels.ids.long() == targets_P[:, None]).any(dim=1)
    return dropped_P if labels.target_log_prob is None else dropped_P & labels.target_log_prob.isnan()


def check_targets(labels: SoftLabels, targets_P: Tensor, num_student_classes: int) -> None:
    """Raises LabelError unless every target is a class, or -100, of a known probability. Waits for a GPU."""
    if tuple(targets_P.shape) != (len(labels),):
        raise LabelError(f"targets: expected [{len(labels)}], one per label; found {list(targets_P.shape)}")
    outside_P = (targets_P != IGNORED) & ((targets_P < 0) | (targets_P >= num_student_classes))
    bad_P = outside_P | unknown_targets(labels, targets_P)
    if not bool(bad_P.any()):
        return
    position = int(bad_P.int().argmax())
    if bool(outside_P[position]):
        raise LabelError(
            f"targets, position {position}: expected a class in [0, {num_student_classes}) or -100; "
            f"found {int(targets_P[position])}; check that targets are in the student's vocabulary",
            position=position,
        )
    raise unknown_target(position, int(targets_P[position]))


def unknown_target(position: int, target: int) -> LabelError:
    """The error that a record without the target's probability deserves."""
    return LabelError(
        f"labels, position {position}: the ground-truth class {target} is not among the kept ones, and "
        "target_log_prob does not hold how likely the teacher finds it; expected one or the other for dkd, nkd and weights "
        "by correctness or gap; "
        "capture the labels with targets, keep more classes, or use another loss",
        position=position,
    )


def _log_difference(log_a: Tensor, log_b: Tensor) -> Tensor:
    """log(a - b), -inf where b is not below a."""
    below = log_b < log_a
    ratio = (log_b - log_a).where(below, -1.0)
    return (log_a.where(below, 0.0) + torch.log(-torch.expm1(ratio))).where(below, -torch.inf)
