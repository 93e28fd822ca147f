"""The limit of reading: the same numbers uncompressed in files, gathered through np.memmap.

Two layouts, one record per row and one file per column; and `drop_from_memory`, which makes files cold.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softcache.reader.cache import Cache
from softcache.reader.order import Request

__all__ = ["RawColumns", "RawDataset", "RawRecords", "drop_from_memory", "resident_share", "write_raw"]

NAMES = ("ids", "log_probs", "log_tail", "target_log_prob", "stats")
PART_SAMPLES = 2048


def record_of(labels: Any) -> np.dtype:
    """Returns the structured dtype of one row; no padding."""
    return np.dtype(
        [(name, (values := getattr(labels, name)).dtype, values.shape[1:]) for name in NAMES], align=False
    )


def write_raw(cache: Cache, folder: Path) -> tuple[RawRecords, RawColumns]:
    """Writes both layouts with the labels of a cache, flushed to the disk."""
    folder.mkdir(parents=True)
    dtype = record_of(cache.read([0]))
    with (folder / "records.raw").open("wb") as records:
        files = {name: (folder / f"{name}.raw").open("wb") for name in NAMES}
        size = max(1, cache.manifest.plan.chunk_samples)
        for start in range(0, len(cache), size):
            labels = cache.read(np.arange(start, min(start + size, len(cache))))
            rows = np.empty(len(labels), dtype)
            for name in NAMES:
                rows[name] = getattr(labels, name)
                np.ascontiguousarray(rows[name]).tofile(files[name])
            rows.tofile(records)
        for file in [*files.values(), records]:
            file.flush()
            os.fsync(file.fileno())
        for file in files.values():
            file.close()
    rows_per_sample = int(cache.rows.counts(np.arange(1))[0])
    return RawRecords(folder, dtype, rows_per_sample), RawColumns(folder, dtype, rows_per_sample)


class RawRecords:
    """One record per row; picklable, and mapped by each process on first use.

    Args:
        rows_per_sample: the same for every sample.
    """

    def __init__(self, folder: Path, dtype: np.dtype, rows_per_sample: int) -> None:
        self.folder, self.dtype, self.rows_per_sample = folder, dtype, rows_per_sample
        self._maps: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}

    def paths(self) -> list[Path]:
        return [self.folder / "records.raw"]

    def close(self) -> None:
        """Lets go of the maps: pages that are mapped cannot be dropped from memory."""
        self._maps = {}

    def _map(self, name: str, sample_bytes: int) -> np.ndarray:
        if name not in self._maps:
            # A view as a plain array: np.memmap's own indexing costs a few microseconds more.
            mapped = np.memmap(self.folder / f"{name}.raw", np.uint8, "r")
            self._maps[name] = np.asarray(mapped).reshape(-1, sample_bytes)
        return self._maps[name]

    def read(self, samples: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the raw bytes of samples: {"records": [B, bytes of a sample] uint8}."""
        mapped = self._map("records", self.dtype.itemsize * self.rows_per_sample)
        return {"records": np.take(mapped, samples, axis=0)}

    def rows(self, raw: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the columns [P, ...] of what was read."""
        records = raw["records"].view(self.dtype).reshape(-1)
        return {name: records[name] for name in NAMES}


class RawColumns(RawRecords):
    """One file per column."""

    def paths(self) -> list[Path]:
        return [self.folder / f"{name}.raw" for name in NAMES]

    def read(self, samples: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the raw bytes of samples, by column."""
        sizes = {name: self.dtype[name].itemsize * self.rows_per_sample for name in NAMES}
        return {name: np.take(self._map(name, size), samples, axis=0) for name, size in sizes.items()}

    def rows(self, raw: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {
            name: values.view(self.dtype[name].base).reshape(-1, *self.dtype[name].shape)
            for name, values in raw.items()
        }


class RawDataset:
    """Samples with their raw labels as tensors of bytes; fetched a batch at a time."""

    def __init__(self, data: Any, raw: RawRecords) -> None:
        self._data, self._raw = data, raw

    def __len__(self) -> int:
        return len(self._data)

    def __getitems__(self, request: Request) -> tuple[Any, dict[str, torch.Tensor]]:
        batch = self._data.load(request.samples, request.view, fingerprints=False)
        read = self._raw.read(request.samples)
        return batch, {name: torch.from_numpy(values) for name, values in read.items()}


# -- cold files --------------------------------------------------------------------------------------------


def files_of(paths: list[Path]) -> list[Path]:
    """Returns all files, those in folders included."""
    return [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*")))]


def drop_from_memory(paths: list[Path]) -> float:
    """Asks the kernel to forget the pages of files and folders; returns the share [0, 1] of them that is still there."""
    for path in files_of(paths):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)  # pages that wait to be written stay
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)
    return resident_share(paths)


def resident_share(paths: list[Path]) -> float:
    """Returns which share of the pages of files and folders is in memory (mincore)."""
    libc = ctypes.CDLL(None, use_errno=True)
    there = total = 0
    for path in files_of(paths):
        size = path.stat().st_size if path.is_file() else 0
        if size == 0:
            continue
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            pages = -(-size // mmap.PAGESIZE)
            vector = (ctypes.c_ubyte * pages)()
            array = np.frombuffer(mapped, np.uint8)
            if libc.mincore(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(size), vector) != 0:
                raise OSError(ctypes.get_errno(), f"{path}: mincore failed")
            del array
            there += int((np.frombuffer(vector, np.uint8) & 1).sum())
            total += pages
    return there / max(total, 1)
