"""A record from logits and a choice of classes: the same for every policy.

Shape suffixes: `P` positions, `V` classes, `K` slots, `G` grid of temperatures.

The mass of the classes outside the record is summed from those classes themselves, at every grid temperature; 1 -
sum(kept) would lose all its digits on confident rows. Rows of float32 on the CPU go through compiled code, which holds
24 bytes times V besides the logits. Others are worked on in chunks by torch, and there about 20 bytes times chunk x V are
held (at the default chunk under 100 MB, whatever P). Nothing here waits for a GPU unless `check` is on.
"""

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from softcache.labels import Sampling, SoftLabels, collect
from softcache.labels.sparsify.validate import checked_targets, raise_on_fault

__all__ = ["Chosen", "Rows", "build_soft_labels", "top_k_indices"]

_CHUNK_ELEMENTS = 2**22


class Rows:
    """Some rows of logits, for a policy to choose from.

    Attributes:
        logits_PV: float32, or float64 where the logits are.
        part: where among all rows they are.
    """

    def __init__(self, logits_PV: Tensor, part: slice) -> None:
        self.logits_PV, self.part = logits_PV, part

    @cached_property
    def log_probs_PV(self) -> Tensor:
        if not _is_compiled(self.logits_PV):
            return self.logits_PV.log_softmax(dim=-1)
        from softcache.labels.sparsify.kernels import fill_log_probs

        log_probs_PV = torch.empty(self.logits_PV.shape)
        fill_log_probs(self.logits_PV.contiguous().numpy(), log_probs_PV.numpy())
        return log_probs_PV


class Chosen(NamedTuple):
    """The slots of some rows.

    Attributes:
        ids_PK: int64; V in unused slots, which are never the first.
        counts_PK: how often each was drawn, or None.
        log_threshold_P: of the draws without replacement, or None.
    """

    ids_PK: Tensor
    counts_PK: Tensor | None = None
    log_threshold_P: Tensor | None = None


def build_soft_labels(
    logits_PV: Tensor,
    choose: Callable[[Rows], Chosen] | int,
    *,
    temperatures: tuple[float, ...],
    targets_P: Tensor | None = None,
    chunk_positions: int | None = None,
    check: bool = True,
    sampling: Sampling | None = None,
) -> SoftLabels:
    """Makes the record of the classes that `choose` names, chunk by chunk of rows.

    Args:
        logits_PV: [P, V] floating point, checked for shape by the caller.
        choose: names the slots of a chunk; or a number, for so many of the most likely classes.
        temperatures: grid of the tail.
        targets_P: [P] integer classes in [0, V), or None.
        chunk_positions: rows worked on at once; None picks 2^22 / V.
        check: raise on faulty logits and targets, which waits for a GPU.
        sampling: how the choice was drawn; the tail then holds all classes but the exact ones.

    Raises:
        LabelError: a faulty logit or target, with its position.
    """
    targets = None if targets_P is None else checked_targets(targets_P, logits_PV, check=check)
    if check:
        raise_on_fault(logits_PV)
    num_positions, num_classes = logits_PV.shape
    rows = chunk_positions or max(1, _CHUNK_ELEMENTS // num_classes)

    def chunk(part: slice) -> SoftLabels:
        dtype = torch.float64 if logits_PV.dtype == torch.float64 else torch.float32
        chunk = Rows(logits_PV[part].detach().to(dtype), part)
        targets_p = None if targets is None else targets[part]
        if _is_compiled(chunk.logits_PV):
            return _compiled_record(chunk, choose, temperatures, targets_p, sampling)
        chosen = Chosen(top_k_indices(chunk.logits_PV, choose)) if isinstance(choose, int) else choose(chunk)
        return _record(chunk.log_probs_PV, chosen, temperatures, targets_p, sampling)

    with torch.no_grad():
        starts = range(0, max(num_positions, 1), rows)
        return collect((chunk(slice(i, i + rows)) for i in starts), num_positions)


def _is_compiled(values_PV: Tensor) -> bool:
    if values_PV.device.type != "cpu" or values_PV.dtype != torch.float32:
        return False
    from softcache.runtime.jit import compiled_is_on

    return compiled_is_on()


def _compiled_record(
    chunk: Rows,
    choose: Callable[[Rows], Chosen] | int,
    temperatures: tuple[float, ...],
    targets_P: Tensor | None,
    sampling: Sampling | None,
) -> SoftLabels:
    from softcache.labels.sparsify.kernels import fill_records

    rows, num_classes = chunk.logits_PV.shape
    is_number = not callable(choose)
    chosen = choose(chunk) if callable(choose) else Chosen(torch.empty((rows, choose), dtype=torch.int64))
    ids_PK, beta_G = chosen.ids_PK.contiguous(), 1.0 / np.array(temperatures)
    log_probs_PK = torch.empty(ids_PK.shape)
    log_tail_PG = torch.empty((rows, len(temperatures)))
    target_log_prob, stats = torch.empty(rows), torch.empty((rows, 4))
    wanted_P = torch.zeros(rows, dtype=torch.int64) if targets_P is None else targets_P.contiguous()
    fill_records(
        chunk.logits_PV.contiguous().numpy(),
        is_number,
        ids_PK.shape[1] if sampling is None else sampling.exact,
        beta_G,
        *(array.numpy() for array in (ids_PK, wanted_P, log_probs_PK, log_tail_PG, target_log_prob, stats)),
    )
    return SoftLabels(
        ids=ids_PK,
        log_probs=log_probs_PK,
        log_tail=log_tail_PG,
        num_classes=num_classes,
        temperatures=temperatures,
        target_log_prob=None if targets_P is None else target_log_prob,
        stats=stats,
        sampling=sampling,
        counts=chosen.counts_PK,
        log_threshold=chosen.log_threshold_P,
    )


def _record(
    log_probs_PV: Tensor,
    chosen: Chosen,
    temperatures: tuple[float, ...],
    targets_P: Tensor | None,
    sampling: Sampling | None,
) -> SoftLabels:
    num_classes = log_probs_PV.shape[1]
    used_PK = chosen.ids_PK < num_classes
    safe_PK = chosen.ids_PK.where(used_PK, chosen.ids_PK[:, :1])
    log_probs_PK = log_probs_PV.gather(1, safe_PK).where(used_PK, -torch.inf)
    target_log_prob = None
    if targets_P is not None:
        valid = (targets_P >= 0) & (targets_P < num_classes)
        picked = log_probs_PV.gather(1, targets_P.clamp(0, num_classes - 1)[:, None])[:, 0]
        target_log_prob = picked.where(valid, torch.nan)
    stats = _stats(log_probs_PV)
    exact_PK = safe_PK if sampling is None else safe_PK[:, : sampling.exact]
    others_PV = log_probs_PV.scatter_(1, exact_PK, -torch.inf)
    log_tail_PG = torch.stack([(others_PV * (1.0 / t)).logsumexp(dim=-1) for t in temperatures], dim=1)
    return SoftLabels(
        ids=chosen.ids_PK,
        log_probs=log_probs_PK,
        log_tail=log_tail_PG,
        num_classes=num_classes,
        temperatures=temperatures,
        target_log_prob=target_log_prob,
        stats=stats,
        sampling=sampling,
        counts=chosen.counts_PK,
        log_threshold=chosen.log_threshold_P,
    )


def top_k_indices(values_PV: Tensor, k: int) -> Tensor:
    """Ids of the k largest values, descending; equal values by ascending id (`topk` leaves ties open)."""
    if _is_compiled(values_PV):
        from softcache.labels.sparsify.top_k_kernel import fill_largest

        ids_PK = torch.empty((len(values_PV), k), dtype=torch.int64)
        fill_largest(values_PV.contiguous().numpy(), ids_PK.numpy())
        return ids_PK
    if values_PV.dtype == torch.float64:
        return values_PV.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    # Unique sort keys: the float's bits, made monotone, above the reversed id. Adding 0 turns -0.0 into 0.0.
    bits = (values_PV + 0.0).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    reversed_ids = torch.arange(values_PV.shape[1] - 1, -1, -1, device=values_PV.device)
    return ((ordered << 32) | reversed_ids).topk(k, dim=-1).indices


def _stats(log_probs_PV: Tensor) -> Tensor:
    """[P, 4], the columns of `softcache.labels.STATS`."""
    alive = log_probs_PV > -torch.inf
    support = alive.sum(dim=-1).to(log_probs_PV.dtype)
    finite = log_probs_PV.where(alive, 0.0)
    entropy = -(log_probs_PV.exp() * finite).sum(dim=-1)
    mean = finite.sum(dim=-1) / support
    variance = (finite - mean[:, None]).where(alive, 0.0).square().sum(dim=-1) / support
    return torch.stack([entropy, mean, variance.sqrt(), support], dim=1)
