"""A student's logits in the buckets of a record: its kept classes, and all the others as one.

Shape suffixes: `P` positions, `V` classes, `K` kept classes.

The student's tail is summed over its classes, not taken as 1 minus the rest, so it is right where the kept mass
rounds to 1. All of it costs three [P, V] temporaries in addition to the student's logits.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from softcache.errors import LabelError
from softcache.labels import SoftenedLabels, SoftLabels
from softcache.labels.tail import log_sum_exp

__all__ = [
    "MAX_LACKING_MASS",
    "check_student",
    "check_vocabulary",
    "fit_vocabulary",
    "over_temperature",
    "promote_dtype",
    "student_buckets",
]

MAX_LACKING_MASS = 1e-3
"""What a teacher may give, at the loss's temperature, to classes of its padding, for a student that has none to take it."""


def fit_vocabulary(softened: SoftenedLabels, num_classes: int, num_student_classes: int) -> SoftenedLabels:
    """The same distribution over the student's classes, where both vocabularies start alike.

    The student stays normalised over all its classes. Where it has more of them, the teacher gives the extra
    ones 0: they become R = num_student_classes - num_classes kept classes of log_prob -inf, and the tail is
    the dropped classes of the teacher alone. Where it has fewer, the mass of kept classes it lacks moves to
    the tail; where that has no class of the student either, the others are scaled up to a mass of 1.

    Args:
        softened: torch record at one temperature.
        num_classes: V, the teacher's.
        num_student_classes: V', the student's.

    Returns:
        ids [P, K] or [P, K + R] int64, in which an unused slot holds V'; `softened` itself where V' = V.

    Raises:
        LabelError: the student has fewer classes, and these were drawn at random, or are all there is and the teacher gives
            the others more than `MAX_LACKING_MASS`.
    """
    if num_student_classes == num_classes:
        return softened
    if softened.log_weights is not None:
        if num_student_classes < num_classes:
            raise LabelError(
                f"student logits: expected at least {num_classes} classes for labels that were drawn at random; "
                f"found {num_student_classes}; a drawn class that the student lacks has nowhere to go: pad the "
                "student"
            )
        unused_PK = softened.log_probs == -torch.inf
        return replace(softened, ids=softened.ids.long().masked_fill(unused_PK, num_student_classes))
    ids_PK = softened.ids.long()
    lacking = ids_PK >= min(num_classes, num_student_classes)
    # Unused slots (id V) are among the lacking, with a mass of 0.
    folded_PK = softened.log_probs.masked_fill(~lacking, -torch.inf)
    log_tail_P = log_sum_exp(torch.cat([folded_PK, softened.log_tail[:, None]], dim=1))
    extra_R = torch.arange(num_classes, max(num_classes, num_student_classes), device=ids_PK.device)
    extra_PR = extra_R.expand(len(ids_PK), -1)
    log_probs_PK = softened.log_probs.masked_fill(lacking, -torch.inf)
    if ids_PK.shape[1] >= num_student_classes < num_classes:
        log_probs_PK, log_tail_P = _without_tail(
            log_probs_PK, log_tail_P, (~lacking).sum(dim=1) == num_student_classes, num_student_classes
        )
    return SoftenedLabels(
        ids=torch.cat([ids_PK.masked_fill(lacking, num_student_classes), extra_PR], dim=1),
        log_probs=F.pad(log_probs_PK, (0, len(extra_R)), value=-torch.inf),
        log_tail=log_tail_P,
    )


def _without_tail(
    log_probs_PK: Tensor, log_tail_P: Tensor, is_whole_P: Tensor, num_student_classes: int
) -> tuple[Tensor, Tensor]:
    """The kept classes, and no tail, in the rows whose kept classes are all of the student's."""
    lost_P = log_tail_P.exp().where(is_whole_P, 0.0)
    if bool((lost_P > MAX_LACKING_MASS).any()):
        position = int(lost_P.argmax())
        raise LabelError(
            f"student logits: {num_student_classes} classes, to all others of which the teacher gives "
            f"{lost_P[position]:.2g} at position {position}; expected at most {MAX_LACKING_MASS:g}, as of padding; "
            "build the student with the teacher's classes",
            position=position,
        )
    log_left_P = log_sum_exp(log_probs_PK).where(is_whole_P, 0.0)
    return log_probs_PK - log_left_P[:, None], log_tail_P.masked_fill(is_whole_P, -torch.inf)


def check_vocabulary(num_classes: int, num_student_classes: int, *, padded_vocabulary: bool) -> None:
    """Raises LabelError where the student's number of classes is another, unless that is allowed."""
    if num_student_classes != num_classes and not padded_vocabulary:
        raise LabelError(
            f"student logits: expected {num_classes} classes as in the labels; found {num_student_classes}; "
            f"build the student with {num_classes} outputs or rebuild the cache; "
            "padded_vocabulary=True is for two paddings of one vocabulary"
        )


def check_student(student_logits: Tensor, labels: SoftLabels) -> None:
    """Raises LabelError unless the labels are torch and have a position for every row of logits."""
    if not labels.is_torch:
        raise LabelError(
            "labels: expected torch tensors; found NumPy arrays; call labels.to_torch(device) first"
        )
    if student_logits.ndim != 2 or student_logits.shape[0] != len(labels):
        raise LabelError(
            f"student logits: expected [{len(labels)}, {labels.num_classes}], a row per labeled position; "
            f"found {list(student_logits.shape)}; flatten batch and positions as the labels are"
        )


def student_buckets(student_logits: Tensor, ids_PK: Tensor, temperature: Any) -> tuple[Tensor, Tensor]:
    """The student's log-probabilities at T of the kept classes [P, K] and of all the others together [P].

    A slot whose id is no class of the student's is unused, and -inf.
    """
    scaled_PV = over_temperature(promote_dtype(student_logits), temperature)
    num_positions, num_classes = scaled_PV.shape
    ids_PK = ids_PK.long()
    # One column more than classes, for the unused slots to fall into.
    kept_PV = torch.zeros((num_positions, num_classes + 1), dtype=torch.bool, device=scaled_PV.device)
    kept_PV.scatter_(1, ids_PK, True)
    log_z_P = scaled_PV.logsumexp(dim=1)
    log_tail_P = log_sum_exp(scaled_PV.masked_fill(kept_PV[:, :num_classes], -torch.inf)) - log_z_P
    log_kept_PK = scaled_PV.gather(1, ids_PK.clamp(max=num_classes - 1)) - log_z_P[:, None]
    return log_kept_PK.masked_fill(ids_PK >= num_classes, -torch.inf), log_tail_P


def over_temperature(logits_PV: Tensor, temperature: Any) -> Tensor:
    """Logits / T; -inf stays -inf, without a NaN gradient in T."""
    if not isinstance(temperature, Tensor):
        return logits_PV / temperature
    masked = logits_PV == -torch.inf
    divisor = temperature.to(logits_PV.device).reshape(-1, 1)
    return (logits_PV.masked_fill(masked, 0.0) / divisor).masked_fill(masked, -torch.inf)


def promote_dtype(logits: Tensor) -> Tensor:
    """float64 as it is, all else as float32."""
    return logits if logits.dtype == torch.float64 else logits.float()
