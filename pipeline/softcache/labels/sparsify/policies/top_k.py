"""`top_k`: the k most likely classes.

Shape suffixes: `P` positions, `V` classes, `K` kept classes.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from softcache.labels.soft_labels import SoftLabels
from softcache.labels.sparsify.assemble import build_soft_labels
from softcache.labels.sparsify.settings import POLICIES, LabelSettings
from softcache.labels.sparsify.validate import check_arguments
from softcache.labels.tail import DEFAULT_TEMPERATURES
from softcache.labels.truncate import truncate_labels

__all__ = ["TopK", "top_k"]


@POLICIES.register("top_k")
class TopK(LabelSettings):
    """Keeps the k most likely classes.

    Attributes:
        k: kept classes, at most the number of classes.
    """

    policy: Literal["top_k"] = "top_k"
    k: int = Field(default=10, ge=1)

    labels_detections: ClassVar[bool] = True

    def apply(self, logits_PV: Tensor, *, seeds_P: Tensor | None = None, **how: Any) -> SoftLabels:
        return top_k(logits_PV, k=self.k, temperatures=self.temperatures, **how)

    def num_slots(self, num_classes: int) -> int:
        return self.k

    def truncate(self, labels: SoftLabels) -> SoftLabels:
        return truncate_labels(labels, self.k, temperatures=self.temperatures)


def top_k(
    logits_PV: Tensor,
    *,
    k: int,
    temperatures: tuple[float, ...] = DEFAULT_TEMPERATURES,
    targets_P: Tensor | None = None,
    chunk_positions: int | None = None,
    check: bool = True,
) -> SoftLabels:
    """Keeps the k most likely classes; among equal logits the lower id wins, on every device.

    Args:
        logits_PV: [P, V] floating-point logits of the teacher. -inf masks a class.
        k: 1 to V.
        temperatures: grid of the tail.
        targets_P: [P] integer ground-truth classes in [0, V), or None.
        chunk_positions: rows worked on at once; None picks 2^22 / V. The result does not depend on it.
        check: raise on faulty logits, and on faulty targets on a GPU; this waits for the GPU. With False,
            look at `logit_faults` yourself: a faulty row gives NaN, and so does the log-probability of a
            faulty target. Targets on the CPU are always checked.

    Returns:
        A torch record on the logits' device, without gradients: ids int64, everything else float32 (float64
        logits stay float64).

    Raises:
        LabelError: k out of range, wrong shapes or dtypes, faulty logits or targets (with `position`).
        TemperatureError: a malformed grid.
    """
    check_arguments(logits_PV, k, targets_P)
    return build_soft_labels(
        logits_PV,
        k,
        temperatures=temperatures,
        targets_P=targets_P,
        chunk_positions=chunk_positions,
        check=check,
    )
