"""Objects in a folder: the seam of `objects`, on a file system.

An object is written to ROOT/.staging, flushed to the disk, and renamed into place, so it
is there whole or not at all. A claim is an flock, which the kernel releases when its process ends, or a lease where there is
no flock to rely on (`locks`). Where there are no hard links, a new object is renamed into place under a token.
"""

from __future__ import annotations

import errno
import os
import stat
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pyarrow as pa

from softcache.cache.storage import lease
from softcache.cache.storage.base import size_error
from softcache.cache.storage.handles import OpenFiles
from softcache.cache.storage.lease import LeaseManager, Tag
from softcache.cache.storage.locks import (
    MARK,
    Locks,
    find_locks,
    lock_file,
    report_once,
    try_stale_lock,
)
from softcache.errors import CacheNotFoundError, StorageError
from softcache.hashing.digests import digest_bytes
from softcache.runtime.files import MISSING_FEATURE

__all__ = ["LocalObjects"]

STAGING = ".staging"
NO_LINKS = (*MISSING_FEATURE, errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EACCES)
"""What link gives where a file system has no hard links, or not between these folders."""
TOKEN_POLL_SECONDS = 0.05


class LocalObjects:
    """Objects in a folder."""

    def __init__(self, root: str | Path, *, create: bool = False) -> None:
        self.root, self.url = Path(root), str(root)
        self._locks: Locks | None = None
        self._has_links = True
        self._offset: float | None = None
        self._board = LeaseManager(self)
        self._files = OpenFiles()
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

    def locks(self) -> Locks:
        """Returns how this folder is locked, found out when it is first written.

        Raises:
            OSError: it cannot be written.
        """
        while self._locks is None:
            folder = self.path(STAGING)
            folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # a run that ends removes an empty folder
                self._locks = find_locks(self.root, folder)
        return self._locks

    @property
    def has_links(self) -> bool:
        """Whether no hard link was refused yet."""
        return self._has_links

    @contextmanager
    def _staged(self, path: Path, data: bytes) -> Iterator[Path]:
        """A file with the data, safe on the disk, in the staging folder; gone afterwards.

        Its lock is held until then: a staged file whose lock is free is that of a crashed process.
        """
        folder = self.path(STAGING)
        folder.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        is_locked, handle = self.locks().kind == "flock", None
        while handle is None:  # gc may hold the lock for a moment
            staged = folder / uuid.uuid4().hex
            handle = lock_file(staged) if is_locked else _create(staged)
        try:
            with open(handle, "wb") as file:
                file.write(data)
                file.flush()
                with _naming("fsync"):
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
        if self._has_links:
            with _explained(target), self._staged(target, data) as staged:
                try:
                    os.link(staged, target)
                except FileExistsError:
                    return False
                except OSError as error:
                    if error.errno not in NO_LINKS:
                        raise
                    self._has_links = False
                    report_once(
                        f"{self.root}: no hard links on this file system ({error.strerror}); new objects are renamed into "
                        "place, one writer at a time"
                    )
                else:
                    return True
        while self.put_where(path, data, None) is None:
            if self.size(path) is not None:
                return False
            time.sleep(TOKEN_POLL_SECONDS)  # another process holds the token, or crashed with it
        return True

    def put_where(self, path: str, data: bytes, tag: Tag | None) -> Tag | None:
        """Writes an object if the one there has this tag, or, with None, if there is none.

        A token, a file that one process can create, stands for the change from that tag: its holder looks at the object
        again and replaces it. The token of a crashed process is taken away when it has not changed for a lease.

        Returns:
            The new tag; None if the object there is another one, or if another process is about to replace it.
        """
        target = self.path(path)
        if tag is None and self.size(path) is not None:
            return None
        with _explained(target), self._staged(target, data) as staged:
            name = f"{digest_bytes(f'{path} {tag}'.encode())[:32]}.token"
            token = self.path(f"{STAGING}/{name}")
            try:
                os.close(_create(token))
            except FileExistsError:
                self._end_stale_token(token)
                return None
            try:
                if self._tag(path) != tag:
                    return None
                staged.replace(target)
            finally:
                token.unlink(missing_ok=True)
        return _tag_of(data)

    def _end_stale_token(self, token: Path) -> None:
        with suppress(FileNotFoundError):
            there = {"inode": str(token.stat().st_ino)}
            if self._board.unchanged_seconds(token.name, there) > lease.LEASE_SECONDS:
                self._board.forget(token.name)
                token.unlink()

    def _tag(self, path: str) -> Tag | None:
        try:
            return _tag_of(self.get(path))
        except CacheNotFoundError:
            return None

    def get_tagged(self, path: str, *, patient: bool = True) -> tuple[bytes, Tag]:
        """Returns an object and its tag."""
        data = self.get(path, max_bytes=1 << 16)
        return data, _tag_of(data)

    def get(self, path: str, *, max_bytes: int | None = None) -> bytes:
        target = self.path(path)
        with _reading(target), open(target, "rb", opener=_open_plain) as file:
            # A file of holes has any size and takes no room: its size is looked at before there is room made for it.
            if max_bytes is not None and (size := os.fstat(file.fileno()).st_size) > max_bytes:
                raise size_error(f"{target}", size, max_bytes)
            return file.read()

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
            target = f"{self.root}/{path}"
            with _reading(target):
                out.append(self._files.read(target, start, stop, partial(self._open_handle, path)))
        return out

    def _open_handle(self, path: str) -> int:
        return _open_plain(os.fspath(self.path(path)), os.O_RDONLY)

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

    def age(self, path: str) -> float | None:
        target = self.path(path)
        with _explained(target):
            try:
                written = target.stat().st_mtime
            except (FileNotFoundError, NotADirectoryError):
                return None
            return self._now() - written

    def _now(self) -> float:
        """The time of the file system, which may be a server's, in seconds since the epoch."""
        if self._offset is None:
            folder = self.path(STAGING)
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f"probe-{uuid.uuid4().hex}"
            handle = _create(probe)
            try:
                self._offset = os.fstat(handle).st_mtime - time.time()
            finally:
                os.close(handle)
                probe.unlink(missing_ok=True)
        return time.time() + self._offset

    def orphaned_writes(self, *, remove: bool, older_than: float = 0.0) -> dict[str, int]:
        found: dict[str, int] = {}
        paths = [path for path in _files(os.fspath(self.path(STAGING))) if os.path.basename(path) != MARK]
        if not paths:
            return found
        with _explained(self.path(STAGING)):
            is_locked = self.locks().kind == "flock"
        for path in paths:
            name = os.path.relpath(path, self.root)
            # Without locks age is all there is to go by.
            least = older_than if is_locked else max(older_than, lease.LEASE_SECONDS)
            if least and ((age := self.age(name)) is None or age < least):
                continue
            with _explained(Path(path)), try_stale_lock(path) if is_locked else _sized(path) as dead:
                if dead is not None:
                    found[name] = dead
                    if remove:
                        os.unlink(path)
        return found

    def kvstore(self, prefix: str) -> dict[str, str] | None:
        root = os.path.realpath(self.root)  # TensorStore takes no `..`
        # It reads a backslash as a separator, and takes a name's bytes to be UTF-8, whatever the locale has.
        if "\\" in root or os.fsencode(root) != root.encode("utf-8", "replace"):
            return None
        return {
            "driver": "file",
            "path": f"{Path(root, self.path(prefix.rstrip('/')).relative_to(self.root))}/",
        }

    def open(self, path: str) -> pa.NativeFile:
        target = self.path(path)
        try:
            os.close(_open_plain(os.fspath(target), os.O_RDONLY))
            return pa.OSFile(os.fsencode(target))
        except FileNotFoundError as error:
            raise CacheNotFoundError(
                f"{target}: missing; restore it, or run the stage that writes it"
            ) from error
        except OSError as error:
            raise StorageError(f"{target}: cannot be read: {error}") from error

    def delete(self, path: str, *, patient: bool = True) -> None:
        with _explained(self.path(path)):
            self.path(path).unlink(missing_ok=True)

    def delete_many(self, paths: Sequence[str]) -> None:
        for path in paths:
            self.delete(path)

    @contextmanager
    def claim(self, path: str) -> Iterator[bool]:
        target, handle, is_lease = self.path(path), None, False
        with _explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            if self.locks().kind == "flock":
                handle = lock_file(target)
                is_lease = handle is not None and os.fstat(handle).st_size > 0
        if is_lease or self.locks().kind == "lease":  # the former, of a process that chose otherwise
            if handle is not None:
                os.close(handle)
            with self._board.claim(path) as is_ours:
                yield is_ours
            return
        if handle is None:
            yield False
            return
        try:
            yield True
        finally:
            with suppress(OSError):
                target.unlink()  # before the lock goes, so that no process locks a name that is about to vanish
            os.close(handle)

    def __getstate__(self) -> dict[str, Path]:
        return {"root": self.root}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _tag_of(data: bytes) -> Tag:
    return {"sha256": digest_bytes(data)}


def _create(path: Path) -> int:
    """Returns a handle of a new file, which exactly one process can create."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


@contextmanager
def _sized(path: str) -> Iterator[int | None]:
    try:
        yield os.lstat(path).st_size
    except FileNotFoundError:
        yield None


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
    except OSError as error:
        if error.errno not in MISSING_FEATURE:  # of a file system that has no flush of names
            raise
    finally:
        os.close(handle)


_HINTS = {
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space and rerun: finished units are kept"
    ),
    **dict.fromkeys(
        (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP),
        "this file system lacks it; docs/reliability.md lists what is needed",
    ),
    errno.EIO: "the device or its network fails; see the kernel's log, then rerun: finished units are kept",
    errno.ESTALE: "the folder was removed or replaced on its server; check the mount and rerun: finished units are kept",
    errno.EXDEV: f"{STAGING} must be on the file system of the objects, so that they can be renamed into place; no mount or "
    "link may lie between",
}


@contextmanager
def _reading(target: str | Path) -> Iterator[None]:
    """Names a file that is missing or cannot be read in softcache's errors."""
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError as error:
        raise CacheNotFoundError(f"{target}: missing; restore it, or run the stage that writes it") from error
    except OSError as error:
        raise StorageError(f"{target}: cannot be read: {error.strerror}") from error


@contextmanager
def _naming(feature: str) -> Iterator[None]:
    """Names a feature of the file system in an error that means that it is missing."""
    try:
        yield
    except OSError as error:
        if error.errno not in MISSING_FEATURE:
            raise
        raise OSError(error.errno, f"{feature}: {error.strerror}") from error


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        hint = _HINTS.get(error.errno or 0, "choose a place that can be written")
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}; {hint}") from error
