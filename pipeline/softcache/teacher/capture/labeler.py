"""Labels batches: while the teacher runs on one batch, the last one's logits are made into soft labels.

On a GPU the device does that by itself: a record is made there, and copied back while the next batch runs. On the CPU one
thread of ours does it, which is fed a chunk of logits at a time over a queue of one, so that at most three chunks are
there at once: one that the teacher makes, one that waits, one that is worked on.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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

__all__ = ["AnyLabels", "Labeler", "PendingLabels"]

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


class Labeler:
    """Runs a teacher over batches and makes labels of its logits or hidden states; a context manager, which ends the thread.

    Args:
        head: of the cache, of coordinates of hidden states; else None.
    """

    def __init__(self, teacher: Teacher, settings: LabelSettings, head: OutputHead | None = None) -> None:
        self._teacher, self._settings = teacher, settings
        self._more: dict[str, Any] = {} if head is None else {"head": head}
        self._thread: ThreadPoolExecutor | None = None
        if teacher.device.type == "cpu":
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="softcache-labels")

    def __enter__(self) -> Labeler:
        return self

    def __exit__(self, *error: object) -> None:
        if self._thread is not None:
            self._thread.shutdown()

    def start(self, batch: Batch) -> Callable[[], PendingLabels]:
        """Runs the teacher on a batch; returns what waits for its record, or raises what went wrong with it.

        Raises:
            LabelError: the teacher returns something of a wrong shape.
        """
        if self._thread is None:
            flight = self._labeled(batch, None)
            return lambda: flight
        chunks = _Chunks()
        record = self._thread.submit(chunks.read_by, lambda: self._labeled(batch, iter(chunks)))
        try:
            for inputs in self._teacher.inputs(batch, self._settings):
                chunks.put(inputs)
        finally:
            chunks.put(None)
        return record.result

    def _labeled(self, batch: Batch, chunks: Iterator[torch.Tensor] | None) -> PendingLabels:
        record, faults_P = self._teacher.label(batch, self._settings, chunks=chunks, **self._more)
        return PendingLabels(batch, record, faults_P, _most_uncertain(batch, record, self._settings))


class _Chunks:
    """Logits from one thread to another; at most one waits."""

    def __init__(self) -> None:
        self._queue, self._ended = queue.Queue[torch.Tensor | None](1), False

    def put(self, logits_PV: torch.Tensor | None) -> None:
        self._queue.put(logits_PV)  # the reader reads to the end, so this waits but never hangs

    def __iter__(self) -> Iterator[torch.Tensor]:
        while not self._ended:
            logits_PV = self._queue.get()
            self._ended = logits_PV is None
            if logits_PV is not None:
                yield logits_PV

    def read_by(self, read: Callable[[], PendingLabels]) -> PendingLabels:
        """Returns what `read` makes of the chunks; where it fails, the rest is read and dropped."""
        try:
            return read()
        finally:
            for _ in self:
                pass


def _most_uncertain(batch: Batch, record: AnyLabels, settings: LabelSettings) -> torch.Tensor | None:
    """Returns which rows are kept, on the device, where the teacher's entropy decides; None where all are."""
    if settings.positions.policy != "entropy":
        return None
    assert isinstance(record, SoftLabels)
    assert record.stats is not None
    entropy_P: Any = record.stats[:, STATS.index("entropy")]
    return highest_rows(entropy_P, batch.row_counts, settings.positions.counts(batch.row_counts))
