"""`top_p`: as few of the most likely classes as hold a given mass.

Shape suffixes: `P` positions, `V` classes, `K` kept classes.
"""

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from softcache.errors import LabelError
from softcache.labels.soft_labels import SoftLabels
from softcache.labels.sparsify.assemble import Chosen, Rows, build_soft_labels
from softcache.labels.sparsify.settings import POLICIES, LabelSettings
from softcache.labels.sparsify.validate import check_arguments
from softcache.labels.tail import DEFAULT_TEMPERATURES
from softcache.labels.truncate import truncate_labels

__all__ = ["TopP", "top_p"]


@POLICIES.register("top_p")
class TopP(LabelSettings):
    """Keeps as many of the most likely classes as hold the mass p, at most k.

    Attributes:
        k: slots of a row, at most the number of classes.
        p: the mass.
    """

    policy: Literal["top_p"] = "top_p"
    k: int = Field(default=10, ge=1)
    p: float = Field(default=0.9, gt=0, le=1)

    def apply(self, logits_PV: Tensor, *, seeds_P: Tensor | None = None, **how: Any) -> SoftLabels:
        return top_p(logits_PV, p=self.p, max_k=self.k, temperatures=self.temperatures, **how)

    def num_slots(self, num_classes: int) -> int:
        return self.k

    def truncate(self, labels: SoftLabels) -> SoftLabels:
        return truncate_labels(labels, self.k, p=self.p, temperatures=self.temperatures)

    def identity(self, num_classes: int) -> dict[str, Any]:
        return super().identity(num_classes) | {"p": self.p}


def top_p(
    logits_PV: Tensor,
    *,
    p: float,
    max_k: int,
    temperatures: tuple[float, ...] = DEFAULT_TEMPERATURES,
    targets_P: Tensor | None = None,
    chunk_positions: int | None = None,
    check: bool = True,
) -> SoftLabels:
    """Keeps as few of the most likely classes as hold the mass p at T=1, and no more than `max_k`.

    Args:
        logits_PV: [P, V] floating-point logits of the teacher.
        p: mass, in (0, 1].
        max_k: 1 to V, the slots of every row; a row that needs fewer leaves the last ones unused (id V, log-probability
            -inf). The most likely class is always kept.
        temperatures: as in `top_k`, like the other arguments.
        targets_P: [P] integers, or None.
        chunk_positions: rows worked on at once.
        check: raise on faults.

    Returns:
        A record as of `top_k`; its tail holds everything that was not kept.

    Raises:
        LabelError: p is not in (0, 1], or as in `top_k`.
        TemperatureError: a malformed grid.
    """
    check_arguments(logits_PV, max_k, targets_P)
    if not 0.0 < p <= 1.0:
        raise LabelError(f"labels.p: expected a mass in (0, 1]; found {p}; 0.9 keeps nine tenths of it")

    def choose(rows: Rows) -> Chosen:
        ids_PK, probs_PK = rows.largest(max_k), rows.largest_log_probs(max_k).exp()
        before_PK = probs_PK.cumsum(dim=1) - probs_PK
        wanted_PK = before_PK < p
        wanted_PK[:, 0] = True
        return Chosen(ids_PK.where(wanted_PK, rows.logits_PV.shape[1]))

    return build_soft_labels(
        logits_PV,
        choose,
        temperatures=temperatures,
        targets_P=targets_P,
        chunk_positions=chunk_positions,
        check=check,
        num_largest=max_k,
    )
