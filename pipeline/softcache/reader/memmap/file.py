"""One memory-mapped file: written atomically, verified by checksum, mapped, and gathered from."""

from __future__ import annotations

import mmap
import os
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import xxhash

from softcache.errors import CorruptionError
from softcache.reader.memmap.layout import PAGE, MemmapPlan, read_header
from softcache.runtime.logging import log_info

__all__ = ["MemmapFile", "is_whole", "remove_unfinished", "write_file"]

CHECK_BYTES = 1 << 24


class MemmapFile:
    """An open memory-mapped view: records and fingerprints, mapped read-only.

    Attributes:
        path: of the file.
        rows_PR: [num_rows, R] uint8.
        fingerprints: [num_samples] uint64; empty where each row has its own.
    """

    def __init__(self, path: Path, plan: MemmapPlan, lock: int) -> None:
        self.path, self.record = path, plan.record
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        end = PAGE + plan.num_rows * plan.record.num_bytes
        data = np.frombuffer(self._map, np.uint8)
        self.rows_PR = data[PAGE:end].reshape(plan.num_rows, plan.record.num_bytes)
        # Eight bytes at a time: what is gathered is copied row by row, and wide elements make that a third faster.
        self._wide = self.rows_PR.view(np.uint64)
        self.fingerprints = data[end:].view(np.uint64)
        self._close = weakref.finalize(self, os.close, lock)  # the shared lock goes with the last user

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Returns the records [len(rows), R] uint8 of some rows, copied; rows must be in range."""
        return self._wide.take(rows, axis=0, mode="clip").view(np.uint8)

    def take_runs(self, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Returns the records of runs of rows, one after the other, copied."""
        out, place = np.empty((int(counts.sum()), self._wide.shape[1]), np.uint64), 0
        for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
            out[place : place + count] = self._wide[start : start + count]
            place += count
        return out.view(np.uint8)


def write_file(path: Path, plan: MemmapPlan, fill: Callable[[], Iterator[np.ndarray]]) -> None:
    """Writes the file under a temporary name, flushes it, and renames it."""
    remove_unfinished(path)
    staged = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
    digest = xxhash.xxh3_128()
    written = 0
    try:
        with staged.open("xb") as file:
            os.posix_fallocate(file.fileno(), 0, plan.num_bytes)  # a full disk is found before the work
            file.seek(PAGE)
            for part in fill():
                data = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
                digest.update(data)
                file.write(data)
                written += len(data)
                _failpoint("writing")
            if written != plan.data_bytes:
                raise CorruptionError(
                    f"memory map {plan.key}: {written} bytes decoded; {plan.data_bytes} expected; run `softcache verify`"
                )
            file.seek(0)
            file.write(plan.header(digest.hexdigest()))
            file.flush()
            os.fsync(file.fileno())
        _failpoint("before_rename")
        staged.replace(path)
    finally:
        with suppress(OSError):
            staged.unlink(missing_ok=True)


def _failpoint(name: str) -> None:
    """Called while a file is written; the tests stop the process here."""


def remove_unfinished(path: Path) -> None:
    """Removes unfinished files of crashed writers of this file; the caller holds its lock."""
    for staged in path.parent.glob(f"{path.stem}.*.tmp"):
        staged.unlink(missing_ok=True)


def is_whole(path: Path, plan: MemmapPlan, use: Path, what: str) -> bool:
    """Whether the file matches its header and the plan; one that does not is removed."""
    signature = _signature(path)
    if signature is not None and _read_text(use) == signature:
        return True
    with path.open("rb") as file:
        found, digest = read_header(file.read(PAGE)), xxhash.xxh3_128()
        while data := file.read(CHECK_BYTES):
            digest.update(data)
    found.pop("about", None)
    if path.stat().st_size == plan.num_bytes and found == plan.fields(digest.hexdigest()):
        if signature is not None:
            with suppress(PermissionError):  # another user's: it is read again next time
                use.write_text(signature, encoding="utf-8")
        return True
    log_info(
        f"{what}: {path} is damaged (its checksum differs); it is deleted and created again from the cache"
    )
    path.unlink(missing_ok=True)
    use.unlink(
        missing_ok=True
    )  # a process that maps the damaged file may keep its lock; the new file gets a new one
    return False


def _signature(path: Path) -> str | None:
    """Returns a text that changes when the file changes or the machine restarts; None where that is unknown."""
    boot = _read_text(Path("/proc/sys/kernel/random/boot_id"))
    if not boot:
        return None
    stat = path.stat()
    return f"{boot.strip()} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
