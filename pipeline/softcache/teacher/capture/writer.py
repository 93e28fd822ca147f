"""Units while they are made: what loads their batches, what gathers their labels, and the thread that publishes them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from softcache.cache.codecs import Codec
from softcache.cache.manifest import Unit
from softcache.data.batch import Batch
from softcache.data.batch import Dataset as Data
from softcache.labels import concat_labels
from softcache.labels.positions import PositionSettings, chosen_rows
from softcache.teacher.capture.labeler import AnyLabels

__all__ = ["PendingUnit", "UnitBatches", "Writer"]


class UnitBatches(Dataset):
    """Loads (unit, view, first, last) requests; runs in this process or in loader processes. Of None it is None.

    Rows that are known to get no label are left out, so that the teacher's head does not run on them. Where reads are
    shared, what is decoded of a range of samples is kept until another range is asked for.
    """

    def __init__(self, data: Data, positions: PositionSettings, *, shares_reads: bool = False) -> None:
        self._data, self._positions, self._shares_reads = data, positions, shares_reads
        self._range, self._shared = range(0), data

    def _data_of(self, samples: range) -> Data:
        if not self._shares_reads:
            return self._data
        if self._range != samples:
            self._range, self._shared = samples, self._data.sharing_reads(samples)
        return self._shared

    def __getitem__(self, request: tuple[int, int, int, int] | None) -> Any:
        if request is None:
            return None
        unit, view, start, stop = request
        batch = replace(self._data_of(range(start, stop)).load(range(start, stop), view), unit=unit)
        if not self._positions.is_static:
            return batch
        keys = [self._data.source.key(sample) for sample in range(start, stop)]
        return batch.select(chosen_rows(self._positions, keys, batch.row_counts, batch.positions))


@dataclass
class PendingUnit:
    """A claimed unit whose batches are being labeled.

    Attributes:
        teacher_seconds: of the capturing thread, spent in the teacher on this unit or waiting for its results.
        num_left: units made together with it that are not published before it, itself included.
    """

    unit: Unit
    claim: ExitStack
    teacher_seconds: float = 0.0
    num_left: int = 1
    labels: list[AnyLabels] = field(default_factory=list)
    fingerprints: list[np.ndarray] = field(default_factory=list)
    row_counts: list[np.ndarray] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)

    def add(self, batch: Batch, labels: AnyLabels) -> None:
        self.labels.append(labels)
        self.fingerprints.append(batch.fingerprints)
        self.row_counts.append(batch.row_counts)
        self.positions.append(batch.positions)

    @property
    def num_samples(self) -> int:
        return sum(map(len, self.fingerprints))

    @property
    def num_rows(self) -> int:
        return sum(map(len, self.positions))

    def columns(self, codec: Codec, *, ragged: bool) -> dict[str, np.ndarray]:
        columns = codec.encode(concat_labels(self.labels))
        columns["fingerprint"] = np.concatenate(self.fingerprints)
        if ragged:
            columns["num_rows"] = np.concatenate(self.row_counts).astype(np.uint32)
            columns["position"] = np.concatenate(self.positions).astype(np.uint32)
        return columns


class Writer:
    """One thread that encodes and publishes units; the queue is bounded, and its error is ours."""

    def __init__(self, publish: Callable[[PendingUnit], None], depth: int) -> None:
        self._publish, self._queue = publish, queue.Queue[PendingUnit | None](depth)
        self._error: BaseException | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="softcache-writer", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            with item.claim:
                if self._error is None:
                    try:
                        self._publish(item)
                    except BaseException as error:
                        self._error = error

    @property
    def depth(self) -> int:
        """Units that wait, without the one that is being published."""
        return max(0, self._queue.qsize() - self._closing)

    def put(self, item: PendingUnit) -> None:
        if self._error is not None:
            item.claim.close()
            raise self._error
        self._queue.put(item)  # the thread always drains, so this waits but never hangs

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self._closing = True
        self._queue.put(None)
        self._thread.join()
        self.raise_error()
