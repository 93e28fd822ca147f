"""`sample`: classes drawn at random with replacement.

Shape suffixes: `P` positions, `V` classes, `K` slots, `N` draws.
"""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from softcache.hashing.splitmix import SPLITMIX64_GAMMA
from softcache.labels.sampling import Sampling
from softcache.labels.soft_labels import SoftLabels
from softcache.labels.sparsify.assemble import Chosen, Rows, build_soft_labels
from softcache.labels.sparsify.one_pass import draw
from softcache.labels.sparsify.sampled import CHUNK_ELEMENTS, checked_seeds, most_likely_first, uniform
from softcache.labels.sparsify.settings import POLICIES, SampledSettings
from softcache.labels.sparsify.validate import check_arguments
from softcache.labels.tail import DEFAULT_TEMPERATURES

__all__ = ["Sample", "sample"]


@POLICIES.register("sample")
class Sample(SampledSettings):
    """Draws `num_samples` classes at random, with replacement (random-sampling distillation).

    Attributes:
        proposal_temperature: must be one of the temperatures.
    """

    policy: Literal["sample"] = "sample"

    def apply(self, logits_PV: Tensor, *, seeds_P: Tensor | None = None, **how: Any) -> SoftLabels:
        return sample(
            logits_PV,
            draws=self.num_samples,
            exponent=self.proposal_exponent,
            seeds_P=self.required_seeds(seeds_P),
            temperatures=self.temperatures,
            **how,
        )

    def num_slots(self, num_classes: int) -> int:
        return min(self.num_samples, num_classes)

    @property
    def sampling(self) -> Sampling:
        return Sampling(exact=0, draws=self.num_samples, exponent=self.proposal_exponent, replacement=True)


def sample(
    logits_PV: Tensor,
    *,
    draws: int,
    seeds_P: Tensor,
    exponent: float = 1.0,
    temperatures: tuple[float, ...] = DEFAULT_TEMPERATURES,
    targets_P: Tensor | None = None,
    chunk_positions: int | None = None,
    check: bool = True,
) -> SoftLabels:
    """Random-sampling distillation: `draws` classes from p^exponent, with replacement.

    Args:
        logits_PV: [P, V] floating-point logits of the teacher. -inf masks a class.
        draws: N, at least 1. A class that is drawn more than once takes one slot.
        seeds_P: [P] int64, see `row_seeds`.
        exponent: in (0, 1]; below 1 rare classes are drawn more often, and weigh less.
        temperatures: the grid, with 1 / exponent in it.
        targets_P: [P] integers, or None.
        chunk_positions: rows worked on at once; None picks 2^21 / V.
        check: raise on faults.

    Returns:
        A record of K = min(N, V) slots, the most likely first, unused ones last (id V), with `counts` and `sampling`.
        Its tail is the mass of all classes.

    Raises:
        LabelError: no draws, an exponent out of range, or as in `top_k`.
        TemperatureError: a malformed grid, or one without 1 / exponent.

    References:
        Anshumann et al. 2025, "Sparse logit sampling", arXiv 2503.16870.
    """
    sampling = Sampling(exact=0, draws=draws, exponent=exponent, replacement=True)
    sampling.proposal_index(temperatures)
    check_arguments(logits_PV, 1, targets_P)
    seeds_P = checked_seeds(seeds_P, logits_PV)

    def choose(rows: Rows) -> Chosen:
        chosen = _compiled_choice if rows.is_compiled else _choice
        return chosen(rows, draws, exponent, seeds_P[rows.part])

    return build_soft_labels(
        logits_PV,
        choose,
        temperatures=temperatures,
        targets_P=targets_P,
        chunk_positions=chunk_positions,
        chunk_elements=CHUNK_ELEMENTS,
        check=check,
        sampling=sampling,
    )


def _choice(rows: Rows, draws: int, exponent: float, seeds_P: Tensor) -> Chosen:
    """The slots of rows, by torch."""
    num_classes = rows.logits_PV.shape[1]
    number_N = torch.arange(1, draws + 1, device=seeds_P.device)
    uniform_PN = uniform(seeds_P[:, None] + number_N * SPLITMIX64_GAMMA)
    if rows.read is not None:
        drawn_PN = draw(rows.logits_PV, rows.read, uniform_PN, exponent)
    else:
        reached_PV = (rows.log_probs_PV.double() * exponent).exp().cumsum(dim=1)
        wanted_PN = uniform_PN * reached_PV[:, -1:]
        # The first class whose cumulative weight is above the draw; it never has weight 0.
        drawn_PN = torch.searchsorted(reached_PV, wanted_PN, right=True).clamp_(max=num_classes - 1)
    drawn_PN = drawn_PN.sort(dim=1).values
    first_PN = torch.ones_like(drawn_PN, dtype=torch.bool)
    first_PN[:, 1:] = drawn_PN[:, 1:] != drawn_PN[:, :-1]
    slot_PN = first_PN.cumsum(dim=1) - 1
    counts_PN = torch.zeros_like(drawn_PN).scatter_add_(1, slot_PN, torch.ones_like(drawn_PN))
    ids_PN = torch.full_like(drawn_PN, num_classes).scatter_(1, slot_PN, drawn_PN)
    slots = min(draws, num_classes)
    return most_likely_first(rows, ids_PN[:, :slots], counts_PN[:, :slots])


def _compiled_choice(rows: Rows, draws: int, exponent: float, seeds_P: Tensor) -> Chosen:
    """The same of float32 rows on the CPU."""
    from softcache.labels.sparsify import cpu_draw_kernels

    logits_PV = rows.logits_PV.contiguous()
    ids_PK = torch.empty((len(logits_PV), min(draws, logits_PV.shape[1])), dtype=torch.int64)
    counts_PK, seeds = torch.empty_like(ids_PK), seeds_P.contiguous().numpy().view(np.uint64)
    cpu_draw_kernels.draw_by_weight(
        logits_PV.numpy(), float(exponent), seeds, draws, ids_PK.numpy(), counts_PK.numpy()
    )
    return Chosen(ids_PK, counts_PK=counts_PK)
