"""What the footer of a Parquet file claims, read without pyarrow's view of a column, which ends the process on some damage.

pyarrow 26 lets an exception of C++ through `RowGroupMetaData.column` (a histogram of levels that is too long is one), and
std::terminate is called. Where rows are read they become errors.

The footer is a struct of Thrift's compact protocol [1], whose fields are those of parquet.thrift [2].

[1] https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
[2] https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["RowGroup", "read_row_groups"]

_MAX_DEPTH = 16


@dataclass(frozen=True)
class RowGroup:
    """A row group's claims.

    Attributes:
        num_rows: of it.
        num_bytes: of all columns, not compressed.
        num_values: of each column, by the first part of its path; the most of several leaves.
    """

    num_rows: int
    num_bytes: int
    num_values: dict[str, int]


def read_row_groups(data: bytes) -> list[RowGroup]:
    """Returns the row groups of a Parquet file's bytes.

    Raises:
        ValueError: the footer is not one.
    """
    size = int.from_bytes(data[-8:-4], "little")
    if len(data) < 12 or data[-4:] != b"PAR1" or size > len(data) - 12:
        raise ValueError("no footer at its end")
    try:
        groups = _Reader(memoryview(data)[-8 - size : -8]).struct(0)[4]
        return [RowGroup(_number(group[3]), _number(group[2]), _num_values(group[1])) for group in groups]
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError("its footer is cut or damaged") from error


def _num_values(columns: list[dict[int, Any]]) -> dict[str, int]:
    out: dict[str, int] = {}
    for column in columns:
        described = column[3]
        name = bytes(described[3][0]).decode(errors="replace")
        out[name] = max(_number(described[5]), out.get(name, 0))
    return out


def _number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("its footer is damaged: a count is no number, or below 0")
    return value


class _Reader:
    """Values of the compact protocol; a struct is a dict of its fields by number."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0

    def struct(self, depth: int) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._signed()
            fields[number] = self._value(head & 15, depth, is_field=True)
        return fields

    def _value(self, kind: int, depth: int, *, is_field: bool) -> Any:
        if depth > _MAX_DEPTH:
            raise ValueError("its footer is nested too deep")
        if kind in (1, 2):
            return kind == 1 if is_field else self._byte() == 1
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._signed()
        if kind in (7, 8):
            return self._bytes(8 if kind == 7 else self._varint())
        if kind in (9, 10):
            head = self._byte()
            many = head >> 4 if head >> 4 < 15 else self._varint()
            if many > len(self._data):  # an element has a byte at least
                raise ValueError("its footer is damaged: a list is longer than the footer")
            return [self._value(head & 15, depth + 1, is_field=False) for _ in range(many)]
        if kind == 12:
            return self.struct(depth + 1)
        raise ValueError(f"its footer is damaged: there is no type {kind}")  # Parquet has no maps

    def _byte(self) -> int:
        value = self._data[self._at]
        self._at += 1
        return value

    def _bytes(self, size: int) -> memoryview:
        value = self._data[self._at : self._at + size]
        if len(value) != size:
            raise ValueError("its footer is cut")
        self._at += size
        return value

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("its footer is damaged: a number of more than 64 bits")

    def _signed(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
