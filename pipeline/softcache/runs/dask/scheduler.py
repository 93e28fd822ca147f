"""Schedules units on workers: a bounded window, three attempts, and a failure counts against its own unit alone.

    while anything is left: keep `window` units in flight; take what came back; count it, try it again, or give it up

A unit that fails is tried again on other workers; after three tries it is given up and the rest goes on, unless nothing
but failures comes back. A worker is at fault where others make what failed on it: after three such units without one that
it made itself, it gets no more, and is named. A unit whose worker process died twice may have been the neighbor of the one
that kills it: it runs once more at the end with no other unit, and only then is it given up. A worker whose unit does not
move on for long is restarted; at its next try each sample of the unit is taken by itself before, so that one which hangs is
known by name. Finished units are known by their markers alone; the driver's memory holds the window and the failures.
"""

from __future__ import annotations

import heapq
import itertools
import queue
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from softcache.errors import RunError
from softcache.runs.dask.worker import Outcome, Step
from softcache.runtime.display import format_duration
from softcache.runtime.logging import log_info
from softcache.runtime.signals import raise_if_signalled

__all__ = ["MAX_ATTEMPTS", "Cluster", "Failure", "Scheduler", "WorkerDied"]

MAX_ATTEMPTS = 3
MAX_CONSECUTIVE_FAILURES = 10
"""Units given up one after the other, without one that was made between them, after which a run ends."""
MAX_WORKER_FAULTS = 3
"""Units that failed on a worker and were made by another, without one that it made since, after which it gets no more."""
CLAIM_RETRY_SECONDS = 1.0
"""Before a unit that another run holds is asked for again."""
POLL_SECONDS = 0.25
STALL_POLL_SECONDS = 2.0
MEDIANS_OF_A_STALL, MIN_STALL_SECONDS, FIRST_STALL_SECONDS = 10.0, 300.0, 3600.0
"""A unit hangs if it does not move on for ten times the median unit, for five minutes at least; for an hour before three are
made, and while teacher and data are being opened."""
RESTART_SECONDS = 60.0
"""After a worker is restarted here, in which a death counts against no unit."""
HELD_SECONDS = 180.0
"""For the claim of a process that hung to end, at least: a lease takes a minute."""
MAX_DEATHS = 2
"""Of a unit's workers, after which it runs with no other unit."""


class WorkerDied(Exception):
    """The process that worked on a unit died, as often as the cluster tries.

    Attributes:
        deaths: how often.
    """

    def __init__(self, deaths: int = 1) -> None:
        super().__init__(f"the worker process died {deaths} times")
        self.deaths = deaths


class Cluster(Protocol):
    """What hands tasks to workers: Dask's client (`softcache.runs.dask.cluster`), or one of a test."""

    def submit(self, unit: int, *, last: bool, avoid: frozenset[str], alone: bool = False) -> Any:
        """Starts a unit, on none of the workers in `avoid` as long as there are others; returns a handle.

        Args:
            alone: take each sample by itself before.
        """

    def on_done(self, handle: Any, call: Callable[[], None]) -> None:
        """Calls back, from any thread, when the handle has a result."""

    def result(self, handle: Any) -> Outcome | None:
        """Returns the outcome; None where the task was lost and has to be asked for again.

        Raises:
            WorkerDied: its worker did.
        """

    def cancel(self, handles: Iterable[Any]) -> None: ...
    def num_threads(self) -> int:
        """Returns how many tasks run at once."""

    def is_alive(self) -> bool: ...
    def steps(self) -> Iterable[tuple[str, Step]]:
        """Returns what the threads of each worker are at."""

    def restart(self, worker: str) -> None:
        """Ends a worker's process; returns at once."""


@dataclass
class Failure:
    """A unit that was given up: the last error, and the workers that tried it."""

    unit: int
    error: str
    workers: list[str] = field(default_factory=list)


@dataclass
class Stall:
    """How often a unit hung, since when the last time, and that failure until it is counted."""

    count: int = 0
    since: float = 0.0
    pending: Outcome | None = None


class Scheduler:
    """Hands out the units of one run.

    Args:
        on_outcome: called in this thread with every unit that is made or found.
        stall_seconds: without progress, after which a unit hangs; None: by the median unit.
    """

    def __init__(
        self,
        cluster: Cluster,
        units: Iterable[int],
        on_outcome: Callable[[Outcome], None],
        *,
        stall_seconds: float | None = None,
    ) -> None:
        self._cluster, self._on_outcome, self._stall_seconds = cluster, on_outcome, stall_seconds
        self._seconds: deque[float] = deque(maxlen=101)
        self._next_look = time.monotonic() + STALL_POLL_SECONDS
        self._restarted: set[str] = set()
        self._restarting_until = 0.0
        self._stalls: dict[int, Stall] = {}
        self._deaths: dict[int, int] = {}
        self._fresh: Iterator[int] = iter(units)
        self._later: list[tuple[float, int, int]] = []  # (not before, number, unit), a heap
        self._numbers = itertools.count()
        self._alone: list[int] = []
        self._tried: dict[int, Failure] = {}
        self._in_flight: dict[int, Any] = {}
        self._done: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._running_alone: int | None = None
        self._streak = 0
        self._faults: dict[str, int] = {}
        self._excluded: set[str] = set()
        self.failures: list[Failure] = []

    def run(self) -> list[Failure]:
        """Runs until every unit is made, found or given up; returns those that were given up.

        Raises:
            RunError: the cluster is gone, or only failures come back; what is finished is kept.
            Interrupted: a signal came; what is in flight is abandoned.
        """
        try:
            while self._fill():
                try:
                    self._take(self._done.get(timeout=POLL_SECONDS))
                except queue.Empty:
                    if not self._cluster.is_alive():
                        raise RunError(
                            "dask: the scheduler is gone, or every local worker; finished units are kept: run again"
                        ) from None
                if time.monotonic() >= self._next_look:
                    self._look_for_stalls()
                raise_if_signalled()
        finally:
            self._cluster.cancel(self._in_flight.values())
        return self.failures

    def _limit(self) -> float:
        if self._stall_seconds is not None:
            return self._stall_seconds
        if len(self._seconds) < 3:
            return FIRST_STALL_SECONDS
        return max(MIN_STALL_SECONDS, MEDIANS_OF_A_STALL * statistics.median(self._seconds))

    def _look_for_stalls(self) -> None:
        """Restarts workers that do not move on; what they had is tried again."""
        self._next_look = time.monotonic() + STALL_POLL_SECONDS
        for worker, step in self._cluster.steps():
            limit = self._limit()
            if step.is_opening:
                limit = max(limit, self._stall_seconds or FIRST_STALL_SECONDS)
            if step.is_waiting or step.seconds <= limit or worker in self._restarted:
                continue
            self._restarted.add(worker)
            self._excluded.add(worker)
            self._restarting_until = time.monotonic() + RESTART_SECONDS
            words = f"{step.doing}: no progress for {format_duration(step.seconds)}; the limit is {format_duration(limit)}"
            log_info(f"dask: worker {worker}, unit {step.unit}, {words}; it is restarted")
            handle = self._in_flight.get(step.unit)
            if handle is not None:
                known = self._stalls.setdefault(step.unit, Stall())
                known.count, known.since = known.count + 1, time.monotonic()
                known.pending = Outcome(step.unit, worker, error=words)
                self._cluster.cancel([handle])
            self._cluster.restart(worker)

    def _fill(self) -> bool:
        """Submits what the window has room for; returns whether anything is left to wait for."""
        if self._running_alone is None:
            window = 2 * max(1, self._cluster.num_threads())
            while len(self._in_flight) < window and (unit := self._next()) is not None:
                self._submit(unit)
        if not self._in_flight and not self._later and self._alone:
            self._running_alone = self._alone.pop()
            self._submit(self._running_alone)
        return bool(self._in_flight or self._later)

    def _next(self) -> int | None:
        if self._later and self._later[0][0] <= time.monotonic():
            return heapq.heappop(self._later)[2]
        return next(self._fresh, None)

    def _submit(self, unit: int) -> None:
        tried = self._tried.get(unit)
        workers = tried.workers if tried else []
        handle = self._cluster.submit(
            unit,
            last=len(workers) == MAX_ATTEMPTS - 1,
            avoid=frozenset(workers) | self._excluded,
            alone=unit in self._stalls,
        )
        self._in_flight[unit] = handle
        self._cluster.on_done(handle, lambda: self._done.put(unit))

    def _again(self, unit: int, seconds: float = 0.0) -> None:
        heapq.heappush(self._later, (time.monotonic() + seconds, next(self._numbers), unit))

    def _take(self, unit: int) -> None:
        handle = self._in_flight.pop(unit)
        was_alone, self._running_alone = self._running_alone == unit, None
        stall = self._stalls.get(unit)
        try:
            outcome = self._cluster.result(handle)
        except WorkerDied as died:
            if stall is not None and stall.pending is not None:
                outcome = None
            elif time.monotonic() < self._restarting_until:  # of its worker, for another unit
                self._again(unit)
                return
            else:
                self._died(unit, died.deaths, was_alone=was_alone)
                return
        if outcome is None and stall is not None and stall.pending is not None:
            error, stall.pending = stall.pending, None
            self._failed(unit, error, give_up=stall.count > 1)  # the second time its sample is known
        elif outcome is None:
            self._again(unit)
        elif (
            outcome.held
            and stall is not None
            and time.monotonic() - stall.since > max(2 * self._limit(), HELD_SECONDS)
        ):
            tried = self._tried.pop(unit, Failure(unit, ""))
            tried.error += "; its claim is still held, by a process that hangs and cannot be ended"
            self._give_up(tried)
        elif outcome.held:
            self._again(unit, CLAIM_RETRY_SECONDS)
        elif outcome.error is not None:
            self._failed(unit, outcome)
        else:
            self._streak = 0
            if outcome.metrics is not None:
                self._seconds.append(outcome.metrics.seconds)
                self._blame(self._tried.get(unit), outcome.worker)
            for known in (self._tried, self._stalls, self._deaths):
                known.pop(unit, None)  # type: ignore[attr-defined]
            self._on_outcome(outcome)

    def _died(self, unit: int, deaths: int, *, was_alone: bool) -> None:
        """Tries a unit again whose worker died; alone from its second death on; gives it up if it dies alone."""
        total = self._deaths[unit] = self._deaths.get(unit, 0) + deaths
        if was_alone:
            words = (
                f"the worker process died {total} times while it had this unit, the last time with no other unit: out of "
                "memory, or a crash in native code; see the worker's log"
            )
            self._give_up(Failure(unit, words))
        elif total >= MAX_DEATHS:
            self._alone.append(unit)
        else:
            self._again(unit)

    def _failed(self, unit: int, outcome: Outcome, *, give_up: bool = False) -> None:
        tried = self._tried.setdefault(unit, Failure(unit, ""))
        tried.error = outcome.error or ""
        tried.workers.append(outcome.worker)
        if len(tried.workers) < MAX_ATTEMPTS and not give_up:
            self._again(unit)
        else:
            self._give_up(self._tried.pop(unit))

    def _blame(self, tried: Failure | None, maker: str) -> None:
        """Counts a unit that was made against the workers that it had failed on."""
        self._faults[maker] = 0
        for worker in set(tried.workers if tried else ()) - {maker} - self._excluded:
            assert tried is not None
            self._faults[worker] = self._faults.get(worker, 0) + 1
            if self._faults[worker] >= MAX_WORKER_FAULTS:
                self._excluded.add(worker)
                log_info(
                    f"dask: worker {worker} failed on {self._faults[worker]} units that others made; it gets no more; "
                    f"the last, unit {tried.unit}: {tried.error}"
                )

    def _give_up(self, failure: Failure) -> None:
        self.failures.append(failure)
        self._streak += 1
        if self._streak >= MAX_CONSECUTIVE_FAILURES:
            raise RunError(
                f"dask: {self._streak} units failed one after the other and none was made between them; the last, unit "
                f"{failure.unit}: {failure.error}\nFinished units are kept: mend this and run again"
            )
