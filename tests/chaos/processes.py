"""Processes to be killed: forked from one that has imported everything, so that a run costs what it does and no start.

A child is a copy of a parent that has never used TensorStore (which does not survive a fork) nor holds a lock; what it
does afterwards is what a new process would do. `steps` count and stop: each flush, rename, link and removal of a file, before
and after, and each step of a commit.
"""

from __future__ import annotations

import mmap
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from softcache.errors import SoftcacheError

__all__ = ["FAILED", "REFUSED", "Child", "full_disk", "kill_at_step", "killed_after"]

REFUSED, FAILED = 1, 70
"""Exit codes of a child: an error of softcache's own, and any other error."""


class Child:
    """A forked process that does some work and exits with 0, REFUSED or FAILED; its output goes to `log`."""

    def __init__(self, work: Callable[[], None], log: Path, *prepare: Callable[[], None]) -> None:
        self.log = log
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(_run(work, log, prepare))

    def wait(self) -> int:
        """Returns its exit code; of one that was killed, the signal's number below 0."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def log_text(self) -> str:
        return self.log.read_text()


def _run(work: Callable[[], None], log: Path, prepare: tuple[Callable[[], None], ...]) -> int:
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        for step in prepare:
            step()
        work()
        return 0
    except SoftcacheError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return REFUSED
    except BaseException:
        traceback.print_exc()
        return FAILED
    finally:
        sys.stderr.flush()


def killed_after(work: Callable[[], None], log: Path, seconds: float) -> int:
    """Runs a child and kills it after so long; returns its exit code, which is 0 if it was done before."""
    child = Child(work, log)
    time.sleep(seconds)
    child.kill()
    return child.wait()


def kill_at_step(number: int, counts: mmap.mmap | None = None) -> Callable[[], None]:
    """Returns what a child does first, so that it is killed at that step of its work.

    Args:
        counts: memory that is shared with the child, 8 bytes; takes how many steps there were.
    """

    def prepare() -> None:
        done = [0]

        def step(*_: Any) -> None:
            if done[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)  # the signal comes before this ends
            done[0] += 1
            if counts is not None:
                counts[:8] = done[0].to_bytes(8)

        _watch(step)

    return prepare


def _watch(step: Callable[..., None]) -> None:
    from softcache.cache import units
    from softcache.reader.memmap import file as files

    units._failpoint = step
    files._failpoint = step
    for name in ("fsync", "replace", "link", "unlink"):
        setattr(os, name, _around(getattr(os, name), step))


def _around(real: Callable[..., Any], step: Callable[..., None]) -> Callable[..., Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:
        step()
        out = real(*args, **kwargs)
        step()
        return out

    return watched


def full_disk(num_bytes: int) -> Callable[[], None]:
    """Returns what a child does first, so that no file of it grows beyond so many bytes: the write fails with EFBIG."""

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))

    return prepare
