"""Finds and deletes orphaned files of crashed writers.

    staged files without a writer        a write holds a lock on its staged file, which ends with its process
    objects of unfinished units          a reader trusts what a marker names; a rerun writes the same bytes again
    claims without a holder              taking one ends it, so looking at one is enough
    a table of samples of another run    that crashed, or came second, before there was a manifest; and its shared objects

A unit is claimed before its objects are called stray, and its marker is looked for again: what a run is making, or has
just made, is never touched. Nor is anything that the manifest or a marker names. Whatever softcache does not write is
reported and left where it is. Markers of a large cache that no run folded are folded with `delete`.

A lease may run out while its holder is paused, and a bucket deletes without a condition. So a unit whose objects were
deleted is looked for once more: one that was made meanwhile, and has lost them, is unmarked, and a rerun makes it.

A lock may hold on one host only (NFS, Lustre). So what was written within the last hour stays, too, by the storage's own
clock, and so do the objects of a unit whose claim was made or renewed within it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field

from softcache.cache.finished import UnitIndex, UnitNames
from softcache.cache.folded import block_claim_path
from softcache.cache.folding import fold_markers, unmark_units
from softcache.cache.manifest import MAX_MANIFEST_BYTES, Manifest, claim_path
from softcache.cache.shared import OBJECT_PATH
from softcache.cache.storage.base import Objects
from softcache.cache.units import check_unit, open_store
from softcache.errors import CacheNotFoundError, CorruptionError, StorageError
from softcache.hashing.digests import digest_bytes

__all__ = ["SAFE_SECONDS", "GarbageReport", "collect_garbage"]

SAFE_SECONDS = 3600.0
"""Age from which a file without a marker is orphaned; from its first shard to its marker a unit takes seconds."""
MANIFEST = "manifest.json"
SAMPLES = re.compile(r"samples(-[0-9a-f]{16})?\.parquet")


@dataclass
class GarbageReport:
    """Objects that do not belong to a cache.

    Attributes:
        stray: bytes of the orphaned files, by path.
        held: numbers of the unfinished units that a run holds; their objects were left alone.
        stale_claims: number of claims that had outlived their process.
        foreign: paths that softcache did not write; they are left alone.
        young: paths that may be orphaned, and are too young to be called so; they are left alone.
        unmarked: numbers of the units that were made while their objects were deleted; they are unfinished again.
    """

    stray: dict[str, int] = field(default_factory=dict)
    held: list[int] = field(default_factory=list)
    stale_claims: int = 0
    foreign: list[str] = field(default_factory=list)
    young: list[str] = field(default_factory=list)
    unmarked: list[int] = field(default_factory=list)


def collect_garbage(objects: Objects, *, delete: bool, older_than: float = SAFE_SECONDS) -> GarbageReport:
    """Returns the orphaned files of a cache; deletes them on request.

    Args:
        delete: delete stray files. Stale claims end either way.
        older_than: seconds; what was written since is left alone. 0: locks alone decide.

    Raises:
        CacheNotFoundError: there is no cache there.
        ManifestError: the manifest or a marker is damaged, so stray files cannot be identified.
    """
    if objects.size(MANIFEST) is None:
        raise CacheNotFoundError(
            f"cache {objects.url}: no {MANIFEST} there, so stray files cannot be identified; correct the path, or rerun the "
            "stage that makes the cache"
        )
    stored = objects.get(MANIFEST, max_bytes=MAX_MANIFEST_BYTES)
    manifest, digest = Manifest.parse(stored, where=f"cache {objects.url}"), digest_bytes(stored)
    store, report = open_store(manifest, objects), GarbageReport()
    report.stray |= objects.orphaned_writes(remove=delete, older_than=older_than)

    # Objects are listed before markers are: what a unit that is finished meanwhile wrote is then known to be its own.
    paths = objects.list("")
    index = UnitIndex(objects, manifest, digest, store)
    finished = index.snapshot()
    shared = [one.path for one in manifest.objects.values()]
    known, names = {MANIFEST, manifest.samples, *shared, *store.described()}, UnitNames([])
    unfinished: dict[int, list[str]] = defaultdict(list)
    others: list[str] = []
    for path in paths:
        if path.startswith("units/"):
            names.add(path)
        elif path.startswith(f"{manifest.data}/") and (number := store.unit_of(path)) is not None:
            if number not in finished:
                unfinished[number].append(path)
        elif (SAMPLES.fullmatch(path) or OBJECT_PATH.fullmatch(path)) and path not in known:
            others.append(path)
        elif path not in known:
            report.foreign.append(path)
    fresh, emptied = _end_stale_claims(objects, manifest, names, report, older_than), []
    for number, shards in unfinished.items():
        if number in fresh:
            continue
        with objects.claim(claim_path(number)) as is_held:
            if not is_held:
                report.held.append(number)
            elif index.marker(number) is None:
                if not any(_is_young(objects, path, older_than) for path in shards):
                    _discard(objects, shards, report, delete)
                    emptied.append(number)
                else:
                    report.young += shards
    young = {path for path in others if _is_young(objects, path, older_than)}
    report.young = sorted([*report.young, *young])
    _discard(objects, sorted(set(others) - young), report, delete)
    if delete:
        report.unmarked = unmark_units(
            index, filter(index.marker, emptied), still=lambda number: _is_damaged(index, number)
        )
        fold_markers(index)
    report.held = sorted(set(report.held))
    report.foreign = sorted([*report.foreign, *names.strays])
    return report


def _end_stale_claims(
    objects: Objects, manifest: Manifest, names: UnitNames, report: GarbageReport, older_than: float
) -> set[int]:
    """Claims each claim once, which ends it if no process holds it; young ones are left alone, and their units returned."""
    fresh = set()
    for number in names.claimed:
        path = claim_path(number)
        if number >= manifest.plan.num_units:
            report.foreign.append(path)
            continue
        if _is_young(objects, path, older_than):
            fresh.add(number)
            continue
        with objects.claim(path) as is_held:
            if is_held:
                report.stale_claims += 1
            else:
                report.held.append(number)
    for block in names.claimed_blocks:
        path = block_claim_path(block)
        if not _is_young(objects, path, older_than):
            with objects.claim(path) as is_held:
                report.stale_claims += is_held
    report.held += fresh
    return fresh


def _is_damaged(index: UnitIndex, number: int) -> bool:
    marker = index.marker(number)
    if marker is None:
        return False
    try:
        check_unit(index.objects, marker)
    except CorruptionError:
        return True
    return False


def _is_young(objects: Objects, path: str, older_than: float) -> bool:
    """Whether an object may be of a live writer by its age alone."""
    if not older_than:
        return False
    try:
        age = objects.age(path)
    except StorageError:  # a link out of the cache: foreign
        return False
    return age is not None and age < older_than


def _discard(objects: Objects, paths: list[str], report: GarbageReport, delete: bool) -> None:
    for path in paths:
        try:
            size = objects.size(path)
        except StorageError:  # a link out of the cache: foreign
            report.foreign.append(path)
            continue
        if size is not None:
            report.stray[path] = size
            if delete:
                objects.delete(path)
