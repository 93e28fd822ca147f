"""Labels of one source for a student of another: one label row per sample on both sides, joined by a pairing.

Samples are numbered as in the cache. Of each, the teacher's side is loaded too, and compared with the fingerprint that
the cache has of it, as for a student that sees the same: a label of another sample is refused before it meets anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from softcache.data.batch import Dataset
from softcache.data.images import ImageBatch
from softcache.data.pairing import Pairing
from softcache.reader.cache import Cache, CachedBatch
from softcache.reader.dataset import FingerprintedSamples, SoftLabelDataset, group_by_view
from softcache.reader.order import Request

__all__ = ["OnlinePairedDataset", "PairedBatch", "PairedSamples"]


class PairedBatch(NamedTuple):
    """The teacher's side is compared with the cache; the student's is what is trained on."""

    teacher: Any
    student: Any

    def pin_memory(self) -> PairedBatch:
        return PairedBatch(self.teacher, self.student.pin_memory())


class _Unlabelled:
    """What a loader process does: both sides of a batch, the teacher's with its fingerprints, without labels."""

    def __init__(
        self, teacher: FingerprintedSamples, student: Dataset, pairing: Pairing, replays: bool
    ) -> None:
        self._teacher, self._student, self._replays = teacher, student, replays
        self._student_of = pairing.student_of

    def __getitems__(self, request: Request) -> PairedBatch:
        return self.load(request.samples, request.view)

    def load(self, samples: np.ndarray, view: int) -> PairedBatch:
        batch = self._student.load(
            self._student_of[samples], view if self._replays else 0, fingerprints=False
        )
        return PairedBatch(
            self._teacher.load(samples, view), replace(batch, samples=np.asarray(samples), view=view)
        )


class PairedSamples:
    """The student's samples with the labels of their partners; see `softcache.reader.loader.JoinedDataset`.

    Args:
        replays: whether the student sees the views of the teacher; else it sees its plain view, whatever the label's.

    Attributes:
        labelled_of: None; each sample has its one label.
        unlabeled_dataset: the half of the work that needs no cache.

    Raises (from the constructor and on every fetch):
        AlignmentError: the teacher's side is not what was labelled; the sample is named.
    """

    labelled_of = None

    def __init__(
        self,
        teacher: Dataset,
        student: Dataset,
        pairing: Pairing,
        cache: Cache,
        *,
        replays: bool,
        **checks: Any,
    ) -> None:
        self._labelled, self._num_samples = SoftLabelDataset(teacher, cache, **checks), len(pairing.samples)
        self.cache = cache
        self.unlabeled_dataset = _Unlabelled(self._labelled.unlabeled_dataset, student, pairing, replays)

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: tuple[int, int]) -> ImageBatch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Any) -> ImageBatch:
        """Returns one batch of pairs (sample of the teacher, view), in their order."""
        batches = [
            self.join(self.unlabeled_dataset.load(samples, view), self.read(samples, view))
            for samples, view in group_by_view(indices, 0)
        ]
        return batches[0] if len(batches) == 1 else self.collate(batches)

    def read(self, samples: np.ndarray, view: int = 0) -> CachedBatch:
        """Returns what the cache holds of the teacher's `samples`."""
        return self._labelled.read(samples, view)

    def join(self, batch: PairedBatch, stored: CachedBatch) -> ImageBatch:
        """Returns the student's side with its labels; raises as `SoftLabelDataset.join`."""
        return replace(batch.student, labels=self._labelled.join(batch.teacher, stored).labels)

    collate = staticmethod(SoftLabelDataset.collate)


class OnlinePairedDataset(Dataset):
    """The student's samples, each with what a live teacher sees of it; numbered as in the student's source."""

    def __init__(self, teacher: Dataset, student: Dataset, pairing: Pairing) -> None:
        self.source, self._teacher, self._student = student.source, teacher, student
        self._teacher_of = pairing.teacher_of

    def identity(self, num_views: int) -> dict[str, dict[str, Any]]:
        return self._student.identity(num_views)

    def load(
        self, samples: Sequence[int] | np.ndarray, view: int, *, fingerprints: bool | np.ndarray = True
    ) -> Any:
        """Returns the student's batch, with the teacher's images of its partners as `seen`."""
        numbers = np.asarray(samples, np.int64)
        seen = self._teacher.load(self._teacher_of[numbers], view, fingerprints=False).images
        return replace(self._student.load(numbers, view, fingerprints=fingerprints), seen=seen)
