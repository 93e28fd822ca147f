"""Labels batches: the teacher runs on one, and its logits or hidden states are made into soft labels on its device.

On a GPU the labels are copied back while the next batch runs. On the CPU teacher and labels take turns, each on all cores
(`softcache.labels.sparsify.assemble`): beside a teacher a thread of their own would take a core from every operation that
torch runs on all of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from softcache.data.batch import Batch
from softcache.data.batch import Dataset as Data
from softcache.errors import LabelError
from softcache.labels import STATS, DetectionLabels, OutputHead, SoftLabels, VectorLabels
from softcache.labels.positions import highest_rows
from softcache.labels.sparsify import LabelSettings, describe_fault
from softcache.teacher.base import Teacher

__all__ = ["AnyLabels", "PendingLabels", "start_labels"]

AnyLabels = SoftLabels | DetectionLabels | VectorLabels


class PendingLabels:
    """A record on its way from the device to host memory, started but not waited for."""

    def __init__(
        self,
        batch: Any,
        labels: AnyLabels,
        faults_P: torch.Tensor,
        chosen: torch.Tensor | None,
    ) -> None:
        self.batch = replace(batch, labels=None)
        self._chosen = None if chosen is None else chosen.to("cpu", non_blocking=True)
        labels = labels if chosen is None else labels.take(chosen)
        self._labels = labels.to_torch("cpu", non_blocking=True)
        self._faults_P = faults_P.to("cpu", non_blocking=True)
        self._event = torch.cuda.Event() if faults_P.is_cuda else None
        if self._event is not None:
            self._event.record()

    def wait(self, data: Data) -> AnyLabels:
        """Returns the labels as NumPy, `batch` being theirs; raises LabelError naming the first sample with a bad row."""
        if self._event is not None:
            self._event.synchronize()
        faults_P = self._faults_P.numpy()
        if faults_P.any():
            row = int(np.flatnonzero(faults_P)[0])
            sample = np.repeat(self.batch.samples, self.batch.row_counts)[row]
            place = data.describe_position(int(self.batch.positions[row]))
            if isinstance(self._labels, VectorLabels):
                raise LabelError(
                    f"teacher state of sample {data.source.key(int(sample))!r}{place}, view {self.batch.view} (unit "
                    f'{self.batch.unit}): NaN or infinite; expected finite numbers; try capture.dtype = "float32", or check '
                    "the teacher's weights. The unit was not marked done",
                    position=row,
                )
            raise LabelError(
                f"teacher logits of sample {data.source.key(int(sample))!r}{place}, view {self.batch.view} (unit "
                f"{self.batch.unit}): {describe_fault(int(faults_P[row]))}; expected finite logits (-inf for a masked "
                'class); try capture.dtype = "float32", or check the teacher\'s weights. The unit was not marked done',
                position=row,
            )
        if self._chosen is not None:
            self.batch = self.batch.select(self._chosen.numpy())
        return self._labels.to_numpy()


def start_labels(
    teacher: Teacher, settings: LabelSettings, batch: Batch, head: OutputHead | None = None
) -> PendingLabels:
    """Runs a teacher on a batch and makes labels of its logits or hidden states; returns what waits for their copies.

    Args:
        head: of the cache, of coordinates of hidden states; else None.

    Raises:
        LabelError: the teacher returns something of a wrong shape.
    """
    more: dict[str, Any] = {} if head is None else {"head": head}
    labels, faults_P = teacher.label(batch, settings, **more)
    return PendingLabels(batch, labels, faults_P, _most_uncertain(batch, labels, settings))


def _most_uncertain(batch: Batch, record: AnyLabels, settings: LabelSettings) -> torch.Tensor | None:
    """Returns which rows are kept, on the device, where the teacher's entropy decides; None where all are."""
    if settings.positions.policy != "entropy":
        return None
    assert isinstance(record, SoftLabels)
    assert record.stats is not None
    entropy_P: Any = record.stats[:, STATS.index("entropy")]
    return highest_rows(entropy_P, batch.row_counts, settings.positions.counts(batch.row_counts))
