"""Logs and progress of a run on stderr: lines of text with a live bar on a terminal, or one JSON object per line.

Everything is logged by the logger `softcache` of the standard library: a program can add its own handlers, or set the
level. `set_log_format("json")` (`--log json` of a command) makes every line on stderr an object with `time` (UTC),
`event` and the event's own fields; `log_info` becomes {"event": "message", "text": …}, and bars become
{"event": "progress", …}. As text, events are not shown: the bars show the same.

Of a run of many processes, rank 0 logs. Results of commands go to stdout, and are not logged.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
from rich.progress import TimeRemainingColumn as TimeLeft

from softcache.runtime.distributed import is_rank_zero
from softcache.runtime.files import finite

__all__ = [
    "Advance",
    "LogFormat",
    "event",
    "listen",
    "log_event",
    "log_format",
    "log_info",
    "progress_bar",
    "set_log_format",
    "sparkline",
]

PLAIN_SECONDS = 10.0
BARS = "▁▂▃▄▅▆▇█"
LogFormat = Literal["text", "json"]


class _StderrHandler(logging.Handler):
    """Writes to the stderr of the moment, which a bar or a test may have replaced."""

    log_format: LogFormat = "text"

    def format(self, record: logging.LogRecord) -> str:
        if self.log_format == "text":
            return record.getMessage()
        now = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        name, fields = getattr(record, "event", ("message", {"text": record.getMessage()}))
        return json.dumps({"time": now, "event": name, **finite(fields)}, default=str, allow_nan=False)

    def emit(self, record: logging.LogRecord) -> None:
        # One write: processes may share a stderr.
        print(f"{self.format(record)}\n", end="", file=sys.stderr, flush=True)


_LOGGER, _HANDLER = logging.getLogger("softcache"), _StderrHandler()
_LOGGER.setLevel(logging.INFO)
_LOGGER.propagate = False
_LOGGER.addHandler(_HANDLER)


def log_format() -> LogFormat:
    """Returns how this process logs."""
    return _HANDLER.log_format


def set_log_format(format: LogFormat) -> None:
    """Chooses how this process logs from here on."""
    _HANDLER.log_format = format


_LISTENERS: list[Callable[[str, dict[str, Any]], None]] = []


@contextmanager
def listen(call: Callable[[str, dict[str, Any]], None]) -> Iterator[None]:
    """Calls back with the name and the fields of every event of this process in the block, on rank 0."""
    _LISTENERS.append(call)
    try:
        yield
    finally:
        _LISTENERS.remove(call)


def event(name: str, **fields: Any) -> None:
    """Logs one event as a JSON object; as text, or on a rank other than 0, nothing.

    Args:
        fields: numbers, strings, None, and lists and dicts of them.
    """
    if not is_rank_zero():
        return
    for call in _LISTENERS:
        call(name, fields)
    if log_format() == "json":
        _LOGGER.info(name, extra={"event": (name, fields)})


def log_info(text: str) -> None:
    """Logs one line about the progress of a run, on rank 0."""
    if is_rank_zero():
        _LOGGER.info(text)


def log_event(name: str, line: str, **fields: Any) -> None:
    """Logs an error or the end of a run, on any rank: as text a line, as JSON an event."""
    _LOGGER.error(line, extra={"event": (name, fields)})


class Advance:
    """Counts how far a step is; shows nothing, as on every rank but 0."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._started = time.monotonic()
        self._done, self._found, self._note = 0, 0, ""

    def __call__(self, count: int) -> None:
        """Counts what was done now."""
        self._done += count
        self._show()

    def found(self, count: int) -> None:
        """Counts what was done before; it is no part of the rate."""
        self._done += count
        self._found += count
        self._show()

    def note(self, text: str) -> None:
        """Shows a few words after the figures, until the next ones."""
        self._note = text
        self._show()

    def _rate(self) -> float:
        return (self._done - self._found) / max(time.monotonic() - self._started, 1e-9)

    def _show(self) -> None: ...


def sparkline(values: Sequence[float], width: int = 16) -> str:
    """Returns a line of bars of the values, of means of neighbors where there are more of them than bars."""
    size = -(-len(values) // width) or 1
    means = [
        sum(part) / len(part)
        for part in (values[start : start + size] for start in range(0, len(values), size))
    ]
    if not all(map(math.isfinite, means)):
        return ""
    low, high = min(means, default=0.0), max(means, default=0.0)
    return "".join(BARS[int((mean - low) / ((high - low) or 1.0) * (len(BARS) - 1))] for mean in means)


@contextmanager
def progress_bar(label: str, total: int, unit: str = "samples") -> Iterator[Advance]:
    """Yields `advance(n)`; shows how far the step is, its rate and the time left."""
    console = Console(stderr=True)
    if not is_rank_zero():
        yield Advance(label, total, unit)
    elif console.is_terminal and log_format() == "text":
        bar = _Bar(label, total, unit, console)
        with bar.live:
            yield bar
    else:
        lines = _Lines(label, total, unit)
        yield lines
        lines.end()


class _Bar(Advance):
    """A live bar."""

    def __init__(self, label: str, total: int, unit: str, console: Console) -> None:
        super().__init__(label, total, unit)
        self.live = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeLeft(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._task = self.live.add_task(label, total=total, rate="", note="")

    def _show(self) -> None:
        rate = f"{self._rate():,.0f} {self._unit}/s"
        self.live.update(self._task, completed=self._done, rate=rate, note=self._note)


class _Lines(Advance):
    """A plain line every PLAIN_SECONDS, and one at the end."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        super().__init__(label, total, unit)
        self._shown = self._started

    def _show(self) -> None:
        if self._done < self._total and time.monotonic() - self._shown >= PLAIN_SECONDS:
            self._shown = time.monotonic()
            self.end()

    def end(self) -> None:
        done, total, unit, rate = self._done, self._total, self._unit, self._rate()
        seconds = time.monotonic() - self._started
        left = (total - done) / rate if rate and done < total else None
        note = f" ({self._note})" if self._note else ""
        end = f" in {seconds:,.1f} s" if left is None else f", {left:,.0f} s left"
        fields = {
            "label": self._label,
            "done": done,
            "total": total,
            "unit": unit,
            "per_second": round(rate, 3),
        }
        fields |= {"seconds": round(seconds, 3), "seconds_left": left, "note": self._note}
        text = f"{self._label}: {done:,}/{total:,} {unit}, {rate:,.0f}/s{end}{note}"
        _LOGGER.info(text, extra={"event": ("progress", fields)})
