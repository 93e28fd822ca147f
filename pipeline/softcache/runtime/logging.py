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

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from softcache.runtime.display import format_duration
from softcache.runtime.distributed import is_rank_zero
from softcache.runtime.files import finite

__all__ = [
    "Advance",
    "LogFormat",
    "count_found",
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
BAR_WIDTHS = (10, 30)
"""The fewest and the most characters of a bar."""
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
        self._ended: float | None = None

    def __call__(self, count: int) -> None:
        """Counts what was done now."""
        self._done += count
        self._show()

    def found(self, count: int) -> None:
        """Counts what was done before; it is no part of the rate."""
        self._done += count
        self._found += count
        self._show()

    def note(self, text: str, line: str = "") -> None:
        """Shows a few words after the figures, until the next ones.

        Args:
            line: what a log has in their place, with the time left; none: the words with the next line of progress.
        """
        self._note = text
        self._show()

    def _seconds(self) -> float:
        return max((self._ended or time.monotonic()) - self._started, 1e-9)

    def _rate(self) -> float:
        return (self._done - self._found) / self._seconds()

    def _seconds_left(self) -> float | None:
        rate = self._rate()
        return (self._total - self._done) / rate if rate and self._done < self._total else None

    def _figures(self) -> list[str]:
        """Returns what is done, the rate and the time, as texts."""
        rate, left = self._rate(), self._seconds_left()
        figures = [f"{self._done:,}/{self._total:,} {self._unit}", f"{rate:,.0f}/s"]
        if self._ended is not None or self._done >= self._total:
            return [*figures, f"in {format_duration(self._seconds())}"]
        return figures if left is None else [*figures, f"{format_duration(left)} left"]

    def end(self) -> None:
        """Shows the last figures."""
        self._ended = time.monotonic()

    def _show(self) -> None: ...


def count_found(progress: Callable[[int], None], count: int) -> None:
    """Counts what was there before: of a bar by `found`, so that it is no part of the rate."""
    getattr(progress, "found", progress)(count)


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
            bar.end()
    else:
        lines = _Lines(label, total, unit)
        yield lines
        lines.end()


class _Bar(Advance):
    """A live bar: a line, or as many as the width of the terminal takes."""

    def __init__(self, label: str, total: int, unit: str, console: Console) -> None:
        super().__init__(label, total, unit)
        self._console, self._is_tall = console, False
        self.live = Live(get_renderable=self._render, console=console)

    def _render(self) -> RenderableType:
        width = self._console.width
        share = self._done / self._total if self._total else 1.0
        figures = "  ".join((f"{share:4.0%}", *self._figures()))
        shortest, longest = BAR_WIDTHS
        rest = [part for part in (self._label, self._note) if part]
        room_for_bar = width - cell_len("  ".join((figures, *rest))) - 4
        self._is_tall = self._is_tall or room_for_bar < shortest  # and stays so, or it would jump
        label, note = (Text(text, no_wrap=True, overflow="ellipsis") for text in (self._label, self._note))
        room = width - cell_len(figures) - 2 if self._is_tall else room_for_bar
        bar = ProgressBar(total=self._total or 1, completed=self._done if self._total else 1)
        bar.width = max(shortest, min(longest, room))
        row = Table.grid(padding=(0, 2, 0, 0))
        if self._is_tall:
            row.add_row(bar, Text(figures, no_wrap=True, overflow="ellipsis"))
            return Group(label, row, *([note] if self._note else []))
        row.add_row(label, bar, Text(figures, no_wrap=True), *([note] if self._note else []))
        return row


class _Lines(Advance):
    """A plain line every PLAIN_SECONDS in which there was no other, and one at the end."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        super().__init__(label, total, unit)
        self._shown = self._started

    def note(self, text: str, line: str = "") -> None:
        if not line or log_format() == "json":
            super().note(text)
            return
        self._note, self._shown = text, time.monotonic()
        log_info(f"{self._label}: {', '.join((line, *self._figures()[2:]))}")

    def _show(self) -> None:
        if self._done < self._total and time.monotonic() - self._shown >= PLAIN_SECONDS:
            self._shown = time.monotonic()
            self._write()

    def end(self) -> None:
        super().end()
        self._write()

    def _write(self) -> None:
        seconds, rate, left = self._seconds(), self._rate(), self._seconds_left()
        done, speed, *when = self._figures()
        fields = {
            "label": self._label,
            "done": self._done,
            "total": self._total,
            "unit": self._unit,
            "per_second": round(rate, 3),
            "seconds": round(seconds, 3),
            "seconds_left": left,
            "note": self._note,
        }
        note = f" ({self._note})" if self._note else ""
        in_time = " ".join((speed, *when)) if self._ended else ", ".join((speed, *when))
        text = f"{self._label}: {done}, {in_time}{note}"
        _LOGGER.info(text, extra={"event": ("progress", fields)})
