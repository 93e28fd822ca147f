"""The teacher's distributions at one temperature, and the sums over all classes that the measures need.

Shape suffixes: `P` positions, `V` classes, `K` slots of a record.

With the sums at hand a record is measured in O(P K): what a sum over the dropped classes is follows from the sum over
all of them and the kept ones. In float64 that loses nothing that matters (1e-16 of a sum whose value is at most 1).

The gradient of a loss is that of a student, so there is one to ask: the teacher itself softened to `STUDENT_T`, which
ranks the classes rightly and is too unsure, as a student in training is. Nearer to the teacher the bucket's error
vanishes and a draw's noise does not; farther from it both grow.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["STUDENT_T", "ReferenceDistribution"]

STUDENT_T = 2.0
_CHUNK_ELEMENTS = 2**22


class ReferenceDistribution:
    """P distributions over V classes, softened to T, and a student's for the gradient.

    Attributes:
        temperature: T.
        plogp_P: [P] float64, sum of p log p: minus the entropy, nats.
        pp_P, ps_P, ss_P: [P] float64, sums of p^2, p s and s^2, with s the student's probabilities.
        top_P: [P] float64, log p of the most likely class.
    """

    def __init__(self, logits_PV: Tensor, temperature: float) -> None:
        """Takes the sums once; [P, V] logits, of which no copy is kept."""
        self.logits_PV, self.temperature = logits_PV, temperature
        rows = max(1, _CHUNK_ELEMENTS // max(1, logits_PV.shape[1]))
        parts = [self._sums(chunk_PV) for chunk_PV in logits_PV.split(rows)]
        (
            self._log_z_P,
            self._student_log_z_P,
            self.plogp_P,
            self.pp_P,
            self.ps_P,
            self.ss_P,
            self.top_P,
        ) = (torch.cat(column) for column in zip(*parts, strict=True))

    def _sums(self, logits_PV: Tensor) -> tuple[Tensor, ...]:
        scaled_PV = logits_PV.double() / self.temperature
        log_z_P, student_log_z_P = scaled_PV.logsumexp(1), (scaled_PV / STUDENT_T).logsumexp(1)
        log_p_PV = scaled_PV - log_z_P[:, None]
        p_PV, s_PV = log_p_PV.exp(), (scaled_PV / STUDENT_T - student_log_z_P[:, None]).exp()
        plogp_P = (p_PV * log_p_PV.where(p_PV > 0, 0.0)).sum(1)
        return (
            log_z_P,
            student_log_z_P,
            plogp_P,
            p_PV.square().sum(1),
            (p_PV * s_PV).sum(1),
            s_PV.square().sum(1),
            log_p_PV.amax(1),
        )

    @property
    def num_classes(self) -> int:
        return self.logits_PV.shape[1]

    @property
    def gradient_P(self) -> Tensor:
        """[P] squared norm of the true gradient at the student's logits, s - p (without the loss's factor T)."""
        return (self.pp_P - 2 * self.ps_P + self.ss_P).clamp(min=0)

    def at(self, ids_PK: Tensor) -> tuple[Tensor, Tensor]:
        """log p and log s [P, K] float64 of some classes; -inf where the id is V, an unused slot."""
        used_PK = ids_PK < self.num_classes
        scaled_PK = self.logits_PV.gather(1, ids_PK.where(used_PK, 0)).double() / self.temperature
        log_p_PK = (scaled_PK - self._log_z_P[:, None]).where(used_PK, -torch.inf)
        log_s_PK = (scaled_PK / STUDENT_T - self._student_log_z_P[:, None]).where(used_PK, -torch.inf)
        return log_p_PK, log_s_PK

    def everywhere(self) -> tuple[Tensor, Tensor]:
        """p and s [P, V] float64 of every class."""
        scaled_PV = self.logits_PV.double() / self.temperature
        return (scaled_PV - self._log_z_P[:, None]).exp(), (
            scaled_PV / STUDENT_T - self._student_log_z_P[:, None]
        ).exp()
