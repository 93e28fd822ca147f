"""What other tools read of a Zarr store: the group, an array for each column, the grid of temperatures; by zarr-python."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from softcache.cache.codecs import Column
from softcache.cache.manifest import Manifest, Plan
from softcache.labels import STATS

__all__ = ["GEOMETRY", "describe", "metadata_equal"]

COMPRESSION_LEVEL = 3
PLANAR_LEVEL = 1
"""Of packed records, plane by plane: higher levels find false repetitions in what is all but random (1% larger)."""

GEOMETRY = (
    "zarr_format",
    "node_type",
    "shape",
    "data_type",
    "chunk_grid",
    "chunk_key_encoding",
    "fill_value",
    "codecs",
)
"""The keys of an array's `zarr.json` that decide what its numbers are."""

DESCRIBED = (*GEOMETRY, "dimension_names", "attributes")


def metadata_equal(found: bytes, expected: bytes) -> bool:
    """Whether two `zarr.json` describe the same numbers by the same names.

    What later versions of Zarr may add is left alone; a key in place of another is damage.
    """
    try:
        one, other = json.loads(found), json.loads(expected)
        renamed = one.keys() - other.keys() and other.keys() - one.keys()
        return (
            all(one.get(key) == other.get(key) for key in DESCRIBED)
            and not one.get("storage_transformers")
            and not renamed
        )
    except (ValueError, AttributeError, RecursionError):
        return False


async def describe(manifest: Manifest, columns: Iterable[Column]) -> dict[str, bytes]:
    """Writes the group into memory with zarr-python; returns every object that it made."""
    import zarr
    from zarr.storage import MemoryStore

    memory = MemoryStore()
    group = await zarr.api.asynchronous.open_group(
        memory,
        path=manifest.data,
        mode="w",
        zarr_format=3,
        attributes={"softcache_format": manifest.format_version, "units": "nats", "stats": list(STATS)},
    )
    plan, rows = manifest.plan, manifest.rows
    for column in columns:
        names, sizes = [name for name, _ in column.dims], list(column.shape)
        axes, (shape, shards, chunks) = ["view", "sample"], _grid(plan)
        if rows is not None and not column.per_sample:
            axes = ["row"]
            shape, shards, chunks = (
                (plan.num_units * rows.shard_rows,),
                (rows.shard_rows,),
                (rows.chunk_rows,),
            )
        await group.create_array(
            column.name,
            shape=(*shape, *sizes),
            dtype=column.dtype,
            shards=(*shards, *sizes),
            chunks=(*chunks, *sizes),
            fill_value=_fill_value(manifest, column),
            dimension_names=[*axes, *names],
            filters=_filters(column, len(axes)),
            compressors=_compressors(column),
        )
    grid = np.array(manifest.codec["temperatures"], np.float64)
    if len(grid):  # independent classes have no tail, and no grid
        coordinate = await group.create_array(
            "temperature",
            shape=grid.shape,
            chunks=grid.shape,
            dtype="float64",
            dimension_names=["temperature"],
            compressors=None,
        )
        await coordinate.setitem(slice(None), grid)
    paths = [path async for path in memory.list()]
    prefix = manifest.data + "/"
    from zarr.core.buffer import default_buffer_prototype

    out = {}
    for path in sorted(paths):
        if path.startswith(prefix):
            value = await memory.get(path, default_buffer_prototype())
            assert value is not None
            out[path] = value.to_bytes()
    return out


def _grid(plan: Plan) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Returns shape, shard and chunk of an array with the axes (view, sample)."""
    return (plan.num_views, plan.num_samples), (1, plan.unit_samples), (1, plan.chunk_samples)


def _fill_value(manifest: Manifest, column: Column) -> Any:
    if column.name == "ids":
        return manifest.num_classes
    # Of what is not written yet: no cell has the number -1.
    return {"u": 0, "i": -1}.get(np.dtype(column.dtype).kind, float("nan"))


def _filters(column: Column, num_axes: int) -> list[Any]:
    from zarr.codecs import TransposeCodec

    return [TransposeCodec(order=(num_axes, *range(num_axes)))] if column.planar else []


def _compressors(column: Column) -> list[Any]:
    from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

    if column.name == "fingerprint":  # random bits by construction
        return [Crc32cCodec()]
    if column.planar:
        return [ZstdCodec(level=PLANAR_LEVEL), Crc32cCodec()]
    size = np.dtype(column.dtype).itemsize
    return [
        BloscCodec(cname="zstd", clevel=COMPRESSION_LEVEL, shuffle="bitshuffle", typesize=size),
        Crc32cCodec(),
    ]
