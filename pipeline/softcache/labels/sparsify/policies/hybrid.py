"""`hybrid`: the most likely classes exactly, and some of the others drawn at random.

Shape suffixes: `P` positions, `V` classes, `K` slots, `N` draws.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from softcache.hashing.splitmix import SPLITMIX64_GAMMA
from softcache.labels.sampling import Sampling
from softcache.labels.soft_labels import SoftLabels
from softcache.labels.sparsify.assemble import Chosen, Rows, build_soft_labels
from softcache.labels.sparsify.one_pass import MAX_LARGEST, draw_by_priority
from softcache.labels.sparsify.sampled import CHUNK_ELEMENTS, checked_seeds, most_likely_first, uniform
from softcache.labels.sparsify.settings import POLICIES, SampledSettings
from softcache.labels.sparsify.validate import check_arguments
from softcache.labels.tail import DEFAULT_TEMPERATURES

__all__ = ["Hybrid", "hybrid"]


@POLICIES.register("hybrid")
class Hybrid(SampledSettings):
    """Keeps the k most likely classes, and draws `num_samples` of the others, each at most once.

    Attributes:
        k: exact classes; k + num_samples is at most the number of classes.
    """

    policy: Literal["hybrid"] = "hybrid"
    k: int = Field(default=10, ge=1)

    def apply(self, logits_PV: Tensor, *, seeds_P: Tensor | None = None, **how: Any) -> SoftLabels:
        return hybrid(
            logits_PV,
            k=self.k,
            draws=self.num_samples,
            exponent=self.proposal_exponent,
            seeds_P=self.required_seeds(seeds_P),
            temperatures=self.temperatures,
            **how,
        )

    def num_slots(self, num_classes: int) -> int:
        return self.k + self.num_samples

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            exact=self.k, draws=self.num_samples, exponent=self.proposal_exponent, replacement=False
        )

    def identity(self, num_classes: int) -> dict[str, Any]:
        return super().identity(num_classes) | {"k": self.k}


def hybrid(
    logits_PV: Tensor,
    *,
    k: int,
    draws: int,
    seeds_P: Tensor,
    exponent: float = 1.0,
    temperatures: tuple[float, ...] = DEFAULT_TEMPERATURES,
    targets_P: Tensor | None = None,
    chunk_positions: int | None = None,
    check: bool = True,
) -> SoftLabels:
    """The k most likely classes as they are, and `draws` of the others, each at most once.

    Priority sampling: a class gets the priority q / u, with q = p^exponent and u uniform in (0, 1); the highest N are
    taken, and the next one's priority is the threshold. A class with q above the threshold is certain to be taken and
    weighs 1; the others are taken with probability q / threshold and weigh its inverse.

    Args:
        logits_PV: [P, V] floating-point logits of the teacher. -inf masks a class.
        k: exact classes, at least 1; k + draws is at most V.
        draws: N, at least 1.
        seeds_P: [P] int64, see `row_seeds`.
        exponent: in (0, 1].
        temperatures: grid of the tail.
        targets_P: [P] integers, or None.
        chunk_positions: rows worked on at once; None picks 2^21 / V.
        check: raise on faults.

    Returns:
        A record of K = k + N slots, the exact ones first, then the drawn ones, the most likely first, and unused ones
        last (id V), with `log_threshold` and `sampling`. Its tail is the mass of all classes but the exact ones.

    Raises:
        LabelError: k + draws above V, an exponent out of range, or as in `top_k`.
        TemperatureError: a malformed grid.

    References:
        Duffield, Lund, Thorup 2007, "Priority sampling for estimation of arbitrary subset sums", J. ACM 54(6).
    """
    sampling = Sampling(exact=k, draws=draws, exponent=exponent, replacement=False)
    check_arguments(logits_PV, k + draws, targets_P)
    seeds_P = checked_seeds(seeds_P, logits_PV)
    num_classes = logits_PV.shape[1]

    in_kernels = draws < MAX_LARGEST

    def choose(rows: Rows) -> Chosen:
        ids_PK, count = rows.largest(k), min(draws + 1, num_classes)
        seeds_p = seeds_P[rows.part]
        if rows.read is not None and in_kernels:
            values_PN, indices_PN = draw_by_priority(rows.logits_PV, rows.read, seeds_p, exponent, count)
        else:
            class_V = torch.arange(1, num_classes + 1, device=ids_PK.device) * SPLITMIX64_GAMMA
            log_uniform_PV = uniform(seeds_p[:, None] + class_V).log().to(rows.log_probs_PV.dtype)
            priority_PV = (rows.log_probs_PV * exponent).sub_(log_uniform_PV)
            values_PN, indices_PN = priority_PV.scatter_(1, ids_PK, -torch.inf).topk(count, dim=1)
        taken_PN = indices_PN[:, :draws].where(values_PN[:, :draws] > -torch.inf, num_classes)
        # With no class left outside the slots, all are taken and weigh 1.
        all_taken = draws + 1 > num_classes
        threshold_P = values_PN.new_full((len(ids_PK),), -torch.inf) if all_taken else values_PN[:, draws]
        taken_PN = most_likely_first(rows, taken_PN, torch.ones_like(taken_PN)).ids_PK
        return Chosen(torch.cat([ids_PK, taken_PN], dim=1), log_threshold_P=threshold_P)

    return build_soft_labels(
        logits_PV,
        choose,
        temperatures=temperatures,
        targets_P=targets_P,
        chunk_positions=chunk_positions,
        chunk_elements=CHUNK_ELEMENTS,
        check=check,
        sampling=sampling,
        num_largest=k,
        holds_rows=not in_kernels,
    )
