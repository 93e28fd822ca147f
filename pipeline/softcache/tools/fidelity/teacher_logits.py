"""Reruns the teacher on random rows of a cache: its logits together with the cached labels.

The rows are drawn sample by sample, at most `ROWS_PER_SAMPLE` of each, since a language model's backbone runs over a
whole sample for any one of its rows; its head runs on the chosen rows alone. The logits of all rows are held at once:
512 rows of 150,000 classes are 300 MB.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from softcache.data.batch import Dataset
from softcache.errors import AlignmentError, IdentityError, IncompleteCacheError
from softcache.labels import MixedTargets, OutputHead, SoftLabels, VectorLabels, concat
from softcache.labels.sparsify import dense, describe_fault, logit_faults, row_seeds
from softcache.reader.alignment import attach_labels, check_alignment
from softcache.reader.cache import Cache
from softcache.teacher.base import Teacher
from softcache.teacher.capture.shared import sample_states

__all__ = ["Rerun", "RerunStates", "check_measured", "rerun_teacher"]

ROWS_PER_SAMPLE = 8


class RerunStates(NamedTuple):
    """The hidden states of the rows of a rerun, of a language model; on the CPU.

    Attributes:
        states_PD: [P, D] float32.
        head: that makes logits of them.
        sampled_ND: [N, D] float32, states of samples from all over the source, by which coordinates are chosen.
    """

    states_PD: Tensor
    head: OutputHead
    sampled_ND: Tensor


@dataclass(frozen=True, eq=False)
class Rerun:
    """P rows of a cache with the teacher's logits from a fresh run; all on the CPU.

    Attributes:
        logits_PV: [P, V] float32.
        labels: torch record of the P rows, as the cache holds them; of hidden states what its head makes of them.
        targets_P: [P] int64, the ground truth.
        seeds_P: [P] int64, of draws from these rows (`sparsify.row_seeds`).
        num_samples: that the rows are of.
        states: of a teacher that is seen as a backbone and a head; else None.
    """

    logits_PV: Tensor
    labels: SoftLabels
    targets_P: Tensor
    seeds_P: Tensor
    num_samples: int
    states: RerunStates | None = None

    @property
    def width(self) -> int | None:
        """D of the hidden states, where there are any."""
        return None if self.states is None else self.states.states_PD.shape[1]

    def __len__(self) -> int:
        return len(self.logits_PV)


def rerun_teacher(
    cache: Cache,
    data: Dataset,
    teacher: Teacher,
    *,
    num_rows: int,
    seed: int,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda rows: None,
) -> Rerun:
    """Returns about `num_rows` random rows of the cache (fewer if it has fewer) with the teacher's logits.

    Args:
        seed: of the choice of rows.
        batch_size: samples that the teacher sees at once.
        progress: called with a number of rows.

    Raises:
        IdentityError: another teacher made the cache.
        AlignmentError: `data` is not what was labeled.
        IncompleteCacheError: the cache has no finished row.
        LabelError: it is of a detector's cells.
    """
    check_measured(cache)
    check_teacher(cache, teacher)
    check_alignment(cache, data)
    draw = np.random.default_rng(seed)
    parts, found = [], 0
    for view, samples in _chosen(cache, num_rows, draw):
        for start in range(0, len(samples), batch_size):
            part = _rerun(cache, data, teacher, samples[start : start + batch_size], view, draw)
            parts.append(part)
            found += len(part)
            progress(len(part))
    if not found:
        raise IncompleteCacheError(
            f"cache {cache.url}: no finished row to measure; run `softcache teacher-logits` first"
        )
    states = None
    if teacher.has_states:
        head = teacher.output_head()
        on_cpu = head._replace(weight=head.weight.cpu(), bias=None if head.bias is None else head.bias.cpu())
        sampled_ND = sample_states(teacher, data, batch_size=batch_size).cpu()
        states_PD = torch.cat([part.states.states_PD for part in parts if part.states is not None])
        states = RerunStates(states_PD, on_cpu, sampled_ND)
    return Rerun(
        torch.cat([part.logits_PV for part in parts]),
        concat([part.labels for part in parts]),
        torch.cat([part.targets_P for part in parts]),
        torch.cat([part.seeds_P for part in parts]),
        sum(part.num_samples for part in parts),
        states,
    )


def check_measured(cache: Cache) -> None:
    """Raises LabelError unless the labels of a cache are one distribution over all classes, or hidden states."""
    if cache.manifest.codec["name"] != "vectors":
        cache.manifest.soft_codec(f"fidelity, cache {cache.url}")


def check_teacher(cache: Cache, teacher: Teacher) -> None:
    """Raises IdentityError unless this very teacher, in this dtype, made the cache.

    Imported labels name a teacher of unknown weights; they are not checked.
    """
    there = cache.manifest.identity["teacher"]
    if str(there["spec"]).startswith("imported:"):
        return
    differing = [
        f"{name} {str(value)[:40]} here, {str(there.get(name))[:40]} there"
        for name, value in teacher.identity()["teacher"].items()
        # The spec is where it was loaded from; caches of before have it alone.
        if value != there.get(name) and name != ("spec" if "architecture" in there else "architecture")
    ]
    if differing:
        raise IdentityError(
            f"cache {cache.url}: made by another teacher than the config's ({'; '.join(differing)}); give --config the "
            "run's own file, with the weights that labeled it"
        )


def _chosen(cache: Cache, num_rows: int, draw: np.random.Generator) -> list[tuple[int, np.ndarray]]:
    """Random samples of each view that have about `num_rows` rows together."""
    finished = [cache.samples_in(view) for view in range(cache.num_views)]
    views = np.repeat(np.arange(cache.num_views), [len(samples) for samples in finished])
    samples = np.concatenate(finished)
    order = draw.permutation(len(samples))
    rows = np.cumsum(np.minimum(cache.rows.counts(samples[order]), ROWS_PER_SAMPLE))
    order = order[: int(np.searchsorted(rows, num_rows)) + 1]
    return [(view, np.sort(samples[order[views[order] == view]])) for view in range(cache.num_views)]


@torch.inference_mode()
def _rerun(
    cache: Cache, data: Dataset, teacher: Teacher, samples: np.ndarray, view: int, draw: np.random.Generator
) -> Rerun:
    stored = cache.read_stored(samples, view)
    batch = attach_labels(data.load(samples, view), stored, cache, data)
    for row in np.flatnonzero(batch.fingerprints != stored.fingerprints)[:1]:
        raise AlignmentError(
            f"cache {cache.url}: sample {data.source.key(int(samples[row]))!r}, view {view}: its content changed since it "
            "was labeled; restore the data, or rebuild the cache"
        )
    labels = batch.labels
    if getattr(batch, "labeled", None) is not None:
        batch = batch.select(batch.labeled.numpy())
    if data.is_ragged:
        starts = np.cumsum(batch.row_counts) - batch.row_counts
        picked = [
            start + np.sort(draw.permutation(count)[:ROWS_PER_SAMPLE])
            for start, count in zip(starts, batch.row_counts, strict=True)
        ]
        rows = np.concatenate(picked)
        batch, labels = batch.select(rows), labels.take(rows)
    logits = [chunk_PV.float().cpu() for chunk_PV in teacher.chunks(batch)]
    logits_PV = torch.cat(logits) if logits else torch.empty(0, teacher.num_classes)
    for code in logit_faults(logits_PV).unique().tolist() if len(logits_PV) else ():
        if code:
            raise IdentityError(
                f"teacher {teacher.spec}: {describe_fault(code)} in view {view}, where it had none when it made the cache"
            )
    states = None
    if teacher.has_states:
        states_PD = torch.cat([chunk_PD.float().cpu() for chunk_PD in teacher.states(batch)])
        states = RerunStates(states_PD, teacher.output_head(), states_PD)
    if isinstance(labels, VectorLabels):
        labels = dense(labels.to_torch().head_logits(), temperatures=(1.0,))
    seeds_P = row_seeds(batch.fingerprints, batch.row_counts, batch.positions, seed=0)
    return Rerun(logits_PV, labels, MixedTargets.own_classes(batch.targets), seeds_P, len(samples), states)
