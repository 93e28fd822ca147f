"""Shared by the policies that sample classes at random: an unbiased record of a distribution in a few of its classes.

Shape suffixes: `P` positions, `V` classes, `K` slots, `N` draws.

`sample` draws with replacement (random-sampling distillation); `hybrid` keeps the most likely classes and draws each of
the others at most once, by priority sampling, whose variance is at most that of any scheme with one draw less (Szegedy
2006). Either way a class of the sum over all classes has a weight whose mean over the draws is 1, at every temperature
(`softcache.labels.Sampling`).

Draws are a function of the row's seed and of the class or the number of the draw (splitmix64), so a rerun draws the
same, whatever the order, the batch and the number of workers.
"""

import numpy as np
import torch
from torch import Tensor

from softcache.errors import LabelError
from softcache.hashing.splitmix import SPLITMIX64_GAMMA, splitmix64
from softcache.labels.sparsify.assemble import Chosen, Rows

__all__ = ["CHUNK_ELEMENTS", "checked_seeds", "most_likely_first", "row_seeds", "uniform"]

CHUNK_ELEMENTS = 2**21  # a draw holds 64-bit numbers as well as the log-probabilities


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


def most_likely_first(rows: Rows, ids_PN: Tensor, counts_PN: Tensor) -> Chosen:
    """The slots in order of probability, ties by id, unused ones last."""
    num_classes = rows.logits_PV.shape[1]
    by_id_PN = ids_PN.sort(dim=1).indices
    ids_PN, counts_PN = ids_PN.gather(1, by_id_PN), counts_PN.gather(1, by_id_PN)
    used_PN = ids_PN < num_classes
    log_probs_PN = rows.log_probs_of(ids_PN.where(used_PN, 0)).where(used_PN, -torch.inf)
    order_PN = log_probs_PN.sort(dim=1, descending=True, stable=True).indices
    counts_PN = counts_PN.where(used_PN, 0)
    return Chosen(ids_PN.gather(1, order_PN), counts_PK=counts_PN.gather(1, order_PN))


def checked_seeds(seeds_P: Tensor, logits_PV: Tensor) -> Tensor:
    if tuple(seeds_P.shape) != tuple(logits_PV.shape[:1]) or seeds_P.dtype != torch.int64:
        raise LabelError(
            f"seeds: expected {list(logits_PV.shape[:1])} int64, one per row of logits; "
            f"found {seeds_P.dtype} {list(seeds_P.shape)}; make them with row_seeds"
        )
    return seeds_P.to(logits_PV.device, non_blocking=True)


def uniform(counter: Tensor) -> Tensor:
    """float64 in (0, 1) of 64-bit counters."""
    high_bits = (splitmix64(counter) >> 12) & (2**52 - 1)
    return (high_bits.double() + 0.5) * 2.0**-52
