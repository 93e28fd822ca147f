"""Verifies checksums and markers of every unit, and that every row can be decoded; needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from softcache.errors import SoftcacheError
from softcache.reader.cache import Cache
from softcache.reader.parts import CacheParts

__all__ = ["verify_units"]


def verify_units(cache: Cache, progress: Callable[[int], None] = lambda units: None) -> Iterator[str]:
    """Yields one line per fault: missing units, bad markers, bad checksums, rows that cannot be decoded."""
    if isinstance(cache, CacheParts):
        for part in cache.parts:
            yield from verify_units(part, progress)
        return
    for check in (cache.samples_table, cache.check_metadata):
        try:
            check()
        except SoftcacheError as error:
            yield str(error)
    for unit in cache.manifest.plan.units():
        try:
            marker = cache.marker(unit.number)
            if marker is None:
                yield (
                    f"unit {unit.number} (view {unit.view}, samples {unit.start} to {unit.stop - 1}): not finished; "
                    "rerun `softcache teacher-logits`"
                )
            else:
                cache.check_unit(marker)
        except SoftcacheError as error:
            yield str(error)
        progress(1)
