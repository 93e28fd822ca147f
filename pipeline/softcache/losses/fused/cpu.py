"""`fused.chunk` by compiled rows (`fused.cpu_kernels`), where a CPU computes in float32: for cross-entropy and for
losses that are linear in the student's log-masses, at one temperature, with a tail that is a bucket or nothing.

torch takes about fifteen passes over a chunk for the same; the chunk does not fit a core's cache, a row does. A plain
record (`RecordMixture`) is softened, checked and weighed row by row, too, and never copied.

Shape suffixes: `P` positions, `V` classes, `K` kept classes.
"""

from __future__ import annotations

import itertools
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softcache.labels import SoftLabels
from softcache.losses.fused.chunk import ChunkObjective
from softcache.losses.fused.head import Head
from softcache.losses.fused.rows import Rows, kept_out_of_range
from softcache.losses.fused.soft import Buckets
from softcache.losses.registry import Loss
from softcache.losses.target_class import IGNORED
from softcache.runtime.jit import compiled_is_on

__all__ = ["CompiledMixture", "RecordMixture", "is_compiled", "is_record"]


def is_compiled(head: Head, mixture: ChunkObjective) -> bool:
    """Whether `CompiledMixture` can take the place of a mixture."""
    soft = mixture.soft
    return (
        compiled_is_on()
        and _is_narrow(head)
        and (soft is None or (isinstance(soft, Buckets) and soft.is_linear))
        and isinstance(mixture.T, float)
        and not mixture.standardize
        and mixture.truth_P is None
    )


def is_record(head: Head, loss: Loss, labels: SoftLabels, temperature: Any) -> bool:
    """Whether `RecordMixture` serves: the tail is a bucket, student and teacher have the same classes, none was drawn."""
    arrays = (labels.ids, labels.log_probs, labels.log_tail)
    return (
        compiled_is_on()
        and _is_narrow(head)
        and "hidden" in loss.kind.fast_paths
        and loss.tail == "bucket"
        and not loss.standardize
        and isinstance(temperature, int | float)
        and labels.sampling is None
        and labels.num_classes == head.num_classes
        and all(x.device.type == "cpu" for x in arrays)
    )


def _is_narrow(head: Head) -> bool:
    return head.dtype == torch.float32 and head.weight_VD.device.type == "cpu"


class CompiledMixture:
    """The same loss and gradient as the mixture that it is made of."""

    def __init__(self, mixture: ChunkObjective) -> None:
        self._mixture = mixture

    def __call__(
        self, head: Head, logits_PV: Tensor, part: slice, needs_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """The loss [P] and the gradient [P, V], which overwrites the logits, needed or not."""
        from softcache.losses.fused.cpu_kernels import mix_rows

        mixture, soft, num_rows = self._mixture, self._mixture.soft, len(logits_PV)
        if soft is None:
            ids_PK, nothing_PK = torch.zeros((num_rows, 0), dtype=torch.int64), torch.zeros((num_rows, 0))
            terms = (nothing_PK, torch.zeros(num_rows), nothing_PK, torch.zeros(num_rows))
            factor = 0.0
        else:
            assert isinstance(soft, Buckets)
            ids_PK, factor = soft.kept(logits_PV, part), mixture.alpha * mixture.T**soft.temperature_power
            terms = soft.linear_terms()
        hard = _hard_part(mixture.targets_P, part, num_rows, 1.0 - mixture.alpha)
        loss_P = torch.empty(num_rows)
        _in_threads(mix_rows, logits_PV, ids_PK, *terms, factor, mixture.T, *hard, loss_P)
        return loss_P, logits_PV


class RecordMixture:
    """(1 - alpha) * cross-entropy + alpha * T^2 * loss of a record, where `is_record`.

    Raises:
        LabelError: a kept class is out of range; when the chunk is computed.
    """

    def __init__(self, loss: Loss, labels: SoftLabels, rows: Rows, T: float, alpha: float) -> None:
        log_masses_PK, log_tail_P = labels.masses_at(T)
        self._labels, self._rows, self._T, self._alpha = labels, rows, T, alpha
        masses = (x.detach().to(torch.float32) for x in (log_masses_PK, log_tail_P))
        self._record = tuple(rows.take(x) for x in (labels.ids, *masses))
        self._is_divergence, self._factor = loss.kind.has_entropy, alpha * T**loss.kind.temperature_power

    def __call__(
        self, head: Head, logits_PV: Tensor, part: slice, needs_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """As `CompiledMixture`."""
        from softcache.losses.fused.cpu_kernels import mix_records

        record = [x[part] for x in self._record]
        targets_P = self._rows.targets_P if self._alpha < 1.0 else None
        hard = _hard_part(targets_P, part, len(logits_PV), 1.0 - self._alpha)
        loss_P, bad_N = torch.empty(len(logits_PV)), torch.full((1,), -1)
        how = (self._is_divergence, self._factor, self._T)
        _in_threads(mix_records, logits_PV, *record, *how, *hard, loss_P, bad_N)
        if (bad := int(bad_N[0])) >= 0:
            row, places_P = part.start + bad, self._rows.index_P
            raise kept_out_of_range(self._labels, row if places_P is None else int(places_P[row]))
        return loss_P, logits_PV


def _hard_part(targets_P: Tensor | None, part: slice, num_rows: int, weight: float) -> tuple[Tensor, Tensor]:
    """Weight and target of a chunk's cross-entropy."""
    if targets_P is None:
        return torch.zeros(num_rows), torch.zeros(num_rows, dtype=torch.int64)
    return weight * (targets_P[part] != IGNORED).to(torch.float32), targets_P[part]


def _in_threads(kernel: Any, *arguments: Any) -> None:
    """Runs a kernel over the rows, shared out over as many threads as torch would take."""
    arrays = [_array(x) if isinstance(x, Tensor) else x for x in arguments]
    num_rows = len(arrays[0])
    count = max(1, min(torch.get_num_threads(), num_rows))
    bounds = [num_rows * number // count for number in range(count + 1)]
    threads = [
        threading.Thread(target=kernel, args=(*arrays, first, stop))
        for first, stop in itertools.pairwise(bounds[1:])
    ]
    for thread in threads:
        thread.start()
    kernel(*arrays, 0, bounds[1])
    for thread in threads:
        thread.join()


def _array(x: Tensor) -> np.ndarray:
    found: np.ndarray = x.contiguous().numpy()
    return found
