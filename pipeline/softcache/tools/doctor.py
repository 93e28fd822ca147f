"""Diagnoses an installation: package versions, devices, free space, and access to a store.

A store is tried out: an object of a few bytes is written under an unused name, listed, read back and
deleted, by the same code that caches go through. A folder that is not there yet is tried at the nearest one that is.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from softcache import __version__
from softcache.cache.storage.base import Objects, is_bucket
from softcache.cache.storage.local import STAGING, LocalObjects
from softcache.cache.storage.locks import MARK
from softcache.cache.storage.open import open_objects
from softcache.errors import CorruptionError, SoftcacheError, StorageError
from softcache.reader.memmap import default_folder
from softcache.runtime.files import expand_home

__all__ = ["devices", "free_space", "store_access", "versions"]

CORE = ("torch", "zarr", "tensorstore", "pyarrow", "numpy")
DEV_EXTRAS = {"all", "dev", "docs"}
EXTRA = re.compile(r"""^\s*([A-Za-z0-9._-]+).*;.*extra\s*==\s*["']([\w-]+)["']""")
REMEDIES = {
    "open": "correct the path or URL; for a bucket see docs/how-to/object-storage.md",
    "write": "choose a place that this user may write (bucket: the right to put objects), with free space",
    "list": "give this user the right to list it (bucket: s3:ListBucket or its like)",
    "read": "give this user the right to read it (bucket: the right to get objects)",
    "delete": "give this user the right to delete (gc and claims need it), and remove the object named above",
}


def versions() -> dict[str, Any]:
    """Returns the versions of softcache, Python and the core packages, and of each extra's packages (None: missing)."""
    return {
        "softcache": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in CORE},
        "extras": {name: {part: _version(part) for part in parts} for name, parts in _extras().items()},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extras() -> dict[str, list[str]]:
    """The optional packages by extra, as the installed softcache declares them; none where it is not installed."""
    found: dict[str, list[str]] = {}
    with suppress(importlib.metadata.PackageNotFoundError):
        for line in importlib.metadata.requires("softcache") or ():
            match = EXTRA.match(line)
            if match and match[1] != "softcache" and match[2] not in DEV_EXTRAS:
                found.setdefault(match[2], []).append(match[1])
    return found


def devices() -> dict[str, Any]:
    """Returns CPU cores and threads, and each accelerator with its memory [bytes] and, if it fails a sum, why."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        import torch
    except ModuleNotFoundError:  # a machine that only reads caches
        return {"cpu_cores": cores, "cpu_threads": None, "cuda": [], "mps": False}
    gpus = []
    for number in range(torch.cuda.device_count()):
        free, total = None, torch.cuda.get_device_properties(number).total_memory
        fault = None
        try:
            free = torch.cuda.mem_get_info(number)[0]
            torch.ones(2, device=f"cuda:{number}").sum().item()
        except RuntimeError as error:
            fault = str(error).splitlines()[0]
        name = torch.cuda.get_device_name(number)
        gpus.append({"name": name, "total_bytes": total, "free_bytes": free, "fault": fault})
    return {
        "cpu_cores": cores,
        "cpu_threads": torch.get_num_threads(),
        "cuda": gpus,
        "mps": torch.backends.mps.is_available(),
    }


def free_space() -> dict[str, dict[str, Any]]:
    """Returns the default folders of caches and memory-mapped views, and the free bytes there."""
    places = {"caches": Path("runs").absolute(), "memmaps": default_folder()}
    return {
        name: {"folder": str(path), "free_bytes": shutil.disk_usage(_existing(path)).free}
        for name, path in places.items()
    }


def _existing(path: Path) -> Path:
    """The nearest folder at or above a path that is there."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def store_access(url: str) -> dict[str, Any]:
    """Tries a store: writes, lists, reads and deletes one small object.

    Returns:
        `url`; `tried`, where (a folder that is not there is tried at the nearest one above it); `done`, the steps that
        worked; `failed`, None or the first `step` that did not, with `message` and `to_do`; `locks`, what keeps two
        writers apart there.
    """
    found: dict[str, Any] = {"url": url, "tried": url, "done": [], "failed": None, "locks": None}
    step = "open"
    try:
        found["tried"] = url if is_bucket(url) else _local_place(url)
        objects = open_objects(found["tried"])
        found["done"].append(step)
        for step, work in _steps(objects):
            work()
            found["done"].append(step)
            if step == "write":
                found["locks"] = _locks(objects)
    except (SoftcacheError, OSError) as error:
        found["failed"] = {"step": step, "message": str(error), "to_do": REMEDIES[step]}
    return found


def _locks(objects: Objects) -> str:
    if not isinstance(objects, LocalObjects):
        return "leases, by conditional puts"
    kind, reason = objects.locks()
    words = "flock" if kind == "flock" else f"leases ({reason})"
    return words + ("" if objects.has_links else "; no hard links, so new objects are renamed into place")


def _local_place(url: str) -> str:
    """A local path, or the nearest folder above it that is there; `open_objects` refuses other schemes."""
    parts = urlsplit(url)
    if "://" in url and parts.scheme != "file":
        return url
    path = Path(unquote(parts.path) if parts.scheme == "file" else expand_home(url)).absolute()
    place = _existing(path)
    if not place.is_dir():
        raise StorageError(f"{place}: is a file; expected a folder")
    return url if place == path else str(place)


def _steps(objects: Objects) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yields what is tried, in order; where a step fails, what was written is removed if that can be done."""
    folder = f".softcache-doctor-{uuid.uuid4().hex}"
    path, data = f"{folder}/object", os.urandom(64)
    local = Path(objects.url) if not is_bucket(objects.url) else None
    staging_was_there = local is not None and (local / STAGING).exists()

    def write() -> None:
        if not objects.put_if_absent(path, data):
            raise StorageError(f"{objects.url}: {path} could not be written as a new object")

    def listed() -> None:
        if objects.list(folder) != [path]:
            raise StorageError(f"{objects.url}: {path} was written and is not listed")

    def read() -> None:
        if objects.get(path) != data:
            raise CorruptionError(f"{objects.url}: {path} is read back with other bytes than were written")

    def delete() -> None:
        objects.delete(path)
        if objects.size(path) is not None:
            raise StorageError(f"{objects.url}: {path} was deleted and is still there")

    try:
        yield "write", write
        yield "list", listed
        yield "read", read
        yield "delete", delete
    finally:
        with suppress(SoftcacheError, OSError):
            objects.delete(path)
        if local is not None:
            if not staging_was_there:
                (local / STAGING / MARK).unlink(missing_ok=True)
            for left in [folder, *([] if staging_was_there else [STAGING])]:
                with suppress(OSError):
                    (local / left).rmdir()
