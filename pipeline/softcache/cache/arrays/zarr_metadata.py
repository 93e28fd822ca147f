"""What other tools read of a Zarr store: the group, an array for each column, the grid of temperatures; by zarr-python."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from softcache.cache.codecs import Column
from softcache.cache.manifest import Manifest, Plan
from softcache.labels import STATS

__all__ = ["GEOMETRY", "compressor_of", "consolidated_equal", "describe", "metadata_equal"]

COMPRESSION_LEVEL = 3

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

COMPRESSORS = ("blosc", "zstd", "gzip")
PARAMETERS = {
    "bytes": {"endian"},
    "blosc": {"typesize", "cname", "clevel", "shuffle", "blocksize"},
    "zstd": {"level", "checksum"},
    "gzip": {"level"},
    "crc32c": set(),
}
"""The keys of a codec's configuration, which other readers refuse others of."""


def metadata_equal(found: bytes, expected: bytes, *, any_codec: bool = False) -> bool:
    """Whether two `zarr.json` describe the same numbers by the same names.

    Parameters that no decoder needs (levels, shuffles, sizes of blocks), further attributes, consolidated metadata and
    extensions that need not be understood are left alone; Zarr v3 has no other key.

    Args:
        any_codec: chunks may be coded in any way of `array_codecs`.
    """
    try:
        one, other = json.loads(found), json.loads(expected)
        further = one.keys() - other.keys() - OPTIONAL
        if any(one[key].get("must_understand") is not False for key in further):
            return False
        if other.keys() - one.keys() - OPTIONAL or one.get("storage_transformers") or one["zarr_format"] != 3:
            return False
        mine, theirs = one.get("attributes", {}), other["attributes"]
        if one["node_type"] != other["node_type"] or any(
            theirs[key] != mine[key] for key in theirs.keys() & mine.keys()
        ):
            return False
        return one["node_type"] == "group" or (
            all(one[key] == other[key] for key in ("shape", "data_type", "chunk_grid", "fill_value"))
            and {"configuration": {"separator": "/"}, **one["chunk_key_encoding"]}
            == other["chunk_key_encoding"]
            and (one.get("dimension_names") or other["dimension_names"]) == other["dimension_names"]
            and _codecs_equal(one["codecs"], other["codecs"], any_codec=any_codec)
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def consolidated_equal(found: bytes, expected: Mapping[str, bytes], *, any_codec: bool = False) -> bool:
    """Whether the copies of arrays' metadata in a group's `zarr.json`, where there are any, describe the same numbers.

    Args:
        expected: of each array its `zarr.json`, by name; copies of others are left alone.
        any_codec: as of `metadata_equal`.
    """
    try:
        copies = (json.loads(found).get("consolidated_metadata") or {"metadata": {}})["metadata"]
        return all(
            metadata_equal(json.dumps(copies[name]).encode(), expected[name], any_codec=any_codec)
            for name in copies.keys() & expected.keys()
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


OPTIONAL = {"attributes", "consolidated_metadata", "dimension_names", "storage_transformers"}


def _codecs_equal(found: list[dict[str, Any]], expected: list[dict[str, Any]], *, any_codec: bool) -> bool:
    if expected[0]["name"] != "sharding_indexed":
        return [_decoder(codec) for codec in found] == [_decoder(codec) for codec in expected]
    (one,), (other,) = found, expected
    there, here = one["configuration"], other["configuration"]
    if one["name"] != "sharding_indexed" or {"index_location": "end", **there}.keys() != here.keys():
        return False
    if there["chunk_shape"] != here["chunk_shape"] or there.get("index_location", "end") != "end":
        return False
    if [_decoder(codec) for codec in there["index_codecs"]] != [
        _decoder(codec) for codec in here["index_codecs"]
    ]:
        return False
    inner = [_decoder(codec) for codec in there["codecs"]]
    return inner == [_decoder(codec) for codec in here["codecs"]] or (
        any_codec and _is_known(inner, here["chunk_shape"])
    )


def _decoder(codec: dict[str, Any]) -> tuple[str, Any]:
    """Returns the name of a codec, and those of its parameters that decide what is decoded.

    Raises:
        ValueError, TypeError: zarr-python takes no such codec.
    """
    from zarr.registry import get_codec_class

    configuration = codec.get("configuration", {})
    if codec.keys() - {"name", "configuration", "must_understand"}:
        raise ValueError("a codec has other keys")
    if configuration.keys() - PARAMETERS.get(codec["name"], configuration.keys()):
        raise ValueError("a codec has other parameters")
    if codec["name"] in COMPRESSORS and configuration:  # any that a reader can decode with
        get_codec_class(codec["name"]).from_dict({"name": codec["name"], "configuration": configuration})
    if codec["name"] == "bytes":
        return "bytes", configuration.get("endian", "little")
    return codec["name"], None if codec["name"] in (*COMPRESSORS, "crc32c") else configuration


def _is_known(chain: list[tuple[str, Any]], shape: list[int]) -> bool:
    """Whether a chain is: a transposition or none, little-endian bytes, a compressor or none, crc32c or none."""
    if chain and chain[0][0] == "transpose":
        if sorted(chain[0][1]["order"]) != list(range(len(shape))):
            return False
        chain = chain[1:]
    if not chain or chain[0] != ("bytes", "little"):
        return False
    names = [name for name, _ in chain[1:]]
    return (names[:1] in ([name] for name in COMPRESSORS) and names[1:] in ([], ["crc32c"])) or names in (
        [],
        ["crc32c"],
    )


def compressor_of(document: dict[str, Any]) -> str | None:
    """The name of the compressor of an array's chunks, by its `zarr.json`; None where they are not compressed."""
    names = [codec["name"] for codec in document["codecs"][0]["configuration"]["codecs"]]
    return next((name for name in names if name in COMPRESSORS), None)


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
        attributes={
            "softcache_format": manifest.format_version,
            "kind": manifest.kind,
            "units": "nats",
            "stats": list(STATS),
            "codec": manifest.codec,
        },
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
    return _consolidated(prefix, out)


def _consolidated(prefix: str, documents: dict[str, bytes]) -> dict[str, bytes]:
    """Puts the arrays' `zarr.json` into that of the group too, where zarr-python and xarray find them with one request."""
    arrays = {
        path.removeprefix(prefix).removesuffix("/zarr.json"): json.loads(data)
        for path, data in documents.items()
        if path.endswith("/zarr.json") and path != f"{prefix}zarr.json"
    }
    group = json.loads(documents[f"{prefix}zarr.json"])
    group["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": arrays}
    return documents | {f"{prefix}zarr.json": json.dumps(group).encode()}


def _grid(plan: Plan) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Returns shape, shard and chunk of an array with the axes (view, sample)."""
    return (plan.num_views, plan.num_samples), (1, plan.unit_samples), (1, plan.chunk_samples)


def _fill_value(manifest: Manifest, column: Column) -> Any:
    if column.name == "ids":
        return manifest.num_classes
    if column.name == "cells":  # of what is not written yet: no cell has the number -1
        return -1
    return 0 if np.dtype(column.dtype).kind in "iu" else float("nan")


def _filters(column: Column, num_axes: int) -> list[Any]:
    from zarr.codecs import TransposeCodec

    return [TransposeCodec(order=(num_axes, *range(num_axes)))] if column.planar else []


def _compressors(column: Column) -> list[Any]:
    from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

    if column.name == "fingerprint":  # random bits by construction
        return [Crc32cCodec()]
    if column.planar:
        return [ZstdCodec(level=column.level), Crc32cCodec()]
    size = np.dtype(column.dtype).itemsize
    return [
        BloscCodec(cname="zstd", clevel=COMPRESSION_LEVEL, shuffle="bitshuffle", typesize=size),
        Crc32cCodec(),
    ]
