"""The folder of memory-mapped views of one machine: each written once, shared, and removed to free space."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from softcache.errors import CorruptionError, SoftcacheError, StorageError
from softcache.reader.memmap.file import MemmapFile, is_whole, remove_unfinished, write_file
from softcache.reader.memmap.layout import PAGE, MemmapPlan, read_header
from softcache.runtime.files import expand_home, user_cache_folder
from softcache.runtime.logging import log_info

__all__ = ["MemmapFolder", "MemmapSettings", "default_folder"]

ATTEMPTS = 3
LOCK_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class MemmapSettings:
    """Whether and where views of a cache may be memory-mapped.

    Attributes:
        limit_bytes: of all files of the folder together; the least recently used are removed first. A cache whose views
            do not fit together is not memory-mapped.
        folder: where; None is $SOFTCACHE_MEMMAP_DIR, or softcache/thaw under $XDG_CACHE_HOME (~/.cache).
        required: raise where the folder cannot be written; otherwise log it, and read the cache's chunks.
    """

    limit_bytes: int = 8 << 30
    folder: str | None = None
    required: bool = False


def default_folder() -> Path:
    """Returns the default folder of memory-mapped views."""
    return user_cache_folder("SOFTCACHE_MEMMAP_DIR", "thaw")


class Entry(NamedTuple):
    """A file of the folder: its view, size and last use, in seconds since 1970."""

    path: Path
    about: str
    num_bytes: int
    used: float


class MemmapFolder:
    """The memory-mapped views of one machine.

    Raises (from every method):
        StorageError: the folder cannot be written or is full.
    """

    def __init__(self, root: str | Path | None = None) -> None:
        self.root = Path(expand_home(str(root))) if root is not None else default_folder()

    def _path(self, plan: MemmapPlan) -> Path:
        return self.root / f"{plan.key}.thaw"

    def holds(self, plan: MemmapPlan) -> bool:
        """Whether a file of this content exists; it may still be damaged."""
        return self._path(plan).exists()

    def open(
        self, plan: MemmapPlan, fill: Callable[[], Iterator[np.ndarray]], *, limit_bytes: int, what: str
    ) -> MemmapFile:
        """Returns the memory-mapped view, written first if it is missing; concurrent processes write it once.

        Args:
            fill: yields the data in order, records [P, R] first, then fingerprints.
            limit_bytes: of all files of the folder; unused ones are removed to stay below it.
            what: names the view in messages.
        """
        path = self._path(plan)
        use = path.with_suffix(".use")
        with _translate_errors(self.root, what):
            self.root.mkdir(parents=True, exist_ok=True)
            attempts = 0
            while attempts < ATTEMPTS:
                lock = _locked(use, fcntl.LOCK_SH, f"{what}: another process is writing it; waiting")
                try:
                    if path.exists() and is_whole(path, plan, use, what):
                        with suppress(PermissionError):  # another user's
                            os.utime(use)
                        return MemmapFile(path, plan, lock)
                except BaseException:
                    os.close(lock)
                    raise
                os.close(lock)
                # Not waited for: a process that wrote it meanwhile holds the lock for as long as it uses the file.
                lock = _locked(use, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if lock is None:
                    time.sleep(LOCK_POLL_SECONDS)
                    continue
                attempts += 1
                try:
                    if not path.exists():
                        self._make_room(plan.num_bytes, limit_bytes)
                        write_file(path, plan, fill)
                finally:
                    os.close(lock)
        raise CorruptionError(
            f"{path}: written {ATTEMPTS - 1} times, and it differed when read back, or was removed; check the disk, "
            "or set SOFTCACHE_MEMMAP_DIR to another one"
        )

    def entries(self) -> list[Entry]:
        """Returns the files of the folder, least recently used first."""
        found = []
        for path in self.root.glob("*.thaw"):
            use = path.with_suffix(".use")
            with suppress(FileNotFoundError):
                used = (use if use.exists() else path).stat().st_mtime
                found.append(Entry(path, _about(path), path.stat().st_size, used))
        return sorted(found, key=lambda entry: entry.used)

    def remove(self, entry: Entry) -> bool:
        """Removes a file unless a process uses it; returns whether it is gone."""
        use = entry.path.with_suffix(".use")
        with _translate_errors(self.root, entry.path.name):
            lock = _locked(use, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock is None:
                return False
            try:
                entry.path.unlink(missing_ok=True)
                remove_unfinished(entry.path)
                use.unlink(missing_ok=True)
            finally:
                os.close(lock)
        return True

    def _make_room(self, num_bytes: int, limit_bytes: int) -> None:
        entries = self.entries()
        total = sum(entry.num_bytes for entry in entries)
        for entry in entries:
            if total + num_bytes <= limit_bytes:
                return
            if self.remove(entry):
                total -= entry.num_bytes
        if total + num_bytes > limit_bytes:
            raise StorageError(
                f"{self.root}: {total:,} bytes are in use and {num_bytes:,} more are needed; the limit is {limit_bytes:,}; "
                "raise reader.memmap_limit_bytes, or `softcache materialize --clear`"
            )


def _about(path: Path) -> str:
    with path.open("rb") as file:
        return str(read_header(file.read(PAGE)).get("about", "?"))


def _opened(path: Path) -> int:
    """Opens or creates a file to lock it, but follows no link; that of another user is opened for reading."""
    flags = os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o644)
    except PermissionError:
        return os.open(path, os.O_RDONLY | flags)


def _locked(path: Path, how: int, waiting: str = "") -> Any:
    """Returns a handle that holds a lock on `path`; with LOCK_NB, None if another process holds it."""
    while True:
        handle = _opened(path)
        try:
            try:
                fcntl.flock(handle, how | fcntl.LOCK_NB)
            except BlockingIOError:
                if how & fcntl.LOCK_NB:
                    os.close(handle)
                    return None
                log_info(waiting)
                fcntl.flock(handle, how)
            # The file may have been removed between open and lock, which leaves a lock on nothing: try again.
            if os.fstat(handle).st_ino == os.stat(path).st_ino:
                return handle
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


@contextmanager
def _translate_errors(root: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, SoftcacheError):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = (
            "free some space, or set SOFTCACHE_MEMMAP_DIR to another disk"
            if full
            else "set SOFTCACHE_MEMMAP_DIR to a folder that can be written"
        )
        raise StorageError(
            f'{root}: {what} cannot be memory-mapped: {error.strerror or error}; {hint}, or reader.memmap = "never"'
        ) from error
