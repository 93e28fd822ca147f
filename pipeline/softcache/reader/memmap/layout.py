"""The layout of a memory-mapped file: the columns of one row in a record, and the header that describes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from softcache.runtime.files import parse_json

__all__ = ["MAGIC", "PAGE", "MemmapPlan", "Record", "read_header"]

MAGIC = b"SOFTTHAW"
VERSION = 1
PAGE = 4096


class Record:
    """The layout of one row's columns in a record: widest fields first, so that each is aligned.

    Args:
        columns: by name, arrays [0, ...] of the columns' dtypes and inner shapes.
    """

    def __init__(self, columns: Mapping[str, np.ndarray]) -> None:
        names = sorted(columns, key=lambda name: -columns[name].dtype.itemsize)
        offsets, end = [], 0
        for name in names:
            offsets.append(end)
            end += columns[name].dtype.itemsize * int(np.prod(columns[name].shape[1:]))
        self.num_bytes = -(-end // 8) * 8
        self._fields = [
            (name, offset, columns[name].dtype, columns[name].shape[1:], self._strides(columns[name]))
            for name, offset in zip(names, offsets, strict=True)
        ]

    def _strides(self, column: np.ndarray) -> tuple[int, ...]:
        inner = [column.dtype.itemsize]
        for length in reversed(column.shape[2:]):
            inner.insert(0, inner[0] * length)
        return (self.num_bytes, *(inner if column.ndim > 1 else ()))

    def describe(self) -> list[list[Any]]:
        """Returns [name, offset, dtype, inner shape] of every field, for the header."""
        return [[name, offset, dtype.str, list(shape)] for name, offset, dtype, shape, _ in self._fields]

    def columns(self, rows_PR: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the columns of some records [P, R] uint8 in C order, by name: views, nothing is copied."""
        num_rows = len(rows_PR)
        if not num_rows:
            return {name: np.empty((0, *shape), dtype) for name, _, dtype, shape, _ in self._fields}
        return {
            name: np.ndarray((num_rows, *shape), dtype, rows_PR, offset, strides)
            for name, offset, dtype, shape, strides in self._fields
        }

    def pack(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns the records [P, R] uint8 of columns [P, ...]."""
        num_rows = len(next(iter(columns.values())))
        rows_PR = np.zeros((num_rows, self.num_bytes), np.uint8)
        for name, values in self.columns(rows_PR).items():
            values[...] = columns[name]
        return rows_PR


class MemmapPlan(NamedTuple):
    """The contents of a memory-mapped file.

    Attributes:
        key: the digest of the content, in hex.
        about: cache and view, shown in listings; two copies of one cache share a file, and it names the first.
        record: of a row.
        num_rows: of the view.
        num_samples: number of separate fingerprints (where samples have many rows); 0 where each row has its own.
    """

    key: str
    about: str
    record: Record
    num_rows: int
    num_samples: int

    @property
    def data_bytes(self) -> int:
        return self.num_rows * self.record.num_bytes + self.num_samples * 8

    def fields(self, checksum: str) -> dict[str, Any]:
        """Returns the header's description of the content."""
        return {
            "version": VERSION,
            "key": self.key,
            "num_rows": self.num_rows,
            "record_bytes": self.record.num_bytes,
            "fields": self.record.describe(),
            "num_samples": self.num_samples,
            "xxh3_128": checksum,
        }

    def header(self, checksum: str) -> bytes:
        text = json.dumps({"about": self.about[:1000], **self.fields(checksum)}).encode()
        return (MAGIC + text).ljust(PAGE, b"\0")

    @property
    def num_bytes(self) -> int:
        return PAGE + self.data_bytes


def read_header(page: bytes) -> dict[str, Any]:
    """Returns the fields of a header; an empty dict if it is not one."""
    try:
        found = parse_json(page.removeprefix(MAGIC).rstrip(b"\0"))
    except ValueError:
        return {}
    return found if page.startswith(MAGIC) and isinstance(found, dict) else {}
