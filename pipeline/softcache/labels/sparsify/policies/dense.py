"""`dense`: every class.

Shape suffixes: `P` positions, `V` classes.
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from softcache.labels.soft_labels import SoftLabels
from softcache.labels.sparsify.policies.top_k import top_k
from softcache.labels.sparsify.settings import POLICIES, LabelSettings
from softcache.labels.tail import DEFAULT_TEMPERATURES
from softcache.labels.truncate import truncate_labels

__all__ = ["Dense", "dense", "dense_labels_unsorted"]


@POLICIES.register("dense")
class Dense(LabelSettings):
    """Keeps every class."""

    policy: Literal["dense"] = "dense"

    labels_detections: ClassVar[bool] = True

    def apply(self, logits_PV: Tensor, *, seeds_P: Tensor | None = None, **how: Any) -> SoftLabels:
        return dense(logits_PV, temperatures=self.temperatures, **how)

    def num_slots(self, num_classes: int) -> int:
        return num_classes

    def truncate(self, labels: SoftLabels) -> SoftLabels:
        return truncate_labels(labels, labels.num_classes, temperatures=self.temperatures)


def dense(
    logits_PV: Tensor,
    *,
    temperatures: tuple[float, ...] = DEFAULT_TEMPERATURES,
    targets_P: Tensor | None = None,
    chunk_positions: int | None = None,
    check: bool = True,
) -> SoftLabels:
    """Keeps every class, most likely first (K = V); the tail is empty. Arguments and errors: `top_k`."""
    return top_k(
        logits_PV,
        k=logits_PV.shape[-1],
        temperatures=temperatures,
        targets_P=targets_P,
        chunk_positions=chunk_positions,
        check=check,
    )


def dense_labels_unsorted(logits_PV: Tensor) -> SoftLabels:
    """A record of all classes in their own order: nothing is dropped, so nothing need be sorted; [P, V] logits."""
    log_probs_PV = logits_PV.float().log_softmax(-1)
    num_positions, num_classes = log_probs_PV.shape
    return SoftLabels(
        ids=torch.arange(num_classes, device=logits_PV.device).expand(num_positions, -1),
        log_probs=log_probs_PV,
        log_tail=log_probs_PV.new_full((num_positions, 1), -torch.inf),
        num_classes=num_classes,
        temperatures=(1.0,),
    )
