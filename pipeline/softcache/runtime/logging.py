"""Progress and logs of a run: a live bar on a terminal, plain lines elsewhere, or one JSON object per line.

Results go to stdout, all of this to stderr. `set_log_format("json")` (`--log json` of a command) makes every line there an
object with `time` (UTC), `event` and the event's own fields; `log_info` becomes {"event": "message", "text": …}, and bars
become {"event": "progress", …}. As text, events are not shown: the bars tell what they tell.

Of a run of many processes, the first one speaks.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
from rich.progress import TimeRemainingColumn as TimeLeft

from softcache.runtime.distributed import is_rank_zero

__all__ = [
    "Advance",
    "LogFormat",
    "event",
    "log_event",
    "log_format",
    "log_info",
    "progress_bar",
    "set_log_format",
]

PLAIN_SECONDS = 10.0
LogFormat = Literal["text", "json"]


class _Mode:
    """How this process logs; stderr is of a process, so there is one of these."""

    format: LogFormat = "text"
    lock = threading.Lock()


def log_format() -> LogFormat:
    """Returns how this process logs."""
    return _Mode.format


def set_log_format(format: LogFormat) -> None:
    """Chooses how this process logs from here on."""
    _Mode.format = format


def event(name: str, **fields: Any) -> None:
    """Logs one event as a JSON object on a line of stderr; as text, or of a process that is not the first, nothing.

    Args:
        fields: numbers, strings, None, and lists and dicts of them.
    """
    if _Mode.format == "json" and is_rank_zero():
        _write_event(name, fields)


def _write_event(name: str, fields: dict[str, Any]) -> None:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    line = json.dumps({"time": now, "event": name, **fields}, default=str)
    with _Mode.lock:  # the writer thread logs, too
        _write(line)


def _write(line: str) -> None:
    print(f"{line}\n", end="", file=sys.stderr, flush=True)  # one write: processes may share a stderr


def log_info(text: str) -> None:
    """Says one line about what goes on."""
    if is_rank_zero():
        log_event("message", text, text=text)


def log_event(name: str, line: str, **fields: Any) -> None:
    """Says a line, of whatever process; where objects are logged, an event instead."""
    if _Mode.format == "json":
        _write_event(name, fields)
    else:
        _write(line)


class Advance(Protocol):
    """Counts what is done."""

    def __call__(self, count: int) -> None: ...

    def found(self, count: int) -> None:
        """Counts what was done before; it is no part of the rate."""

    def note(self, text: str) -> None:
        """Shows a few words behind the figures, until the next ones."""


@contextmanager
def progress_bar(label: str, total: int, unit: str = "samples") -> Iterator[Advance]:
    """Yields `advance(n)`; shows how far the step is, its rate and the time left."""
    if not is_rank_zero():
        yield _Silence()
        return
    console = Console(stderr=True)
    if console.is_terminal and _Mode.format == "text":
        with _Bar(label, total, unit, console) as bar:
            yield bar
    else:
        lines = _Lines(label, total, unit)
        yield lines
        lines.end()


class _Silence:
    """Of a process that is not the first."""

    def __call__(self, count: int) -> None: ...
    def found(self, count: int) -> None: ...
    def note(self, text: str) -> None: ...


class _Bar:
    """A live bar."""

    def __init__(self, label: str, total: int, unit: str, console: Console) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeLeft(),
            TextColumn("{task.fields[note]}"),
        )
        self._progress, self._unit = Progress(*columns, console=console), unit
        self._started, self._now = time.monotonic(), 0
        self._task = self._progress.add_task(label, total=total, rate="", note="")

    def __enter__(self) -> _Bar:
        self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)

    def __call__(self, count: int) -> None:
        self._now += count
        rate = self._now / max(time.monotonic() - self._started, 1e-9)
        self._progress.update(self._task, advance=count, rate=f"{rate:,.0f} {self._unit}/s")

    def found(self, count: int) -> None:
        self._progress.update(self._task, advance=count)

    def note(self, text: str) -> None:
        self._progress.update(self._task, note=text)


class _Lines:
    """A plain line now and then, and one at the end."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._started = self._shown = time.monotonic()
        self._done, self._found, self._note = 0, 0, ""

    def __call__(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._shown >= PLAIN_SECONDS:
            self._shown = now
            self._show(now)

    def found(self, count: int) -> None:
        self._done += count
        self._found += count

    def note(self, text: str) -> None:
        self._note = text

    def end(self) -> None:
        self._show(time.monotonic())

    def _show(self, now: float) -> None:
        done, total, spent = self._done, self._total, now - self._started
        rate = (done - self._found) / max(spent, 1e-9)
        left = (total - done) / rate if rate and done < total else None
        if _Mode.format == "json":
            figures = {"done": done, "total": total, "unit": self._unit, "per_second": round(rate, 3)}
            event(
                "progress",
                label=self._label,
                **figures,
                seconds=round(spent, 3),
                seconds_left=left,
                note=self._note,
            )
            return
        end = f" in {spent:,.1f} s" if left is None else f", {left:,.0f} s left"
        note = f" ({self._note})" if self._note else ""
        log_info(f"{self._label}: {done:,}/{total:,} {self._unit}, {rate:,.0f}/s{end}{note}")
