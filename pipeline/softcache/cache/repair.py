"""Marked units whose objects are missing: their markers are taken away, so that a rerun makes them again.

A unit can come to this where the locks of a file system hold on one host only, or where files were removed by hand. Only
names are looked at; `softcache verify` compares contents.
"""

from __future__ import annotations

from softcache.cache.finished import FinishedUnits, UnitIndex
from softcache.cache.folding import fold_if_possible, unmark_units
from softcache.runtime.logging import log_info

__all__ = ["usable_units"]

MAX_LISTED_SHARDS = 200_000
"""Of a cache with more, names are not compared: that would be hundreds of requests."""
SHOWN = 5


def usable_units(index: UnitIndex) -> FinishedUnits:
    """Returns all finished units of a cache that is written; units that lack an object are unmarked.

    Markers that earlier runs left loose are folded before.

    Raises:
        ManifestError: a marker or block is malformed, of another cache, or of a unit that the plan does not have.
        CorruptionError: a block of folded markers is damaged.
        StorageError: a marker cannot be removed.
    """
    fold_if_possible(index)
    found, objects, plan = index.snapshot(), index.objects, index.manifest.plan
    if not found or len(found) * len(index.limits.columns) > MAX_LISTED_SHARDS:
        return found
    there = set(objects.list(index.manifest.data))
    broken = [number for number in found if not index.store.shard_paths(plan.unit(number)).keys() <= there]

    def lacks_object(number: int) -> bool:
        return any(objects.size(path) is None for path in index.store.shard_paths(plan.unit(number)))

    for number in broken:
        found.discard(number)
    # Another run may have made one again meanwhile, or is about to.
    unmark_units(index, broken, still=lacks_object)
    if broken:
        shown = ", ".join(map(str, broken[:SHOWN])) + (", …" if len(broken) > SHOWN else "")
        log_info(
            f"cache {objects.url}: {len(broken)} units were marked as finished and lack an object ({shown}); they are made "
            "again"
        )
    return found
