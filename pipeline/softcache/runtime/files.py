"""Files that are there whole or not at all, also after a power cut, and JSON that every reader accepts."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from softcache.errors import SoftcacheError, StorageError

__all__ = [
    "MISSING_FEATURE",
    "expand_home",
    "finite",
    "give_mode",
    "parse_json",
    "read_json",
    "replace_file",
    "staged_file",
    "sync_file",
    "sync_folder",
    "to_json",
    "try_lock",
    "user_cache_folder",
]


MISSING_FEATURE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
"""Error numbers of a file system that lacks a feature."""


def expand_home(path: str) -> str:
    """Returns a path with the home folder in the place of `~` at its beginning; any other as it is.

    Raises:
        StorageError: there is no such user, or this one has no home folder.
    """
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:
        raise StorageError(
            f"{path}: {error}; set HOME, or give the path without ~ (a folder of that name is ./{path})"
        ) from error


def user_cache_folder(variable: str, name: str) -> Path:
    """Returns the folder that an environment variable names, or softcache/NAME under $XDG_CACHE_HOME (~/.cache).

    Raises:
        StorageError: neither is set, and this user has no home folder (a container that runs as any user id).
    """
    if given := os.environ.get(variable):
        return Path(expand_home(given))
    return Path(os.environ.get("XDG_CACHE_HOME") or _home_cache(variable)) / "softcache" / name


def _home_cache(variable: str) -> Path:
    try:
        return Path.home() / ".cache"
    except RuntimeError as error:
        raise StorageError(
            f"~/.cache: this user has no home folder; set {variable}, XDG_CACHE_HOME or HOME"
        ) from error


def try_lock(handle: int) -> bool:
    """Takes the flock of an open file, unless another process holds it; returns whether this one does.

    Raises:
        OSError: it cannot be locked; one that means that there is no flock names it.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in MISSING_FEATURE:
            raise
        raise OSError(error.errno, f"flock: {error.strerror}") from error
    return True


def sync_file(path: str | Path) -> None:
    """Flushes a file to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


sync_folder = sync_file
"""Flushes the names in a folder to the disk: what was created, renamed or removed there."""


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """A temporary name in the folder of `path`, to write to: flushed and renamed to `path` if nothing is raised.

    Who may read it is what the umask leaves, also where a library writes a file of its own in its place (safetensors: 0600).

    Raises:
        OSError: it cannot be written, flushed or renamed; `path` is then what it was.
    """
    # Not by the number of the process, which many containers share.
    staged = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        staged.touch()
        mode = stat.S_IMODE(staged.stat().st_mode)
        yield staged
        give_mode(staged, mode)
        sync_file(staged)
        staged.replace(path)
        sync_folder(path.parent)
    finally:
        with suppress(OSError):
            staged.unlink(missing_ok=True)


def give_mode(path: Path, mode: int) -> None:
    """Sets the permissions of a file where they differ."""
    if stat.S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)


def replace_file(path: Path, content: str | bytes) -> None:
    """Writes a file whole, or leaves it as it was; see `staged_file`."""
    with staged_file(path) as staged:
        staged.write_bytes(content.encode() if isinstance(content, str) else content)


def finite(value: Any) -> Any:
    """Returns `value` with None in place of NaN and infinities, which JSON lacks."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(content: Any) -> str:
    """Returns a JSON document on indented lines; null stands for NaN and infinities."""
    return json.dumps(finite(content), indent=2, allow_nan=False) + "\n"


def parse_json(text: str | bytes, **how: Any) -> Any:
    """Returns the value of a JSON document, as `json.loads`.

    Raises:
        ValueError: it is not JSON, not UTF-8, or nested too deep.
    """
    try:
        return json.loads(text, **how)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def read_json(path: Path, what_next: str, *, error: type[SoftcacheError]) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Args:
        what_next: what to do where there is none.
        error: its class.

    Raises:
        SoftcacheError: of class `error`: the file cannot be read, or holds something else.
    """
    try:
        found = parse_json(path.read_bytes())
    except OSError as failure:
        raise error(f"{path}: cannot be read: {failure.strerror or failure}; {what_next}") from failure
    except ValueError as failure:
        raise error(
            f"{path}: expected a JSON object; found damaged text ({failure}); {what_next}"
        ) from failure
    if not isinstance(found, dict):
        raise error(f"{path}: expected a JSON object; found {type(found).__name__}; {what_next}")
    return found
