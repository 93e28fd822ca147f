"""Verifies checksums, markers and every row of every unit by the invariants of docs/format.md; needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from softcache.cache.folding import unmark_units
from softcache.cache.invariants import name_invariant
from softcache.errors import CorruptionError, ManifestError, SoftcacheError
from softcache.reader.cache import Cache
from softcache.reader.parts import CacheParts

__all__ = ["unmark_damaged", "verify_units"]


def verify_units(
    cache: Cache,
    progress: Callable[[int], None] = lambda units: None,
    *,
    on_damaged: Callable[[Cache, int], None] = lambda cache, unit: None,
) -> Iterator[str]:
    """Yields one line per fault: missing units, invariants that are broken (by number), stray files.

    Args:
        on_damaged: called with the cache and the number of each finished unit with a fault.
    """
    if isinstance(cache, CacheParts):
        for part in cache.parts:
            yield from verify_units(part, progress, on_damaged=on_damaged)
        return
    for number, check in (
        ("I2", cache.check_samples),
        ("I6", cache.check_metadata),
        ("I7", cache.check_objects),
    ):
        try:
            check()
        except SoftcacheError as error:
            yield name_invariant(number, error)
    # As a reader opens it, which lists the markers; the loop below asks for each by its name.
    refused: set[str] = set()
    try:
        refused.update(map(str, cache.markers.block_faults()))
    except SoftcacheError as error:
        refused.add(str(error))
    for unit in cache.manifest.plan.units():
        faults: list[str] = []
        try:
            marker = cache.marker(unit.number)
            if marker is None:
                yield (
                    f"unit {unit.number} (view {unit.view}, samples {unit.start} to {unit.stop - 1}): not finished; "
                    "rerun `softcache teacher-logits`"
                )
            else:
                faults += cache.unit_faults(marker)
        except ManifestError as error:
            refused.discard(str(error))
            faults.append(name_invariant("I4", error))
        except CorruptionError as error:  # of the block of folded markers, with all of its units
            refused.add(str(error))
        except SoftcacheError as error:
            yield str(error)
        yield from faults
        if faults:
            on_damaged(cache, unit.number)
        progress(1)
    yield from (name_invariant("I4", line) for line in refused)
    for path in cache.stray_names():
        yield f"cache {cache.url}, {path}: not written by softcache; readers pass over it; remove it"


def unmark_damaged(cache: Cache, numbers: list[int]) -> list[int]:
    """Takes the markers of damaged units away, so that the next run makes them again; returns these units.

    One that is whole by now, or that a run is making, stays.
    """

    def is_damaged(number: int) -> bool:
        try:
            marker = cache.marker(number)
            return marker is not None and any(cache.unit_faults(marker))
        except ManifestError:
            return True

    return unmark_units(cache.index, numbers, still=is_damaged)
