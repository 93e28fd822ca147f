"""What becomes of the classes that the teacher's record dropped.

Shape suffixes: `P` positions, `V` classes, `K` kept classes.

    bucket        All of them together are one more bucket, on both sides: a true divergence, of the distributions over
                  K + 1 buckets, at least 0, a lower bound of the full one, and equal to it at K = V. How the student
                  spreads its mass within the tail costs nothing. The default.
    uniform       The teacher's tail is spread evenly over them, and every class is compared: a true divergence, from a
                  teacher that is flatter in its tail than the real one, so that the student is taught a tail that
                  no model has. About ten temporaries of [P, V] (fused: of a chunk, and six times the time) where the bucket
                  needs three; fused forward_kl and cross_entropy need only the mean log-probability, at no cost.
    ignore        Only the kept classes' terms, of the true masses. Not a divergence: it may be negative, and the mass
                  that the student puts elsewhere is free, or even wins. For comparison with other tools.
    renormalize   The teacher's kept classes are scaled up to a mass of 1, the student stays whole: what most tools do
                  with a top-k. A true divergence, from a teacher that never chooses a dropped class: the student is
                  taught to be as sure. At a high temperature, or with few classes, that is most of the mass.
"""

from dataclasses import replace

import torch
from torch import Tensor

from softcache.labels import SoftenedLabels
from softcache.labels.tail import log_sum_exp

__all__ = ["apply_tail_mode"]


def apply_tail_mode(softened: SoftenedLabels, tail: str, num_classes: int) -> SoftenedLabels:
    """The record of the teacher that a tail mode makes of it.

    Args:
        softened: in the student's classes (`fit_vocabulary`), unused slots with id `num_classes`.
        tail: "bucket", "uniform", "ignore" or "renormalize".
        num_classes: the student's.

    Returns:
        `softened` itself for "bucket"; all classes, in order, for "uniform"; without a tail for the others (of "ignore",
        the kept masses do not add up to 1).
    """
    if tail == "uniform":
        return _spread(softened, num_classes)
    if tail == "bucket":
        return softened
    log_probs_PK = softened.log_probs
    if tail == "renormalize":
        log_mass_P = log_sum_exp(log_probs_PK)
        log_probs_PK = log_probs_PK - log_mass_P.where(log_mass_P > -torch.inf, 0.0)[:, None]
    log_tail_P = torch.full_like(softened.log_tail, -torch.inf)
    return replace(softened, log_probs=log_probs_PK, log_tail=log_tail_P)


def _spread(softened: SoftenedLabels, num_classes: int) -> SoftenedLabels:
    ids_PK, log_tail_P = softened.ids.long(), softened.log_tail
    num_dropped_P = num_classes - (ids_PK < num_classes).sum(dim=1)
    log_share_P = log_tail_P - num_dropped_P.clamp(min=1).to(log_tail_P.dtype).log()
    # One column more than classes, for the unused slots to fall into.
    wide_PV: Tensor = log_share_P[:, None].repeat(1, num_classes + 1)
    wide_PV = wide_PV.scatter(1, ids_PK, softened.log_probs)
    return SoftenedLabels(
        ids=torch.arange(num_classes, device=ids_PK.device).expand(len(ids_PK), -1),
        log_probs=wide_PV[:, :num_classes],
        log_tail=torch.full_like(log_tail_P, -torch.inf),
    )
