"""Soft labels against the reference, row by row: divergences, the tail's mass, and the gradient that a student would see.

Shape suffixes: `P` positions, `V` classes, `K` slots.

With p the reference and q the distribution of the record, at one temperature:

    kl          KL(p || q), q spreading the tail's mass evenly over the dropped classes: how far the record is from the
                teacher for someone who needs a whole distribution
    bucket_kl   KL(p || q) of K + 1 buckets, the tail being one: what rounding and the tail's interpolation lose; at most
                kl, and 0 for a record that was only cut
    gradient    |g(record) - g(truth)|^2 at a student's logits, for the loss that softcache trains with
                (`softcache.losses.fused.chunk`): s - p of the truth; of a record s_k - q_k where kept, and for a dropped
                class
                (s_tail - q_tail) s_j / s_tail. Of drawn classes W s_j - w_j q_j, w_j being their weights, W = sum w_j q_j

The gradient is the one measure that fits both kinds of record: a cut record errs the same way every time it is seen, a
drawn one by chance and on average not at all, so its divergence is not reported.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softcache.labels import SoftenedLabels, SoftLabels
from softcache.tools.fidelity.reference import ReferenceDistribution

__all__ = ["gradient_difference", "measure"]


def measure(labels: SoftLabels, truth: ReferenceDistribution) -> dict[str, Tensor]:
    """Measures a record at the temperature of the truth.

    Args:
        labels: torch record of the same P rows, on the CPU.

    Returns:
        [P] float64 by name. Of every record: `agrees` (1 where the first class is the teacher's, ties count),
        `kept_mass` (of the record's own classes that were not drawn) and `gradient`; of one whose classes were not drawn
        also `kl_nats`, `bucket_kl_nats` and `tail_error`, the tail's mass less the true one; of a drawn one
        `total_mass`, the estimate of 1.

    Raises:
        TemperatureError: the record does not reach this temperature.
    """
    softened = _softened(labels, truth)
    ids_PK = softened.ids
    log_p_PK, log_s_PK = truth.at(ids_PK)
    found = {"agrees": (log_p_PK[:, 0] >= truth.top_P).double()}
    if softened.log_weights is not None:
        assert labels.sampling is not None
        exact_PK = softened.log_probs[:, : labels.sampling.exact].exp()
        return found | {"kept_mass": exact_PK.sum(1)} | _drawn(softened, log_p_PK, log_s_PK, truth)
    return found | {"kept_mass": softened.log_probs.exp().sum(1)} | _cut(softened, log_p_PK, log_s_PK, truth)


def _softened(labels: SoftLabels, truth: ReferenceDistribution) -> SoftenedLabels:
    """The record at T in float64, so that what is measured is its own rounding and not this module's."""
    wide = labels.map_arrays(lambda x: x.double() if x.is_floating_point() else x.long())
    return wide.at_temperature(truth.temperature)


def _cut(
    softened: SoftenedLabels, log_p_PK: Tensor, log_s_PK: Tensor, truth: ReferenceDistribution
) -> dict[str, Tensor]:
    log_q_PK, log_q_tail_P = softened.log_probs, softened.log_tail
    p_PK, s_PK, q_PK, q_tail_P = log_p_PK.exp(), log_s_PK.exp(), log_q_PK.exp(), log_q_tail_P.exp()
    num_dropped_P = truth.num_classes - (softened.ids < truth.num_classes).sum(1)
    has_tail_P = (num_dropped_P > 0) & (log_q_tail_P > -torch.inf)
    # Where nothing is in the tail, the differences below are roundings of 0.
    tail_P = (1.0 - p_PK.sum(1)).clamp(min=0).where(has_tail_P, 0.0)
    kept_P = (p_PK * (log_p_PK - log_q_PK).where(p_PK > 0, 0.0)).sum(1)
    kept_plogp_P = (p_PK * log_p_PK.where(p_PK > 0, 0.0)).sum(1)
    log_each_P = log_q_tail_P.where(has_tail_P, 0.0) - num_dropped_P.clamp(min=1).double().log()
    spread_P = (truth.plogp_P - kept_plogp_P - tail_P * log_each_P).where(has_tail_P, 0.0)
    log_tail_P = tail_P.where(tail_P > 0, 1.0).log()
    bucket_P = tail_P * (log_tail_P - log_q_tail_P.where(has_tail_P, 0.0))
    share_P = (q_tail_P / (1.0 - s_PK.sum(1)).clamp(min=1e-300)).where(has_tail_P, 0.0)
    pp_P, ps_P, ss_P = (
        truth.pp_P - (p_PK**2).sum(1),
        truth.ps_P - (p_PK * s_PK).sum(1),
        truth.ss_P - (s_PK**2).sum(1),
    )
    dropped_P = (pp_P - 2 * share_P * ps_P + share_P**2 * ss_P).clamp(min=0).where(has_tail_P, 0.0)
    return {
        "kl_nats": kept_P + spread_P,
        "bucket_kl_nats": kept_P + bucket_P,
        "tail_error": q_tail_P - tail_P,
        "gradient": (p_PK - q_PK).square().sum(1) + dropped_P,
    }


def _drawn(
    softened: SoftenedLabels, log_p_PK: Tensor, log_s_PK: Tensor, truth: ReferenceDistribution
) -> dict[str, Tensor]:
    p_PK, s_PK = log_p_PK.exp(), log_s_PK.exp()
    weighted_PK = _weighted(softened)
    over_P1 = weighted_PK.sum(1, keepdim=True) - 1.0
    slots_P = (over_P1 * s_PK + p_PK - weighted_PK).square().sum(1)
    pp_P, ps_P, ss_P = (
        truth.pp_P - (p_PK**2).sum(1),
        truth.ps_P - (p_PK * s_PK).sum(1),
        truth.ss_P - (s_PK**2).sum(1),
    )
    over_P = over_P1[:, 0]
    others_P = (over_P**2 * ss_P + 2 * over_P * ps_P + pp_P).clamp(min=0)
    return {"total_mass": over_P + 1.0, "gradient": slots_P + others_P}


def _weighted(softened: SoftenedLabels) -> Tensor:
    """[P, K] the mass that each slot of a drawn record stands for; 0 in unused ones."""
    assert softened.log_weights is not None
    used_PK = softened.log_probs > -torch.inf
    return (softened.log_probs + softened.log_weights).where(used_PK, -torch.inf).exp()


def gradient_difference(labels: SoftLabels, truth: ReferenceDistribution) -> Tensor:
    """[P, V] float64, g(record) - g(truth) of a drawn record, to be averaged over draws."""
    softened = _softened(labels, truth)
    weighted_PK = _weighted(softened)
    p_PV, s_PV = truth.everywhere()
    difference_PV = s_PV.mul_(weighted_PK.sum(1, keepdim=True) - 1.0).add_(p_PV)
    padded_PV = torch.cat([difference_PV, difference_PV.new_zeros(len(difference_PV), 1)], dim=1)
    return padded_PV.scatter_add_(1, softened.ids, -weighted_PK)[:, : truth.num_classes]
