"""The folder of thawed files of one machine: made once, shared, and removed when room is needed."""

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
from softcache.reader.memmap.file import ThawedFile, is_whole, remove_unfinished, write_file
from softcache.reader.memmap.layout import PAGE, ThawedPlan, read_header
from softcache.runtime.logging import log_info

__all__ = ["MemmapSettings", "ThawFolder", "default_folder"]

ATTEMPTS = 3
LOCK_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class MemmapSettings:
    """Whether and where a cache may be thawed.

    Attributes:
        limit_bytes: what all files of the folder may take together; those not used for longest make room. A cache
            whose views do not fit together is not thawed.
        folder: where; None is $SOFTCACHE_THAW_DIR, or softcache/thaw under $XDG_CACHE_HOME (~/.cache).
        required: raise where the folder cannot be written; otherwise say so, and read the cache's chunks.
    """

    limit_bytes: int = 8 << 30
    folder: str | None = None
    required: bool = False


def default_folder() -> Path:
    """Returns the folder of thawed views where no other is named."""
    if named := os.environ.get("SOFTCACHE_THAW_DIR"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "softcache" / "thaw"


class Entry(NamedTuple):
    """A file of the folder: of which view, and when it was used last, in seconds since 1970."""

    path: Path
    about: str
    num_bytes: int
    used: float


class ThawFolder:
    """The thawed views of one machine.

    Raises (from every method):
        StorageError: the folder cannot be written or is full.
    """

    def __init__(self, root: str | Path | None = None) -> None:
        self.root = Path(root) if root is not None else default_folder()

    def _path(self, plan: ThawedPlan) -> Path:
        return self.root / f"{plan.key}.thaw"

    def holds(self, plan: ThawedPlan) -> bool:
        """Whether there is a file of this very content; not yet whether it is whole."""
        return self._path(plan).exists()

    def open(
        self, plan: ThawedPlan, fill: Callable[[], Iterator[np.ndarray]], *, limit_bytes: int, what: str
    ) -> ThawedFile:
        """Returns the thawed view, made first if it is not there; two processes that ask at once make it once.

        Args:
            fill: gives the data in order, records [P, R] first, then fingerprints.
            limit_bytes: of all files of the folder; others that nobody uses are removed for it.
            what: names the view in messages.
        """
        path = self._path(plan)
        use = path.with_suffix(".use")
        with _explained(self.root, what):
            self.root.mkdir(parents=True, exist_ok=True)
            attempts = 0
            while attempts < ATTEMPTS:
                lock = _locked(use, fcntl.LOCK_SH, f"{what}: another process is making it; waiting")
                try:
                    if path.exists() and is_whole(path, plan, use, what):
                        os.utime(use)
                        return ThawedFile(path, plan, lock)
                except BaseException:
                    os.close(lock)
                    raise
                os.close(lock)
                # Not waited for: who has made it meanwhile holds it for as long as it is used.
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
            f"{path}: written {ATTEMPTS - 1} times, and each time it read back otherwise, or was removed at once; check the "
            "disk, or set SOFTCACHE_THAW_DIR to another one"
        )

    def entries(self) -> list[Entry]:
        """Returns the files that are there, the one not used for longest first."""
        found = []
        for path in self.root.glob("*.thaw"):
            use = path.with_suffix(".use")
            with suppress(FileNotFoundError):
                used = (use if use.exists() else path).stat().st_mtime
                found.append(Entry(path, _about(path), path.stat().st_size, used))
        return sorted(found, key=lambda entry: entry.used)

    def remove(self, entry: Entry) -> bool:
        """Removes a file unless somebody uses it; returns whether it is gone."""
        use = entry.path.with_suffix(".use")
        with _explained(self.root, entry.path.name):
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
                "raise reader.thaw_limit_bytes, or `softcache materialize --clear`"
            )


def _about(path: Path) -> str:
    with path.open("rb") as file:
        return str(read_header(file.read(PAGE)).get("about", "?"))


def _locked(path: Path, how: int, waiting: str = "") -> Any:
    """Returns a handle that holds a lock on `path`; with LOCK_NB, None if somebody else holds it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(handle, how | fcntl.LOCK_NB)
            except BlockingIOError:
                if how & fcntl.LOCK_NB:
                    os.close(handle)
                    return None
                log_info(waiting)
                fcntl.flock(handle, how)
            # Whoever removed the file between our open and our lock left us a lock on nothing: then try again.
            if os.fstat(handle).st_ino == os.stat(path).st_ino:
                return handle
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


@contextmanager
def _explained(root: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, SoftcacheError):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = (
            "free some space, or set SOFTCACHE_THAW_DIR to another disk"
            if full
            else "set SOFTCACHE_THAW_DIR to a folder that can be written"
        )
        raise StorageError(
            f'{root}: {what} cannot be thawed: {error.strerror or error}; {hint}, or reader.thaw = "never"'
        ) from error
