"""Marked units whose objects are missing: their markers are taken away, so that a rerun makes them again.

A unit can come to this where the locks of a file system hold on one host only, or where files were removed by hand. Only
names are looked at; `softcache verify` compares contents.
"""

from __future__ import annotations

from softcache.cache.manifest import Manifest, UnitMarker, claim_path, marker_path
from softcache.cache.storage.base import Objects
from softcache.cache.units import finished_units, open_store
from softcache.runtime.logging import log_info

__all__ = ["usable_units"]

MAX_LISTED_SHARDS = 200_000
"""Of a cache with more, names are not compared: that would be hundreds of requests."""
SHOWN = 5


def usable_units(objects: Objects, manifest: Manifest, manifest_sha256: str) -> dict[int, UnitMarker]:
    """Returns the markers of all finished units, by number, as `finished_units`; units that lack an object are unmarked.

    Raises:
        ManifestError: a marker is malformed, of another cache, or of a unit that the plan does not have.
        StorageError: a marker cannot be removed.
    """
    found = finished_units(objects, manifest, manifest_sha256)
    store = open_store(manifest, objects)
    paths = {number: store.shard_paths(manifest.plan.unit(number)).keys() for number in found}
    if not found or sum(map(len, paths.values())) > MAX_LISTED_SHARDS:
        return found
    there = set(objects.list(manifest.data))
    broken = [number for number in found if not paths[number] <= there]
    for number in broken:
        with objects.claim(claim_path(number)) as is_ours:
            # Another run may have made it again meanwhile, or is about to.
            if is_ours and any(objects.size(path) is None for path in paths[number]):
                objects.delete(marker_path(number))
        del found[number]
    if broken:
        shown = ", ".join(map(str, broken[:SHOWN])) + (", …" if len(broken) > SHOWN else "")
        log_info(
            f"cache {objects.url}: {len(broken)} units were marked as finished and lack an object ({shown}); they are made "
            "again"
        )
    return found
