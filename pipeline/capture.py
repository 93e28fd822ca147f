"""The writing half: run the teacher once over every unit of work that is not finished yet.

    for every unit without a marker: claim it, run the teacher over it, publish it, mark it

The cache is planned and created before that, by `pipeline.planning`. Three things overlap: the teacher runs on a batch
while the last one's logits are made into records (`pipeline.labelling`), and finished units wait in a bounded queue for
one writer thread, which encodes and publishes them; a thread that fails stops the run with its error. So memory holds
`queue_units` + 2 units of labels, however many samples there are. Batches never straddle units, so a unit's content
does not depend on what was interrupted before.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from pipeline.batches import Batch
from pipeline.batches import Dataset as Data
from pipeline.codec import Codec
from pipeline.labelling import InFlight, Labeller
from pipeline.labels import SoftLabels, concat
from pipeline.manifest import Manifest, TeacherReport, Unit
from pipeline.planning import CaptureSettings
from pipeline.positions import PositionSettings, chosen_rows
from pipeline.sparsify import LabelSettings
from pipeline.stores.objects import Objects
from pipeline.stores.units import finished_units, open_store, publish_unit, read_marker
from pipeline.teacher import Teacher

__all__ = ["CaptureReport", "capture", "evaluate_teacher"]

WAIT_SECONDS = 0.5


@dataclass
class CaptureReport:
    """What one run did.

    Attributes:
        units_done: units that this run computed and published.
        units_found: units that were finished before, or by another run meanwhile.
        rows: positions that this run labelled.
        seconds: wall time of the whole pass.
    """

    units_done: int = 0
    units_found: int = 0
    rows: int = 0
    seconds: float = 0.0


class _UnitBatches(Dataset):
    """Loads (unit, view, first, last) requests; runs in this process or in loader processes.

    Rows that are known to get no label are left out, so that the teacher's head does not run on them.
    """

    def __init__(self, data: Data, positions: PositionSettings) -> None:
        self._data, self._positions = data, positions

    def __getitem__(self, request: tuple[int, int, int, int]) -> Any:
        unit, view, start, stop = request
        batch = replace(self._data.load(range(start, stop), view), unit=unit)
        if not self._positions.known_before:
            return batch
        keys = [self._data.source.key(sample) for sample in range(start, stop)]
        return batch.select(chosen_rows(self._positions, keys, batch.row_counts, batch.positions))


@dataclass
class _OpenUnit:
    """A claimed unit whose batches are being labelled."""

    unit: Unit
    claim: ExitStack
    labels: list[SoftLabels] = field(default_factory=list)
    fingerprints: list[np.ndarray] = field(default_factory=list)
    row_counts: list[np.ndarray] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)

    def add(self, batch: Batch, labels: SoftLabels) -> None:
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
        columns = codec.encode(concat(self.labels))
        columns["fingerprint"] = np.concatenate(self.fingerprints)
        if ragged:
            columns["num_rows"] = np.concatenate(self.row_counts).astype(np.uint32)
            columns["position"] = np.concatenate(self.positions).astype(np.uint32)
        return columns


class _Writer:
    """One thread that encodes and publishes units; the queue is bounded, and its error is ours."""

    def __init__(self, publish: Callable[[_OpenUnit], None], depth: int) -> None:
        self._publish, self._queue = publish, queue.Queue[_OpenUnit | None](depth)
        self._error: BaseException | None = None
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

    def put(self, item: _OpenUnit) -> None:
        if self._error is not None:
            item.claim.close()
            raise self._error
        self._queue.put(item)  # the thread always drains, so this waits but never hangs

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()
        self.raise_error()


def capture(
    objects: Objects,
    manifest: Manifest,
    manifest_sha256: str,
    *,
    data: Data,
    teacher: Teacher,
    labels: LabelSettings,
    settings: CaptureSettings,
    progress: Callable[[int], None] = lambda rows: None,
) -> CaptureReport:
    """Runs the teacher over every unfinished unit of the cache.

    Killed at any moment and run again, it completes what is missing and nothing else. Units that another run
    holds are left to it; this call returns when every unit is marked, whoever made it, and takes over the
    units of a run that died.

    Args:
        progress: called with a number of finished positions, those that were there at the start first.

    Raises:
        LabelError: the teacher's logits have a wrong shape, NaN or +inf; the sample is named.
        StorageError: the store refused to write; finished units stay valid.
    """
    started, report = time.monotonic(), CaptureReport()
    store, codec = open_store(manifest, objects), manifest.build_codec()

    def publish(item: _OpenUnit) -> None:
        columns = item.columns(codec, ragged=manifest.rows is not None)
        publish_unit(objects, store, manifest_sha256, item.unit, columns)
        report.units_done += 1
        report.rows += item.num_rows
        progress(item.num_rows)

    finished = finished_units(objects, manifest, manifest_sha256)
    report.units_found = len(finished)
    progress(sum(marker.num_rows for marker in finished.values()))
    pending = [unit for unit in manifest.plan.units() if unit.number not in finished]
    with ExitStack() as abandoned:
        writer = _Writer(publish, settings.queue_units)
        abandoned.callback(writer.close)
        while pending:
            claimed_elsewhere: list[Unit] = []
            claims = _claim_units(
                objects, manifest, manifest_sha256, pending, claimed_elsewhere, report, progress
            )
            _label_units(claims, data, teacher, labels, settings, writer)
            pending = claimed_elsewhere
            if pending:
                writer.raise_error()
                time.sleep(WAIT_SECONDS)
    report.seconds = time.monotonic() - started
    return report


def _claim_units(
    objects: Objects,
    manifest: Manifest,
    manifest_sha256: str,
    pending: list[Unit],
    claimed_elsewhere: list[Unit],
    report: CaptureReport,
    progress: Callable[[int], None],
) -> Iterator[_OpenUnit]:
    """Yields the pending units that this run may make; another run's go to `claimed_elsewhere`."""
    for unit in pending:
        claim = ExitStack()
        if not claim.enter_context(objects.claim(f"units/{unit.number:05d}.lock")):
            claimed_elsewhere.append(unit)
            claim.close()
        elif (marker := read_marker(objects, manifest, manifest_sha256, unit.number)) is not None:
            claim.close()
            report.units_found += 1
            progress(marker.num_rows)
        else:
            yield _OpenUnit(unit, claim)


def _label_units(
    claims: Iterator[_OpenUnit],
    data: Data,
    teacher: Teacher,
    labels: LabelSettings,
    settings: CaptureSettings,
    writer: _Writer,
) -> None:
    """Labels every claimed unit and hands it to the writer, one batch of device work ahead of the copies."""
    open_units: dict[int, _OpenUnit] = {}

    def requests() -> Iterator[tuple[int, int, int, int]]:
        for item in claims:
            unit = item.unit
            open_units[unit.number] = item
            for start in range(unit.start, unit.stop, settings.batch_size):
                yield unit.number, unit.view, start, min(start + settings.batch_size, unit.stop)

    def finish(flight: InFlight) -> None:
        item = open_units[flight.batch.unit]  # type: ignore[index]
        found = flight.wait(data)
        item.add(flight.batch, found)
        if item.num_samples == item.unit.stop - item.unit.start:
            writer.put(open_units.pop(item.unit.number))

    loader = DataLoader(
        _UnitBatches(data, labels.positions),
        batch_size=None,
        sampler=requests(),  # type: ignore[arg-type]
        num_workers=settings.workers,
        multiprocessing_context="forkserver" if settings.workers else None,
        pin_memory=teacher.device.type == "cuda",
    )
    in_flight: deque[Callable[[], InFlight]] = deque()
    try:
        with Labeller(teacher, labels) as labeller:
            for batch in loader:
                in_flight.append(labeller.start(batch))
                if len(in_flight) > 1:
                    finish(in_flight.popleft()())
            while in_flight:
                finish(in_flight.popleft()())
    finally:
        for item in open_units.values():
            item.claim.close()


def evaluate_teacher(
    data: Data,
    teacher: Teacher,
    *,
    batch_size: int,
    progress: Callable[[int], None] = lambda samples: None,
) -> TeacherReport:
    """Returns the teacher's accuracy and loss on the plain view of an evaluation split."""
    loss, correct, rows = 0.0, 0, 0
    for start in range(0, len(data), batch_size):
        batch = data.load(range(start, min(start + batch_size, len(data))), 0, fingerprints=False)
        batch_loss, batch_correct = teacher.score(batch)
        loss, correct, rows = loss + batch_loss, correct + batch_correct, rows + batch.num_rows
        progress(len(batch.samples))
    return TeacherReport(
        num_parameters=teacher.num_parameters,
        eval_accuracy=correct / rows,
        # A masked class that is the truth costs +inf, and a faulty teacher is refused when it labels.
        eval_loss=loss / rows if math.isfinite(loss) else None,
        eval_samples=len(data),
    )
