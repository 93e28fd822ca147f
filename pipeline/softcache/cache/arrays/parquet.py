"""Columns as Parquet: one file per unit, one row per position with its `view` and `sample`, page checksums on.

What is known per sample is repeated on each of its rows.
"""

from __future__ import annotations

import io
import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from softcache.cache.arrays.parquet_footer import RowGroup, read_row_groups
from softcache.cache.codecs import Column
from softcache.cache.manifest import Manifest, Unit, owner_of
from softcache.cache.storage.base import Objects, check_machine, is_bucket
from softcache.errors import CacheNotFoundError, CorruptionError, StorageError
from softcache.labels import STATS

__all__ = ["ParquetStore"]

OPEN_FILES = 16
SAMPLE, VIEW = Column("sample", "int64"), Column("view", "uint32")


class ParquetStore:
    """The columns of one cache as a folder of Parquet files."""

    def __init__(self, manifest: Manifest, objects: Objects, columns: Iterable[Column]) -> None:
        self._manifest, self._objects = manifest, objects
        self._columns = {column.name: column for column in columns}
        self._chunk_rows = manifest.rows.chunk_rows if manifest.rows else manifest.plan.chunk_samples
        self._schema = _schema(manifest, self._columns.values())
        self._files: OrderedDict[str, tuple[pq.ParquetFile, np.ndarray]] = OrderedDict()
        self._lock = threading.Lock()  # a file is read at one place at a time, and stays open meanwhile

    @property
    def manifest(self) -> Manifest:
        """What the cache is."""
        return self._manifest

    @property
    def columns(self) -> tuple[Column, ...]:
        return tuple(self._columns.values())

    def described(self) -> tuple[str, ...]:
        """Returns nothing: every file describes itself."""
        return ()

    def create(self) -> None:
        """Does nothing: every file describes itself."""

    def check_metadata(self) -> None:
        """Does nothing: there is none besides the units' own files."""

    def shard_paths(self, unit: Unit) -> dict[str, str | None]:
        """Returns the path of a unit's file; it holds all columns."""
        return {f"{self._manifest.data}/{unit.number:05d}.parquet": None}

    def unit_of(self, path: str) -> int | None:
        """Returns the number of the unit whose shard has this path; None if no unit has it."""
        name = path.removeprefix(f"{self._manifest.data}/").removesuffix(".parquet")
        return owner_of(path, self, int(name) if name.isascii() and name.isdecimal() else -1)

    def max_shard_bytes(self, name: str | None) -> int:
        """Returns how large a unit's file can be: what does not compress grows by a little, and pages have heads."""
        rows, row = self._unit_rows(), self._row_bytes()
        return (
            rows * (row + row // 64 + 64) + 2**20 + 4096 * len(self._columns) * (rows // self._chunk_rows + 1)
        )

    def _row_bytes(self) -> int:
        return 12 + sum(math.prod(c.shape) * np.dtype(c.dtype).itemsize for c in self._columns.values())

    def _unit_rows(self) -> int:
        return self._manifest.rows.shard_rows if self._manifest.rows else self._manifest.plan.unit_samples

    def check_decompressed_size(self, name: str | None, data: bytes, where: str) -> None:
        """Checks a file's description of its rows before any of it is decoded.

        Raises:
            CorruptionError: it claims to hold more than the manifest implies.
        """
        try:
            groups = read_row_groups(data)
        except ValueError as error:
            raise CorruptionError(f"{where}: is no Parquet file: {error}; restore it from a copy") from error
        num_rows = sum(group.num_rows for group in groups)
        if num_rows > self._unit_rows() or any(map(self._claims_too_much, groups)):
            raise CorruptionError(
                f"{where}: claims to hold {num_rows:,} rows, {max([g.num_bytes for g in groups], default=0):,} "
                f"bytes in a group of them; at most {self._unit_rows():,} rows expected; restore it from a copy"
            )

    def _claims_too_much(self, group: RowGroup) -> bool:
        """Whether a group has more bytes, or a column more numbers, than its rows: a few bytes can claim it."""
        # Levels, heads and what does not compress come on top.
        return group.num_bytes > 2 * group.num_rows * (self._row_bytes() + 64) + 2**20 or any(
            many > group.num_rows * math.prod(() if column.planar else column.shape)
            for name, many in group.num_values.items()
            if (column := self._columns.get(name)) is not None
        )

    def encode(self, unit: Unit, columns: Mapping[str, np.ndarray]) -> dict[str, tuple[str | None, bytes]]:
        """Returns path -> (None, bytes) of a unit's file; the same columns give the same bytes.

        Args:
            columns: by name, [rows of the unit, ...]; those per sample [samples of the unit, ...].
        """
        samples = np.arange(unit.start, unit.stop, dtype=np.int64)
        counts = columns["num_rows"] if self._manifest.rows else np.ones(len(samples), np.int64)
        samples, rows = np.repeat(samples, counts), int(counts.sum())
        arrays = [pa.array(np.full(rows, unit.view, np.uint32)), pa.array(samples)]
        for name, column in self._columns.items():
            values = columns[name]
            if column.per_sample and len(values) == len(counts):
                values = np.repeat(values, counts, axis=0)
            if values.shape != (rows, *column.shape) or values.dtype != np.dtype(column.dtype):
                raise CorruptionError(
                    f"unit {unit.number}, column {name}: expected {column.dtype} {(rows, *column.shape)}; found "
                    f"{values.dtype} {values.shape}"
                )
            if column.planar:
                arrays.append(_records(np.ascontiguousarray(values)))
                continue
            flat = pa.array(np.ascontiguousarray(values).reshape(-1))
            for size in reversed(column.shape):
                flat = pa.FixedSizeListArray.from_arrays(flat, type=pa.list_(_item(flat.type), size))
            arrays.append(flat)
        planar = [name for name, column in self._columns.items() if column.planar]
        split = [
            f"{name}.list.element"
            for name, column in self._columns.items()
            if column.is_vector and np.dtype(column.dtype).itemsize > 1
        ]
        sink = io.BytesIO()
        pq.write_table(
            pa.table(arrays, schema=self._schema),
            sink,
            row_group_size=self._chunk_rows,
            compression="zstd",
            compression_level=max((self._columns[name].level for name in planar), default=1),
            use_dictionary=False,
            use_byte_stream_split=[*planar, *split],
            # The smallest of records that are bytes means nothing, and would stand, unchecked, in every page's header.
            write_statistics=[name for name in self._schema.names if name not in planar] if planar else True,
            write_page_checksum=True,
        )
        ((path, column_of),) = self.shard_paths(unit).items()
        return {path: (column_of, sink.getvalue())}

    def fetch_parts(self, parts: object) -> None:
        """Returns None: parts of a file are decoded by `read`."""

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
            CorruptionError: the file is missing, damaged, or of another shape.
        """
        names = list(self._columns if columns is None else columns)
        order = ["position"] if self._manifest.rows and "position" not in names else []
        first_row, last_row = rows or (start - unit.start, stop - unit.start)
        try:
            with self._lock:
                file, starts = self._open(unit)
                group = max(0, int(np.searchsorted(starts, first_row, "right")) - 1)
                last_group = int(np.searchsorted(starts, last_row, "left"))
                table = file.read_row_groups(
                    list(range(group, last_group)), ["view", "sample", *order, *names], use_threads=False
                )
            table = table.slice(first_row - starts[group], last_row - first_row)
            samples = self._values(table["sample"], SAMPLE, len(table))
            firsts = np.flatnonzero(np.diff(samples, prepend=start - 1))
            if len(table) != last_row - first_row or not (
                np.array_equal(samples[firsts], np.arange(start, stop))
                and (self._values(table["view"], VIEW, len(table)) == unit.view).all()
            ):
                raise ValueError(_misplaced(samples, start, stop))
            if self._manifest.rows:
                position = self._values(table["position"], self._columns["position"], len(table))
                _check_ascending(position, samples)
            out = {name: self._values(table[name], self._columns[name], len(table)) for name in names}
            for name in names:
                if self._columns[name].per_sample:
                    out[name] = _once(name, out[name], samples, firsts)
        except StorageError:  # not of the bytes: the storage does not answer
            raise
        except (pa.ArrowException, OSError, ValueError, KeyError, IndexError, CacheNotFoundError) as error:
            where = (
                f"cache {self._objects.url}: unit {unit.number} (view {unit.view}, samples {unit.start} to "
                f"{unit.stop - 1}), {next(iter(self.shard_paths(unit)))}"
            )
            check_machine(error, where)
            raise CorruptionError(
                f"{where}: cannot be decoded: {error}; delete the unit's "
                "marker and rerun `softcache teacher-logits`, or restore the file"
            ) from error
        return out

    def _open(self, unit: Unit) -> tuple[pq.ParquetFile, np.ndarray]:
        """Returns the open file and the first row of each of its row groups, however large another writer made them."""
        (path,) = self.shard_paths(unit)
        if path not in self._files:
            file = self._open_file(path, [])
            self._check_columns(file.schema_arrow)
            free = [
                c.name
                for c in self.columns
                if c.planar and not _is_fixed(file.schema_arrow.field(c.name).type)
            ]
            if free:  # each different record once, so that its size is looked at before it is repeated
                file = self._open_file(path, free)
            sizes = [
                file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)
            ]
            self._files[path] = file, np.cumsum([0, *sizes])[:-1]
            while len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)[1][0].close(force=True)
        self._files.move_to_end(path)
        return self._files[path]

    def _open_file(self, path: str, dictionaries: list[str]) -> pq.ParquetFile:
        return pq.ParquetFile(
            self._objects.open(path),
            page_checksum_verification=True,
            pre_buffer=is_bucket(self._objects.url),  # one request for neighboring columns, not one for each
            read_dictionary=dictionaries,
        )

    def _check_columns(self, schema: pa.Schema) -> None:
        """Raises ValueError unless every column is there, once, as lists or bytes of its size and dtype.

        Order, further columns, nullability, names of list items and metadata are the writer's.
        """
        for field in self._schema:
            places = schema.get_all_field_indices(field.name)
            if len(places) != 1:
                raise ValueError(
                    f"it has {len(places)} columns {field.name}, among {schema.names}; expected one"
                )
            found = schema.field(places[0]).type
            if not _is_readable(found, field.type):
                raise ValueError(f"column {field.name} is of type {found}; expected {field.type}")

    def _values(self, chunked: pa.ChunkedArray, column: Column, rows: int) -> np.ndarray:
        if chunked.null_count:
            raise ValueError(f"column {column.name} has nulls")
        if column.planar:
            parts = [_bytes_of(chunk, len(chunk), *column.shape) for chunk in chunked.chunks]
            return (
                parts[0]
                if len(parts) == 1
                else np.concatenate([np.zeros((0, *column.shape), np.uint8), *parts])
            )
        array = pa.concat_arrays(chunked.chunks) if chunked.num_chunks else pa.array([], chunked.type)
        for size in column.shape:
            array = _flat(array, size, column.name)
        wanted = pa.from_numpy_dtype(np.dtype(column.dtype))
        if array.type != wanted:
            array = array.cast(wanted)
        return array.to_numpy(zero_copy_only=False).reshape(rows, *column.shape)


def _misplaced(samples: np.ndarray, start: int, stop: int) -> str:
    """Returns what is wrong with the rows of samples that are not `start` to `stop` in this order."""
    back = np.flatnonzero(np.diff(samples) < 0)
    if len(back):
        row = int(back[0])
        return (
            f"its rows are not in the order of their samples (sample {samples[row + 1]} comes after {samples[row]}); "
            "write them sorted by sample, then position"
        )
    return f"its rows are of other samples than {start} to {stop - 1}, or of another view"


def _check_ascending(position_P: np.ndarray, samples_P: np.ndarray) -> None:
    """Raises ValueError where the rows of a sample are not in the order of their positions."""
    wrong = np.flatnonzero((position_P[1:] <= position_P[:-1]) & (samples_P[1:] == samples_P[:-1]))
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"the rows of sample {samples_P[row]} are not in the order of their positions ({position_P[row + 1]} comes "
            f"after {position_P[row]}); write them sorted by sample, then position"
        )


def _once(name: str, values_P: np.ndarray, samples_P: np.ndarray, firsts_S: np.ndarray) -> np.ndarray:
    """Returns a value per sample of those that its rows repeat; raises ValueError where rows of a sample differ."""
    wrong = np.flatnonzero((values_P[1:] != values_P[:-1]) & (samples_P[1:] == samples_P[:-1]))
    if len(wrong):
        raise ValueError(
            f"column {name}: the rows of sample {samples_P[wrong[0]]} differ; expected one value"
        )
    return values_P[firsts_S]


def _records(values: np.ndarray) -> pa.Array:
    """Rows of bytes as one fixed-size binary value each."""
    rows, size = values.shape
    return pa.Array.from_buffers(pa.binary(size), rows, [None, pa.py_buffer(values)])


_is_fixed = pa.types.is_fixed_size_binary


def _flat(array: pa.Array, size: int, name: str) -> pa.Array:
    """Returns the items of lists that have `size` each."""
    if not pa.types.is_fixed_size_list(array.type):
        lengths = array.value_lengths()
        if len(array) and (lengths.null_count or (lengths.to_numpy() != size).any()):
            raise ValueError(f"column {name} has lists of other lengths than {size}")
    items = array.flatten()
    if items.null_count:
        raise ValueError(f"column {name} has nulls")
    return items


def _is_readable(found: pa.DataType, expected: pa.DataType) -> bool:
    """Whether values of a type are those of another: lists of any kind, and integers of any width where there is no list."""
    if pa.types.is_fixed_size_list(expected):
        if pa.types.is_fixed_size_list(found) and found.list_size != expected.list_size:
            return False
        is_list = any(
            is_kind(found)
            for is_kind in (pa.types.is_fixed_size_list, pa.types.is_list, pa.types.is_large_list)
        )
        return is_list and _is_readable(found.value_type, expected.value_type)
    if pa.types.is_fixed_size_binary(expected):
        return found == expected or pa.types.is_binary(found) or pa.types.is_large_binary(found)
    return found == expected or (pa.types.is_integer(found) and pa.types.is_integer(expected))


def _bytes_of(array: pa.Array, rows: int, size: int) -> np.ndarray:
    if not _is_fixed(array.type):  # of a writer that has no such type; the cast refuses other sizes
        array = pa.DictionaryArray.from_arrays(array.indices, array.dictionary.cast(pa.binary(size)))
        array = array.dictionary_decode()
    buffer = array.buffers()[1]
    if buffer is None:
        return np.zeros((0, size), np.uint8)
    return np.frombuffer(buffer, np.uint8)[array.offset * size :][: rows * size].reshape(rows, size)


def _item(kind: pa.DataType) -> pa.Field:
    return pa.field("element", kind, nullable=False)


def _schema(manifest: Manifest, columns: Iterable[Column]) -> pa.Schema:
    fields = [pa.field("view", pa.uint32(), nullable=False), pa.field("sample", pa.int64(), nullable=False)]
    for column in columns:
        if column.planar:
            fields.append(pa.field(column.name, pa.binary(*column.shape), nullable=False))
            continue
        kind = pa.from_numpy_dtype(np.dtype(column.dtype))
        for size in reversed(column.shape):
            kind = pa.list_(_item(kind), size)
        fields.append(pa.field(column.name, kind, nullable=False))
    metadata_of_file = {
        "softcache_format": str(manifest.format_version),
        "units": "nats",
        "temperatures": ",".join(map(str, manifest.codec["temperatures"])),
        "stats": ",".join(STATS),
    }
    return pa.schema(fields, metadata=metadata_of_file)
