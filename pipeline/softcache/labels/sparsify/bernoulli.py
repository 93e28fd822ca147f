"""Logits of independent classes into a record: the K largest, and what is known of the others.

Shape suffixes: `P` rows, `V` classes, `K` kept classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softcache.errors import LabelError
from softcache.labels.bernoulli import BernoulliLabels
from softcache.labels.sparsify.assemble import top_k_indices

__all__ = ["bernoulli_faults", "top_k_bernoulli"]


def top_k_bernoulli(logits_PV: Tensor, k: int) -> BernoulliLabels:
    """Returns the record of the K largest logits of each row, ties by lower class, on their device; float32.

    Raises:
        LabelError: K is not in 1 to V.
    """
    num_classes = logits_PV.shape[1]
    if not 1 <= k <= num_classes:
        raise LabelError(f"labels.k: expected 1 to {num_classes}, the number of classes; found {k}; lower k")
    ids_PK = top_k_indices(logits_PV, k)
    others_PV = logits_PV.scatter(1, ids_PK, -torch.inf)
    return BernoulliLabels(
        ids=ids_PK,
        logits=logits_PV.gather(1, ids_PK),
        dropped_bound=others_PV.amax(1),
        num_classes=num_classes,
        dropped_mass=others_PV.sigmoid().sum(1),
    )


def bernoulli_faults(logits_PV: Tensor) -> Tensor:
    """Returns what is wrong with each row, [P] uint8, without waiting for the device: 0 fine, 1 NaN, 2 +inf.

    A logit of -inf is an impossible class, and a row may have no other.
    """
    peak_P = logits_PV.amax(1)  # NaN where any is
    return torch.where(peak_P.isnan(), 1, 2 * peak_P.isposinf()).to(torch.uint8)
