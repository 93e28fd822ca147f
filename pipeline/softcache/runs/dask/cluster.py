"""A Dask cluster: started on this machine, or joined by its address; and its client as `scheduling` wants it.

`auto`: one worker process per GPU where there are GPUs (by dask-cuda, which gives every process its own), else one per
core. Each runs two tasks at a time, which take turns at the teacher. Labels never live in Dask's memory, so its memory
limits are off. Worker processes end with this one, even by SIGKILL: they watch a pipe to it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import torch

from softcache import __version__
from softcache.errors import ConfigError, MissingExtraError, RunError
from softcache.runs.dask.scheduler import WorkerDied
from softcache.runs.dask.worker import METRIC, Job, Outcome, Step, label
from softcache.runtime.logging import log_info

__all__ = [
    "DaskCluster",
    "LocalWorkers",
    "check_workers",
    "local_workers",
    "open_client",
    "redirect_dask_logs",
]

TASKS_PER_WORKER = 2
CONNECT_SECONDS = "30s"
PRELOAD = "softcache.runs.dask.preload"
LOCAL_SETTINGS = {
    # Deaths are counted by `scheduler`: each costs a load of the teacher.
    "distributed.scheduler.allowed-failures": 0,
    # A process that starts again imports torch; where that takes longer than the default of 15 seconds, on a busy
    # machine, Dask would end the nanny that starts it, and with the last one everything would wait for ever.
    "distributed.deploy.lost-worker-timeout": "10 minutes",
    # A daemon may have no children, and capture.workers are children of a worker.
    "distributed.worker.daemon": False,
}
NO_WORKER_TIMEOUT_SECONDS = 600.0
"""Without a single worker of "auto", after which the run ends."""
RESTART_SECONDS = 60
"""For a worker that hangs to end and to start again."""


@dataclass(frozen=True)
class LocalWorkers:
    """What `auto` starts: so many processes, with a GPU each or none, and so many torch threads in each."""

    workers: int
    gpus: bool
    torch_threads: int


def local_workers(device: str, workers: int | None = None) -> LocalWorkers:
    """Returns what suits this machine: a process per GPU, or per core, unless `workers` is given."""
    cores = len(os.sched_getaffinity(0))
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    workers = workers or gpus or cores
    return LocalWorkers(workers, gpus > 0, max(1, cores // workers))


@contextmanager
def open_client(where: str, local: LocalWorkers | None, *, dashboard: str = ":8787") -> Iterator[Any]:
    """Yields a client of a cluster, which is closed afterwards if it was started here.

    Args:
        where: "auto", or the address of a scheduler.
        local: what "auto" starts.
        dashboard: where "auto" serves Dask's dashboard.

    Raises:
        MissingExtraError: distributed is not installed, or dask-cuda where it is needed.
        ConfigError: `where` is neither.
        RunError: no scheduler answers there.
    """
    try:
        import dask
        from distributed import Client
    except ImportError as error:
        raise MissingExtraError(
            "--dask: distributed is not installed; pip install 'softcache[dask]'"
        ) from error
    if where != "auto" and "://" not in where:
        raise ConfigError(f"--dask {where}: expected auto, or a scheduler's address such as tcp://host:8786")
    with ExitStack() as stack:
        stack.enter_context(redirect_dask_logs())
        if local is not None:
            stack.enter_context(dask.config.set(LOCAL_SETTINGS))
            with warnings.catch_warnings():
                # Where the dashboard's port is taken, the logged link has the port in use.
                warnings.simplefilter("ignore")
                address: Any = stack.enter_context(_start(local, dashboard))
        else:
            address = where
        try:
            client = stack.enter_context(Client(address, timeout=CONNECT_SECONDS, set_as_default=False))
        except OSError as error:
            raise RunError(
                f"--dask {where}: no scheduler answers there: {error}; start one, or use --dask auto"
            ) from error
        yield client


def check_workers(client: Any) -> None:
    """Waits for the first worker, and raises unless all that are there have this version of softcache.

    Raises:
        RunError: some have another, or none; each is named with what it has.
    """
    task = None
    if not client.scheduler_info(n_workers=-1)["workers"]:
        task = client.submit(int, pure=False)  # an adaptive cluster starts no worker without a task
    client.wait_for_workers(1)
    del task
    # By builtins alone: a function of ours could not be unpickled where softcache is missing.
    found = client.run(eval, "__import__('softcache').__version__", on_error="return")
    wrong = [
        f"{worker}: {f'{type(has).__name__}: {has}' if isinstance(has, BaseException) else has}"
        for worker, has in sorted(found.items())
        if has != __version__
    ]
    if wrong:
        raise RunError(
            f"dask: {len(wrong)} of {len(found)} workers cannot label: softcache {__version__} is needed on each, as at the "
            f"driver; found {'; '.join(wrong[:10])}{'; …' if len(wrong) > 10 else ''}; install it there, or start "
            "the workers from an environment that has it"
        )


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        # A message of nothing but a traceback is of a scheduler that is gone, and one of CancelledError of a unit that
        # the driver abandons: it knows both.
        if text.strip() and "CancelledError" not in text:
            log_info(f"dask: {text}")


@contextmanager
def redirect_dask_logs() -> Iterator[None]:
    """Routes Dask's warnings and errors through `log_info` in this process, so that a JSON log stays valid JSON."""
    parent = logging.getLogger("distributed")
    # Some, such as that of the client, have handlers of their own.
    names = [name for name in logging.root.manager.loggerDict if name.startswith("distributed.")]
    loggers = [parent, *map(logging.getLogger, names)]
    before = [(logger, logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [], logger is not parent
    parent.handlers = [_Lines(logging.WARNING)]
    parent.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, handlers, propagate, level in before:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


def _start(local: LocalWorkers, dashboard: str) -> Any:
    common: dict[str, Any] = {
        "n_workers": local.workers,
        "threads_per_worker": TASKS_PER_WORKER,
        "memory_limit": None,
        "dashboard_address": dashboard,
        "silence_logs": logging.WARNING,
        "preload": [PRELOAD],
    }
    if local.gpus and local.workers > 1:
        try:
            from dask_cuda import LocalCUDACluster
        except ImportError as error:
            raise MissingExtraError(
                f"--dask auto: {local.workers} GPUs, and dask-cuda, which gives each worker its own, is not installed; pip "
                "install dask-cuda, or hide all but one with CUDA_VISIBLE_DEVICES=0"
            ) from error
        return LocalCUDACluster(**common)
    from distributed import LocalCluster

    return LocalCluster(processes=True, **common)


@dataclass
class DaskCluster:
    """Dask's client as `scheduling.Cluster`."""

    client: Any
    job: Job
    is_local: bool = False
    function: Callable[..., Outcome] = label
    _run: str = field(default_factory=lambda: uuid4().hex[:8])
    _threads: dict[str, int] = field(default_factory=dict)
    _steps: list[tuple[str, Step]] = field(default_factory=list)
    _bound: list[tuple[Any, frozenset[str]]] = field(default_factory=list)
    _asked: float = -1e9
    _last_seen: float = field(default_factory=time.monotonic)

    def submit(self, unit: int, *, last: bool, avoid: frozenset[str], alone: bool = False) -> Any:
        others = [worker for worker in self.threads() if worker not in avoid] if avoid else []
        handle = self.client.submit(
            self.function,
            self.job,
            unit,
            last=last,
            alone=alone,
            key=f"unit-{unit:05d}-{self._run}-{uuid4().hex[:8]}",
            pure=False,
            workers=others or None,
            allow_other_workers=False,
        )
        if others:
            self._bound.append((handle, frozenset(others)))
        return handle

    def on_done(self, handle: Any, call: Callable[[], None]) -> None:
        handle.add_done_callback(lambda future: call())

    def result(self, handle: Any) -> Outcome | None:
        from distributed import KilledWorker

        if handle.status in ("cancelled", "lost"):
            return None
        try:
            return handle.result()
        except KilledWorker as error:
            raise WorkerDied(error.allowed_failures + 1) from error
        except Exception as error:  # it did not even start: no softcache there, or another version of Dask
            return Outcome(-1, "a worker", error=f"{type(error).__name__}: {error}")

    def cancel(self, handles: Iterable[Any]) -> None:
        if (found := list(handles)) and self.is_alive():
            self.client.cancel(found, force=True)

    def threads(self) -> dict[str, int]:
        """Returns tasks at once by worker, asked once a second."""
        if time.monotonic() - self._asked > 1.0:
            self._asked = time.monotonic()
            workers = self.client.scheduler_info(n_workers=-1)["workers"]
            self._threads = {address: worker["nthreads"] for address, worker in workers.items()}
            self._steps = [
                (address, Step(**step))
                for address, worker in workers.items()
                for step in worker.get("metrics", {}).get(METRIC, ())
            ]
            self._free_bound()
        return self._threads

    def steps(self) -> list[tuple[str, Step]]:
        """Returns what the threads of each worker are at, of this run's cache, by their last heartbeats."""
        self.threads()
        return [(worker, step) for worker, step in self._steps if step.url == self.job.url]

    def restart(self, worker: str) -> None:
        """Ends a worker's process, which starts again where a nanny watches it; returns at once."""
        threading.Thread(target=self._restart, args=(worker,), daemon=True).start()

    def _restart(self, worker: str) -> None:
        with suppress(Exception):  # it has gone, or the scheduler has
            try:
                self.client.restart_workers([worker], timeout=RESTART_SECONDS, raise_for_error=False)
            except ValueError:  # no nanny
                self.client.run(os._exit, 1, workers=[worker], on_error="ignore")

    def _free_bound(self) -> None:
        """Cancels tasks whose workers are all gone, which Dask would keep for ever: they are asked for again."""
        self._bound = [(handle, workers) for handle, workers in self._bound if handle.status == "pending"]
        stranded = [handle for handle, workers in self._bound if not workers & self._threads.keys()]
        if stranded:
            self.client.cancel(stranded, force=True)

    def num_threads(self) -> int:
        return sum(self.threads().values())

    def is_alive(self) -> bool:
        if self.threads() or not self.is_local:
            self._last_seen = time.monotonic()
        return (
            self.client.status == "running" and time.monotonic() - self._last_seen < NO_WORKER_TIMEOUT_SECONDS
        )
