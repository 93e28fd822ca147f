"""Labels of one tokenizer for a student of another: documents joined by key, rows by their place.

Row r of a document's labels meets row r of the student's own tokens, up to the shorter of the two, as in Universal
Logit Distillation (Boizard et al. 2024, arXiv 2402.12030, section 3.2): only losses that do not ask which class is
which make sense of such a pair (`losses.uld`). Samples must be documents (packing = "documents"); of a document longer
than seq_len its first part is used.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import torch

from softcache.data.tokens import TokenBatch, TokenData
from softcache.errors import AlignmentError, SourceError
from softcache.reader.cache import Cache
from softcache.reader.dataset import MatchedSamples

__all__ = ["MatchedDocuments"]


class MatchedDocuments(MatchedSamples):
    """A student's documents, matched with those that a cache has labels of.

    Attributes:
        samples: [S] int64, the samples of the cache that both sides have.

    Raises (from the constructor):
        SourceError: the samples are not documents.
        AlignmentError: the student's side lacks one of the documents.
    """

    def __init__(self, teacher: TokenData, student: TokenData, cache: Cache) -> None:
        for data in (teacher, student):
            if data.source.packing != "documents":
                raise SourceError(
                    f"source {data.source.name}: packing {data.source.packing!r}; labels for another tokenizer are joined "
                    'document by document; set source.packing = "documents" and make the cache so'
                )
        self._student = student
        keys, theirs = teacher.source.keys(), {key: n for n, key in enumerate(student.source.keys())}
        for data, found in ((teacher, keys), (student, student.source.keys())):
            for key, count in Counter(found).most_common(1):
                if count > 1:
                    raise SourceError(
                        f"source {data.source.name}: {count} documents have the key {key!r}, and they are joined by key; "
                        "give each its own (key_column; of a corpus in parts also over all parts) and make the cache so"
                    )
        self.samples = np.array([n for n, key in enumerate(keys) if key.endswith("@0")], np.int64)
        self._student_of = np.full(len(keys), -1, np.int64)
        for sample in self.samples:
            if keys[sample] not in theirs:
                raise AlignmentError(
                    f"cache {cache.url}: document {keys[sample]!r} was labeled, and the student's source "
                    f"{student.source.name} has no such sample; both must come from the same dataset"
                )
            self._student_of[sample] = theirs[keys[sample]]
        self.rows_of: np.ndarray = np.minimum(
            teacher.source.num_rows(), student.source.num_rows()[self._student_of]
        )
        if cache.skips_positions:
            self.labeled_of = self._count_labels(teacher, cache)

    def _count_labels(self, teacher: TokenData, cache: Cache) -> np.ndarray:
        """Returns how many labels of each finished sample are for rows of both sides; reads all positions once."""
        counted = np.zeros(len(self.rows_of), np.int64)
        for number in cache.markers:
            unit = cache.manifest.plan.unit(number)
            samples = np.arange(unit.start, unit.stop)
            batch, label_counts = teacher.load(samples, fingerprints=False), cache.rows.counts(samples)
            rows_Q = batch.rows_at(cache.read_positions(number), label_counts)
            sample_Q, place_Q = _places(rows_Q, batch.row_counts, label_counts)
            kept_Q = place_Q < self.rows_of[samples][sample_Q]
            counted[samples] = np.bincount(sample_Q[kept_Q], minlength=len(samples))
        return counted

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, samples: np.ndarray, view: int) -> TokenBatch:
        batch = self._student.load(self._student_of[samples], 0, fingerprints=False)
        batch = batch.select(_first_rows(batch.row_counts, self.rows_of[samples]))
        return replace(batch, samples=samples)

    def attach(self, batch: TokenBatch, labeled: TokenBatch) -> TokenBatch:
        assert labeled.labels is not None
        counts = self.rows_of[labeled.samples]
        rows_Q, label_counts = np.arange(labeled.num_rows), labeled.row_counts
        if labeled.labeled is not None and labeled.label_counts is not None:
            rows_Q, label_counts = labeled.labeled.numpy(), labeled.label_counts
        sample_Q, place_Q = _places(rows_Q, labeled.row_counts, label_counts)
        kept = np.flatnonzero(place_Q < counts[sample_Q])
        joined = replace(batch, labels=labeled.labels.take(kept))
        if len(kept) == joined.num_rows:
            return joined
        starts_B = np.cumsum(counts) - counts
        return replace(
            joined,
            labeled=torch.from_numpy((starts_B[sample_Q] + place_Q)[kept]),
            label_counts=np.bincount(sample_Q[kept], minlength=len(counts)),
        )


def _places(
    rows_Q: np.ndarray, row_counts: np.ndarray, label_counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns of each labeled row its sample in the batch, and its number among that sample's rows."""
    sample_Q = np.repeat(np.arange(len(row_counts)), label_counts)
    return sample_Q, rows_Q - (np.cumsum(row_counts) - row_counts)[sample_Q]


def _first_rows(row_counts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Returns the numbers of the first `wanted` rows of every sample, in a batch with `row_counts` of them."""
    starts = np.cumsum(row_counts) - row_counts
    parts = [np.arange(start, start + count) for start, count in zip(starts, wanted, strict=True)]
    return np.concatenate(parts)
