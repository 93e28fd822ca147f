"""Progress of a capture, from the manifest, the names of markers and claims, the ends of folded blocks, and their times.

Any machine that reaches the store can ask; no run is needed, and none is disturbed. The rate is that of the newest units: of
WINDOW markers the first only starts the clock. A claim that a killed run left behind on a local folder counts as a
claim until another run finishes its unit.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import numpy as np

from softcache.cache import folded
from softcache.cache.finished import UnitIndex, UnitNames
from softcache.cache.folded import block_path
from softcache.cache.manifest import MAX_MANIFEST_BYTES, Manifest, marker_path
from softcache.cache.storage.base import Objects
from softcache.cache.units import open_index
from softcache.hashing.digests import digest_bytes

__all__ = ["Status", "read_status"]

WINDOW = 100
"""Newest markers that are read for the rate."""


@dataclass(frozen=True)
class Status:
    """Where a capture stands.

    Attributes:
        state: complete; running: units are claimed; stopped: none is, and some are missing.
        samples_total: samples times views; `samples_done` of them are in finished units.
        rows_per_second: None before two units are there.
        seconds_left: at the rate of the newest units; None where that is unknown.
        quiet_seconds: since the last unit was marked, by the store's clock; None before the first.
    """

    cache: str
    state: Literal["complete", "running", "stopped"]
    units_total: int
    units_done: int
    units_claimed: int
    units_left: int
    samples_total: int
    samples_done: int
    rows_per_second: float | None
    samples_per_second: float | None
    seconds_left: float | None
    quiet_seconds: float | None


def read_status(objects: Objects, *, now: float | None = None) -> Status:
    """Returns how far the cache is.

    Args:
        now: seconds since the epoch; None: this machine's clock.

    Raises:
        CacheNotFoundError: there is no cache yet.
        ManifestError: its manifest, or a marker that is read, is malformed.
    """
    stored = objects.get("manifest.json", max_bytes=MAX_MANIFEST_BYTES)
    manifest, plan = (found := Manifest.parse(stored, where=f"cache {objects.url}")), found.plan
    index = open_index(objects, manifest, digest_bytes(stored))
    times = objects.times("units")
    if index.folds or any("/folded/" in path for path in times):
        times |= objects.times(
            "units/folded"
        )  # after the markers: one that is folded meanwhile is in a block
    names = UnitNames(times)
    loose = {number: times[marker_path(number)] for number in names.loose if number < plan.num_units}
    is_done = np.zeros(plan.num_units, bool)
    for number, generation in names.generations.items():
        if (
            number * folded.BLOCK_UNITS < plan.num_units
            and (block := index.known(number, generation)) is not None
        ):
            is_done[block.first : block.first + len(block.finished)] = block.finished
    is_done[list(loose)] = True
    num_done = int(is_done.sum())
    num_claimed = sum(number < plan.num_units and not is_done[number] for number in names.claimed)
    samples_done = plan.num_samples_of(np.flatnonzero(is_done))
    newest = max(
        [*loose.values(), *(times[block_path(*block)] for block in names.generations.items())], default=None
    )
    total = plan.num_samples * plan.num_views
    rows_rate, samples_rate = _rates(index, loose)
    return Status(
        cache=objects.url,
        state="complete" if num_done == plan.num_units else "running" if num_claimed else "stopped",
        units_total=plan.num_units,
        units_done=num_done,
        units_claimed=num_claimed,
        units_left=plan.num_units - num_done - num_claimed,
        samples_total=total,
        samples_done=samples_done,
        rows_per_second=rows_rate,
        samples_per_second=samples_rate,
        seconds_left=(total - samples_done) / samples_rate if samples_rate else None,
        quiet_seconds=None if newest is None else max(0.0, (time.time() if now is None else now) - newest),
    )


def _rates(index: UnitIndex, done: dict[int, float]) -> tuple[float | None, float | None]:
    """Returns rows and samples per second of the newest units, by the times of markers; None where there are too few."""
    newest = sorted(done, key=lambda number: done[number])[-WINDOW:]
    seconds = done[newest[-1]] - done[newest[0]] if newest else 0.0
    if seconds <= 0:
        return None, None
    rows = samples = 0
    for marker in index.loose_markers(newest[1:]):
        if marker is not None:
            rows, samples = rows + marker.num_rows, samples + marker.stop - marker.start
    return rows / seconds, samples / seconds
