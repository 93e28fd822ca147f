"""Objects in a folder: the seam of `objects`, on a file system.

An object is written to ROOT/.staging, flushed to the disk, and renamed into place, so it
is there whole or not at all. A claim is an flock: the kernel releases it when its process dies.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa

from softcache.cache.storage.base import size_error
from softcache.errors import CacheNotFoundError, StorageError

__all__ = ["LocalObjects"]

STAGING = ".staging"


class LocalObjects:
    """Objects in a folder."""

    def __init__(self, root: str | Path, *, create: bool = False) -> None:
        self.root, self.url = Path(root), str(root)
        if create:
            with _explained(self.root):
                if not self.root.is_dir():
                    self.root.mkdir(parents=True, exist_ok=True)

    def path(self, relative: str) -> Path:
        """Returns where an object is.

        Raises:
            StorageError: the path, or a link on the way, leads out of the root.
        """
        path = self.root / relative
        parts = relative.split("/")
        if not relative or path.is_absolute() != self.root.is_absolute() or {"", ".", ".."} & set(parts):
            raise StorageError(f"{self.root}: object {relative!r} is no path inside of it")
        if self._has_link(parts) and not path.resolve().is_relative_to(self.root.resolve()):
            raise StorageError(
                f"{path}: a link leads out of {self.root}; a cache holds no links to elsewhere"
            )
        return path

    def _has_link(self, parts: list[str]) -> bool:
        """Whether one of the names on the way from the root is a link; resolving each path costs four times as much."""
        where = os.fspath(self.root)
        for part in parts:
            where = f"{where}/{part}"
            if os.path.islink(where):
                return True
        return False

    @contextmanager
    def _staged(self, path: Path, data: bytes) -> Iterator[Path]:
        """A file with the data, safe on the disk, in the staging folder; gone afterwards.

        Its lock is held until then: a staged file whose lock is free was left by a process that died.
        """
        folder = self.path(STAGING)
        folder.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = None
        while handle is None:  # who collects what the dead left may hold the lock for a moment
            staged = folder / uuid.uuid4().hex
            handle = _lock(staged)
        try:
            with open(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(handle)
                yield staged
                _sync_folder(path.parent)
        finally:
            with suppress(OSError):
                staged.unlink(missing_ok=True)

    def put(self, path: str, data: bytes) -> None:
        target = self.path(path)
        with _explained(target), self._staged(target, data) as staged:
            staged.replace(target)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        target = self.path(path)
        with _explained(target), self._staged(target, data) as staged:
            try:
                os.link(staged, target)
            except FileExistsError:
                return False
            return True

    def get(self, path: str, *, max_bytes: int | None = None) -> bytes:
        target = self.path(path)
        try:
            with open(target, "rb", opener=_open_plain) as file:
                # A file of holes has any size and takes no room: its size is looked at before there is room made for it.
                if max_bytes is not None and (size := os.fstat(file.fileno()).st_size) > max_bytes:
                    raise size_error(f"{target}", size, max_bytes)
                return file.read()
        except FileNotFoundError as error:
            raise CacheNotFoundError(
                f"{target}: missing; restore it, or run the stage that writes it"
            ) from error
        except OSError as error:
            raise StorageError(f"{target}: cannot be read: {error.strerror}") from error

    def get_many(self, paths: Sequence[str], *, max_bytes: int | None = None) -> Iterator[bytes | None]:
        for path in paths:
            try:
                yield self.get(path, max_bytes=max_bytes)
            except CacheNotFoundError:
                yield None

    def get_sized(self, sizes: Mapping[str, int]) -> Iterator[bytes | int | None]:
        for path, expected in sizes.items():
            found = self.size(path)
            yield self.get(path, max_bytes=expected) if found == expected else found

    def get_suffixes(self, lengths: Mapping[str, int]) -> Sequence[tuple[bytes, int]]:
        sizes = [(path, length, self._existing_size(path)) for path, length in lengths.items()]
        parts = self.get_ranges([(path, max(0, size - length), size) for path, length, size in sizes])
        return [(part, size) for part, (_, _, size) in zip(parts, sizes, strict=True)]

    def _existing_size(self, path: str) -> int:
        found = self.size(path)
        return len(self.get(path)) if found is None else found  # a missing object raises by its name

    def get_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> Sequence[bytes]:
        out = []
        for path, start, stop in ranges:
            with self.open(path) as file:
                file.seek(start)
                out.append(file.read(stop - start))
        return out

    def size(self, path: str) -> int | None:
        target = self.path(path)
        try:
            return target.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StorageError(f"{target}: cannot be read: {error.strerror}; make it readable") from error

    def list(self, prefix: str) -> list[str]:
        folder = self.path(prefix) if prefix else self.root
        start = len(os.path.join(self.root, ""))
        found = (path[start:] for path in _files(os.fspath(folder)))
        return sorted(path for path in found if not path.startswith(f"{STAGING}/"))

    def times(self, prefix: str) -> dict[str, float]:
        found = {}
        for path in self.list(prefix):
            with suppress(FileNotFoundError):  # a claim ends when it likes
                found[path] = (self.root / path).stat().st_mtime
        return found

    def orphaned_writes(self, *, remove: bool) -> dict[str, int]:
        found = {}
        for path in _files(os.fspath(self.path(STAGING))):
            with _explained(Path(path)), _try_stale_lock(path) as dead:
                if dead is not None:
                    found[os.path.relpath(path, self.root)] = dead
                    if remove:
                        os.unlink(path)
        return found

    def kvstore(self, prefix: str) -> dict[str, str] | None:
        if "\\" in os.fspath(self.root.absolute()):  # which TensorStore reads as a separator
            return None
        return {"driver": "file", "path": f"{self.path(prefix.rstrip('/')).absolute()}/"}

    def open(self, path: str) -> pa.NativeFile:
        target = self.path(path)
        try:
            os.close(_open_plain(os.fspath(target), os.O_RDONLY))
            return pa.OSFile(str(target))
        except FileNotFoundError as error:
            raise CacheNotFoundError(
                f"{target}: missing; restore it, or run the stage that writes it"
            ) from error
        except OSError as error:
            raise StorageError(f"{target}: cannot be read: {error}") from error

    def delete(self, path: str) -> None:
        with _explained(self.path(path)):
            self.path(path).unlink(missing_ok=True)

    @contextmanager
    def claim(self, path: str) -> Iterator[bool]:
        target = self.path(path)
        with _explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            handle = _lock(target)
        if handle is None:
            yield False
            return
        try:
            yield True
        finally:
            with suppress(OSError):
                target.unlink()  # before the lock goes, so that no process locks a name that is about to vanish
            os.close(handle)


def _files(folder: str) -> Iterator[str]:
    """Returns the paths of all files below a folder; links to folders are not followed."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield from _files(entry.path)
                elif entry.is_file():
                    yield entry.path
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise StorageError(f"{folder}: cannot be listed: {error.strerror}; make it readable") from error


def _lock(path: Path) -> int | None:
    """Returns a handle that holds the lock on `path`, or None if another process holds it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not _is_free(handle):
                os.close(handle)
                return None
            # The last holder may have unlinked this very file between our open and our lock: then try again.
            if os.fstat(handle).st_ino == os.stat(path).st_ino:
                return handle
        except FileNotFoundError:
            pass
        os.close(handle)


@contextmanager
def _try_stale_lock(path: str) -> Iterator[int | None]:
    """Yields the size of a staged file, locked meanwhile; None if its writer lives, or has just finished."""
    try:
        # No link is followed: it would lock, and count, a file elsewhere.
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    try:
        yield os.fstat(handle).st_size if _is_free(handle) and os.fstat(handle).st_nlink else None
    finally:
        os.close(handle)


def _is_free(handle: int) -> bool:
    """Takes the lock of an open file, unless another process holds it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _open_plain(path: str, flags: int) -> int:
    """Opens a file, but neither waits for a pipe nor reads a device that was put in its place."""
    handle = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "no regular file")
    return handle


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = (
            "free some space and rerun: finished units are kept"
            if full
            else "choose a place that can be written"
        )
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}; {hint}") from error
