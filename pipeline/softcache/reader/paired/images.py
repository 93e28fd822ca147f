"""Images, or their bytes, of a student whose source is another: one label row per sample on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from softcache.data.batch import Dataset
from softcache.data.images import ImageBatch
from softcache.data.pairing import Pairing
from softcache.reader.dataset import MatchedSamples

__all__ = ["MatchedImages", "OnlinePairedDataset"]


class MatchedImages(MatchedSamples):
    """A student's images, matched with labeled ones by a pairing.

    Args:
        replays: whether the student sees the views of the teacher; else it sees its plain view, whatever the label's.
    """

    def __init__(self, student: Dataset, pairing: Pairing, *, replays: bool) -> None:
        self._student, self._replays = student, replays
        self._student_of, self._num_samples = pairing.student_of, len(pairing.samples)

    def __len__(self) -> int:
        return self._num_samples

    def load(self, samples: np.ndarray, view: int) -> ImageBatch:
        seen = view if self._replays else 0
        batch: ImageBatch = self._student.load(self._student_of[samples], seen, fingerprints=False)
        return replace(batch, samples=np.asarray(samples), view=view)

    def attach(self, batch: ImageBatch, labeled: ImageBatch) -> ImageBatch:
        return replace(batch, labels=labeled.labels)


class OnlinePairedDataset(Dataset):
    """The student's samples, each with what an online teacher sees of it; numbered as in the student's source."""

    def __init__(self, teacher: Dataset, student: Dataset, pairing: Pairing) -> None:
        self.source, self._teacher, self._student = student.source, teacher, student
        self._teacher_of = pairing.teacher_of

    def identity(self, num_views: int) -> dict[str, dict[str, Any]]:
        return self._student.identity(num_views)

    def load(
        self, samples: Sequence[int] | np.ndarray, view: int, *, fingerprints: bool | np.ndarray = True
    ) -> Any:
        """Returns the student's batch, with the teacher's images of its matched samples as `seen`."""
        numbers = np.asarray(samples, np.int64)
        seen = self._teacher.load(self._teacher_of[numbers], view, fingerprints=False).images
        return replace(self._student.load(numbers, view, fingerprints=fingerprints), seen=seen)
