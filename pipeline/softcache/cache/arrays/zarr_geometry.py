"""Where the shards and chunks of a cache's columns are, by the manifest alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from softcache.cache.arrays.zarr_shards import WantedChunks
from softcache.cache.codecs import Column
from softcache.cache.manifest import Manifest, Unit, owner_of

__all__ = ["ZarrGeometry"]


class ZarrGeometry:
    """The shards of the columns of one cache.

    Attributes:
        manifest: what the cache is.
        columns: by name.
    """

    def __init__(self, manifest: Manifest, columns: Iterable[Column]) -> None:
        self.manifest = manifest
        self.columns = {column.name: column for column in columns}

    def is_ragged(self, column: Column) -> bool:
        """Whether an array's first axis is `row`, and not `view` and `sample`."""
        return self.manifest.rows is not None and not column.per_sample

    def shard_paths(self, unit: Unit) -> dict[str, str | None]:
        """Returns the paths of a unit's shards, and the column that each holds."""
        out: dict[str, str | None] = {}
        for name, column in self.columns.items():
            place = [unit.view, unit.start // self.manifest.plan.unit_samples]
            if self.is_ragged(column):
                place = [unit.number]
            out["/".join([self.manifest.data, name, "c", *map(str, place), *["0"] * len(column.dims)])] = name
        return out

    def unit_of(self, path: str) -> int | None:
        """Returns the number of the unit whose shard has this path; None if no unit has it."""
        name, _, place = path.removeprefix(f"{self.manifest.data}/").partition("/c/")
        numbers = [int(part) if part.isascii() and part.isdecimal() else -1 for part in place.split("/")[:2]]
        column = self.columns.get(name)
        if column is None or min(numbers) < 0:
            return None
        if self.is_ragged(column):
            return owner_of(path, self, numbers[0])
        return owner_of(path, self, numbers[0] * self.manifest.plan.units_per_view + numbers[-1])

    def chunk_bytes(self, name: str | None) -> tuple[int, int]:
        """Returns the bytes of a decoded chunk of a column, and how many chunks a shard has."""
        column, plan, rows = self.columns[str(name)], self.manifest.plan, self.manifest.rows
        unit, chunk = plan.unit_samples, plan.chunk_samples
        if rows is not None and self.is_ragged(column):
            unit, chunk = rows.shard_rows, rows.chunk_rows
        return chunk * math.prod(column.shape) * np.dtype(column.dtype).itemsize, unit // chunk

    def chunk_rows(self, column: Column) -> int:
        """Returns how many samples, or rows, a chunk of a column has."""
        rows, is_ragged = self.manifest.rows, self.is_ragged(column)
        return rows.chunk_rows if rows is not None and is_ragged else self.manifest.plan.chunk_samples

    def part(
        self, array: Any, unit: Unit, column: Column, start: int, stop: int, rows: tuple[int, int]
    ) -> Any:
        """Returns the part of an open array that holds samples of a unit, or its rows."""
        if self.is_ragged(column):
            assert self.manifest.rows is not None
            first = unit.number * self.manifest.rows.shard_rows
            return array[first + rows[0] : first + rows[1]]
        return array[unit.view, start:stop]

    def wanted(
        self, unit: Unit, column: Column, start: int, stop: int, rows: tuple[int, int]
    ) -> WantedChunks:
        """Returns which chunks of a unit's shard hold samples of it, or their rows."""
        plan, ragged = self.manifest.plan, self.manifest.rows
        first, last = start - unit.start, stop - unit.start
        shard, chunk = plan.unit_samples, plan.chunk_samples
        if ragged is not None and not column.per_sample:
            first, last = rows
            shard, chunk = ragged.shard_rows, ragged.chunk_rows
        return WantedChunks(shard // chunk, first // chunk, -(-last // chunk))
