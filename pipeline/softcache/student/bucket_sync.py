"""A run's directory in a bucket: worked on in a local folder, sent there after every checkpoint, fetched to go on.

    URL/config.json, metrics.json, model.safetensors, ...    a finished run, metrics.json last
    URL/checkpoint.json                                       of a run in progress: its files, by name and sha256
    URL/checkpoint/SHA256-NAME                                those files

    URL/run.lock                                              while a process works on it: its lease

Who resumes gets the files of one checkpoint, never some of each: `checkpoint.json` is replaced when all of them are there,
and what it no longer names is deleted after that. The bucket is the truth: the local folder notes what it last sent or
fetched, and where the bucket holds something else by now, or nothing, its files are removed and the bucket's are fetched.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from softcache.cache.storage.base import Objects
from softcache.cache.storage.cloud.store import CloudObjects
from softcache.cache.storage.lease import LEASE_SECONDS
from softcache.errors import CacheNotFoundError, CorruptionError, RunError, StorageError
from softcache.hashing.digests import digest_bytes
from softcache.runtime.files import parse_json, replace_file, user_cache_folder
from softcache.runtime.logging import log_info

__all__ = ["BucketSync", "find_runs", "hold_lease"]

POINTER, STATE, METRICS, LEASE = "checkpoint.json", "checkpoint", "metrics.json", "run.lock"
NOTE = ".bucket.json"
"""In the local folder: the state of the bucket that it was last equal to."""
WAIT_SECONDS = 2.0
UNFINISHED = ("checkpoint.new/", "checkpoint.old/", ".")


def default_folder() -> Path:
    """Returns where the local copies of runs in buckets are."""
    return user_cache_folder("SOFTCACHE_RUNS_DIR", "runs")


@contextmanager
def hold_lease(objects: Objects, path: str, what: str) -> Iterator[None]:
    """Holds a lease for this process; that of a process that is gone runs out after a minute, for which it waits.

    Raises:
        RunError: another process holds it, and renews its lease.
    """
    began, first = time.monotonic(), None
    while True:
        with objects.claim(path) as is_ours:
            if is_ours:
                yield
                return
        holder = _holder(objects, path)
        renewed = first is not None and first.get("owner") == holder.get("owner") and first != holder
        where = f"host {holder.get('host')}, process {holder.get('pid')}"
        if renewed or time.monotonic() - began > 2 * LEASE_SECONDS:
            raise RunError(
                f"{what}: another run works on it ({where}); wait for its end, stop it, or choose another --out"
            )
        if first is None and holder:
            log_info(f"{what}: held by {where}; waiting for a minute, in case that it is gone")
        first = first or holder or None
        time.sleep(WAIT_SECONDS)


def _holder(objects: Objects, path: str) -> dict[str, Any]:
    """Returns the content of a lease; nothing if it has just ended, or is not one."""
    try:
        found = parse_json(objects.get(path, max_bytes=1 << 16))
    except (CacheNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class BucketSync:
    """A run's directory in a bucket, and the local folder in which the run works.

    Attributes:
        url: of the directory.
        folder: the local one; the same for the same URL.

    Raises (from every method):
        StorageError: the bucket or the folder refuses.
    """

    def __init__(self, url: str) -> None:
        self._objects = CloudObjects(url)
        self.url = self._objects.url
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", self.url.split("://", 1)[1]).strip("-")[-40:]
        self.folder = default_folder() / f"{slug}-{digest_bytes(self.url.encode())[:12]}"

    @property
    def is_finished(self) -> bool:
        """Whether the bucket holds a finished run."""
        return self._objects.size(METRICS) is not None

    def lease(self) -> AbstractContextManager[None]:
        """Holds the directory in the bucket for this process; see `hold_lease`."""
        return hold_lease(self._objects, LEASE, f"run {self.url}")

    def fetch(self) -> None:
        """Makes the local folder what the bucket holds: a finished run, the last checkpoint, or nothing.

        A folder that has gone on since from that very checkpoint stays as it is.

        Raises:
            CorruptionError: a file differs from `checkpoint.json`.
        """
        state = self._state()
        if state == self._noted():
            if (self.folder / METRICS).exists() and state is not None and not state.startswith(METRICS):
                self.finish()  # stopped between the two
            return
        found = self._finished_files() if self.is_finished else self._checkpoint_files()
        self._remove_files()
        self._write(found)
        self._note(state)

    def _finished_files(self) -> dict[str, bytes]:
        names = [
            name
            for name in self._objects.list("")
            if name not in (POINTER, LEASE) and not name.startswith(f"{STATE}/")
        ]
        return {name: self._objects.get(name) for name in sorted(names, key=METRICS.__eq__)}

    def _checkpoint_files(self) -> dict[str, bytes]:
        """Returns the files of the last checkpoint, by name; nothing without one."""
        files = self._named()
        objects = [_object(name, sha256) for name, sha256 in files.items()]
        found = dict(zip(files, self._objects.get_many(objects), strict=True))
        for name, sha256 in files.items():
            if (data := found[name]) is None or digest_bytes(data) != sha256:
                raise CorruptionError(
                    f"run {self.url}: {_object(name, sha256)} is {'missing' if data is None else 'damaged'}; its "
                    f"sha256 is in {POINTER}; restore it, or choose another --out to train anew"
                )
        return {name: data for name, data in found.items() if data is not None}

    def send(self) -> None:
        """Sends the folder's files, those that are not there yet, and then marks them as the checkpoint.

        Raises:
            RunError: another process has changed the run in the bucket meanwhile.
        """
        before, files = self._named(), {}
        for name, data in self._local_files():
            files[name] = digest_bytes(data)
            if before.get(name) != files[name]:
                self._objects.put(_object(name, files[name]), data)
        self._replace_pointer((json.dumps({"files": files}, indent=2) + "\n").encode())
        self._clear(keep={_object(name, sha256) for name, sha256 in files.items()})

    def _replace_pointer(self, data: bytes) -> None:
        """Replaces exactly the checkpoint that this folder went on from."""
        try:
            there, tag = self._objects.get_tagged(POINTER)
        except CacheNotFoundError:
            there, tag = None, None
        self._check_unchanged(f"{POINTER} {digest_bytes(there)}" if there is not None else self._state())
        # The answer to a put may be lost: then it is our own that is there.
        if self._objects.put_where(POINTER, data, tag) is None and self._objects.get(POINTER) != data:
            raise self._changed()
        self._note(f"{POINTER} {digest_bytes(data)}")

    def finish(self) -> None:
        """Sends the folder of a finished run under its files' own names, and clears its checkpoints.

        Raises:
            RunError: another process has changed the run in the bucket meanwhile.
        """
        self._check_unchanged(self._state())
        for name, data in sorted(self._local_files(), key=lambda file: file[0] == METRICS):
            if not name.startswith(f"{STATE}/"):
                self._objects.put(name, data)
        self._objects.delete(POINTER)
        self._clear(keep=set())
        self._note(self._state())

    def _state(self) -> str | None:
        """Returns what the bucket holds: the digest of the run's results, or of its checkpoint; None without either."""
        for name in (METRICS, POINTER):
            try:
                return f"{name} {digest_bytes(self._objects.get(name))}"
            except CacheNotFoundError:
                continue
        return None

    def _check_unchanged(self, state: str | None) -> None:
        if state != self._noted():
            raise self._changed()

    def _changed(self) -> RunError:
        return RunError(
            f"run {self.url}: another process has changed it in the bucket since this one began; this one stops and "
            "leaves it as it is; start one run on an --out"
        )

    def _noted(self) -> str | None:
        try:
            return str(parse_json((self.folder / NOTE).read_text("utf-8"))["state"])
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _note(self, state: str | None) -> None:
        if state is not None:
            self._write({NOTE: (json.dumps({"state": state}) + "\n").encode()})

    def _remove_files(self) -> None:
        """Empties the local folder, except for what begins with a dot: the lock that this process holds."""
        with self._writing():
            (self.folder / NOTE).unlink(missing_ok=True)
            for path in self.folder.iterdir() if self.folder.exists() else ():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif not path.name.startswith("."):
                    path.unlink()

    def _clear(self, keep: set[str]) -> None:
        for path in self._objects.list(STATE):
            if path not in keep:
                self._objects.delete(path)

    def _named(self) -> dict[str, str]:
        """Returns the sha256 of each file of the checkpoint in the bucket, by name; nothing if there is none."""
        try:
            found: Any = parse_json(self._objects.get(POINTER))["files"]
            if isinstance(found, dict) and all(
                _is_inside(name) and re.fullmatch("[0-9a-f]{64}", found[name]) for name in found
            ):
                return dict(found)
        except CacheNotFoundError:
            return {}
        except (ValueError, TypeError, KeyError):
            pass
        raise CorruptionError(
            f"run {self.url}: {POINTER} is not a list of files with their sha256; choose another --out, or remove it"
        )

    def _local_files(self) -> Iterator[tuple[str, bytes]]:
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if path.is_file() and not name.startswith(UNFINISHED):
                yield name, path.read_bytes()

    def _write(self, files: dict[str, bytes]) -> None:
        with self._writing():
            for name, data in files.items():
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                replace_file(path, data)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"run {self.url}: its local folder {self.folder} cannot be written: {error}; set SOFTCACHE_RUNS_DIR"
            ) from error


def find_runs(url: str) -> tuple[list[str], list[str]]:
    """Returns the URLs of finished runs in a bucket, and of those that are not finished.

    Args:
        url: of a run's directory, or of a folder of such.

    Raises:
        StorageError: the bucket refuses.
    """
    root = CloudObjects(url)
    found: dict[str, set[str]] = {}
    for path in root.list(""):
        folder, _, name = path.rpartition("/")
        if name in (METRICS, POINTER) and "/" not in folder:
            found.setdefault(folder, set()).add(name)
    if "" in found:
        found = {"": found[""]}
    finished = {f"{root.url}/{folder}".rstrip("/"): METRICS in found[folder] for folder in sorted(found)}
    return [place for place in finished if finished[place]], [
        place for place in finished if not finished[place]
    ]


def _object(name: str, sha256: str) -> str:
    return f"{STATE}/{sha256}-{name.replace('/', '-')}"


def _is_inside(name: str) -> bool:
    return not {"", ".", ".."} & set(name.split("/")) and "\\" not in name
