"""The writing half: run the teacher once over every unit of work that is not finished yet.

    for every unit without a marker: claim it, run the teacher over it, publish it, mark it

The cache is planned and created before that, by `softcache.teacher.capture.plan`. Two things overlap: the teacher runs and
its logits are made into records (`softcache.teacher.capture.labeler`), which a GPU copies back while the next batch runs;
and finished units wait in a bounded queue for one writer thread, which encodes and publishes them
(`softcache.teacher.capture.writer`); a thread that fails stops the run with its error. So memory holds `queue_units` + 2
units of labels, however many samples there are. Batches never straddle units, so a unit's content does not depend on what
was interrupted before. `capture` does a whole cache, `capture_units` some units of it, for one of many workers
(`softcache.runs.dask`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice
from typing import NamedTuple

from torch.utils.data import DataLoader

from softcache.cache.manifest import Manifest, TeacherReport, Unit
from softcache.cache.repair import usable_units
from softcache.cache.shared import shared_head
from softcache.cache.storage.base import Objects
from softcache.cache.units import UnitIndex, fold_if_possible, open_index, open_store, publish_unit
from softcache.data.batch import Dataset as Data
from softcache.data.batch import ranges
from softcache.data.sent_batch import loader_batches
from softcache.labels import OutputHead
from softcache.labels.sparsify import LabelSettings
from softcache.runtime.logging import count_found
from softcache.runtime.signals import (
    defer_signals,
    raise_if_signalled,
    shield_loaders,
    signals_first,
)
from softcache.teacher.base import Teacher
from softcache.teacher.capture.labeler import PendingLabels, start_labels
from softcache.teacher.capture.plan import CaptureSettings
from softcache.teacher.capture.writer import PendingUnit, UnitBatches, Writer

__all__ = ["CaptureContext", "CaptureReport", "UnitMetrics", "capture", "capture_units", "evaluate_teacher"]

CLAIM_POLL_SECONDS = 0.5
MAX_OPEN_BYTES = 2**29
"""Labels of the units that are made together, before compression."""


class UnitMetrics(NamedTuple):
    """What one unit took.

    Attributes:
        seconds: since this process published its last unit, or since it began; of units that were made together, the part
            of each.
        teacher_seconds: of these, what the capturing thread spent in the teacher or waiting for its results; the rest
            went into loading batches, or into waiting for the writer.
        queue_depth: units that waited for the writer when this one was done.
    """

    unit: int
    view: int
    rows: int
    num_bytes: int
    seconds: float
    teacher_seconds: float
    queue_depth: int


@dataclass
class CaptureReport:
    """What one run did.

    Attributes:
        units_done: units that this run computed and published.
        units_found: units that were finished before, or by another run meanwhile.
        rows: positions that this run labeled.
        num_bytes: that this run published.
        seconds: wall time of the whole pass.
        teacher_seconds: of the capturing thread (of all workers together), in the teacher or waiting for it.
        slowest: the unit that took longest.
        workers: that took part.
    """

    units_done: int = 0
    units_found: int = 0
    rows: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    teacher_seconds: float = 0.0
    slowest: UnitMetrics | None = None
    workers: int = 1

    def add(self, unit: UnitMetrics) -> None:
        """Counts a unit that was published."""
        self.units_done += 1
        self.rows += unit.rows
        self.num_bytes += unit.num_bytes
        self.teacher_seconds += unit.teacher_seconds
        if self.slowest is None or unit.seconds > self.slowest.seconds:
            self.slowest = unit


@dataclass(frozen=True)
class CaptureContext:
    """Everything that labeling a unit of a cache takes."""

    objects: Objects
    manifest: Manifest
    manifest_sha256: str
    data: Data
    teacher: Teacher
    labels: LabelSettings
    settings: CaptureSettings

    @cached_property
    def index(self) -> UnitIndex:
        """What looks up finished units."""
        return open_index(self.objects, self.manifest, self.manifest_sha256)

    @cached_property
    def head(self) -> OutputHead | None:
        """The cache's own head, where its coordinates are what hidden states are kept as; else None."""
        if getattr(self.labels, "components", None) is None:
            return None
        head = shared_head(self.objects.url, self.manifest)
        return None if head is None else head.load(self.teacher.device)


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
    on_unit: Callable[[UnitMetrics], None] = lambda metrics: None,
) -> CaptureReport:
    """Runs the teacher over every unfinished unit of the cache.

    Killed at any moment and run again, it completes what is missing and nothing else. Units that another run
    holds are left to it; this call returns when every unit is marked, by any process, and takes over the
    units of a run that died.

    Args:
        progress: called with a number of finished positions, those that were there at the start first.
        on_unit: called from the writer's thread with every unit that this run published.

    Raises:
        LabelError: the teacher's logits have a wrong shape, NaN or +inf; the sample is named.
        StorageError: the store refused to write; finished units stay valid.
    """
    started, report = time.monotonic(), CaptureReport()
    work = CaptureContext(objects, manifest, manifest_sha256, data, teacher, labels, settings)

    def done(metrics: UnitMetrics) -> None:
        report.add(metrics)
        progress(metrics.rows)
        on_unit(metrics)

    def found(rows: int) -> None:
        report.units_found += 1
        progress(rows)

    finished = usable_units(work.index)
    report.units_found = len(finished)
    count_found(progress, finished.num_rows)
    # Where images are decoded, the views of one range of samples follow each other.
    numbers = manifest.plan.in_order(finished.missing, by_range=data.decodes)
    pending: Iterable[Unit] = map(manifest.plan.unit, numbers)
    del finished
    with defer_signals():
        while held := capture_units(work, pending, on_unit=done, on_found=found):
            pending = held
            raise_if_signalled()
            time.sleep(CLAIM_POLL_SECONDS)
    fold_if_possible(work.index)
    report.seconds = time.monotonic() - started
    return report


def capture_units(
    work: CaptureContext,
    units: Iterable[Unit],
    *,
    on_unit: Callable[[UnitMetrics], None],
    on_found: Callable[[int], None] = lambda rows: None,
    turn: AbstractContextManager | None = None,
    together: int | None = None,
    on_step: Callable[[int, range], None] = lambda unit, samples: None,
) -> list[Unit]:
    """Labels and publishes those of the units that are neither finished nor claimed; returns those that others hold.

    Units of one range of samples that follow each other are labeled together where images are decoded, so that a file is
    decoded once for all of their views; what one unit holds does not depend on it.

    Args:
        on_unit: called from the writer's thread with every unit that was published.
        on_found: called with the number of rows of a unit that turns out to be finished.
        turn: held while the teacher runs, but not while the last units are published: two threads that share a teacher
            take turns at it.
        together: how many units of one range at most are labeled together; None: as many as memory is meant for.
        on_step: called before samples of a unit are loaded, and, with no samples, from the writer's thread before the unit
            is published.

    Raises:
        LabelError, StorageError: as `capture`.
    """
    manifest, last = work.manifest, time.perf_counter()
    store, codec = open_store(manifest, work.objects), manifest.build_codec()

    def publish(item: PendingUnit) -> None:
        nonlocal last
        on_step(item.unit.number, range(0))
        columns = item.columns(codec, ragged=manifest.rows is not None)
        marker = publish_unit(work.objects, store, work.manifest_sha256, item.unit, columns)
        now = time.perf_counter()
        num_bytes = sum(shard.num_bytes for shard in marker.shards)
        # Units that are made together are published together; each has its part of the time.
        unit, seconds = item.unit, (now - last) / item.num_left
        on_unit(
            UnitMetrics(
                unit.number, unit.view, item.num_rows, num_bytes, seconds, item.teacher_seconds, writer.depth
            )
        )
        last += seconds

    held: list[Unit] = []
    with ExitStack() as abandoned:
        writer = Writer(publish, work.settings.queue_units)
        abandoned.callback(writer.close)
        with turn or nullcontext():
            last = time.perf_counter()
            groups = _groups(units, work, together)
            _label_units(
                (_claim_units(work, group, held, on_found) for group in groups), work, writer, on_step
            )
    return held


def _groups(units: Iterable[Unit], work: CaptureContext, together: int | None) -> Iterator[Iterable[Unit]]:
    """Yields units that are labeled together: views of one range of samples, as many as memory is meant for."""
    if not work.data.decodes:
        yield from ((unit,) for unit in units)
        return
    size = together or max(1, MAX_OPEN_BYTES // work.manifest.unit_bytes)
    for _, group in groupby(units, key=lambda unit: (unit.start, unit.stop)):
        while chunk := list(islice(group, size)):
            yield chunk


def _claim_units(
    work: CaptureContext, units: Iterable[Unit], held: list[Unit], on_found: Callable[[int], None]
) -> Iterator[PendingUnit]:
    """Yields the units that this run may make; another run's go to `held`."""
    for unit in units:
        with ExitStack() as claim:  # an error of the lookup ends it; an error that is kept would keep it
            if not claim.enter_context(work.objects.claim(f"units/{unit.number:05d}.lock")):
                held.append(unit)
                continue
            marker = work.index.marker(unit.number)
            if marker is not None:
                on_found(marker.num_rows)
                continue
            item = PendingUnit(unit, claim.pop_all())
        yield item


def _label_units(
    groups: Iterable[Iterator[PendingUnit]],
    work: CaptureContext,
    writer: Writer,
    on_step: Callable[[int, range], None],
) -> None:
    """Labels every claimed unit and hands it to the writer, one batch of device work ahead of the copies."""
    open_units: dict[int, PendingUnit] = {}
    # torch deals requests to its loader processes in turn: each has all views of a batch, one after the other.
    size, loaders = work.settings.batch_size, max(1, work.settings.workers if work.data.decodes else 1)

    def requests() -> Iterator[tuple[int, int, int, int] | None]:
        for group in groups:
            units: list[Unit] = []
            for item in group:
                open_units[item.unit.number] = item
                units.append(item.unit)
            for place, unit in enumerate(units):
                open_units[unit.number].num_left = len(units) - place
            starts = range(units[0].start, units[0].stop, size) if units else range(0)
            for first in range(0, len(starts), loaders):
                block = starts[first : first + loaders]
                for unit in units:
                    for at in block:
                        on_step(unit.number, range(at, min(at + size, unit.stop)))
                        yield unit.number, unit.view, at, min(at + size, unit.stop)
                    yield from [None] * (loaders - len(block))

    def finish(number: int, flight: PendingLabels) -> None:
        item, began = open_units[number], time.perf_counter()
        found = flight.wait(work.data)
        item.teacher_seconds += time.perf_counter() - began
        item.add(flight.batch, found)
        if item.num_samples == item.unit.stop - item.unit.start:
            writer.put(open_units.pop(item.unit.number))

    follow = shield_loaders() if work.settings.workers else None
    loader = DataLoader(
        UnitBatches(work.data, work.labels.positions, shares_reads=work.manifest.plan.num_views > 1),
        batch_size=None,
        sampler=requests(),  # type: ignore[arg-type]
        num_workers=work.settings.workers,
        multiprocessing_context="forkserver" if work.settings.workers else None,
        worker_init_fn=follow,
        pin_memory=work.teacher.device.type == "cuda",
    )
    in_flight: deque[tuple[int, PendingLabels]] = deque()
    try:
        with signals_first():
            for batch in loader_batches(loader, "capture.workers"):
                raise_if_signalled()
                if batch is None:
                    continue
                began = time.perf_counter()
                flight = start_labels(work.teacher, work.labels, batch, work.head)
                in_flight.append((batch.unit, flight))
                open_units[batch.unit].teacher_seconds += time.perf_counter() - began
                if len(in_flight) > 1:
                    finish(*in_flight.popleft())
            while in_flight:
                finish(*in_flight.popleft())
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
    """Returns what the teacher scores on the plain view of an evaluation split."""
    found = teacher.scores(data, batches=ranges(len(data), batch_size), progress=progress)
    return TeacherReport(num_parameters=teacher.num_parameters, eval_samples=len(data), **found)
