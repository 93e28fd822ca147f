"""The soft losses of a chunk: a student's masses in K kept buckets and the rest, to a value and its slopes.

Shape suffixes: `P` positions, `V` classes, `K` kept classes.

A loss that is linear in the student's log-masses has slopes that are known; those of any other come from autograd, over
[P, K + 1] numbers. Either way the definition is the one of the unfused loss (`losses.bucketed.bucket_values`).

With `tail = "uniform"` a linear loss needs of the dropped classes only their mean log-probability. For any other every
class is kept then, and a chunk holds about ten [P, V] temporaries more and takes some six times as long.
"""

from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from softcache.labels import SoftenedLabels
from softcache.losses.bucketed import align_labels, bucket_values
from softcache.losses.registry import Loss

__all__ = ["Buckets", "ChunkLoss", "LossGradients", "StudentBuckets", "Uld"]


class StudentBuckets(NamedTuple):
    """A student's log-masses at one temperature, -inf where a bucket is empty.

    Attributes:
        kept_PK: of the kept classes.
        tail_P: of all others together.
        log_z_P: log-sum-exp of its logits.
        mean_P: the mean of the others' log-masses; None unless the loss is `even`.
        num_dropped_P: the others' number, likewise.
    """

    kept_PK: Tensor
    tail_P: Tensor
    log_z_P: Tensor
    mean_P: Tensor | None = None
    num_dropped_P: Tensor | None = None


class LossGradients(NamedTuple):
    """A loss [P] and its derivatives by the log-masses, those by `mean_P` where the loss is `even`."""

    value_P: Tensor
    kept_PK: Tensor
    tail_P: Tensor
    mean_P: Tensor | None = None


class ChunkLoss(Protocol):
    """A loss of the student's masses in K kept buckets and the bucket of all other classes.

    Attributes:
        temperature_power: the loss is multiplied by T to this power.
        even: it reads the mean of the other classes' log-masses, too.
    """

    temperature_power: int
    even: bool

    def kept(self, logits_PV: Tensor, part: slice) -> Tensor:
        """[P, K] int64 ids of the kept classes of a chunk; V in unused slots."""

    def slopes(self, masses: StudentBuckets, part: slice) -> LossGradients:
        """The loss of the chunk that was last asked for its `kept` classes, and its slopes."""


class Buckets:
    """A loss of `softcache.losses` that compares classes: all but uld.

    Args:
        softened: of the active rows, at the teacher's temperature.
        sizes: number of classes of the teacher and of the student.
        targets_P: of a loss that needs them, with log_dropped_P (`losses.target_class.dropped_log_probs`).
    """

    def __init__(
        self,
        loss: Loss,
        softened: SoftenedLabels,
        sizes: tuple[int, int],
        targets_P: Tensor | None,
        log_dropped_P: Tensor | None,
    ) -> None:
        self.temperature_power = loss.kind.temperature_power
        self.even = loss.kind.linear and loss.tail == "uniform"
        loss = replace(loss, tail="bucket") if self.even else loss
        self._loss, self._softened, self._sizes = loss, softened, sizes
        self._targets_P, self._log_dropped_P = targets_P, log_dropped_P
        self._chunk = softened

    def kept(self, logits_PV: Tensor, part: slice) -> Tensor:
        self._chunk = align_labels(
            self._loss,
            self._softened.map_arrays(lambda x: x[part]),
            num_classes=self._sizes[0],
            num_student_classes=self._sizes[1],
            targets_P=None if self._targets_P is None else self._targets_P[part],
            log_dropped_P=None if self._log_dropped_P is None else self._log_dropped_P[part],
        )
        return self._chunk.ids

    def slopes(self, masses: StudentBuckets, part: slice) -> LossGradients:
        if self._loss.kind.linear:
            return self._linear_slopes(masses)
        targets_P = None if self._targets_P is None else self._targets_P[part]
        with torch.enable_grad():
            log_kept_PK = masses.kept_PK.detach().requires_grad_()
            log_tail_P = masses.tail_P.detach().requires_grad_()
            value_P = bucket_values(self._loss, self._chunk, log_kept_PK, log_tail_P, targets_P)
            slope_PK, slope_P = torch.autograd.grad(
                value_P.sum(), (log_kept_PK, log_tail_P), materialize_grads=True
            )
        return LossGradients(value_P.detach(), slope_PK, slope_P)

    def _linear_slopes(self, masses: StudentBuckets) -> LossGradients:
        loss, chunk = self._loss, self._chunk
        if masses.mean_P is not None and masses.num_dropped_P is not None:
            formula, num_P = loss.kind.formula, masses.num_dropped_P
            assert formula is not None
            value_P = formula(chunk.log_probs, masses.kept_PK).sum(dim=1)
            value_P += num_P * formula(chunk.log_tail - num_P.clamp(min=1).log(), masses.mean_P)
            return LossGradients(
                value_P, -chunk.log_probs.exp(), torch.zeros_like(value_P), -chunk.log_tail.exp()
            )
        _, _, weights_PK, weight_P = self.linear_terms()
        return LossGradients(
            bucket_values(loss, chunk, masses.kept_PK, masses.tail_P, None), -weights_PK, -weight_P
        )

    @property
    def is_linear(self) -> bool:
        """Whether the loss is a sum over the buckets of w (o - log s), s being the student's mass."""
        return self._loss.kind.linear and not self.even

    def linear_terms(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the last chunk, where `is_linear`: o of the kept classes [P, K] and of the tail [P], w of both."""
        chunk = self._chunk
        own_PK, own_P = chunk.log_probs, chunk.log_tail
        if not self._loss.kind.has_entropy:
            own_PK, own_P = torch.zeros_like(own_PK), torch.zeros_like(own_P)
        if chunk.log_weights is not None:  # the drawn classes stand for the tail, which has no bucket then
            return own_PK, own_P, (chunk.log_weights + chunk.log_probs).exp(), torch.zeros_like(own_P)
        return own_PK, own_P, chunk.log_probs.exp(), chunk.log_tail.exp()


class Uld:
    """`losses.uld`: the kept classes are the student's own K largest."""

    temperature_power = 0
    even = False

    def __init__(self, softened: SoftenedLabels) -> None:
        self._probs_PK = softened.log_probs.exp().sort(dim=1, descending=True).values
        self._tail_P = softened.log_tail.exp()

    def kept(self, logits_PV: Tensor, part: slice) -> Tensor:
        num_kept = min(self._probs_PK.shape[1], logits_PV.shape[1])
        return logits_PV.topk(num_kept, dim=1).indices

    def slopes(self, masses: StudentBuckets, part: slice) -> LossGradients:
        probs_PK, num_kept = self._probs_PK[part], masses.kept_PK.shape[1]
        student_PK, student_P = masses.kept_PK.exp(), masses.tail_P.exp()
        more_PK, more_P = student_PK - probs_PK[:, :num_kept], student_P - self._tail_P[part]
        value_P = more_PK.abs().sum(dim=1) + probs_PK[:, num_kept:].sum(dim=1) + more_P.abs()
        return LossGradients(value_P, more_PK.sign() * student_PK, more_P.sign() * student_P)
