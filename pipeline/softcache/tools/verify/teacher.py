"""Verifies labels against a fresh teacher on a sample of rows; `checksums` verifies the stored units."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from softcache.data.batch import Dataset
from softcache.errors import AlignmentError, IdentityError
from softcache.labels import BernoulliLabels, DetectionLabels, SoftLabels, VectorLabels, encode_vectors
from softcache.labels.sparsify import DenseOutputs
from softcache.losses import forward_kl, kl_terms
from softcache.reader.alignment import attach_labels, check_alignment
from softcache.reader.cache import Cache
from softcache.teacher.base import Teacher
from softcache.tools.verify.checksums import verify_units

CHUNK_ELEMENTS = 2**22
"""Of the logits of hidden states that are held at once."""

__all__ = ["verify_against_teacher", "verify_units"]


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
    float16 log-probabilities cost about 1e-7 of it; another device or dtype costs more. At a detector's cells it is the sum
    over the kept classes of a sigmoid head and the best dropped one, and half the squared difference of the other outputs is
    added, which is their KL as means of unit variance. Whether other cells should have been kept is not asked. Of hidden
    states it is the KL of what the cache's head makes of the stored ones and of the teacher's, rounded alike.

    Raises:
        AlignmentError: `data` is not what was labeled.
        IdentityError: the labels are of several teachers.
    """
    if "fusion" in cache.manifest.identity:
        raise IdentityError(
            f"cache {cache.url}: fused of the labels of several teachers, and no single one confirms it; leave --config "
            "out, and verify the caches that it was fused of with the configs of their teachers"
        )
    check_alignment(cache, data)
    there = cache.manifest.identity.get("head")
    if there is not None and there != (here := json.loads(json.dumps(teacher.head_identity))):
        yield f"cache {cache.url}: made with another head than this teacher's: {there} there, {here} here; other weights?"
        return
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
    stored = cache.read_stored(samples, view)
    try:
        batch = attach_labels(data.load(samples, view), stored, cache, data)
    except AlignmentError as error:
        yield str(error)
        return
    labels = batch.labels
    if getattr(batch, "labeled", None) is not None:
        batch = batch.select(batch.labeled.numpy())  # the teacher's head skips the rest
    kl_P = _divergence(labels, batch, teacher)
    worst_B = np.maximum.reduceat(kl_P, np.cumsum(batch.row_counts) - batch.row_counts)
    for row, sample in enumerate(samples):
        unit = cache.manifest.plan.locate(view, int(sample))
        where = f"unit {unit.number}, row {int(sample) - unit.start} (sample {data.source.key(int(sample))!r}, view {view})"
        if stored.fingerprints[row] != batch.fingerprints[row]:
            yield f"{where}: the content changed since it was labeled"
        elif not worst_B[row] <= threshold_nats:
            yield (
                f"{where}: the teacher disagrees with its record: KL {worst_B[row]:.2e} nats, at most "
                f"{threshold_nats:.0e} expected; other weights, dtype or device?"
            )


@torch.inference_mode()
def _divergence(
    labels: SoftLabels | BernoulliLabels | DetectionLabels | VectorLabels, batch: Any, teacher: Teacher
) -> np.ndarray:
    """Returns KL(record || teacher now) [P] at T=1, chunk by chunk.

    Of classes that were drawn at random, half the mean of (log p - log q)^2 over them: what KL is for small
    differences. The estimate of KL itself may be negative.
    """
    if isinstance(labels, VectorLabels):
        return _states_divergence(labels, batch, teacher)
    parts, start = [], 0
    for logits_PV in teacher.chunks(batch):
        if isinstance(labels, DetectionLabels):
            parts.append(_cells_divergence(labels, cast(Any, logits_PV)).numpy())
            continue
        rows = labels.take(slice(start, start + len(logits_PV)))
        if isinstance(rows, BernoulliLabels):
            parts.append(_independent_kl(rows, logits_PV.cpu().float()).numpy())
            start += len(logits_PV)
            continue
        assert isinstance(labels, SoftLabels)
        if labels.sampling is None:
            kl_P = forward_kl(logits_PV.cpu(), rows, temperature=1.0, padded_vocabulary=True)
        else:
            kl_P = _drawn_difference(logits_PV.cpu(), rows)
        parts.append(kl_P.numpy())
        start += len(logits_PV)
    return np.concatenate(parts)


def _states_divergence(labels: VectorLabels, batch: Any, teacher: Teacher) -> np.ndarray:
    """Returns KL(stored || teacher now) [P] at T=1 of hidden states through one head."""
    labels, parts, start = labels.to_torch(teacher.device), [], 0
    assert labels.head is not None
    head, values = labels.head.load(teacher.device), labels.encodings["hidden"]
    rows = max(1, CHUNK_ELEMENTS // labels.num_classes)
    for states_PD in teacher.states(batch):
        if head.encoder is not None:
            states_PD = (states_PD.float() - head.mean) @ head.encoder
        fresh = labels.with_arrays(encode_vectors(states_PD, values))
        stored = labels.take(slice(start, start + len(fresh)))
        for first in range(0, len(fresh), rows):
            part = slice(first, first + rows)
            log_p_PV, log_q_PV = (x.take(part).head_logits().log_softmax(1) for x in (stored, fresh))
            parts.append(kl_terms(log_p_PV, log_q_PV).sum(1).cpu().numpy())
        start += len(fresh)
    return np.concatenate(parts)


def _cells_divergence(labels: DetectionLabels, outputs: DenseOutputs) -> torch.Tensor:
    """Returns the measure of `verify_against_teacher` [P] at all cells of a batch."""
    num_images, cell_P = len(outputs.logits), labels.cells.long()
    image_P = torch.arange(num_images).repeat_interleave(len(labels) // num_images)
    record, logits_PV = labels.labels, outputs.logits.cpu()[image_P, cell_P].float()
    if isinstance(record, SoftLabels):
        found_P = forward_kl(logits_PV, record, temperature=1.0)
    else:
        found_P = _independent_kl(record, logits_PV)
    for name, kept in labels.columns.items():
        now = outputs.columns[name].cpu()[image_P, cell_P].float()
        found_P = found_P + (kept.float() - now).square().reshape(len(cell_P), -1).sum(1) / 2
    return found_P


def _independent_kl(record: BernoulliLabels, logits_PV: torch.Tensor) -> torch.Tensor:
    """Returns the KL [P] of the kept classes, summed, and of the best dropped one."""
    ids_PK = record.ids.long()
    found_P = _bernoulli_kl(record.logits.float(), logits_PV.gather(1, ids_PK)).sum(1)
    if record.k < record.num_classes:
        best_P = logits_PV.scatter(1, ids_PK, -torch.inf).amax(1)
        found_P = found_P + _bernoulli_kl(record.dropped_bound, best_P)
    return found_P


def _bernoulli_kl(logits: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """KL of sigmoid(logits) from sigmoid(others), elementwise; 0 where both are -inf."""
    heads = logits.sigmoid() * (logsigmoid(logits) - logsigmoid(others))
    tails = (-logits).sigmoid() * (logsigmoid(-logits) - logsigmoid(-others))
    return heads.nan_to_num(0.0) + tails


def _drawn_difference(logits_PV: torch.Tensor, labels: SoftLabels) -> torch.Tensor:
    record = labels.at_temperature(1.0)
    used_PK = record.log_probs > -torch.inf
    ids_PK = record.ids.long().where(used_PK, 0)
    difference_PK = record.log_probs - logits_PV.float().log_softmax(1).gather(1, ids_PK)
    mass_PK = (record.log_probs + record.log_weights).exp()
    return (mass_PK * difference_PK.square()).where(used_PK, 0.0).sum(1) / 2
