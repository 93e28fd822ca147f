"""Caches of any size with labels like a teacher's, made without running one: the real manifest, codecs, stores and markers.

A few thousand rows come from made logits (`benchmarks.synthetic_logits`) through the real `top_k`. Every further row is one
of them with other ids of about the same frequency, other gaps between its log-probabilities and its mass made to add up to
1 again, so that no compressor finds a row twice. Contents are constant: what pixels cost is measured elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softcache.cache.create import create_cache
from softcache.cache.storage.open import open_objects
from softcache.cache.units import open_store, publish_unit
from softcache.data.batch import Dataset
from softcache.data.images import ImageBatch
from softcache.data.sources.text.packing import KeyedSample, TokenSample
from softcache.data.sources.text.table import TableWriter, TokenSource
from softcache.data.tokens import TokenData
from softcache.hashing.digests import digest_json
from softcache.labels import SoftLabels
from softcache.labels.sparsify import TopK
from softcache.labels.tail import log_sum_exp
from softcache.teacher.base import TeacherFacts
from softcache.teacher.capture.plan import CaptureSettings, plan_manifest

__all__ = ["MadeImages", "MadeSource", "made_tokens", "varied", "write_cache"]

JITTER = 64  # ids move among so many neighbours


class MadeSource:
    """What a cache asks of a source of images: keys as ImageNet's, classes, no pixels."""

    def __init__(self, num_samples: int, num_classes: int) -> None:
        self.name, self.num_classes, self._num_samples = "made", num_classes, num_samples
        self.class_names: list[str] = []
        self.digest = digest_json({"made": [num_samples, num_classes]})

    def __len__(self) -> int:
        return self._num_samples

    def key(self, sample: int) -> str:
        name = self.target(sample)
        return f"n{name:08d}/n{name:08d}_{sample}.JPEG"

    def keys(self) -> list[str]:
        return [self.key(sample) for sample in range(len(self))]

    def target(self, sample: int) -> int:
        return sample % self.num_classes

    def targets(self) -> np.ndarray:
        return np.arange(len(self), dtype=np.int64) % self.num_classes


class MadeImages(Dataset):
    """Samples that are all one tiny image; a fingerprint is made from the sample's number."""

    def __init__(self, num_samples: int, num_classes: int) -> None:
        self.source = MadeSource(num_samples, num_classes)

    def identity(self, num_views: int) -> dict[str, dict[str, Any]]:
        return {"views": {"digest": "0" * 64, "num_views": num_views, "settings": {}}}

    def load(
        self, samples: Sequence[int] | np.ndarray, view: int = 0, *, fingerprints: bool | np.ndarray = True
    ) -> ImageBatch:
        samples = np.asarray(samples, np.int64)
        prints = (samples.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        prints[~np.broadcast_to(fingerprints, len(samples))] = 0
        images = torch.full((len(samples), 1, 2, 2), 128, dtype=torch.uint8)
        targets = torch.from_numpy(samples % self.source.num_classes)
        return ImageBatch(images, targets, samples, view, prints)


def made_tokens(folder: Path, num_samples: int, *, rows: int, vocab_size: int) -> TokenData:
    """Returns samples of random tokens with `rows` label rows each, in the table that real text is kept in."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    writer = TableWriter(folder / "samples.arrow")
    segments, learnt = np.zeros(rows + 1, np.int32), np.ones(rows + 1, bool)
    for number in range(num_samples):
        sample = TokenSample(random.integers(0, vocab_size, rows + 1, np.int32), segments, learnt)
        writer.add(KeyedSample(f"document/{number:08d}@0", sample, np.array([rows + 1], np.int32)))
    described = writer.close() | {
        "tokenizer_digest": "0" * 64,
        "vocab_size": vocab_size,
        "made_from": {"seq_len": rows + 1, "packing": "documents"},
    }
    (folder / "table.json").write_text(json.dumps(described))
    return TokenData(TokenSource(folder, name="made"))


def varied(base: SoftLabels, num_rows: int, seed: int | Sequence[int]) -> SoftLabels:
    """Returns rows [num_rows] like those of `base`, each of a distribution that adds up to 1; NumPy."""
    random = np.random.default_rng(seed)
    picked_P = random.integers(len(base), size=num_rows)
    first = base.take(picked_P)
    spread = min(
        JITTER, base.num_classes & -base.num_classes
    )  # within it, xor keeps ids in range and distinct
    ids_PK = first.ids.astype(np.int64) ^ random.integers(spread, size=(num_rows, 1))
    log_probs_PK = first.log_probs.astype(np.float64)
    gaps_PK = np.diff(log_probs_PK, axis=1) * random.uniform(0.8, 1.25, (num_rows, base.k - 1))
    log_probs_PK[:, 1:] = log_probs_PK[:, :1] + np.cumsum(gaps_PK, axis=1)
    log_sum_P = log_sum_exp(np.concatenate([log_probs_PK, first.log_tail[:, :1]], axis=1))
    log_probs_PK -= log_sum_P[:, None]
    assert first.target_log_prob is not None
    assert first.stats is not None
    is_target_PK = first.log_probs == first.target_log_prob[:, None]
    own_P = log_probs_PK[np.arange(num_rows), is_target_PK.argmax(axis=1)]
    stats = first.stats.copy()
    stats[:, :3] *= random.uniform(0.98, 1.02, (num_rows, 3))
    return SoftLabels(
        ids=ids_PK,
        log_probs=log_probs_PK.astype(np.float32),
        log_tail=(first.log_tail - log_sum_P[:, None] / np.array(base.temperatures)).astype(np.float32),
        num_classes=base.num_classes,
        temperatures=base.temperatures,
        target_log_prob=np.where(is_target_PK.any(axis=1), own_P, first.target_log_prob - log_sum_P).astype(
            np.float32
        ),
        stats=stats,
    )


def write_cache(url: str, data: Any, base: SoftLabels, settings: CaptureSettings) -> str:
    """Writes a finished cache of `data` with labels varied from `base`; the same labels for every codec and store."""
    labels = TopK(k=base.k, temperatures=base.temperatures)
    manifest, samples = plan_manifest(data, TeacherFacts("made", base.num_classes), labels, settings)
    objects = open_objects(url, create=True)
    manifest, digest = create_cache(objects, manifest, samples)
    store, codec = open_store(manifest, objects), manifest.build_codec()
    for unit in manifest.plan.units():
        batch = data.load(np.arange(unit.start, unit.stop), unit.view)
        columns = codec.encode(varied(base, batch.num_rows, unit.number))
        columns["fingerprint"] = batch.fingerprints
        if manifest.rows is not None:
            columns["num_rows"] = batch.row_counts.astype(np.uint32)
            columns["position"] = batch.positions.astype(np.uint32)
        publish_unit(objects, store, digest, unit, columns)
    return url
