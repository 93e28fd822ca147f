"""The worker side: opens the teacher once, labels one unit per task, returns a small `Outcome`.

A worker needs the object store and the job, which holds the resolved config: data, weights and `module:factory` are found
by the config's paths, from the worker's own folder. The teacher is loaded once per process. A worker may run two
units at a time: they take turns at the teacher, so that one is labeled while the other is published.

Nothing is raised across the network: an error is returned as text, so that the driver needs none of the classes that
a user's teacher may raise. What each thread is at goes to the scheduler with the worker's heartbeats (`Step`), so that the
driver sees a worker that hangs.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from multiprocessing import current_process
from typing import Any

import torch

from softcache import __version__
from softcache.cache.create import MANIFEST
from softcache.cache.manifest import MAX_MANIFEST_BYTES, Manifest, diff_manifests
from softcache.cache.storage.open import open_objects
from softcache.config.run import RunConfig
from softcache.errors import CacheNotFoundError, ConfigError, IdentityError, SoftcacheError
from softcache.hashing.digests import digest_bytes
from softcache.runs import open_data, open_teacher, prepare_cache
from softcache.runtime.logging import LogFormat, set_log_format
from softcache.teacher.capture.plan import plan_manifest
from softcache.teacher.capture.run import CaptureContext, UnitMetrics, capture_units

__all__ = ["METRIC", "Job", "Outcome", "Prepared", "Step", "label", "prepare"]

METRIC = "softcache"
"""Of a worker's metrics, in its heartbeats: the steps of its threads."""


@dataclass(frozen=True)
class Job:
    """The job description that every worker receives.

    Attributes:
        config: the resolved config, JSON.
        url: the cache; absolute where it is a path.
        manifest_sha256: of the cache; empty before there is one.
        torch_threads: of a worker; None: as many as Dask gave it.
        log: how the worker logs to its own stderr.
        version: of the driver's softcache.
    """

    config: str
    url: str
    manifest_sha256: str = ""
    torch_threads: int | None = None
    log: LogFormat = "text"
    version: str = __version__

    @property
    def key(self) -> str:
        """Names what is to be opened: two jobs of one key share a teacher."""
        return digest_bytes(f"{self.config}\n{self.url}".encode())


@dataclass(frozen=True)
class Outcome:
    """What became of a unit on one worker; exactly one of metrics, found_rows, held and error is set.

    Attributes:
        metrics: it was made.
        found_rows: it had been made, with so many rows.
        held: another run has it.
        error: the error's text.
    """

    unit: int
    worker: str = ""
    metrics: UnitMetrics | None = None
    found_rows: int | None = None
    held: bool = False
    error: str | None = None


@dataclass
class Step:
    """What a thread of a worker is at.

    Attributes:
        url: the cache.
        doing: in words: opening, waiting, which samples, or publishing.
        is_waiting: for a thread of the same worker.
        is_opening: teacher and data are being opened.
        seconds: since when, at the last heartbeat.
    """

    url: str
    unit: int
    doing: str = "waiting for its turn"
    is_waiting: bool = True
    is_opening: bool = False
    seconds: float = 0.0
    since: float = field(default_factory=time.monotonic)

    def move(self, doing: str, *, is_waiting: bool = False, is_opening: bool = False) -> None:
        """Notes that the thread has gone on to something else."""
        self.doing, self.is_waiting, self.is_opening = doing, is_waiting, is_opening
        self.since = time.monotonic()


_STEPS: dict[int, Step] = {}
"""By thread."""


def _report_steps(worker: Any = None) -> list[dict[str, Any]]:
    """Returns the steps of this process's threads, as numbers and texts."""
    now = time.monotonic()
    return [asdict(step) | {"seconds": now - step.since, "since": 0.0} for step in list(_STEPS.values())]


def _send_steps() -> None:
    """Has the steps sent with this worker's heartbeats, if this process is one."""
    try:
        from distributed import get_worker

        get_worker().metrics[METRIC] = _report_steps
    except (ImportError, ValueError):
        return


_OPEN: dict[str, tuple[CaptureContext, threading.Lock]] = {}
_OPENING = threading.Lock()


@dataclass(frozen=True)
class Prepared:
    """What became of the cache on the first worker.

    Attributes:
        manifest_sha256: of the cache; empty with an error.
        error: its text.
        is_storage: the error is of this worker's storage; another worker may have none.
        folder: where the worker was started, in which it looks for relative paths.
    """

    worker: str
    manifest_sha256: str = ""
    error: str = ""
    is_storage: bool = False
    folder: str = ""


def prepare(job: Job) -> Prepared:
    """Creates the cache, or joins the one that is there."""
    try:
        with _OPENING:
            return Prepared(_address(), _open(job, create=True)[0].manifest_sha256)
    except Exception as error:
        return Prepared(
            _address(), error=_format_error(error), is_storage=isinstance(error, OSError), folder=os.getcwd()
        )


def label(job: Job, number: int, *, last: bool = False, alone: bool = False) -> Outcome:
    """Labels and publishes one unit, unless another process has claimed it or has finished it.

    Args:
        last: the last attempt: where it fails, look for the sample that causes the error.
        alone: each sample is loaded and labeled by itself before, so that one at which the worker hangs is known.
    """
    worker = _address()
    work: CaptureContext | None = None
    step = _STEPS[threading.get_ident()] = Step(job.url, number)
    _send_steps()
    try:
        step.move("opening teacher and data", is_opening=True)
        with _OPENING:
            work, turn = _open(job)
        step.move("waiting for its turn", is_waiting=True)
        if job.manifest_sha256 != work.manifest_sha256:
            raise IdentityError(
                f"cache {job.url}: manifest {work.manifest_sha256[:12]}… was opened here, {job.manifest_sha256[:12]}… is "
                "the driver's: the cache was replaced meanwhile; run again"
            )
        made: list[UnitMetrics] = []
        found: list[int] = []
        unit = work.manifest.plan.unit(number)

        def at(_: int, samples: range) -> None:
            words = f"view {unit.view}, samples {samples.start} to {samples.stop - 1}"
            step.move(words if samples else "publishing")

        if alone:
            with turn:
                for sample in range(unit.start, unit.stop):
                    step.move(f"sample {work.data.source.key(sample)!r}, view {unit.view}")
                    _fails(work, unit.view, sample, sample + 1)
            step.move("waiting for its turn", is_waiting=True)
        held = capture_units(work, [unit], on_unit=made.append, on_found=found.append, turn=turn, on_step=at)
        return Outcome(
            number, worker, made[0] if made else None, found[0] if found else None, held=bool(held)
        )
    except Exception as error:
        words = _format_error(error)
        if work is not None and last and getattr(error, "position", None) is None:
            with turn:
                words = bisect_failing_sample(work, number) + words
        _exit_if_device_is_lost(error)
        return Outcome(number, worker, error=words)
    finally:
        _STEPS.pop(threading.get_ident(), None)


def _open(job: Job, *, create: bool = False) -> tuple[CaptureContext, threading.Lock]:
    """Returns this process's teacher, data and cache of a job; `_OPENING` is held."""
    _apply_settings(job)
    if job.key not in _OPEN:
        _OPEN.clear()  # one teacher at a time: the next may need the memory
        config = RunConfig.model_validate_json(job.config)
        if config.capture.workers and current_process().daemon:
            raise ConfigError(
                f"capture.workers: {config.capture.workers} loader processes; this Dask worker is a daemon, which may start "
                "none: start workers with DASK_DISTRIBUTED__WORKER__DAEMON=False, or set capture.workers = 0"
            )
        data = open_data(config)
        teacher = open_teacher(config, data)
        if create:
            objects, manifest, sha256 = prepare_cache(config, data, teacher, job.url)
        else:
            objects = open_objects(job.url)
            try:
                stored = objects.get(MANIFEST, max_bytes=MAX_MANIFEST_BYTES)
            except CacheNotFoundError as error:
                raise CacheNotFoundError(
                    f"cache {job.url}: not there for this worker; every worker must reach the same place: use an object "
                    "store, or a folder that all of them mount"
                ) from error
            manifest, sha256 = Manifest.parse(stored, where=f"cache {job.url}"), digest_bytes(stored)
            planned, _ = plan_manifest(data.train, teacher, config.labels, config.capture)
            if differing := diff_manifests(planned, manifest):
                raise IdentityError(
                    f"cache {job.url}: what this worker has is something else (this worker; the cache):\n  "
                    + "\n  ".join(differing)
                    + "\nGive every worker the same data, weights and softcache"
                )
        work = CaptureContext(objects, manifest, sha256, data.train, teacher, config.labels, config.capture)
        _OPEN[job.key] = work, threading.Lock()
    return _OPEN[job.key]


def _apply_settings(job: Job) -> None:
    """Applies the job's log format, threads and import path to this process."""
    if job.version != __version__:
        raise ConfigError(
            f"softcache {__version__} on this worker, {job.version} at the driver; install the same"
        )
    if "" not in sys.path:
        sys.path.append("")  # `module:factory` finds modules of the worker's folder, as in a plain run
    set_log_format(job.log)
    torch.set_num_threads(job.torch_threads or _dask_threads() or torch.get_num_threads())


def _address() -> str:
    try:
        from distributed import get_worker

        return str(get_worker().address)
    except (ImportError, ValueError):
        return f"process {os.getpid()}"


def _dask_threads() -> int | None:
    try:
        from distributed import get_worker

        return int(get_worker().state.nthreads)
    except (ImportError, ValueError):
        return None


def _format_error(error: Exception) -> str:
    return str(error) if isinstance(error, SoftcacheError) else f"{type(error).__name__}: {error}"


def _exit_if_device_is_lost(error: Exception) -> None:
    """Ends the process after a fault that leaves its CUDA context unusable: Dask starts another and tries again."""
    lost = getattr(torch, "AcceleratorError", None)
    if lost is not None and isinstance(error, lost):
        print(f"softcache: {error}; this worker ends, its context is lost", file=sys.stderr, flush=True)
        os._exit(1)


def bisect_failing_sample(work: CaptureContext, number: int) -> str:
    """Returns "sample KEY, view V: " of the first sample that fails by itself, or "" where none does.

    Costs at most one more pass of the teacher over the unit.
    """
    unit, size = work.manifest.plan.unit(number), work.settings.batch_size
    for start in range(unit.start, unit.stop, size):
        stop = min(start + size, unit.stop)
        if not _fails(work, unit.view, start, stop):
            continue
        while stop - start > 1:
            middle = (start + stop) // 2
            if _fails(work, unit.view, start, middle):
                stop = middle
            else:
                start = middle
        if _fails(work, unit.view, start, stop):
            return f"sample {work.data.source.key(start)!r}, view {unit.view}: "
        return ""
    return ""


def _fails(work: CaptureContext, view: int, start: int, stop: int) -> bool:
    try:
        batch = work.data.load(range(start, stop), view)
        more: Any = {} if work.head is None else {"head": work.head}
        _, faults_P = work.teacher.label(batch, work.labels, **more)
        return bool(faults_P.any())
    except Exception:
        return True
