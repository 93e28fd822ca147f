"""The policies that draw classes at random: an unbiased record of a whole distribution in a few of its classes.

Shape suffixes: `P` positions, `V` classes, `K` slots, `N` draws.

`sample` draws with replacement (random-sampling distillation); `hybrid` keeps the most likely classes as they are and
draws each of the others at most once, by priority sampling, whose variance is at most that of any scheme with one draw
less (Szegedy 2006). Either way a class of the sum over all classes is in the record with a weight whose mean over the
draws is 1, at every temperature (`softcache.labels.Sampling`).

Draws are a function of the row's seed and of the class or the number of the draw (splitmix64), so a rerun draws the
same, whatever the order, the batch and the number of workers.
"""

import numpy as np
import torch
from torch import Tensor

from softcache.errors import LabelError
from softcache.hashing.splitmix import SPLITMIX64_GAMMA, splitmix64
from softcache.labels import DEFAULT_TEMPERATURES, Sampling, SoftLabels
from softcache.labels.sparsify.assemble import Chosen, Rows, build_soft_labels, top_k_indices
from softcache.labels.sparsify.validate import check_arguments

__all__ = ["hybrid", "row_seeds", "sample"]

_CHUNK_ELEMENTS = 2**21  # a draw holds 64-bit numbers beside the log-probabilities


def row_seeds(
    fingerprints_B: np.ndarray, row_counts_B: np.ndarray, positions_P: np.ndarray, seed: int
) -> Tensor:
    """A seed for every row of a batch, of what it is and not of where it stands.

    Args:
        fingerprints_B: [B] uint64, of key, view and content.
        row_counts_B: [B] rows of each sample.
        positions_P: [P] positions of the rows in their samples; P = sum of `row_counts_B`.
        seed: of the run, `labels.seed`.

    Returns:
        [P] int64 on the CPU.
    """
    mixed_B = splitmix64(torch.from_numpy(np.ascontiguousarray(fingerprints_B).view(np.int64)) ^ seed)
    rows_P = mixed_B.repeat_interleave(torch.from_numpy(np.asarray(row_counts_B, np.int64)))
    return splitmix64(rows_P + torch.from_numpy(np.asarray(positions_P, np.int64)) * SPLITMIX64_GAMMA)


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
    seeds_P = _checked_seeds(seeds_P, logits_PV)

    def choose(rows: Rows) -> Chosen:
        log_probs_PV = rows.log_probs_PV
        weights_PV = (log_probs_PV.double() * exponent).exp()
        reached_PV = weights_PV.cumsum(dim=1)
        number_N = torch.arange(1, draws + 1, device=log_probs_PV.device)
        uniform_PN = _uniform(seeds_P[rows.part, None] + number_N * SPLITMIX64_GAMMA)
        wanted_PN = uniform_PN * reached_PV[:, -1:]
        # The first class whose cumulative weight is above the draw; it never has weight 0.
        drawn_PN = torch.searchsorted(reached_PV, wanted_PN, right=True)
        drawn_PN = drawn_PN.clamp_(max=log_probs_PV.shape[1] - 1).sort(dim=1).values
        first_PN = torch.ones_like(drawn_PN, dtype=torch.bool)
        first_PN[:, 1:] = drawn_PN[:, 1:] != drawn_PN[:, :-1]
        slot_PN = first_PN.cumsum(dim=1) - 1
        counts_PN = torch.zeros_like(drawn_PN).scatter_add_(1, slot_PN, torch.ones_like(drawn_PN))
        ids_PN = torch.full_like(drawn_PN, log_probs_PV.shape[1]).scatter_(1, slot_PN, drawn_PN)
        slots = min(draws, log_probs_PV.shape[1])
        return _most_likely_first(log_probs_PV, ids_PN[:, :slots], counts_PN[:, :slots])

    return build_soft_labels(
        logits_PV,
        choose,
        temperatures=temperatures,
        targets_P=targets_P,
        chunk_positions=chunk_positions or max(1, _CHUNK_ELEMENTS // logits_PV.shape[1]),
        check=check,
        sampling=sampling,
    )


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
    seeds_P = _checked_seeds(seeds_P, logits_PV)
    num_classes = logits_PV.shape[1]

    def choose(rows: Rows) -> Chosen:
        log_probs_PV, ids_PK = rows.log_probs_PV, top_k_indices(rows.logits_PV, k)
        class_V = torch.arange(1, num_classes + 1, device=log_probs_PV.device) * SPLITMIX64_GAMMA
        log_uniform_PV = _uniform(seeds_P[rows.part, None] + class_V).log().to(log_probs_PV.dtype)
        priority_PV = (log_probs_PV * exponent).sub_(log_uniform_PV).scatter_(1, ids_PK, -torch.inf)
        found = priority_PV.topk(min(draws + 1, num_classes), dim=1)
        taken_PN = found.indices[:, :draws].where(found.values[:, :draws] > -torch.inf, num_classes)
        # With no class left beside the slots, all are taken and weigh 1.
        all_taken = draws + 1 > num_classes
        threshold_P = (
            found.values.new_full((len(ids_PK),), -torch.inf) if all_taken else found.values[:, draws]
        )
        taken_PN = _most_likely_first(log_probs_PV, taken_PN, torch.ones_like(taken_PN)).ids_PK
        return Chosen(torch.cat([ids_PK, taken_PN], dim=1), log_threshold_P=threshold_P)

    return build_soft_labels(
        logits_PV,
        choose,
        temperatures=temperatures,
        targets_P=targets_P,
        chunk_positions=chunk_positions or max(1, _CHUNK_ELEMENTS // num_classes),
        check=check,
        sampling=sampling,
    )


def _most_likely_first(log_probs_PV: Tensor, ids_PN: Tensor, counts_PN: Tensor) -> Chosen:
    """The slots in order of probability, ties by id, unused ones last."""
    num_classes = log_probs_PV.shape[1]
    by_id_PN = ids_PN.sort(dim=1).indices
    ids_PN, counts_PN = ids_PN.gather(1, by_id_PN), counts_PN.gather(1, by_id_PN)
    used_PN = ids_PN < num_classes
    log_probs_PN = log_probs_PV.gather(1, ids_PN.where(used_PN, 0)).where(used_PN, -torch.inf)
    order_PN = log_probs_PN.sort(dim=1, descending=True, stable=True).indices
    counts_PN = counts_PN.where(used_PN, 0)
    return Chosen(ids_PN.gather(1, order_PN), counts_PK=counts_PN.gather(1, order_PN))


def _checked_seeds(seeds_P: Tensor, logits_PV: Tensor) -> Tensor:
    if tuple(seeds_P.shape) != tuple(logits_PV.shape[:1]) or seeds_P.dtype != torch.int64:
        raise LabelError(
            f"seeds: expected {list(logits_PV.shape[:1])} int64, one per row of logits; "
            f"found {seeds_P.dtype} {list(seeds_P.shape)}; make them with row_seeds"
        )
    return seeds_P.to(logits_PV.device, non_blocking=True)


def _uniform(counter: Tensor) -> Tensor:
    """float64 in (0, 1) of 64-bit counters."""
    high_bits = (splitmix64(counter) >> 12) & (2**52 - 1)
    return (high_bits.double() + 0.5) * 2.0**-52
