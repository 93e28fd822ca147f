"""SIGINT and SIGTERM: a run ends where it can be resumed, prints how, and exits with 128 + the signal's number.

    with handle_signals():                # once, around a command
        prepare()                       # a signal here raises Interrupted at once
        with defer_signals():           # around a loop whose body should not be torn
            for batch in batches:
                check()                 # a signal that came meanwhile raises Interrupted here
                step(batch)

The first signal asks; a second one ends the process at once, as SIGKILL would, which is safe, too: everything that is
published is whole. Library code calls `raise_if_signalled` freely: without `handle_signals` around it, no signal is touched.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = [
    "Interrupted",
    "defer_signals",
    "follow_loader",
    "follow_parent",
    "handle_signals",
    "ignore_interrupts",
    "pending_signal",
    "raise_if_signalled",
    "shield_loaders",
    "signals_first",
]

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal asked the run to end; no `except Exception` on the way takes it for an error.

    Attributes:
        signum: the signal's number; a command exits with 128 + that.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum

    @property
    def exit_code(self) -> int:
        return 128 + self.signum


class _State:
    """What this process was asked; signals are of a process, so there is one of these."""

    asked: int | None = None
    depth: int = 0
    handled: bool = False


@contextmanager
def handle_signals() -> Iterator[None]:
    """Makes SIGINT and SIGTERM raise `Interrupted` in the main thread; elsewhere it changes nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.asked, _State.depth, _State.handled = None, 0, True
    before = {signum: signal.signal(signum, _received) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        _State.asked, _State.depth, _State.handled = None, 0, False


def _received(signum: int, frame: FrameType | None) -> None:
    if _State.asked is not None:
        os._exit(128 + signum)
    _State.asked = signum
    if _State.depth == 0:
        raise Interrupted(signum)


@contextmanager
def defer_signals() -> Iterator[None]:
    """Within, a signal waits for the next `raise_if_signalled`, or for the end of the block."""
    _State.depth += 1
    try:
        yield
    finally:
        _State.depth -= 1
    raise_if_signalled()


def pending_signal() -> int | None:
    """Returns the signal that asked this process to end; None without one."""
    return _State.asked


def raise_if_signalled() -> None:
    """Raises Interrupted if a signal asked this process to end."""
    if _State.asked is not None:
        raise Interrupted(_State.asked)


@contextmanager
def signals_first() -> Iterator[None]:
    """Within, an error after a signal, such as that of a helper process that it has ended, is raised as Interrupted."""
    try:
        yield
    except Exception:
        raise_if_signalled()
        raise


def shield_loaders() -> Callable[[int], None] | None:
    """Starts the process that forks loader processes, with SIGTERM blocked; returns what each of these is to call first.

    Slurm, systemd and `timeout` signal all processes of a group: this one decides, and needs its loaders until a step ends.
    Without `handle_signals` nothing is changed, and None is returned: SIGTERM is how Python ends what a program has left
    when it exits, and it asks once.
    """
    if not _State.handled:
        return None
    if threading.current_thread() is not threading.main_thread():
        return follow_loader
    from multiprocessing import forkserver

    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return follow_loader


def follow_loader(worker: int = 0) -> None:
    """Of loader processes: a signal to the whole group is left to the process that started them.

    The first SIGTERM is passed over; a second one, by which torch ends a loader that does not answer, ends this process.
    """

    def passed_over(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, passed_over)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def follow_parent(parent: int) -> None:
    """Leaves it to the process `parent` when this one, which it started, ends: at the latest with it, also after a kill.

    A terminal and a scheduler send their signals to all processes; the parent acts on them.
    """
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def ignore_interrupts() -> None:
    """Of helper processes: Ctrl-C reaches all processes of a terminal; only the one that started them decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
