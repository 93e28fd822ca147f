"""What a capture would take, before it is run: bytes, time and rows left, measured on a few chunks of the real source.

    plan as the real run would   ->  units that are left there
    warm up on one batch         ->  capture chunks, spread over the source, into a temporary folder
    bytes and seconds per row    ->  times the rows that are left

The chunks go through the very code of a capture (loader, teacher, sparsify, codec, compression, disk), one chunk to a
unit, so that what is compressed together is as large as in the real cache. Nothing is written where the cache is or
will be. Not measured: what a bucket's network takes, the start of loader processes, and what several views of a file save in
decoding, so that their time is an upper estimate.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from softcache.cache.create import create_cache, join_cache
from softcache.cache.manifest import Manifest, Plan, Unit
from softcache.cache.storage.base import Objects
from softcache.cache.storage.open import open_objects
from softcache.cache.units import finished_units
from softcache.data.batch import Dataset as Data
from softcache.data.batch import ranges
from softcache.labels import OutputHead
from softcache.labels.sparsify import LabelSettings
from softcache.runtime.signals import defer_signals
from softcache.teacher.base import Teacher
from softcache.teacher.capture.labeler import start_labels
from softcache.teacher.capture.plan import CaptureSettings, plan_manifest
from softcache.teacher.capture.run import CaptureContext, UnitMetrics, capture_units
from softcache.teacher.capture.shared import parsed_head, shared_objects
from softcache.teacher.capture.writer import PendingUnit, UnitBatches

__all__ = ["MEASURE_SECONDS", "Estimate", "estimate_capture"]

MEASURE_SECONDS = 15.0
"""Chunks are begun until so long after the first; two are measured in any case, where there are two."""
MAX_CHUNKS = 64
GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Estimate:
    """What is done of a cache, and what the rest would take.

    Attributes:
        units, rows: of the whole cache; `*_done` are there, `*_left` are what a run would make.
        num_bytes: of all shards of the finished cache: those there, and the estimate for the rest.
        seconds: of this process, for what is left, `evaluate_seconds` for scoring the teacher included.
        measured_rows, measured_seconds: what the rate rests on; the first chunk is not in it, unless it is the only one.
    """

    units: int
    units_done: int
    units_left: int
    rows: int
    rows_done: int
    rows_left: int
    num_bytes: int
    num_bytes_done: int
    num_bytes_left: int
    bytes_per_row: float | None
    rows_per_second: float | None
    seconds: float
    evaluate_seconds: float
    measured_chunks: int
    measured_rows: int
    measured_seconds: float


def estimate_capture(
    objects: Objects,
    *,
    data: Data,
    evaluation: Data,
    teacher: Teacher,
    labels: LabelSettings,
    settings: CaptureSettings,
    measure_seconds: float = MEASURE_SECONDS,
) -> Estimate:
    """Returns what `capture` would do at a place and take for it; writes nothing there.

    Raises:
        IdentityError: the cache there was made from something else.
        LabelError: the teacher's logits cannot be labeled.
    """
    manifest, _ = plan_manifest(data, teacher, labels, settings)
    found, digest = join_cache(objects, manifest) or (None, "")
    manifest = found or manifest
    finished = finished_units(objects, manifest, digest) if found else None
    units_done, done, bytes_done = (
        (len(finished), finished.num_rows, finished.num_bytes) if finished is not None else (0, 0, 0)
    )
    total = manifest.total_rows
    measured: list[UnitMetrics] = []
    evaluate = 0.0
    if done < total:
        shared = shared_objects(teacher, data, labels, batch_size=settings.batch_size)
        head = parsed_head(shared, teacher, labels)
        _warm_up(data, teacher, labels, settings, manifest, head)
        measured = _measure(data, teacher, labels, settings, manifest.plan, measure_seconds, shared)
        if found is None and settings.evaluate:
            evaluate = _evaluation_seconds(evaluation, teacher, settings.batch_size)
    steady = measured[1:] or measured
    rows, seconds = sum(unit.rows for unit in steady), sum(unit.seconds for unit in steady)
    all_rows = sum(unit.rows for unit in measured)
    per_row = sum(unit.num_bytes for unit in measured) / all_rows if all_rows else None
    left = total - done
    bytes_left = round(left * per_row) if per_row is not None else 0
    return Estimate(
        units=manifest.plan.num_units,
        units_done=units_done,
        units_left=manifest.plan.num_units - units_done,
        rows=total,
        rows_done=done,
        rows_left=left,
        num_bytes=bytes_done + bytes_left,
        num_bytes_done=bytes_done,
        num_bytes_left=bytes_left,
        bytes_per_row=per_row,
        rows_per_second=rows / seconds if seconds else None,
        seconds=evaluate + (left * seconds / rows if rows else 0.0),
        evaluate_seconds=evaluate,
        measured_chunks=len(measured),
        measured_rows=rows,
        measured_seconds=seconds,
    )


def _warm_up(
    data: Data,
    teacher: Teacher,
    labels: LabelSettings,
    settings: CaptureSettings,
    manifest: Manifest,
    head: OutputHead | None,
) -> None:
    """Labels and encodes one batch, so that compilers and allocators have done what they do once."""
    stop = min(settings.batch_size, manifest.plan.unit_samples)
    batch = UnitBatches(data, labels.positions)[0, 0, 0, stop]
    with ExitStack() as nothing:
        flight = start_labels(teacher, labels, batch, head)
        record = flight.wait(data)
        item = PendingUnit(manifest.plan.unit(0), nothing)
        item.add(flight.batch, record)
        item.columns(manifest.build_codec(), ragged=manifest.rows is not None)


def _measure(
    data: Data,
    teacher: Teacher,
    labels: LabelSettings,
    settings: CaptureSettings,
    plan: Plan,
    limit_seconds: float,
    shared: dict[str, bytes],
) -> list[UnitMetrics]:
    """Captures chunks into a temporary folder, one to a unit; returns what each took."""
    small = settings.model_copy(
        update={"unit_samples": plan.chunk_samples, "chunk_samples": plan.chunk_samples}
    )
    manifest, samples = plan_manifest(data, teacher, labels, small)
    measured: list[UnitMetrics] = []
    with tempfile.TemporaryDirectory(prefix="softcache-dry-run-") as folder:
        objects = open_objects(folder, create=True)
        manifest, digest = create_cache(objects, manifest, samples, shared=lambda: shared)
        work = CaptureContext(objects, manifest, digest, data, teacher, labels, small)
        with defer_signals():
            capture_units(
                work, _until(limit_seconds, _spread(manifest.plan)), on_unit=measured.append, together=1
            )
    return measured


def _spread(plan: Plan) -> Iterator[Unit]:
    """Yields units from all over the source, whichever number of them is taken."""
    numbers = dict.fromkeys(int((0.5 + i * GOLDEN) % 1 * plan.num_units) for i in range(MAX_CHUNKS))
    return (plan.unit(number) for number in numbers)


def _until(limit_seconds: float, units: Iterator[Unit]) -> Iterator[Unit]:
    started = time.monotonic()
    for number, unit in enumerate(units):
        if number >= 2 and time.monotonic() - started > limit_seconds:
            return
        yield unit


def _evaluation_seconds(data: Data, teacher: Teacher, batch_size: int) -> float:
    """Returns what scoring the teacher on the evaluation split would take, from its second batch (or its only one)."""
    batches, begun = list(ranges(len(data), batch_size))[:2], time.perf_counter()
    for batch in batches:
        begun = time.perf_counter()
        teacher.scores(data, batches=[batch])
    return (time.perf_counter() - begun) * len(data) / len(batches[-1])
