"""The table of samples: which sample a number is, its ground truth, its rows; one Parquet file next to the manifest."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import NamedTuple, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from softcache.cache.manifest import Plan, RaggedRows
from softcache.cache.row_index import RowIndex, smallest_type
from softcache.errors import CorruptionError
from softcache.runtime.indexing import row_numbers

__all__ = [
    "SampleKeys",
    "SampleTable",
    "check_samples",
    "encode_samples",
    "read_row_counts",
    "read_samples",
]

SCHEMA = pa.schema(
    [
        pa.field("sample", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("target", pa.int64()),
    ]
)

ROW_FIELDS = [
    pa.field("num_rows", pa.int64(), nullable=False),
    pa.field("first_row", pa.int64(), nullable=False),
]


MAX_SAMPLE_BYTES = 4096
"""Of a sample in the file: its key is the most of it, and the longest path has no more."""
KEYS_AT_ONCE = 1 << 16
MAX_SAMPLES_PER_BYTE = 16
"""Keys differ: even numbered ones take a byte or two each. A file that claims more is made to fill memory."""


def encode_samples(
    keys: Sequence[str],
    targets: Sequence[int] | np.ndarray | None,
    num_rows: np.ndarray | None = None,
    first_rows: np.ndarray | None = None,
) -> bytes:
    """Returns the Parquet file of the samples, in the order of the source.

    Args:
        keys: [N] unique.
        targets: [N] the ground truth; None where a sample has none, or one per row.
        num_rows: [N] rows of each sample, where there is not one; with `first_rows` [N], the number of its first row
            in the arrays.
    """
    columns = {
        "sample": pa.array(np.arange(len(keys), dtype=np.int64)),
        "key": pa.array(list(keys), pa.string()),
        "target": pa.nulls(len(keys), pa.int64())
        if targets is None
        else pa.array(np.asarray(targets, np.int64)),
    }
    schema = SCHEMA
    if num_rows is not None:
        columns |= {"num_rows": pa.array(num_rows, pa.int64()), "first_row": pa.array(first_rows, pa.int64())}
        schema = pa.schema([*SCHEMA, *ROW_FIELDS])
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema), sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


class SampleKeys(Sequence[str]):
    """The keys of samples: a sequence of strings in Arrow's buffers, which take a tenth of a list's memory."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._column = column

    @classmethod
    def concat(cls, parts: Sequence[SampleKeys]) -> SampleKeys:
        return cls(pa.chunked_array([chunk for part in parts for chunk in part._column.chunks], pa.string()))

    def __len__(self) -> int:
        return len(self._column)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice | list[int] | np.ndarray) -> list[str]: ...
    def __getitem__(self, place: int | slice | list[int] | np.ndarray) -> str | list[str]:
        """Returns one key, or those that an index of NumPy chooses."""
        numbers = row_numbers(place, len(self), "keys")
        if isinstance(place, int | np.integer):
            return self._column[int(numbers[0])].as_py()
        return self._column.take(pa.array(numbers)).to_pylist()

    def find(self, keys: Sequence[str]) -> np.ndarray:
        """Returns the number of the sample of each key [B] int64, -1 where there is none; one pass over all keys."""
        import pyarrow.compute as pc

        found = pc.index_in(pa.array(keys, pa.string()), value_set=self._column)
        return _numbers(pa.chunked_array([found.fill_null(-1)]))

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), KEYS_AT_ONCE):
            yield from self._column.slice(start, KEYS_AT_ONCE).to_pylist()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, SampleKeys):
            return self._column.equals(other._column)
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self[:3]))
        return f"SampleKeys([{shown}{', …' if len(self) > 3 else ''}])"


class SampleTable(NamedTuple):
    """The contents of the table.

    Attributes:
        keys: [N].
        targets: [N] int64; empty where samples have none.
        num_rows: [N] int64 rows of each sample; empty where each has one.
    """

    keys: SampleKeys
    targets: np.ndarray
    num_rows: np.ndarray

    def __repr__(self) -> str:
        shown = [f"{len(self.keys):,} samples", f"keys={self.keys!r}"]
        shown += [
            f"{name}={column!r}" for name, column in self._asdict().items() if name != "keys" and len(column)
        ]
        return f"SampleTable({', '.join(shown)})"


def read_samples(data: bytes, num_samples: int) -> SampleTable:
    """Returns the contents of such a file for a number of samples.

    Raises:
        CorruptionError: it is no Parquet file, or of other columns.
    """
    try:
        table = _checked_table(data, None, num_samples)
        keys, targets = (table[name].cast(SCHEMA.field(name).type) for name in ("key", "target"))
        ragged = "num_rows" in table.column_names
        return SampleTable(
            SampleKeys(keys),
            np.zeros(0, np.int64) if targets.null_count else _numbers(targets),
            _row_counts(table) if ragged else np.zeros(0, np.int64),
        )
    except _UNREADABLE as error:
        raise _damage(error) from error


def read_row_counts(data: bytes, num_samples: int) -> np.ndarray:
    """Returns the rows [N] of each sample, of the smallest integers that hold them, without the keys.

    Raises:
        CorruptionError: as `read_samples`.
    """
    try:
        file, _ = _checked_file(data, num_samples)
        counts, start = np.zeros(num_samples, np.uint8), 0
        # all at once takes several times the memory
        for batch in file.iter_batches(KEYS_AT_ONCE, columns=["sample", "num_rows"], use_threads=False):
            table = _checked_columns(pa.Table.from_batches([batch]), start)
            found = _row_counts(table)
            counts = counts.astype(np.promote_types(counts.dtype, smallest_type(found)), copy=False)
            counts[start : start + len(table)] = found
            start += len(table)
        pa.default_memory_pool().release_unused()
        if start != num_samples:
            raise ValueError(f"its columns have {start} samples; expected {num_samples}")
        return counts
    except _UNREADABLE as error:
        raise _damage(error) from error


def check_samples(data: bytes, plan: Plan, rows: RaggedRows | None) -> None:
    """Checks what readers of such a file do not: that keys differ, and where rows lie.

    Raises:
        CorruptionError: a key is there twice, or `num_rows` or `first_row` is not what the plan implies.
    """
    table = read_samples(data, plan.num_samples)
    if len(left := set(table.keys)) < len(table.keys):
        again = next(key for key in table.keys if key not in left or left.discard(key))  # type: ignore[func-returns-value]
        raise CorruptionError(
            f"sample table: key {again!r} is there twice; expected each once; give samples other keys"
        )
    if rows is None:
        return
    expected = RowIndex(plan, table.num_rows, rows).first_rows(rows)
    found = _numbers(_checked_table(data, ["sample", "first_row"], plan.num_samples)["first_row"])
    for sample in np.flatnonzero(found != expected)[:1]:
        raise CorruptionError(
            f"sample table: first_row of sample {sample} is {found[sample]}; expected {expected[sample]}; write it anew"
        )


_UNREADABLE = (pa.ArrowException, OSError, KeyError, ValueError)


def _checked_table(data: bytes, columns: list[str] | None, num_samples: int) -> pa.Table:
    file, expected = _checked_file(data, num_samples)
    return _checked_columns(file.read(columns or expected, use_threads=False), 0)


def _checked_file(data: bytes, num_samples: int) -> tuple[pq.ParquetFile, list[str]]:
    """Returns the opened file and the names of its columns."""
    # Not `pq.read_table`, nor `to_numpy`: they import half a second of other code, pandas among it.
    file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
    found, schema = file.metadata.num_rows, file.schema_arrow
    if found != num_samples or found > MAX_SAMPLES_PER_BYTE * (len(data) + 1024):
        raise ValueError(f"{found} samples in {len(data)} bytes; expected {num_samples}")
    fields = {field.name: field.type for field in (*SCHEMA, *ROW_FIELDS)}
    ragged = "num_rows" in schema.names
    expected = list(fields) if ragged else SCHEMA.names
    for name in expected:
        kinds = [field.type for field in schema if field.name == name]
        if len(kinds) != 1 or not _is_readable(kinds[0], fields[name]):
            raise ValueError(
                f"its columns are {schema.names} of {schema.types}; expected {name}, once, of {fields[name]}"
            )
    return file, expected


def _checked_columns(table: pa.Table, start: int) -> pa.Table:
    """Returns a table whose samples are numbered from `start` on; raises ValueError for another."""
    for name in set(table.column_names) - {"target"}:
        if table[name].null_count:
            raise ValueError(f"column {name} has nulls")
    for chunk in table["sample"].chunks:
        if not np.array_equal(np.from_dlpack(chunk.cast(pa.int64())), np.arange(start, start + len(chunk))):
            raise ValueError("its samples are not numbered 0, 1, 2, …")
        start += len(chunk)
    return table


def _is_readable(found: pa.DataType, expected: pa.DataType) -> bool:
    """Whether a column of another writer's type has the same values: integers of any width, strings of any kind, nulls."""
    if pa.types.is_string(expected):
        return any(
            is_kind(found)
            for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
        )
    return pa.types.is_integer(found) or pa.types.is_null(found)


def _row_counts(table: pa.Table) -> np.ndarray:
    return _numbers(table["num_rows"])


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    chunks = [np.from_dlpack(chunk) for chunk in column.cast(pa.int64()).chunks]
    return np.concatenate([np.zeros(0, np.int64), *chunks])


def _damage(error: Exception) -> CorruptionError:
    return CorruptionError(f"sample table: cannot be read: {error}; restore it, or rebuild the cache")
