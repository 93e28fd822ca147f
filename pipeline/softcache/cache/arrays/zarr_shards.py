"""A shard cut down to some of its chunks, for decoding what is read of a bucket in ranges.

    shard    chunk, chunk, ..., index
    index    per chunk uint64 offset, uint64 bytes (both 2^64 - 1 where there is none); then crc32c, uint32; little-endian

TensorStore decodes the cut shard from memory as it decodes a whole one from a file, so a cache's numbers, checks and
errors are the same wherever it is. Indexes are kept: reading on costs one request per run of neighbouring chunks.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from softcache.cache.storage.base import Objects

__all__ = ["GAP_BYTES", "ShardCutter", "WantedChunks"]

KEPT_INDEXES = 4096
GAP_BYTES = 64 << 10
"""Chunks that lie closer are asked for together."""
NONE = 2**64 - 1


class WantedChunks(NamedTuple):
    """The chunks `first` to `stop` of a shard that has `total` of them."""

    total: int
    first: int
    stop: int


class _Index(NamedTuple):
    """Where the chunks of a shard are [C, 2] uint64: offset and bytes."""

    entries: np.ndarray


class ShardCutter:
    """Reads parts of one cache's shards; safe to use from several threads."""

    def __init__(self, objects: Objects) -> None:
        self._objects, self._lock = objects, threading.Lock()
        self._indexes: OrderedDict[str, _Index] = OrderedDict()

    def cut(self, wanted: Mapping[str, WantedChunks]) -> dict[str, bytes]:
        """Returns shards, by path, that hold the wanted chunks and say of all others that there are none.

        Raises:
            ValueError: an index or a chunk is not where it has to be, or an index fails its checksum.
            CacheNotFoundError: a shard is missing.
        """
        indexes = self._read_indexes({path: chunks.total for path, chunks in wanted.items()})
        runs = [
            (path, start, stop)
            for path, chunks in wanted.items()
            for start, stop in _runs(indexes[path].entries[chunks.first : chunks.stop].tolist())
        ]
        parts = self._objects.get_ranges(runs)
        for (path, start, stop), part in zip(runs, parts, strict=True):
            if len(part) != stop - start:
                raise ValueError(f"{path}: ends before byte {stop}, where a chunk ends")
        found: dict[str, list[tuple[int, bytes]]] = {path: [] for path in wanted}
        for (path, start, _), part in zip(runs, parts, strict=True):
            found[path].append((start, part))
        return {path: _assemble(indexes[path].entries, wanted[path], found[path]) for path in wanted}

    def chunks(
        self, wanted: Sequence[tuple[str, WantedChunks]], gap: int = GAP_BYTES
    ) -> list[list[bytes | None]]:
        """Returns the stored bytes of the wanted chunks of some shards, None for one that is not there.

        Args:
            gap: chunks that lie at most so many bytes apart are one request, all of which are made at once; -1: of files,
                where a chunk that is read by itself is not copied out of its neighbors.

        Raises:
            ValueError: an index is not where it has to be or fails its checksum.
            CacheNotFoundError: a shard is missing.
        """
        indexes = self._read_indexes({path: chunks.total for path, chunks in wanted})
        places = [indexes[path].entries[chunks.first : chunks.stop].tolist() for path, chunks in wanted]
        entries: dict[str, list[list[int]]] = {}
        for (path, _), found in zip(wanted, places, strict=True):
            entries.setdefault(path, []).extend(found)
        runs = [(path, *run) for path, found in entries.items() for run in _runs(found, gap)]
        parts: dict[str, list[tuple[int, bytes]]] = {path: [] for path in entries}
        for (path, start, _), part in zip(runs, self._objects.get_ranges(runs), strict=True):
            parts[path].append((start, part))
        return [
            [_inside(parts[path], *entry) for entry in found]
            for (path, _), found in zip(wanted, places, strict=True)
        ]

    def forget(self, paths: Iterable[str]) -> None:
        """Has the indexes of some shards read again, which may have been replaced."""
        with self._lock:
            for path in paths:
                self._indexes.pop(path, None)

    def _read_indexes(self, totals: Mapping[str, int]) -> dict[str, _Index]:
        """Returns the indexes of shards of so many chunks, by path."""
        with self._lock:
            indexes = {path: self._indexes[path] for path in totals if path in self._indexes}
        lengths = {path: _index_bytes(total) for path, total in totals.items() if path not in indexes}
        ends = self._objects.get_suffixes(lengths) if lengths else ()
        for path, (data, size) in zip(lengths, ends, strict=True):
            indexes[path] = _parse_index(path, data, totals[path], size)
        with self._lock:
            for path in totals:
                self._indexes[path] = indexes[path]
                self._indexes.move_to_end(path)
            while len(self._indexes) > KEPT_INDEXES:
                self._indexes.popitem(last=False)
        return indexes


def _index_bytes(num_chunks: int) -> int:
    return 16 * num_chunks + 4


def _parse_index(path: str, data: bytes, num_chunks: int, size: int) -> _Index:
    """Returns a shard's index; no entry leads out of the shard."""
    import google_crc32c

    if len(data) != _index_bytes(num_chunks):
        raise ValueError(f"{path}: {size} bytes, too few for an index of {num_chunks} chunks")
    if google_crc32c.value(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise ValueError(f"{path}: the index of its chunks fails its checksum")
    entries = np.frombuffer(data[:-4], "<u8").reshape(num_chunks, 2)
    limit = np.uint64(size - len(data))
    there = entries[:, 0] != np.uint64(NONE)
    offsets, lengths = entries[there].T
    if (lengths > limit).any() or (offsets > limit - np.minimum(lengths, limit)).any():
        raise ValueError(f"{path}: a chunk lies outside of it")
    return _Index(entries)


def _runs(entries: Iterable[Sequence[int]], gap: int = GAP_BYTES) -> list[tuple[int, int]]:
    """Returns the ranges of bytes that hold some chunks (offset, bytes); those up to `gap` bytes apart are in one."""
    spans = sorted((offset, offset + length) for offset, length in entries if offset != NONE)
    runs: list[tuple[int, int]] = []
    for start, stop in spans:
        if runs and start - runs[-1][1] <= gap:
            runs[-1] = runs[-1][0], max(stop, runs[-1][1])
        else:
            runs.append((start, stop))
    return runs


def _inside(parts: list[tuple[int, bytes]], offset: int, length: int) -> bytes | None:
    """Returns the chunk of an index' entry out of the parts of a shard, (start, bytes); None where there is none."""
    if offset == NONE:
        return None
    for start, part in parts:
        if start <= offset and offset + length <= start + len(part):
            return part if length == len(part) else part[offset - start : offset - start + length]
    return None


def _assemble(entries: np.ndarray, chunks: WantedChunks, parts: list[tuple[int, bytes]]) -> bytes:
    """Returns the cut shard: the parts one after the other, and an index of where in them the chunks are."""
    import google_crc32c

    cut = np.full_like(entries, np.uint64(NONE))
    base = 0
    for start, part in parts:
        inside = (entries[:, 0] >= np.uint64(start)) & (entries[:, 0] < np.uint64(start + len(part)))
        for chunk in range(chunks.first, chunks.stop):
            if inside[chunk]:
                cut[chunk] = entries[chunk, 0] - np.uint64(start) + np.uint64(base), entries[chunk, 1]
        base += len(part)
    index = cut.astype("<u8").tobytes()
    return b"".join([*(part for _, part in parts), index, google_crc32c.value(index).to_bytes(4, "little")])
