"""A record from logits and a choice of classes: the same for every policy.

Shape suffixes: `P` positions, `V` classes, `K` slots, `G` grid of temperatures.

The mass of the classes outside the record is summed from those classes themselves, at every grid temperature; 1 -
sum(kept) would lose all its digits on confident rows. Rows of float32 on the CPU go through compiled code, in as many
threads as torch uses, each of which holds 24 bytes times V besides the logits; on CUDA a kernel in Triton reads the rows
once (`one_pass.is_one_pass`), and holds 64 bytes for each 32,768 classes and 16 K for each 4,096. Others are worked on in
chunks by torch, and there about 20 bytes times chunk x V are held (at the default chunk under 100 MB, whatever P). Nothing
here waits for a GPU unless `check` is on.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from softcache.labels import Sampling, SoftLabels, collect
from softcache.labels.sparsify.one_pass import OnePass, is_one_pass, read_rows
from softcache.labels.sparsify.validate import checked_targets, logit_faults, raise_on_fault

__all__ = ["Chosen", "Rows", "build_soft_labels", "one_pass_labels", "top_k_indices"]

_CHUNK_ELEMENTS = 2**22
_ROWS_AT_ONCE = 256
"""Of a thread, where several make the records of some rows: a millisecond or more of work."""


class Rows:
    """Some rows of logits, for a policy to choose from.

    Attributes:
        logits_PV: float32, or float64 where the logits are; as they are given where `read` is.
        part: where among all rows they are.
        read: what one pass over the rows gave, or None.
    """

    def __init__(self, logits_PV: Tensor, part: slice, read: OnePass | None = None) -> None:
        self.logits_PV, self.part, self.read = logits_PV, part, read

    def largest(self, k: int) -> Tensor:
        """Ids [P, k] of the most likely classes, as of `top_k_indices`; k is the `num_largest` of `build_soft_labels`."""
        return top_k_indices(self.logits_PV, k) if self.read is None else self.read.ids_PK

    def largest_log_probs(self, k: int) -> Tensor:
        """Log-probabilities [P, k] of these."""
        if self.read is None:
            return self.log_probs_PV.gather(1, self.largest(k))
        return self.read.log_probs_PK

    def log_probs_of(self, ids_PK: Tensor) -> Tensor:
        """Log-probabilities [P, K] of classes, the very numbers of `log_probs_PV`."""
        if self.read is None:
            return self.log_probs_PV.gather(1, ids_PK)
        highest_P1, log_mass_P1 = self.read.normalizer_P2.split(1, dim=1)
        return (self.logits_PV.gather(1, ids_PK).float() - highest_P1) - log_mass_P1

    @property
    def is_compiled(self) -> bool:
        """Whether compiled functions work on the rows."""
        return self.read is None and _is_compiled(self.logits_PV.device, self.logits_PV.dtype)

    @cached_property
    def log_probs_PV(self) -> Tensor:
        if self.read is not None:
            highest_P1, log_mass_P1 = self.read.normalizer_P2.split(1, dim=1)
            return (self.logits_PV.float() - highest_P1).sub_(log_mass_P1)
        if not self.is_compiled:
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
    chunk_elements: int = _CHUNK_ELEMENTS,
    check: bool = True,
    sampling: Sampling | None = None,
    num_largest: int = 0,
    holds_rows: bool = False,
) -> SoftLabels:
    """Makes the record of the classes that `choose` names, chunk by chunk of rows.

    Args:
        logits_PV: [P, V] floating point, checked for shape by the caller.
        choose: names the slots of a chunk; or a number, for so many of the most likely classes.
        temperatures: grid of the tail.
        targets_P: [P] integer classes in [0, V), or None.
        chunk_positions: rows worked on at once; None picks `chunk_elements` / V.
        check: raise on faulty logits and targets, which waits for a GPU.
        sampling: how the choice was drawn; the tail then holds all classes but the exact ones.
        num_largest: of how many of the most likely classes `choose` takes the exact ones, in their order, leaving V in
            place of what it does not take.
        holds_rows: whether `choose` makes numbers for all classes; else it is asked once where one pass reads the rows.

    Raises:
        LabelError: a faulty logit or target, with its position.
    """
    targets = None if targets_P is None else checked_targets(targets_P, logits_PV, check=check)
    if check:
        raise_on_fault(logits_PV)
    num_positions, num_classes = logits_PV.shape
    rows = chunk_positions or max(1, chunk_elements // num_classes)
    if is_one_pass(logits_PV, choose if isinstance(choose, int) else num_largest, temperatures):
        with torch.no_grad():
            return one_pass_labels(
                logits_PV.detach(),
                choose,
                num_largest,
                temperatures,
                targets,
                sampling,
                rows if holds_rows or chunk_positions else num_positions,
            )

    dtype = torch.float64 if logits_PV.dtype == torch.float64 else torch.float32

    def chunk(part: slice) -> SoftLabels:
        chunk = Rows(logits_PV[part].detach().to(dtype), part)
        targets_p = None if targets is None else targets[part]
        if chunk.is_compiled:
            return _compiled_record(chunk, choose, temperatures, targets_p, sampling)
        chosen = Chosen(top_k_indices(chunk.logits_PV, choose)) if isinstance(choose, int) else choose(chunk)
        record = _record(chunk.log_probs_PV, chosen, temperatures, targets_p, sampling)
        return _with_faults(record, logit_faults(chunk.logits_PV))

    with torch.no_grad():
        threads = torch.get_num_threads() if _is_compiled(logits_PV.device, dtype) else 1
        rows = rows if threads == 1 else min(rows, _ROWS_AT_ONCE)
        parts = [slice(i, i + rows) for i in range(0, max(num_positions, 1), rows)]
        return collect(_in_threads(chunk, parts, min(threads, len(parts))), num_positions)


def _in_threads(
    chunk: Callable[[slice], SoftLabels], parts: list[slice], threads: int
) -> Iterator[SoftLabels]:
    """Returns the records of some parts of the rows, in order, made by so many threads, of which this is one."""
    if threads == 1:
        return map(chunk, parts)
    inference = torch.is_inference_mode_enabled()  # these modes are each thread's own
    waiting, found = iter(enumerate(parts)), dict[int, SoftLabels]()

    def work() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            for number, part in waiting:  # two threads never get the same one
                found[number] = chunk(part)

    with ThreadPoolExecutor(threads - 1, "softcache-labels") as pool:
        others = [pool.submit(work) for _ in range(threads - 1)]
        work()
        for other in others:
            other.result()
    return (found.pop(number) for number in range(len(parts)))


def _is_compiled(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cpu" or dtype != torch.float32:
        return False
    from softcache.runtime.jit import compiled_is_on

    return compiled_is_on()


def one_pass_labels(
    logits_PV: Tensor,
    choose: Callable[[Rows], Chosen] | int,
    num_largest: int,
    temperatures: tuple[float, ...],
    targets_P: Tensor | None,
    sampling: Sampling | None,
    at_once: int,
) -> SoftLabels:
    """`build_soft_labels` of rows that `is_one_pass` serves; `at_once` so many where `choose` is a function."""
    num_positions, num_classes = logits_PV.shape
    k = choose if isinstance(choose, int) else num_largest
    read = read_rows(logits_PV, k, temperatures, targets_P)
    found: dict[str, Any] = {"num_classes": num_classes, "temperatures": temperatures, "sampling": sampling}

    def chunk(part: slice) -> SoftLabels:
        assert callable(choose)
        here = read.rows(part)
        rows = Rows(logits_PV[part], part, here)
        chosen = choose(rows)
        used_PK = chosen.ids_PK < num_classes
        log_probs_PK = rows.log_probs_of(chosen.ids_PK.where(used_PK, 0))
        log_tail_PG = here.log_tail_PG
        if sampling is None:  # what was not taken of the largest is in the tail
            left_PK = here.log_probs_PK.masked_fill(used_PK, -torch.inf)
            moved_PG = torch.stack([(left_PK * (1.0 / t)).logsumexp(dim=1) for t in temperatures], dim=1)
            log_tail_PG = torch.logaddexp(log_tail_PG, moved_PG)
        return SoftLabels(
            ids=chosen.ids_PK,
            log_probs=log_probs_PK.where(used_PK, -torch.inf),
            log_tail=log_tail_PG,
            target_log_prob=here.target_log_prob_P,
            stats=here.stats_P4,
            counts=chosen.counts_PK,
            log_threshold=chosen.log_threshold_P,
            **found,
        )

    if callable(choose):
        starts = range(0, num_positions, at_once)
        return collect((chunk(slice(i, i + at_once)) for i in starts), num_positions)
    return SoftLabels(
        ids=read.ids_PK,
        log_probs=read.log_probs_PK,
        log_tail=read.log_tail_PG,
        target_log_prob=read.target_log_prob_P,
        stats=read.stats_P4,
        **found,
    )


def _with_faults(labels: SoftLabels, faults_P: Tensor) -> SoftLabels:
    """The labels of torch with the faults of their rows where `record_faults` reads them."""
    stats = labels.stats
    assert stats is not None
    stats[:, 3] = stats[:, 3].where(faults_P == 0, -faults_P.to(stats.dtype))
    return labels


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
    if _is_compiled(values_PV.device, values_PV.dtype):
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
