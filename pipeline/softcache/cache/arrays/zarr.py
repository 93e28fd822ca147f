"""Columns as Zarr v3 arrays: one shard per unit, chunked inside, crc32c throughout.

The axes are (view, sample, …), or (row, …) where samples have many rows: unit n's rows then start at a shard.

zarr-python writes the metadata; TensorStore encodes and decodes the chunks. A shard is encoded in memory and
published whole, so that a reader never sees half of one. Reading takes the geometry from the manifest and
never from `zarr.json`, which is there for other tools.
"""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from softcache.cache.arrays.zarr_chunks import DecodedPart, StoredChunks
from softcache.cache.arrays.zarr_geometry import ZarrGeometry
from softcache.cache.arrays.zarr_metadata import (
    GEOMETRY,
    compressor_of,
    consolidated_equal,
    describe,
    metadata_equal,
)
from softcache.cache.arrays.zarr_parts import ZarrParts
from softcache.cache.arrays.zarr_shards import ShardCutter
from softcache.cache.codecs import Column
from softcache.cache.manifest import Manifest, Unit
from softcache.cache.storage.base import Objects, check_machine
from softcache.errors import CorruptionError, StorageError
from softcache.runtime.forks import ForkGuard

if TYPE_CHECKING:
    import tensorstore

__all__ = ["ZarrStore"]

MISSING = 2**64 - 1
"""In place of start and length of a chunk that is not in its shard."""


class ZarrStore:
    """The columns of one cache as a Zarr group."""

    def __init__(self, manifest: Manifest, objects: Objects, columns: Iterable[Column]) -> None:
        self._manifest, self._objects = manifest, objects
        self._geometry = ZarrGeometry(manifest, columns)
        self._columns = self._geometry.columns
        self._opened: dict[str, tensorstore.TensorStore] = {}
        self._geometries: dict[str, dict[str, Any]] = {}
        self._cutter = ShardCutter(objects)

    @property
    def manifest(self) -> Manifest:
        """What the cache is."""
        return self._manifest

    @property
    def columns(self) -> tuple[Column, ...]:
        return tuple(self._columns.values())

    # -- metadata ------------------------------------------------------------------------------------------

    @cached_property
    def _documents(self) -> dict[str, bytes]:
        """Every object of the group but the shards, by its path in the cache."""
        with ThreadPoolExecutor(1) as thread:  # a notebook's own event loop runs in this one
            return thread.submit(asyncio.run, describe(self._manifest, self._columns.values())).result()

    def described(self) -> tuple[str, ...]:
        """Returns the paths of what describes the columns and is of no unit."""
        return tuple(self._documents)

    def create(self) -> None:
        """Writes the group's metadata; what is there already is left as it is."""
        for path, data in self._documents.items():
            if self._objects.size(path) is None:  # what is whole may be on storage that is read only
                self._objects.put_if_absent(path, data)

    def check_metadata(self) -> None:
        """Compares the metadata that other tools read with what the manifest implies.

        Raises:
            CorruptionError: an object is missing or differs.
        """
        group = f"{self._manifest.data}/zarr.json"
        arrays = {
            path.split("/")[-2]: data for path, data in self._documents.items() if path.endswith("/zarr.json")
        }
        coordinate = [
            path for path in self._documents if path.startswith(f"{self._manifest.data}/temperature/")
        ]
        # Other writers may leave it out: the grid is in the manifest.
        left_out = coordinate if all(self._objects.size(path) is None for path in coordinate) else []
        for path, expected in self._documents.items():
            if path in left_out:
                continue
            found = self._objects.get(path, max_bytes=16 * len(expected) + (1 << 16))
            is_described = path.endswith("zarr.json")
            same = (
                metadata_equal(found, expected, any_codec=self._has_own_codecs)
                if is_described
                else found == expected
            )
            if path == group:
                same = same and consolidated_equal(found, arrays, any_codec=self._has_own_codecs)
            if not same:
                raise CorruptionError(
                    f"cache {self._objects.url}: {path} is not what the manifest implies; other tools would read "
                    "other numbers: restore it, or `softcache convert` the cache to a new place"
                )

    # -- units ---------------------------------------------------------------------------------------------

    def shard_paths(self, unit: Unit) -> dict[str, str | None]:
        """Returns the paths of a unit's shards, and the column that each holds."""
        return self._geometry.shard_paths(unit)

    def unit_of(self, path: str) -> int | None:
        """Returns the number of the unit whose shard has this path; None if no unit has it."""
        return self._geometry.unit_of(path)

    def max_shard_bytes(self, name: str | None) -> int:
        """Returns how large a unit's shard of a column can be: what does not compress grows by a little."""
        raw, chunks = self._geometry.chunk_bytes(name)
        return (raw + raw // 64 + 1024) * chunks + 4096

    def check_decompressed_size(self, name: str | None, data: bytes, where: str) -> None:
        """Looks at the head of every Blosc chunk of a shard: TensorStore makes room for what it claims to hold, up to 2 GiB.

        Zstandard frames are decoded as a stream, which ends at the bytes that are expected; gzip is, here.

        Raises:
            CorruptionError: a chunk claims to hold more than the manifest implies, or is not in the shard.
        """
        compressor = compressor_of(self._metadata(self._columns[str(name)]))
        if compressor not in ("blosc", "gzip"):
            return
        raw, chunks = self._geometry.chunk_bytes(name)
        if len(data) < 16 * chunks + 4:
            raise CorruptionError(
                f"{where}: too short for the index of {chunks} chunks; restore it from a copy"
            )
        index = np.frombuffer(data[-16 * chunks - 4 : -4], "<u8")
        for start, length in index.reshape(-1, 2).tolist():
            if (start, length) == (MISSING, MISSING):
                continue
            head = data[start : start + 16] if start + length <= len(data) and length >= 20 else b""
            claimed = int.from_bytes(head[4:8], "little")
            if compressor == "gzip":
                head = data[start : start + length] if start + length <= len(data) else b""
                claimed = _gzip_bytes(head, raw + 1)
            if not head or claimed != raw:
                raise CorruptionError(
                    f"{where}: a chunk claims to hold {claimed:,} bytes; {raw:,} expected; restore it from a copy"
                )

    def encode(self, unit: Unit, columns: Mapping[str, np.ndarray]) -> dict[str, tuple[str | None, bytes]]:
        """Returns path -> (column, bytes) of a unit's shards; the same columns give the same bytes.

        Args:
            columns: by name, [rows of the unit, ...]; those per sample [samples of the unit, ...].
        """
        return {
            path: (name, self._encode_shard(unit, self._columns[name], columns[name]))  # type: ignore[index]
            for path, name in self.shard_paths(unit).items()
        }

    def _encode_shard(self, unit: Unit, column: Column, values: np.ndarray) -> bytes:
        ts = _tensorstore(self._objects.url)
        length = unit.stop - unit.start
        if self._geometry.is_ragged(column):
            assert self._manifest.rows is not None
            length = min(len(values), self._manifest.rows.shard_rows)
        shape = (length, *column.shape)
        if values.shape != shape or values.dtype != np.dtype(column.dtype):
            raise CorruptionError(
                f"unit {unit.number}, column {column.name}: expected {column.dtype} {shape}; found {values.dtype} "
                f"{values.shape}"
            )
        context = ts.Context()
        spec = {
            "driver": "zarr3",
            "kvstore": "memory://shard/",
            "metadata": self._metadata(column),
            # A shard of nothing but fill values is written too: a missing object always means damage.
            "store_data_equal_to_fill_value": True,
        }
        array = ts.open(spec, create=True, open=True, context=context).result()
        self._geometry.part(array, unit, column, unit.start, unit.stop, (0, length)).write(values).result()
        shards = ts.KvStore.open("memory://shard/c/", context=context).result()
        (key,) = shards.list().result()
        return shards.read(key).result().value

    def read(
        self,
        unit: Unit,
        start: int,
        stop: int,
        columns: Iterable[str] | None = None,
        *,
        rows: tuple[int, int] | None = None,
    ) -> dict[str, np.ndarray]:
        """Returns what a unit holds of the samples `start` to `stop` (absolute numbers), by column.

        Args:
            rows: where samples have many rows: the first and last row of these samples, counted from the unit's first.

        Raises:
            CorruptionError: a shard is missing or cannot be decoded.
        """
        rows = rows or (start - unit.start, stop - unit.start)
        names = list(self._columns if columns is None else columns)
        out, name = {}, ""
        try:
            arrays = self._cut_arrays(unit, names, start, stop, rows) or {n: self._array(n) for n in names}
            reads = {
                name: self._geometry.part(arrays[name], unit, self._columns[name], start, stop, rows).read(
                    # Planes stay together, as they are stored: turning them costs as much as decompressing them.
                    order="F" if self._columns[name].planar else "C"
                )
                for name in names
            }
            for name, future in reads.items():
                out[name] = future.result()
        except StorageError:  # not of the bytes: the bucket does not answer
            raise
        except (ValueError, OSError) as error:
            where = (
                f"cache {self._objects.url}: unit {unit.number} (view {unit.view}, samples {unit.start} to "
                f"{unit.stop - 1}){f', column {name}' if name else ''}"
            )
            check_machine(error, where)
            raise CorruptionError(
                f"{where}: cannot be decoded: {error}; delete the unit's "
                "marker and rerun `softcache teacher-logits`, or restore the shard"
            ) from error
        return out

    # -- parts of units, for readers of windows -----------------------------------------------------------------

    @cached_property
    def _is_remote(self) -> bool:
        return self._objects.kvstore(self._manifest.data) is None

    @cached_property
    def _parts(self) -> ZarrParts | None:
        """Fetches and decodes parts of units; None where chunks are coded otherwise than it decodes them."""
        if self._has_own_codecs:
            return None
        documents = {name: self._metadata(column) for name, column in self._columns.items()}
        return ZarrParts.of(self._geometry, documents, self._cutter, is_remote=self._is_remote)

    def fetch_parts(
        self, parts: Sequence[tuple[Unit, int, int, tuple[int, int]]]
    ) -> list[dict[str, StoredChunks]] | None:
        """Returns the stored chunks of some parts (unit, start, stop, rows as in `read`), by column; asked for at once.

        None where `decode_parts` cannot take them, and `read` has to.

        Raises:
            StorageError: the storage does not answer.
        """
        return None if self._parts is None else self._parts.fetch(parts)

    def decode_parts(
        self, unit: Unit, stored: Mapping[str, StoredChunks]
    ) -> tuple[dict[str, np.ndarray], Iterator[DecodedPart | None]]:
        """Returns the columns per sample of a fetched part, and the rows of the others; see `ZarrParts.decode`."""
        assert self._parts is not None
        return self._parts.decode(unit, stored)

    def _cut_arrays(
        self, unit: Unit, names: list[str], start: int, stop: int, rows: tuple[int, int]
    ) -> dict[str, tensorstore.TensorStore]:
        """Returns the arrays with nothing in them but what is asked for, from a bucket; none of a local cache.

        TensorStore has clients of its own for S3 and Google, with other credentials, endpoints and retries than those that
        wrote the cache, and none for Azure. So the bytes come through `objects`, and TensorStore decodes them in memory.
        """
        if not self._is_remote:
            return {}
        ts = _tensorstore(self._objects.url)
        paths = {name: path for path, name in self.shard_paths(unit).items()}
        wanted = {
            paths[name]: self._geometry.wanted(unit, self._columns[name], start, stop, rows) for name in names
        }
        context = ts.Context()
        memory = ts.KvStore.open("memory://cut/", context=context).result()
        for path, data in self._cutter.cut(wanted).items():
            memory.write(path, data).result()
        return {
            name: ts.open(
                self._spec(name, f"memory://cut/{self._manifest.data}/{name}/"),
                open=True,
                assume_metadata=True,
                context=context,
            ).result()
            for name in names
        }

    def _array(self, name: str) -> tensorstore.TensorStore:
        """Returns the open array; opened in the process that reads, since TensorStore does not survive a fork."""
        if name not in self._opened:
            ts = _tensorstore(self._objects.url)
            spec = self._spec(name, self._objects.kvstore(f"{self._manifest.data}/{name}/"))
            self._opened[name] = ts.open(spec, open=True, assume_metadata=True).result()
        return self._opened[name]

    def _spec(self, name: str, kvstore: Any) -> dict[str, Any]:
        return {
            "driver": "zarr3",
            "kvstore": kvstore,
            "metadata": self._metadata(self._columns[name]),
            "fill_missing_data_reads": False,
        }

    @property
    def _has_own_codecs(self) -> bool:
        return "array_codecs" in self._manifest.features

    def _metadata(self, column: Column) -> dict[str, Any]:
        if column.name not in self._geometries:
            path = f"{self._manifest.data}/{column.name}/zarr.json"
            expected = self._documents[path]
            document = json.loads(expected)
            if self._has_own_codecs:
                found = self._objects.get(path, max_bytes=16 * len(expected) + (1 << 16))
                if not metadata_equal(found, expected, any_codec=True):
                    raise CorruptionError(
                        f"cache {self._objects.url}: {path} does not describe what the manifest implies, in chunks that "
                        "are coded as the page on the format allows; restore it, or write the cache anew"
                    )
                document["codecs"] = json.loads(found)["codecs"]
            self._geometries[column.name] = {name: document[name] for name in GEOMETRY}
        return self._geometries[column.name]


def _gzip_bytes(data: bytes, most: int) -> int:
    """Returns how many bytes a gzip stream holds, at most `most`; 0 for what is none."""
    try:
        return len(zlib.decompressobj(wbits=31).decompress(data, most))
    except zlib.error:
        return 0


_FORKS = ForkGuard("read or written a Zarr cache", "TensorStore")


def _tensorstore(url: str) -> Any:
    """Returns the module, where it can run.

    Raises:
        StorageError: this process was forked from one in which it has run.
    """
    import tensorstore

    _FORKS.enter(f"cache {url}")
    return tensorstore
