"""Units on storage: published whole, marked last, and trusted only by their marker.

publish:  every shard (whole or not at all), then units/NNNNN.json with size and sha256 of each
fold:     markers of large caches into blocks (`folding`); `finished` reads both
trust:    the marker is well-formed, belongs to this very manifest and unit, and its shards match it
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from softcache.cache.arrays.parquet import ParquetStore
from softcache.cache.arrays.zarr import ZarrStore
from softcache.cache.codecs import Column
from softcache.cache.finished import FinishedUnits, UnitIndex, UnitNames
from softcache.cache.folding import FOLD_EVERY, fold_if_possible, unmark_units
from softcache.cache.manifest import (
    Manifest,
    Shard,
    Unit,
    UnitMarker,
    claim_path,
    marker_path,
)
from softcache.cache.storage.base import Objects
from softcache.errors import CorruptionError
from softcache.hashing.digests import digest_bytes

__all__ = [
    "FinishedUnits",
    "Store",
    "UnitIndex",
    "alignment_columns",
    "check_unit",
    "claimed_units",
    "finished_units",
    "fold_if_possible",
    "open_index",
    "open_store",
    "publish_unit",
    "read_marker",
    "stray_names",
    "unmark_units",
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
    if unit.number % FOLD_EVERY == FOLD_EVERY - 1:
        fold_if_possible(UnitIndex(objects, store.manifest, manifest_sha256, store))
    return marker


def open_index(objects: Objects, manifest: Manifest, manifest_sha256: str) -> UnitIndex:
    """Returns what looks up the units of a cache; nothing is read yet."""
    return UnitIndex(objects, manifest, manifest_sha256, open_store(manifest, objects))


def read_marker(objects: Objects, manifest: Manifest, manifest_sha256: str, number: int) -> UnitMarker | None:
    """Returns the marker of a unit, or None if the unit is not finished; of many units `open_index` reads less.

    Raises:
        ManifestError: the marker is malformed, or belongs to another cache or unit.
        CorruptionError: the block of folded markers is damaged.
    """
    return open_index(objects, manifest, manifest_sha256).marker(number)


def finished_units(objects: Objects, manifest: Manifest, manifest_sha256: str) -> FinishedUnits:
    """Returns all finished units: a mapping from their numbers to their markers.

    Raises:
        ManifestError: a marker or block is malformed, of another cache, or of a unit that the plan does not have.
        CorruptionError: a block of folded markers is damaged.
    """
    return open_index(objects, manifest, manifest_sha256).snapshot()


def stray_names(objects: Objects) -> list[str]:
    """Returns the paths below units/ that softcache does not write, such as `._00000.json`; readers pass over them."""
    return UnitNames(objects.list("units")).strays


def claimed_units(index: UnitIndex, units: Iterable[Unit]) -> Iterator[Unit]:
    """Yields those of `units` that are not finished, each claimed until the next one is asked for.

    Units that another process holds come last: they are waited for, and taken over if it dies.
    """
    pending = units
    while True:
        held: list[Unit] = []
        for unit in pending:
            with index.objects.claim(claim_path(unit.number)) as ours:
                if not ours:
                    held.append(unit)
                elif index.marker(unit.number) is None:
                    yield unit
        if not held:
            return
        pending = held
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
        what_next = "restore it, or unmark the unit (`softcache verify --repair`) and rerun `softcache teacher-logits`"
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
