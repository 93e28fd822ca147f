"""`softcache teacher-logits --dask`: the cache is made on a worker, its units on all of them; the driver only counts.

The driver loads neither teacher nor data, and may die at any moment: a rerun does what has no marker.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from softcache.cache.create import MANIFEST
from softcache.cache.manifest import MAX_MANIFEST_BYTES, Manifest
from softcache.cache.repair import usable_units
from softcache.cache.storage.base import Objects
from softcache.cache.storage.open import open_objects
from softcache.cache.units import fold_if_possible, open_index
from softcache.config.run import RunConfig
from softcache.errors import CacheNotFoundError, RunError, UnitsFailedError
from softcache.hashing.digests import digest_bytes
from softcache.runs import log_capture, log_unit, make_teacher, open_data, teacher_is_missing
from softcache.runs.dask.cluster import DaskCluster, check_workers, local_workers, open_client
from softcache.runs.dask.scheduler import MAX_ATTEMPTS, Failure, Scheduler
from softcache.runs.dask.worker import Job, Outcome, Prepared, prepare
from softcache.runtime.logging import event, log_format, log_info, progress_bar
from softcache.runtime.signals import defer_signals
from softcache.teacher.capture.run import CaptureReport

__all__ = ["capture_on_dask"]

SHOWN_FAILURES = 20


def capture_on_dask(
    config: RunConfig,
    url: str,
    where: str,
    *,
    workers: int | None = None,
    torch_threads: int | None = None,
    dashboard: str = ":8787",
    stall_seconds: float | None = None,
) -> CaptureReport:
    """Runs the teacher on a cluster over what is not labeled yet; returns what was done.

    Args:
        where: "auto", or the address of a scheduler.
        workers: processes of "auto"; None: one per GPU, or per core.
        torch_threads: of a worker; None: what a process of "auto" has of the cores, elsewhere as many as Dask gave the
            worker. A matrix product on a CPU may differ in its last bit between numbers of threads.
        stall_seconds: without progress in a unit, after which its worker is restarted; None: ten times the median unit, five
            minutes at least, and an hour before three are made.

    Raises:
        UnitsFailedError: units were given up, after three failures as a rule; the others are done.
        RunError: no cluster, or it went away.
    """
    if teacher_is_missing(config):
        make_teacher(config, open_data(config))
    if "://" not in url:
        url = str(Path(url).absolute())  # workers may be started in another folder
    local = local_workers(config.capture.device, workers) if where == "auto" else None
    threads = torch_threads or (local.torch_threads if local else None)
    job = Job(config.model_dump_json(exclude_unset=True), url, torch_threads=threads, log=log_format())
    with open_client(where, local, dashboard=dashboard) as client:
        cluster = DaskCluster(client, job, is_local=local is not None)
        workers = len(cluster.threads())
        waiting = "" if workers else ", waiting for the first"
        log_info(f"dask: {workers} workers at {client.scheduler.address}{waiting}{_dashboard(client)}")
        if local is None:
            check_workers(client)
        objects, manifest, sha256 = _prepared(client, job)
        cluster.job = replace(job, manifest_sha256=sha256)
        report, failures = _capture(cluster, objects, manifest, stall_seconds)
    if failures:
        raise _units_failed_error(manifest, url, failures)
    log_capture(url, report)
    return report


def _dashboard(client: Any) -> str:
    link = client.dashboard_link
    return f"; dashboard {link}" if link else ""


def _prepared(client: Any, job: Job) -> tuple[Objects, Manifest, str]:
    """Has a worker create or join the cache; returns it as the driver sees it.

    One that cannot write there is no reason to end: another is asked.
    """
    tried: set[str] = set()
    deaths = 0
    while True:
        others = sorted(set(client.scheduler_info(n_workers=-1)["workers"]) - tried) if tried else None
        try:
            found = client.submit(prepare, job, pure=False, workers=others).result()
        except Exception as failed:  # it did not even start: no softcache there, or the process died
            deaths += type(failed).__name__ == "KilledWorker"
            if 0 < deaths < MAX_ATTEMPTS:
                continue
            lacking = (
                "; a process that dies as it loads the teacher mostly lacks memory: start workers with --memory-limit 0, "
                "or give them more"
            )
            found = Prepared("", error=f"{type(failed).__name__}: {failed}{lacking if deaths else ''}")
        if not found.error:
            break
        tried.add(found.worker)
        left = set(client.scheduler_info(n_workers=-1)["workers"]) - tried
        if not (found.is_storage and left and len(tried) < MAX_ATTEMPTS):
            where = f" (worker {found.worker}, in its folder {found.folder})" if found.folder else ""
            raise RunError(f"dask: the first worker could not begin: {found.error}{where}")
        log_info(f"dask: worker {found.worker} could not begin: {found.error}; another one is asked")
    sha256, objects = found.manifest_sha256, open_objects(job.url)
    try:
        stored = objects.get(MANIFEST, max_bytes=MAX_MANIFEST_BYTES)
    except CacheNotFoundError as missing:
        raise RunError(
            f"cache {job.url}: a worker made it, but it is not there for this process: driver and workers must reach the "
            "same place; use an object store, or a folder that all of them mount"
        ) from missing
    if digest_bytes(stored) != sha256:
        raise RunError(
            f"cache {job.url}: another manifest here than the workers see; driver and workers must reach the same place"
        )
    return objects, Manifest.parse(stored, where=f"cache {job.url}"), sha256


def _capture(
    cluster: DaskCluster, objects: Objects, manifest: Manifest, stall_seconds: float | None
) -> tuple[CaptureReport, list[Failure]]:
    started, report, seen = time.monotonic(), CaptureReport(workers=0), set[str]()
    url, num_units = cluster.job.url, manifest.plan.num_units
    index = open_index(objects, manifest, cluster.job.manifest_sha256)
    finished = usable_units(index)
    report.units_found = len(finished)
    settings = json.loads(cluster.job.config)
    event(
        "run_started",
        run="teacher-logits",
        cache=url,
        rows=manifest.total_rows,
        units=num_units,
        config=settings,
    )
    with progress_bar("teacher: label", manifest.total_rows, "rows") as advance, defer_signals():
        advance.found(finished.num_rows)

        def count(outcome: Outcome) -> None:
            seen.add(outcome.worker)
            workers = len(cluster.threads())
            report.workers = max(report.workers, workers)
            advance.note(f"{workers} workers")
            if outcome.metrics is not None:
                report.add(outcome.metrics)
                log_unit(outcome.metrics, worker=outcome.worker, workers=workers)
                advance(outcome.metrics.rows)
            elif outcome.found_rows is not None:
                report.units_found += 1
                advance(outcome.found_rows)

        pending = iter(finished.missing.tolist())
        failures = Scheduler(cluster, pending, count, stall_seconds=stall_seconds).run()
    fold_if_possible(index)
    report.seconds = time.monotonic() - started
    return report, failures


def _units_failed_error(manifest: Manifest, url: str, failures: list[Failure]) -> UnitsFailedError:
    """Returns an error that lists the units that were given up."""
    failures = sorted(failures, key=lambda failure: failure.unit)
    lines = []
    for failure in failures[:SHOWN_FAILURES]:
        unit = manifest.plan.unit(failure.unit)
        tried = f" (tried on {', '.join(failure.workers)})" if failure.workers else ""
        lines.append(
            f"unit {unit.number} (view {unit.view}, samples {unit.start} to {unit.stop - 1}): {failure.error}{tried}"
        )
    if len(failures) > SHOWN_FAILURES:
        lines.append(f"and {len(failures) - SHOWN_FAILURES} more")
    done = manifest.plan.num_units - len(failures)
    return UnitsFailedError(
        f"cache {url}: {len(failures)} of {manifest.plan.num_units} units failed and were given up, the other "
        f"{done} are done:\n  "
        + "\n  ".join(lines)
        + "\nMend what they name and run again: only these are tried"
    )
