"""Labels of one tokenizer for a student of another: documents joined by key, rows by their place.

Row r of a document's labels meets row r of the student's own tokens, up to the shorter of the two, as in Universal
Logit Distillation (Boizard et al. 2024, arXiv 2402.12030, section 3.2): only losses that do not ask which class is
which make sense of such a pair (`losses.uld`). Samples must be documents (packing = "documents"); of a document longer
than seq_len its first part is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from softcache.data.tokens import TokenBatch, TokenData
from softcache.errors import AlignmentError, SourceError
from softcache.reader.cache import Cache, CachedBatch
from softcache.reader.dataset import FingerprintedSamples, SoftLabelDataset
from softcache.reader.order import Request
from softcache.reader.paired.images import PairedBatch

__all__ = ["PairedDataset"]


class _Unlabelled:
    """What a loader process does: the tokens of both sides, without labels."""

    def __init__(
        self, teacher: FingerprintedSamples, student: TokenData, partner: np.ndarray, rows_of: np.ndarray
    ) -> None:
        self._teacher, self._student, self._partner, self._rows_of = teacher, student, partner, rows_of

    def __getitems__(self, request: Request) -> PairedBatch:
        return self.load(request.samples)

    def load(self, samples: np.ndarray) -> PairedBatch:
        batch = self._student.load(self._partner[samples], 0, fingerprints=False)
        batch = batch.select(_first_rows(batch.row_counts, self._rows_of[samples]))
        return PairedBatch(self._teacher.load(samples, 0), replace(batch, samples=samples))


class PairedDataset:
    """Samples are numbered as in the cache; the labels are checked against the teacher's own tokens.

    Attributes:
        samples: [S] int64, the samples that both sides have.
        rows_of: [N] int64, the rows that each sample has on both sides.
        labelled_of: [N] int64, how many of them have a label; None: all.
        unlabeled_dataset: the half of the work that needs no cache.

    Raises (from the constructor):
        SourceError: the samples are not documents.
        AlignmentError: the teacher's side is not what was labelled, or the student's lacks one of its documents.
    """

    def __init__(self, teacher: TokenData, student: TokenData, cache: Cache, **checks: Any) -> None:
        for data in (teacher, student):
            if data.source.packing != "documents":
                raise SourceError(
                    f"source {data.source.name}: packing {data.source.packing!r}; labels for another tokenizer are joined "
                    'document by document; set source.packing = "documents" and make the cache so'
                )
        self._labelled, self._student = SoftLabelDataset(teacher, cache, **checks), student
        self.cache = cache
        keys, theirs = teacher.source.keys(), {key: n for n, key in enumerate(student.source.keys())}
        self.samples = np.array([n for n, key in enumerate(keys) if key.endswith("@0")], np.int64)
        self._partner = np.full(len(keys), -1, np.int64)
        for sample in self.samples:
            if keys[sample] not in theirs:
                raise AlignmentError(
                    f"cache {cache.url}: document {keys[sample]!r} was labelled, and the student's source "
                    f"{student.source.name} has no such sample; both must come from the same dataset"
                )
            self._partner[sample] = theirs[keys[sample]]
        self.rows_of = np.minimum(teacher.source.num_rows(), student.source.num_rows()[self._partner])
        self.labelled_of = self._count_labels(teacher) if cache.skips_positions else None
        self.unlabeled_dataset = _Unlabelled(
            self._labelled.unlabeled_dataset, student, self._partner, self.rows_of
        )

    def _count_labels(self, teacher: TokenData) -> np.ndarray:
        """Returns how many labels of each finished sample are for rows of both sides; reads all positions once."""
        counted = np.zeros(len(self.rows_of), np.int64)
        for number in self.cache.markers:
            unit = self.cache.manifest.plan.unit(number)
            samples = np.arange(unit.start, unit.stop)
            batch, label_counts = teacher.load(samples, fingerprints=False), self.cache.rows.counts(samples)
            rows_Q = batch.rows_at(self.cache.read_positions(number), label_counts)
            sample_Q, place_Q = _places(rows_Q, batch.row_counts, label_counts)
            kept_Q = place_Q < self.rows_of[samples][sample_Q]
            counted[samples] = np.bincount(sample_Q[kept_Q], minlength=len(samples))
        return counted

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: tuple[int, int]) -> TokenBatch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[tuple[int, int]]) -> TokenBatch:
        samples = np.array([sample for sample, _ in indices], np.int64)
        return self.join(self.unlabeled_dataset.load(samples), self.read(samples))

    def read(self, samples: np.ndarray, view: int = 0) -> CachedBatch:
        """Returns what the cache holds of `samples`, for the teacher's tokens."""
        return self._labelled.read(samples, view)

    def join(self, batch: PairedBatch, stored: CachedBatch) -> TokenBatch:
        """Returns the student's tokens with the labels of their places; raises as `SoftLabelDataset.join`."""
        labelled = self._labelled.join(batch.teacher, stored)
        samples, counts = labelled.samples, self.rows_of[labelled.samples]
        rows_Q, label_counts = np.arange(labelled.num_rows), labelled.row_counts
        if labelled.labelled is not None:
            rows_Q, label_counts = labelled.labelled.numpy(), labelled.label_counts
        sample_Q, place_Q = _places(rows_Q, labelled.row_counts, label_counts)
        kept = np.flatnonzero(place_Q < counts[sample_Q])
        joined = replace(batch.student, labels=labelled.labels.take(kept))
        if len(kept) == joined.num_rows:
            return joined
        starts_B = np.cumsum(counts) - counts
        return replace(
            joined,
            labelled=torch.from_numpy((starts_B[sample_Q] + place_Q)[kept]),
            label_counts=np.bincount(sample_Q[kept], minlength=len(samples)),
        )

    collate = staticmethod(SoftLabelDataset.collate)


def _places(
    rows_Q: np.ndarray, row_counts: np.ndarray, label_counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns of each labelled row its sample in the batch, and its number among that sample's rows."""
    sample_Q = np.repeat(np.arange(len(row_counts)), label_counts)
    return sample_Q, rows_Q - (np.cumsum(row_counts) - row_counts)[sample_Q]


def _first_rows(row_counts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Returns the numbers of the first `wanted` rows of every sample, in a batch with `row_counts` of them."""
    starts = np.cumsum(row_counts) - row_counts
    parts = [np.arange(start, start + count) for start, count in zip(starts, wanted, strict=True)]
    return np.concatenate(parts)
