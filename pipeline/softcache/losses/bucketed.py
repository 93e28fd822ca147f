"""A loss of a student's masses in the buckets of a record: the part that fused and unfused losses share.

Shape suffixes: `P` positions, `V` classes, `K` kept classes.
"""

from typing import Any

import torch
from torch import Tensor

from softcache.labels import SoftenedLabels, SoftLabels
from softcache.losses.buckets import check_student, check_vocabulary, fit_vocabulary, student_buckets
from softcache.losses.registry import Loss
from softcache.losses.tail_modes import apply_tail_mode
from softcache.losses.target_class import IGNORED, add_target_bucket, check_targets, dropped_log_probs

__all__ = ["align_labels", "bucket_values", "bucketed_loss"]


def align_labels(
    loss: Loss,
    softened: SoftenedLabels,
    *,
    num_classes: int,
    num_student_classes: int,
    targets_P: Tensor | None,
    log_dropped_P: Tensor | None,
) -> SoftenedLabels:
    """The record as this loss reads it: in the student's classes, with its tail and its ground-truth bucket.

    Args:
        softened: torch record at one temperature.
        num_classes: V, the teacher's.
        num_student_classes: V', the student's.
        targets_P: of a loss that needs them.
        log_dropped_P: as of `target_class.dropped_log_probs`, with targets.
    """
    ready = fit_vocabulary(softened, num_classes, num_student_classes)
    if not loss.kind.needs_target:
        return apply_tail_mode(ready, loss.tail, num_student_classes)
    assert targets_P is not None
    assert log_dropped_P is not None
    ready = add_target_bucket(ready, targets_P, log_dropped_P, num_student_classes)
    if loss.tail == "bucket":
        return ready
    # Once more: its own share of the tail is known, and a spread tail has it among all classes.
    ready = apply_tail_mode(ready, loss.tail, num_student_classes)
    return add_target_bucket(ready, targets_P, log_dropped_P, num_student_classes)


def bucket_values(
    loss: Loss, ready: SoftenedLabels, log_kept_PK: Tensor, log_tail_P: Tensor, targets_P: Tensor | None
) -> Tensor:
    """The loss [P], without T^2, from a `align_labels`d record and the student's log-masses in its buckets."""
    formula, tailless = loss.kind.formula, loss.tail in ("uniform", "ignore")
    assert formula is not None
    if loss.kind.linear:
        kept_PK = formula(ready.log_probs, log_kept_PK)
        if ready.log_weights is not None:  # the drawn classes stand for the tail
            return (ready.log_weights.exp() * kept_PK).sum(dim=1)
        kept_P = kept_PK.sum(dim=1)
        return kept_P if tailless else kept_P + formula(ready.log_tail, log_tail_P)
    if tailless:
        log_tail_P = torch.full_like(log_tail_P, -torch.inf)
    log_p_PB = torch.cat([ready.log_probs, ready.log_tail[:, None]], dim=1)
    log_s_PB = torch.cat([log_kept_PK, log_tail_P[:, None]], dim=1)
    value_P: Tensor = formula(log_p_PB, log_s_PB, **loss.parameters)
    if loss.kind.needs_target:
        assert targets_P is not None
        value_P = value_P.where(targets_P != IGNORED, 0.0)
    return value_P


def bucketed_loss(
    loss: Loss,
    student_logits: Tensor,
    labels: SoftLabels,
    targets_P: Tensor | None,
    *,
    temperature: Any,
    padded_vocabulary: bool,
) -> Tensor:
    """The loss [P], without T^2, of logits against a record, both softened to T; for all but uld."""
    check_student(student_logits, labels)
    loss.check_labels(labels)
    num_student_classes = student_logits.shape[1]
    check_vocabulary(labels.num_classes, num_student_classes, padded_vocabulary=padded_vocabulary)
    softened = labels.at_temperature(temperature)
    log_dropped_P = None
    if loss.kind.needs_target:
        assert targets_P is not None
        targets_P = targets_P.long()
        check_targets(labels, targets_P, num_student_classes)
        log_dropped_P = dropped_log_probs(labels, softened, temperature)
    ready = align_labels(
        loss,
        softened,
        num_classes=labels.num_classes,
        num_student_classes=num_student_classes,
        targets_P=targets_P,
        log_dropped_P=log_dropped_P,
    )
    log_kept_PK, log_tail_P = student_buckets(student_logits, ready.ids, temperature)
    return bucket_values(loss, ready, log_kept_PK, log_tail_P, targets_P)
