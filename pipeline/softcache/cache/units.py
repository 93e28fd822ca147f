"""Units on storage: published whole, marked last, and trusted only by their marker.

publish:  every shard (whole or not at all), then units/NNNNN.json with size and sha256 of each
trust:    the marker is well-formed, belongs to this very manifest and unit, and its shards match it
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from softcache.cache.arrays.parquet import ParquetStore
from softcache.cache.arrays.zarr import ZarrStore
from softcache.cache.codecs import Column
from softcache.cache.manifest import (
    MAX_MARKER_BYTES,
    Manifest,
    Shard,
    Unit,
    UnitMarker,
    claim_path,
    marker_path,
)
from softcache.cache.storage.base import Objects
from softcache.errors import CacheNotFoundError, CorruptionError, ManifestError
from softcache.hashing.digests import digest_bytes

__all__ = [
    "Store",
    "alignment_columns",
    "check_unit",
    "claimed_units",
    "finished_units",
    "open_store",
    "publish_unit",
    "read_marker",
    "stray_names",
]

Store = ZarrStore | ParquetStore
WAIT_SECONDS = 0.5


def open_store(manifest: Manifest, objects: Objects) -> Store:
    """Returns the store that a manifest names; nothing is read or written yet."""
    kind = ZarrStore if manifest.store == "zarr" else ParquetStore
    return kind(manifest, objects, [*manifest.build_codec().columns, *alignment_columns(manifest)])


def alignment_columns(manifest: Manifest) -> list[Column]:
    """What a store keeps besides labels, so that they can be joined with their samples."""
    fingerprint = Column("fingerprint", "uint64", per_sample=True)
    if manifest.rows is None:
        return [fingerprint]
    return [Column("position", "uint32"), Column("num_rows", "uint32", per_sample=True), fingerprint]


def _first_column(store: Store) -> str:
    return next(column.name for column in store.columns if not column.per_sample)


def _failpoint(name: str) -> None:
    """Called at every step of a commit; the tests stop the process here."""


def publish_unit(
    objects: Objects, store: Store, manifest_sha256: str, unit: Unit, columns: Mapping[str, np.ndarray]
) -> UnitMarker:
    """Writes a unit's shards, then its marker; returns the marker.

    Args:
        columns: by name, [rows, ...], and those per sample [unit.stop - unit.start, ...].

    Raises:
        StorageError: the storage refused; the unit stays unmarked.
    """
    encoded = store.encode(unit, columns)
    _failpoint("before_shards")
    for path, (_, data) in encoded.items():
        objects.put(path, data)
        _failpoint("after_shard")
    marker = UnitMarker(
        unit=unit.number,
        view=unit.view,
        start=unit.start,
        stop=unit.stop,
        num_rows=len(columns[_first_column(store)]),
        manifest_sha256=manifest_sha256,
        shards=tuple(
            Shard(path=path, column=column, num_bytes=len(data), sha256=digest_bytes(data))
            for path, (column, data) in encoded.items()
        ),
    )
    _failpoint("before_marker")
    objects.put(marker_path(unit.number), marker.to_bytes())
    _failpoint("after_marker")
    return marker


def read_marker(objects: Objects, manifest: Manifest, manifest_sha256: str, number: int) -> UnitMarker | None:
    """Returns the marker of a unit, or None if the unit is not finished.

    Raises:
        ManifestError: the marker is malformed, or belongs to another cache or unit.
    """
    try:
        data = objects.get(marker_path(number), max_bytes=MAX_MARKER_BYTES)
    except CacheNotFoundError:
        return None
    return _checked_marker(objects, manifest, manifest_sha256, number, open_store(manifest, objects), data)


def _checked_marker(
    objects: Objects,
    manifest: Manifest,
    manifest_sha256: str,
    number: int,
    store: Store,
    data: bytes,
) -> UnitMarker:
    path = marker_path(number)
    where = f"cache {objects.url}, {path}"
    marker = UnitMarker.parse(data, where=where)
    unit = manifest.plan.unit(number)
    if marker.manifest_sha256 != manifest_sha256:
        raise ManifestError(
            f"{where}: written for another manifest (sha256 {marker.manifest_sha256[:12]}… there, "
            f"{manifest_sha256[:12]}… here): the manifest was changed, or the marker is of another cache; restore both "
            "from one copy"
        )
    expected = (unit.number, unit.view, unit.start, unit.stop)
    found = (marker.unit, marker.view, marker.start, marker.stop)
    room = manifest.rows.shard_rows if manifest.rows else unit.stop - unit.start
    if found != expected or marker.num_rows > room or (manifest.rows is None and marker.num_rows != room):
        raise ManifestError(
            f"{where}: is of unit (number, view, start, stop) {found} with {marker.num_rows} rows; expected {expected} "
            f"with {room} rows{' at most' if manifest.rows else ''}; delete it and rerun `softcache teacher-logits`"
        )
    names = {shard.path: shard.column for shard in marker.shards}
    wanted = store.shard_paths(unit)
    if names != wanted or len(names) != len(marker.shards):
        raise ManifestError(
            f"{where}: names the shards {sorted(names)}; expected {sorted(wanted)} for unit {number}; delete it and "
            "rerun `softcache teacher-logits`"
        )
    for shard in marker.shards:
        if shard.num_bytes > (most := store.max_shard_bytes(shard.column)):
            raise ManifestError(
                f"{where}: gives {shard.path} {shard.num_bytes:,} bytes; a unit of this cache has {most:,} at most; "
                "restore it from a copy"
            )
    return marker


def finished_units(objects: Objects, manifest: Manifest, manifest_sha256: str) -> dict[int, UnitMarker]:
    """Returns the markers of all finished units, by number.

    Raises:
        ManifestError: a marker is malformed, of another cache, or of a unit that the plan does not have.
    """
    numbers: dict[str, int] = {}
    for path in objects.list("units"):
        number = _number(path)
        if number is None or path != marker_path(number):
            continue  # stray_names has it
        if number >= manifest.plan.num_units:
            raise ManifestError(
                f"cache {objects.url}, {path}: is of no unit of the plan (0 to {manifest.plan.num_units - 1}); remove it"
            )
        numbers[path] = number
    store = open_store(manifest, objects)  # one for all markers: it costs as much as reading one
    return {
        number: _checked_marker(objects, manifest, manifest_sha256, number, store, data)
        for number, data in zip(
            numbers.values(), objects.get_many(list(numbers), max_bytes=MAX_MARKER_BYTES), strict=True
        )
        if data is not None
    }


def _number(path: str) -> int | None:
    """Returns the unit in the name of a marker or claim; None for any other name."""
    found = re.fullmatch(r"units/(\d{5,8})\.(?:json|lock)", path, re.ASCII)
    return int(found[1]) if found else None


def stray_names(objects: Objects) -> list[str]:
    """Returns the paths below units/ that softcache does not write, such as `._00000.json`; readers pass over them."""
    return [
        path
        for path in objects.list("units")
        if (number := _number(path)) is None or path not in (marker_path(number), claim_path(number))
    ]


def claimed_units(
    objects: Objects, manifest: Manifest, manifest_sha256: str, units: Iterable[Unit]
) -> Iterator[Unit]:
    """Yields those of `units` that are not finished, each claimed until the next one is asked for.

    Units that another process holds come last: they are waited for, and taken over if it dies.
    """
    pending = list(units)
    while pending:
        held = []
        for unit in pending:
            with objects.claim(claim_path(unit.number)) as ours:
                if not ours:
                    held.append(unit)
                elif read_marker(objects, manifest, manifest_sha256, unit.number) is None:
                    yield unit
        pending = held
        if pending:
            time.sleep(WAIT_SECONDS)


def check_unit(objects: Objects, marker: UnitMarker, store: Store | None = None) -> None:
    """Compares every shard of a unit with its marker.

    Args:
        store: also looks whether decoding would take more memory than the manifest allows.

    Raises:
        CorruptionError: a shard is missing, or of another size or sha256; unit and shard are named.
    """
    sizes = {shard.path: shard.num_bytes for shard in marker.shards}
    for shard, found in zip(marker.shards, objects.get_sized(sizes), strict=True):
        where = f"cache {objects.url}: unit {marker.unit} (view {marker.view}), {shard.path}"
        what_next = f"restore it, or delete {marker_path(marker.unit)} and rerun `softcache teacher-logits`"
        if found is None:
            raise CorruptionError(f"{where}: missing; {what_next}")
        if isinstance(found, int):
            raise CorruptionError(f"{where}: {found} bytes; {shard.num_bytes} bytes expected; {what_next}")
        digest = digest_bytes(found)
        if digest != shard.sha256:
            raise CorruptionError(
                f"{where}: sha256 {digest[:12]}…; {shard.sha256[:12]}… expected; {what_next}"
            )
        if store is not None:
            store.check_decompressed_size(shard.column, found, where)
