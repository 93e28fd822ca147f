"""A chunk's loss of sampled tokens, and its gradient by the chunk's logits; see `softcache.losses.sampled`.

Shape suffixes: `P` positions, `V` classes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from softcache.losses.fused.head import Head
from softcache.losses.registry import Loss
from softcache.losses.sampled import value_and_slope
from softcache.losses.target_class import IGNORED

__all__ = ["SampledObjective"]


@dataclass(frozen=True)
class SampledObjective:
    """(1 - alpha) * cross-entropy + alpha * loss of the sampled token, of a chunk; 0 of a row without a target.

    Attributes:
        targets_P, log_p_P, log_q_P: of the active rows: tokens, and their log-probabilities by teacher and sampling policy.
    """

    loss: Loss
    targets_P: Tensor
    log_p_P: Tensor
    log_q_P: Tensor | None
    alpha: float

    def __call__(
        self, head: Head, logits_PV: Tensor, part: slice, needs_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """The loss [P] and, if needed, the gradient [P, V], which overwrites the logits."""
        targets_P = self.targets_P[part]
        active_P = targets_P != IGNORED
        at_P1 = targets_P.clamp(min=0)[:, None]
        log_z_P1 = logits_PV.logsumexp(dim=1, keepdim=True)
        log_s_P = (logits_PV.gather(1, at_P1) - log_z_P1)[:, 0]
        log_q_P = None if self.log_q_P is None else self.log_q_P[part]
        value_P, slope_P = value_and_slope(self.loss, log_s_P, self.log_p_P[part], log_q_P)
        loss_P = (self.alpha * value_P - (1.0 - self.alpha) * log_s_P).where(active_P, 0.0)
        if not needs_gradient:
            return loss_P, logits_PV
        slope_P1 = (self.alpha * slope_P - (1.0 - self.alpha)).where(active_P, 0.0)[:, None]
        gradient_PV = logits_PV.sub_(log_z_P1).exp_().mul_(-slope_P1)
        return loss_P, gradient_PV.scatter_add_(1, at_P1, slope_P1)
