"""Is a cache what it says it is? Checksums and markers of every unit, and a fresh teacher on a sample of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from pipeline.batches import Dataset
from pipeline.cache import Cache
from pipeline.errors import SoftcacheError
from pipeline.labels import SoftLabels
from pipeline.losses import forward_kl
from pipeline.reader import check_alignment
from pipeline.teacher import Teacher

__all__ = ["verify_against_teacher", "verify_units"]


def verify_units(cache: Cache, progress: Callable[[int], None] = lambda units: None) -> Iterator[str]:
    """Yields one line per fault: missing units, bad markers, bad checksums, rows that cannot be decoded."""
    for check in (cache.samples_table, cache.check_metadata):
        try:
            check()
        except SoftcacheError as error:
            yield str(error)
    for unit in cache.manifest.plan.units():
        try:
            marker = cache.marker(unit.number)
            if marker is None:
                yield (
                    f"unit {unit.number} (view {unit.view}, samples {unit.start} to {unit.stop - 1}): not finished; "
                    "rerun `softcache teacher-logits`"
                )
            else:
                cache.check_unit(marker)
        except SoftcacheError as error:
            yield str(error)
        progress(1)


def verify_against_teacher(
    cache: Cache,
    data: Dataset,
    teacher: Teacher,
    *,
    num_rows: int,
    threshold_nats: float,
    seed: int,
    batch_size: int = 256,
    progress: Callable[[int], None] = lambda rows: None,
) -> Iterator[str]:
    """Runs the teacher again on random samples; yields one line per sample whose labels it does not confirm.

    The measure is KL(record || fresh teacher) at T=1 over the kept classes and the tail's bucket, in nats.
    float16 log-probabilities cost about 1e-7 of it; another device or dtype costs more.

    Raises:
        AlignmentError: `data` is not what was labelled.
    """
    check_alignment(cache, data)
    rows = [(view, int(sample)) for view in range(cache.num_views) for sample in cache.samples_in(view)]
    chosen = sorted(np.random.default_rng(seed).permutation(len(rows))[:num_rows])
    for view in range(cache.num_views):
        samples = np.array([rows[index][1] for index in chosen if rows[index][0] == view], np.int64)
        for part in np.array_split(samples, max(1, -(-len(samples) // batch_size))) if len(samples) else ():
            yield from _compare(cache, data, teacher, part, view, threshold_nats)
            progress(len(part))


def _compare(
    cache: Cache, data: Dataset, teacher: Teacher, samples: np.ndarray, view: int, threshold_nats: float
) -> Iterator[str]:
    labels, prints = cache.read_rows(samples, view)
    batch = data.load(samples, view)
    kl_P = _divergence(labels.to_torch(), batch, teacher)
    worst_B = np.maximum.reduceat(kl_P, np.cumsum(batch.row_counts) - batch.row_counts)
    for row, sample in enumerate(samples):
        unit = cache.manifest.plan.locate(view, int(sample))
        where = f"unit {unit.number}, row {int(sample) - unit.start} (sample {data.source.key(int(sample))!r}, view {view})"
        if prints[row] != batch.fingerprints[row]:
            yield f"{where}: the content changed since it was labelled"
        elif not worst_B[row] <= threshold_nats:
            yield (
                f"{where}: the teacher disagrees with its record: KL {worst_B[row]:.2e} nats, at most "
                f"{threshold_nats:.0e} expected; other weights, dtype or device?"
            )


@torch.inference_mode()
def _divergence(labels: SoftLabels, batch: Any, teacher: Teacher) -> np.ndarray:
    """Returns KL(record || teacher now) [P] at T=1, chunk by chunk."""
    parts, start = [], 0
    for logits_PV in teacher.chunks(batch):
        rows = labels.take(slice(start, start + len(logits_PV)))
        parts.append(forward_kl(logits_PV.cpu(), rows, temperature=1.0, padded_vocabulary=True).numpy())
        start += len(logits_PV)
    return np.concatenate(parts)
