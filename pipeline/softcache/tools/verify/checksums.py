"""Verifies checksums, markers and every row of every unit by the invariants of docs/format.md; needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from softcache.cache.invariants import name_invariant
from softcache.errors import ManifestError, SoftcacheError
from softcache.reader.cache import Cache
from softcache.reader.parts import CacheParts

__all__ = ["verify_units"]


def verify_units(cache: Cache, progress: Callable[[int], None] = lambda units: None) -> Iterator[str]:
    """Yields one line per fault: missing units, invariants that are broken (by number), stray files."""
    if isinstance(cache, CacheParts):
        for part in cache.parts:
            yield from verify_units(part, progress)
        return
    for number, check in (("I2", cache.check_samples), ("I6", cache.check_metadata)):
        try:
            check()
        except SoftcacheError as error:
            yield name_invariant(number, error)
    # As a reader opens it, which lists the markers; the loop below asks for each by its name.
    refused = set()
    try:
        cache.markers  # noqa: B018
    except SoftcacheError as error:
        refused.add(str(error))
    for unit in cache.manifest.plan.units():
        try:
            marker = cache.marker(unit.number)
            if marker is None:
                yield (
                    f"unit {unit.number} (view {unit.view}, samples {unit.start} to {unit.stop - 1}): not finished; "
                    "rerun `softcache teacher-logits`"
                )
            else:
                yield from cache.unit_faults(marker)
        except ManifestError as error:
            refused.discard(str(error))
            yield name_invariant("I4", error)
        except SoftcacheError as error:
            yield str(error)
        progress(1)
    yield from (name_invariant("I4", line) for line in refused)
    for path in cache.stray_names():
        yield f"cache {cache.url}, {path}: not written by softcache; readers pass over it; remove it"
