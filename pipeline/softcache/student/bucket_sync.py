"""A run's directory in a bucket: worked on in a local folder, sent there after every checkpoint, fetched to go on.

    URL/config.json, metrics.json, model.safetensors, ...    a finished run, metrics.json last
    URL/checkpoint.json                                       of a run in progress: its files, by name and sha256
    URL/checkpoint/SHA256-NAME                                those files

Who resumes gets the files of one checkpoint, never some of each: `checkpoint.json` is replaced when all of them are there,
and what it no longer names is deleted after that. The local folder is kept; a run whose folder is gone, or that another
machine goes on with, is fetched.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from softcache.cache.storage.open import open_objects
from softcache.errors import CacheNotFoundError, CorruptionError, StorageError
from softcache.hashing.digests import digest_bytes

__all__ = ["BucketSync"]

POINTER, STATE, METRICS = "checkpoint.json", "checkpoint", "metrics.json"
UNFINISHED = ("checkpoint.new/", "checkpoint.old/", ".")


def default_folder() -> Path:
    """Returns where the local copies of runs in buckets are."""
    if named := os.environ.get("SOFTCACHE_RUNS_DIR"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "softcache" / "runs"


class BucketSync:
    """A run's directory in a bucket, and the local folder in which the run works.

    Attributes:
        url: of the directory.
        folder: the local one; the same for the same URL.

    Raises (from every method):
        StorageError: the bucket or the folder refuses.
    """

    def __init__(self, url: str) -> None:
        self._objects = open_objects(url)
        self.url = self._objects.url
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", self.url.split("://", 1)[1]).strip("-")[-40:]
        self.folder = default_folder() / f"{slug}-{digest_bytes(self.url.encode())[:12]}"

    def fetch(self) -> None:
        """Fetches a finished run, or the last checkpoint of one that was not begun here.

        Raises:
            CorruptionError: a file differs from `checkpoint.json`.
        """
        there = self._objects.size(METRICS) is not None
        if (self.folder / METRICS).exists():
            if not there:  # stopped between the two
                self.finish()
        elif there:
            names = [name for name in self._objects.list("") if not name.startswith((POINTER, f"{STATE}/"))]
            self._write({name: self._objects.get(name) for name in sorted(names, key=METRICS.__eq__)})
        elif not (self.folder / "config.json").exists() and (files := self._named()):
            objects = [_object(name, sha256) for name, sha256 in files.items()]
            found = dict(zip(files, self._objects.get_many(objects), strict=True))
            for name, sha256 in files.items():
                if (data := found[name]) is None or digest_bytes(data) != sha256:
                    raise CorruptionError(
                        f"run {self.url}: {_object(name, sha256)} is {'missing' if data is None else 'damaged'}; its "
                        f"sha256 is in {POINTER}; restore it, or choose another --out to train anew"
                    )
            self._write({name: data for name, data in found.items() if data is not None})

    def send(self) -> None:
        """Sends the folder's files, those that are not there yet, and then marks them as the checkpoint."""
        before, files = self._named(), {}
        for name, data in self._local_files():
            files[name] = digest_bytes(data)
            if before.get(name) != files[name]:
                self._objects.put(_object(name, files[name]), data)
        self._objects.put(POINTER, (json.dumps({"files": files}, indent=2) + "\n").encode())
        self._clear(keep={_object(name, sha256) for name, sha256 in files.items()})

    def finish(self) -> None:
        """Sends the folder of a finished run under its files' own names, and clears its checkpoints."""
        for name, data in sorted(self._local_files(), key=lambda file: file[0] == METRICS):
            if not name.startswith(f"{STATE}/"):
                self._objects.put(name, data)
        self._objects.delete(POINTER)
        self._clear(keep=set())

    def _clear(self, keep: set[str]) -> None:
        for path in self._objects.list(STATE):
            if path not in keep:
                self._objects.delete(path)

    def _named(self) -> dict[str, str]:
        """Returns the sha256 of each file of the checkpoint in the bucket, by name; nothing if there is none."""
        try:
            found: Any = json.loads(self._objects.get(POINTER))["files"]
            if all(_is_inside(name) and re.fullmatch("[0-9a-f]{64}", found[name]) for name in found):
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
        try:
            for name, data in files.items():
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                staged = path.with_name(f".{path.name}.{os.getpid()}")
                staged.write_bytes(data)
                staged.replace(path)
        except OSError as error:
            raise StorageError(
                f"run {self.url}: its local folder {self.folder} cannot be written: {error}; set SOFTCACHE_RUNS_DIR"
            ) from error


def _object(name: str, sha256: str) -> str:
    return f"{STATE}/{sha256}-{name.replace('/', '-')}"


def _is_inside(name: str) -> bool:
    return not {"", ".", ".."} & set(name.split("/")) and "\\" not in name
