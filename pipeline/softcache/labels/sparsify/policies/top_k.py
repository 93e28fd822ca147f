"""The policies that look at the distribution alone: the most likely classes, by number or by mass, or all.

Shape suffixes: `P` positions, `V` classes, `K` kept classes.
"""

import torch
from torch import Tensor

from softcache.errors import LabelError
from softcache.labels import DEFAULT_TEMPERATURES, SoftLabels
from softcache.labels.sparsify.assemble import Chosen, Rows, build_soft_labels, top_k_indices
from softcache.labels.sparsify.validate import check_arguments

__all__ = ["dense", "dense_labels_unsorted", "top_k", "top_p"]


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
        ids_PK = top_k_indices(rows.logits_PV, max_k)
        probs_PK = rows.log_probs_PV.gather(1, ids_PK).exp()
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
    )


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
