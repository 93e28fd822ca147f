"""Progress of long steps: a live bar with rate and time left on a terminal, plain lines elsewhere.

Of a run of many processes, the first one speaks.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
from rich.progress import TimeRemainingColumn as TimeLeft

from pipeline.ranks import is_first

__all__ = ["say", "track"]

PLAIN_SECONDS = 10.0


def say(text: str) -> None:
    """Prints one line about what goes on; results go to stdout, these lines to stderr."""
    if is_first():
        print(text, file=sys.stderr, flush=True)


@contextmanager
def track(label: str, total: int, unit: str = "samples") -> Iterator[Callable[[int], None]]:
    """Yields `advance(n)`; shows how far the step is, its rate and the time left."""
    if not is_first():
        yield lambda count: None
        return
    console = Console(stderr=True)
    follow = _live if console.is_terminal else _plain
    with follow(label, total, unit, console) as advance:
        yield advance


@contextmanager
def _live(label: str, total: int, unit: str, console: Console) -> Iterator[Callable[[int], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeLeft(),
    )
    started = time.monotonic()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=total, rate="")

        def advance(count: int) -> None:
            done = progress.tasks[task].completed + count
            rate = done / max(time.monotonic() - started, 1e-9)
            progress.update(task, advance=count, rate=f"{rate:,.0f} {unit}/s")

        yield advance


@contextmanager
def _plain(label: str, total: int, unit: str, console: Console) -> Iterator[Callable[[int], None]]:
    started = shown = time.monotonic()
    done = 0

    def line(now: float) -> str:
        rate = done / max(now - started, 1e-9)
        left = (
            f", {max(total - done, 0) / rate:,.0f} s left"
            if 0 < done < total
            else f" in {now - started:,.1f} s"
        )
        return f"{label}: {done:,}/{total:,} {unit}, {rate:,.0f}/s{left}"

    def advance(count: int) -> None:
        nonlocal done, shown
        done += count
        now = time.monotonic()
        if now - shown >= PLAIN_SECONDS:
            shown = now
            say(line(now))

    yield advance
    say(line(time.monotonic()))
