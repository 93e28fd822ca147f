"""Chunks of Zarr shards, decoded one after the other into memory that is used again.

`ZarrStore.read` has TensorStore decode into new arrays. A reader of windows decodes thousands of chunks and copies their
rows to where they belong, and then most of the time goes into pages of memory that are touched for the first time. Here
a thread decodes chunk after chunk into the same few arrays, which stay in the processor's cache. numcodecs has the
decompressors of zarr-python, and runs them without the interpreter's lock.

Only what softcache writes is decoded here: chunks as `zarr_metadata` describes them, each with its crc32c. Anything else,
and whatever is not as it should be, is left to `ZarrStore.read`, which names what is wrong.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from softcache.cache.arrays.zarr_metadata import COMPRESSORS
from softcache.cache.arrays.zarr_shards import WantedChunks
from softcache.cache.codecs import Column

__all__ = [
    "ChunkLayout",
    "DecodedPart",
    "Scratch",
    "StoredChunks",
    "chunk_layout",
    "decode_chunk",
    "decode_parts",
]

_BLOSC_HEAD, _ZSTD_MAGIC = 16, b"\x28\xb5\x2f\xfd"
_CRC_OF_WHOLE = 0x48674BC7
"""The crc32c of any bytes with their crc32c, little-endian, behind them."""


@dataclass(frozen=True)
class ChunkLayout:
    """How the chunks of a column are coded.

    Attributes:
        compressor: "blosc" or "zstd"; None: none.
        shape: of a chunk as it is stored: rows first, of a planar column last.
        dtype: of its numbers.
    """

    compressor: str | None
    shape: tuple[int, ...]
    dtype: np.dtype
    planar: bool

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class StoredChunks(NamedTuple):
    """The chunks of a column that hold some rows, as they are stored.

    Attributes:
        rows: the first and last of these rows, counted from the first row of the shard.
        data: of the chunks from `wanted.first` on; None for one that is missing.
    """

    rows: tuple[int, int]
    wanted: WantedChunks
    data: list[bytes | None]


class DecodedPart(NamedTuple):
    """The rows `first` to `stop` of those that were asked for, by column [stop - first, ...]; overwritten later."""

    first: int
    stop: int
    columns: dict[str, np.ndarray]


def chunk_layout(column: Column, document: Mapping[str, Any], chunk_rows: int) -> ChunkLayout | None:
    """Returns how a column's chunks are coded by its `zarr.json`; None where they are not decoded here."""
    names = [codec["name"] for codec in document["codecs"][0]["configuration"]["codecs"]]
    compressor = next((name for name in names if name in COMPRESSORS), None)
    expected = (
        ["transpose"] * column.planar + ["bytes"] + [compressor] * (compressor is not None) + ["crc32c"]
    )
    if names != expected or compressor == "gzip":
        return None
    shape = (*column.shape, chunk_rows) if column.planar else (chunk_rows, *column.shape)
    return ChunkLayout(compressor, shape, np.dtype(column.dtype), column.planar)


class Scratch(threading.local):
    """Memory of each thread for one chunk of each column."""

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}

    def array(self, name: str, num_bytes: int) -> np.ndarray:
        """Returns [num_bytes] uint8, the same memory whenever the same thread asks."""
        found = self._arrays.get(name)
        if found is None or len(found) != num_bytes:
            found = self._arrays[name] = np.empty(num_bytes, np.uint8)
        return found


def decode_parts(
    stored: Mapping[str, StoredChunks], layouts: Mapping[str, ChunkLayout], scratch: Scratch
) -> Iterator[DecodedPart | None]:
    """Yields the rows of some columns of one chunk grid, chunk by chunk; None for a chunk that cannot be decoded."""
    (first_row, stop_row), wanted, _ = next(iter(stored.values()))
    for number in range(wanted.first, wanted.stop):
        columns, first, stop = {}, 0, 0
        for name, chunks in stored.items():
            layout = layouts[name]
            out, data = scratch.array(name, layout.num_bytes), chunks.data[number - wanted.first]
            if data is None or not decode_chunk(data, layout.compressor, out):
                yield None
                return
            values = out.view(layout.dtype).reshape(layout.shape)
            values = values.T if layout.planar else values
            start = number * len(values)
            first, stop = max(start, first_row), min(start + len(values), stop_row)
            columns[name] = values[first - start : stop - start]
        yield DecodedPart(first - first_row, stop - first_row, columns)


def decode_chunk(data: bytes, compressor: str | None, out: np.ndarray) -> bool:
    """Decodes a chunk with its crc32c behind it into all of `out` [n] uint8; returns False where it is not such a chunk."""
    import google_crc32c

    if google_crc32c.value(data) != _CRC_OF_WHOLE:  # without a copy of what is in front of the checksum
        return False
    body = memoryview(data)[:-4]
    if compressor is None:
        if len(body) != len(out):
            return False
        out[:] = np.frombuffer(body, np.uint8)
        return True
    claimed = _blosc_bytes(body) if compressor == "blosc" else _zstd_bytes(body)
    if claimed != len(out):  # a decompressor may leave a part of `out` as it was
        return False
    try:
        _decompressor(compressor)(body, out)
    except (RuntimeError, ValueError):
        return False
    return True


def _decompressor(name: str) -> Any:
    from numcodecs import blosc, zstd

    blosc.use_threads = False  # zarr-python sets it as well
    return {"blosc": blosc, "zstd": zstd}[name].decompress


def _blosc_bytes(data: memoryview) -> int:
    """Returns how many bytes a Blosc chunk claims to hold; -1 for what is none."""
    whole = len(data) >= _BLOSC_HEAD and int.from_bytes(data[12:16], "little") == len(data)
    return int.from_bytes(data[4:8], "little") if whole else -1


def _zstd_bytes(data: memoryview) -> int:
    """Returns how many bytes a Zstandard frame claims to hold (RFC 8878, 3.1.1.1); -1 where it does not claim any."""
    if len(data) < 18 or data[:4] != _ZSTD_MAGIC:
        return -1
    kind, single, dictionary = data[4] >> 6, data[4] >> 5 & 1, data[4] & 3
    size = (single, 2, 4, 8)[kind]
    if dictionary or not size:
        return -1
    start = 6 - single
    return int.from_bytes(data[start : start + size], "little") + (256 if size == 2 else 0)
