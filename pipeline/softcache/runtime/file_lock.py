"""Locks of a sweep's folder: files that the kernel unlocks when their process dies, however it dies."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from softcache.errors import StorageError
from softcache.runtime.signals import raise_if_signalled

__all__ = ["held", "is_held"]

LOOK_SECONDS = 0.02


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Holds the lock of a file, which is made if it is not there; waits for its holder, and can be interrupted.

    Raises:
        StorageError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise StorageError(
            f"sweep {path.parent}: cannot be written: {error}; choose another --out"
        ) from error
    try:
        while not _take(handle):
            raise_if_signalled()
            time.sleep(LOOK_SECONDS)
        yield
    finally:
        os.close(handle)


def is_held(path: Path) -> bool:
    """Returns whether a process that lives holds the lock."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not _take(handle)
    finally:
        os.close(handle)


def _take(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
