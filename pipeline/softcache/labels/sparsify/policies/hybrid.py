"""`hybrid`: the most likely classes exactly, and some of the others drawn at random.

Shape suffixes: `P` positions, `V` classes, `K` slots, `N` draws.
"""

from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from softcache.errors import LabelError
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
        LabelError: k below 1, k + draws above V, an exponent out of range, or as in `top_k`.
        TemperatureError: a malformed grid.

    References:
        Duffield, Lund, Thorup 2007, "Priority sampling for estimation of arbitrary subset sums", J. ACM 54(6).
    """
    if k < 1:
        raise LabelError(
            f"hybrid, k: expected at least 1 exact class; found {k}; draw all of them with `sample`"
        )
    sampling = Sampling(exact=k, draws=draws, exponent=exponent, replacement=False)
    check_arguments(logits_PV, k + draws, targets_P)
    seeds_P = checked_seeds(seeds_P, logits_PV)
    in_kernels = draws < MAX_LARGEST

    def choose(rows: Rows) -> Chosen:
        seeds_p = seeds_P[rows.part]
        if rows.is_compiled:
            return _compiled_choice(rows, k, draws, exponent, seeds_p)
        ids_PK = rows.largest(k)
        if rows.read is None or not in_kernels:
            return _choice(rows, ids_PK, draws, exponent, seeds_p)
        values_PN, indices_PN = draw_by_priority(rows.logits_PV, rows.read, seeds_p, exponent, draws + 1)
        return _taken(rows, ids_PK, values_PN, indices_PN)

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


def _choice(rows: Rows, ids_PK: Tensor, draws: int, exponent: float, seeds_P: Tensor) -> Chosen:
    """The exact classes `ids_PK` and those drawn of the others, by torch."""
    class_V = torch.arange(1, rows.logits_PV.shape[1] + 1, device=ids_PK.device) * SPLITMIX64_GAMMA
    log_uniform_PV = uniform(seeds_P[:, None] + class_V).log().to(rows.log_probs_PV.dtype)
    priority_PV = (rows.log_probs_PV * exponent).sub_(log_uniform_PV)
    values_PN, indices_PN = priority_PV.scatter_(1, ids_PK, -torch.inf).topk(draws + 1, dim=1)
    return _taken(rows, ids_PK, values_PN, indices_PN)


def _taken(rows: Rows, ids_PK: Tensor, values_PN: Tensor, indices_PN: Tensor) -> Chosen:
    """The slots of exact classes and of the classes with the highest priorities, one more than are drawn."""
    indices_PN = indices_PN[:, :-1].where(values_PN[:, :-1] > -torch.inf, rows.logits_PV.shape[1])
    taken_PN = most_likely_first(rows, indices_PN, torch.ones_like(indices_PN)).ids_PK
    return Chosen(torch.cat([ids_PK, taken_PN], dim=1), log_threshold_P=values_PN[:, -1])


def _compiled_choice(rows: Rows, k: int, draws: int, exponent: float, seeds_P: Tensor) -> Chosen:
    """The same of float32 rows on the CPU."""
    from softcache.labels.sparsify import cpu_draw_kernels

    logits_PV, num_rows = rows.logits_PV.contiguous(), len(rows.logits_PV)
    ids_PK, threshold_P = torch.empty((num_rows, k + draws), dtype=torch.int64), torch.empty(num_rows)
    is_tied_P = torch.empty(num_rows, dtype=torch.bool)
    out = (x.numpy() for x in (ids_PK, threshold_P, is_tied_P))
    seeds = seeds_P.contiguous().numpy().view(np.uint64)
    cpu_draw_kernels.draw_by_priority(logits_PV.numpy(), k, np.float32(exponent), seeds, *out)
    # Which of equal priorities are the highest is as torch has it.
    for row in is_tied_P.nonzero()[:, 0].tolist():
        one = slice(row, row + 1)
        ids_PK[one] = _choice(
            Rows(logits_PV[one], one), ids_PK[one, :k], draws, exponent, seeds_P[one]
        ).ids_PK
    return Chosen(ids_PK, log_threshold_P=threshold_P)
