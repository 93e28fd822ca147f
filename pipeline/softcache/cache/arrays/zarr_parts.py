"""Parts of units of a Zarr cache, for readers of windows: fetched as they are stored, and decoded chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np

from softcache.cache.arrays.zarr_chunks import (
    ChunkLayout,
    DecodedPart,
    Scratch,
    StoredChunks,
    chunk_layout,
    decode_parts,
)
from softcache.cache.arrays.zarr_geometry import ZarrGeometry
from softcache.cache.arrays.zarr_shards import GAP_BYTES, ShardCutter
from softcache.cache.manifest import Unit
from softcache.errors import StorageError

__all__ = ["ZarrParts"]


class ZarrParts:
    """Fetches and decodes parts of one cache's units; safe to use from several threads.

    Args:
        layouts: how the chunks of each column are coded.
        is_remote: chunks are in a bucket, where those that lie close together are one request.
    """

    def __init__(
        self,
        geometry: ZarrGeometry,
        layouts: Mapping[str, ChunkLayout],
        cutter: ShardCutter,
        *,
        is_remote: bool,
    ) -> None:
        self._geometry, self.layouts = geometry, layouts
        self._cutter, self._scratch = cutter, Scratch()
        self._gap = GAP_BYTES if is_remote else -1

    @classmethod
    def of(
        cls,
        geometry: ZarrGeometry,
        documents: Mapping[str, Mapping[str, Any]],
        cutter: ShardCutter,
        *,
        is_remote: bool,
    ) -> Self | None:
        """Returns what reads columns of these `zarr.json`; None where one has chunks that `zarr_chunks` does not decode."""
        layouts: dict[str, ChunkLayout] = {}
        for name, column in geometry.columns.items():
            layout = chunk_layout(column, documents[name], geometry.chunk_rows(column))
            if layout is None:
                return None
            layouts[name] = layout
        return cls(geometry, layouts, cutter, is_remote=is_remote)

    def fetch(
        self, parts: Sequence[tuple[Unit, int, int, tuple[int, int]]]
    ) -> list[dict[str, StoredChunks]] | None:
        """Returns the stored chunks of some parts, by column, asked for at once; None where they are not as they should be.

        Args:
            parts: unit, first and last sample (absolute numbers), and first and last row, counted from the unit's first.

        Raises:
            StorageError: the storage does not answer.
        """
        wanted, keys = [], []
        for number, (unit, start, stop, rows) in enumerate(parts):
            for path, name in self._geometry.shard_paths(unit).items():
                column = self._geometry.columns[str(name)]
                wanted.append((path, self._geometry.wanted(unit, column, start, stop, rows)))
                span = rows if self._geometry.is_ragged(column) else (start - unit.start, stop - unit.start)
                keys.append((number, str(name), span))
        try:
            found = self._cutter.chunks(wanted, self._gap)
        except StorageError:
            raise
        except (ValueError, OSError):
            self._cutter.forget(path for path, _ in wanted)
            return None
        out: list[dict[str, StoredChunks]] = [{} for _ in parts]
        for (number, name, span), (_, chunks), data in zip(keys, wanted, found, strict=True):
            out[number][name] = StoredChunks(span, chunks, data)
        return out

    def decode(
        self, unit: Unit, stored: Mapping[str, StoredChunks]
    ) -> tuple[dict[str, np.ndarray], Iterator[DecodedPart | None]]:
        """Returns the columns per sample of a fetched part, and the rows of the others chunk by chunk.

        The columns per sample are of the part's samples; where each has one row, there are none, and all columns are among
        the others. None instead of a chunk: it cannot be decoded, and `read` names what is wrong.
        """
        samples, rows = dict[str, StoredChunks](), dict[str, StoredChunks]()
        geometry = self._geometry
        for name, chunks in stored.items():
            is_of_rows = geometry.manifest.rows is None or geometry.is_ragged(geometry.columns[name])
            (rows if is_of_rows else samples)[name] = chunks
        if not samples:
            return {}, self._rows_of(unit, rows)
        (part,) = decode_parts(samples, self.layouts, self._scratch)  # samples of a part are of one chunk
        if part is None:
            self._cutter.forget(geometry.shard_paths(unit))
            return {}, iter([None])
        return part.columns, self._rows_of(unit, rows)

    def _rows_of(self, unit: Unit, stored: Mapping[str, StoredChunks]) -> Iterator[DecodedPart | None]:
        for part in decode_parts(stored, self.layouts, self._scratch):
            if part is None:
                self._cutter.forget(self._geometry.shard_paths(unit))
            yield part
