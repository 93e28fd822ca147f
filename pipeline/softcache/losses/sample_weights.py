"""Weights of single rows in the soft part of the loss.

Shape suffixes: `P` positions, `V` classes, `K` kept classes.

A row's score is in [0, 1], read at T = 1, without a gradient:

    teacher_entropy       entropy of the teacher's distribution / log V
    teacher_correctness   the teacher's probability of the ground-truth class
    gap                   |the teacher's - the student's| probability of the ground-truth class

and with s the score, or 1 - score where `prefer` is "low", its weight is floor + (1 - floor) * s^power. The loss is

    mean over all rows of (1 - alpha) * CE + alpha * weight * T^2 * soft loss

The weights are not divided by their mean: a row's share does not depend on who else is in its batch, so pieces of a batch
and processes add up to the batch. Rows that count less leave the ground truth as it is, and make the soft part smaller.
"""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from softcache.errors import LabelError
from softcache.labels import STATS, MixedTargets, SoftLabels
from softcache.losses.buckets import promote_dtype
from softcache.losses.target_class import IGNORED, check_targets, teacher_log_probs
from softcache.settings import Settings

__all__ = ["WeightSettings", "row_weights"]

_PREFERRED: dict[str, Literal["low", "high"]] = {
    "teacher_entropy": "low",
    "teacher_correctness": "high",
    "gap": "high",
}


class WeightSettings(Settings):
    """[loss.weights]: how much each row counts in the soft part.

    Attributes:
        by: the score.
        prefer: which scores count more; left out: low entropy, high correctness, high gap.
        power: the exponent; 0 makes all rows alike.
        floor: the least weight.
    """

    by: Literal["teacher_entropy", "teacher_correctness", "gap"]
    prefer: Literal["low", "high"] | None = None
    power: float = Field(1.0, ge=0, le=16)
    floor: float = Field(0.0, ge=0, le=1)

    @property
    def needs_truth(self) -> bool:
        """Whether the score is about the ground-truth class."""
        return self.by != "teacher_entropy"


def row_weights(
    settings: WeightSettings,
    labels: SoftLabels,
    targets_P: Tensor | MixedTargets | None,
    *,
    student_log_probs_P: Tensor | None = None,
    num_student_classes: int,
) -> Tensor:
    """The weights [P] of a record's rows, float32, in [floor, 1]; constants.

    Args:
        labels: torch record of the P positions.
        targets_P: [P] integer classes; a row with -100 has no score and counts in full. Read by scores about the truth.
        student_log_probs_P: [P] the student's log-probability of the ground-truth class at T = 1, nats; read by "gap".
        num_student_classes: the student's classes; targets are checked against them. Waits for a GPU.

    Raises:
        LabelError: the record does not know its entropy, or the probability of a row's ground-truth class.
    """
    if settings.by == "teacher_entropy":
        score_P = _entropy(labels) / math.log(max(2, labels.num_classes))
        known_P = torch.ones_like(score_P, dtype=torch.bool)
    else:
        if isinstance(targets_P, MixedTargets):
            raise LabelError(
                f"loss.weights: {settings.by} reads the ground-truth class; found targets of mixed images, which have two "
                'each; use by = "teacher_entropy", or labels of views that are not mixed'
            )
        if targets_P is None:
            raise LabelError(
                f"loss.weights: {settings.by} reads the ground-truth classes; found none; use by = "
                '"teacher_entropy", or a source with classes'
            )
        targets_P = targets_P.long()
        check_targets(labels, targets_P, num_student_classes)
        known_P = targets_P != IGNORED
        score_P = teacher_log_probs(labels, targets_P).detach().exp()
        if settings.by == "gap":
            assert student_log_probs_P is not None
            score_P = (score_P - student_log_probs_P.detach().exp()).abs()
    score_P = score_P.float().clamp(0.0, 1.0)  # rounding may leave it by a hair
    if (settings.prefer or _PREFERRED[settings.by]) == "low":
        score_P = 1.0 - score_P
    weight_P = settings.floor + (1.0 - settings.floor) * score_P.pow(settings.power)
    return weight_P.where(known_P, 1.0)


def _entropy(labels: SoftLabels) -> Tensor:
    """Entropy of the teacher's distributions at T = 1, [P] nats."""
    if labels.stats is not None:
        return labels.stats[:, STATS.index("entropy")]
    if labels.k != labels.num_classes or labels.sampling is not None:
        raise LabelError(
            "loss.weights: teacher_entropy needs labels with stats, which hold the entropy over all classes; found "
            'none; capture with labels.statistics = "all", or use by = "teacher_correctness"'
        )
    log_p_PK = promote_dtype(labels.log_probs)
    alive_PK = log_p_PK > -torch.inf
    finite_PK = log_p_PK.where(alive_PK, 0.0)
    return -(finite_PK.exp() * finite_PK).where(alive_PK, 0.0).sum(dim=1)
