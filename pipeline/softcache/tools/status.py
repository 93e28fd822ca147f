"""Progress of a capture, from the manifest, the names of markers and claims, and the times of markers.

Any machine that reaches the store can ask; no run is needed, and none is disturbed. The rate is that of the newest units: of
WINDOW markers the first only starts the clock. A claim that a killed run left behind on a local folder counts as a
claim until another run finishes its unit.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from softcache.cache.manifest import MAX_MANIFEST_BYTES, Manifest, claim_path, marker_path
from softcache.cache.storage.base import Objects
from softcache.cache.units import read_marker
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
    done: dict[int, float] = {}
    claimed: set[int] = set()
    for path, seconds in objects.times("units").items():
        stem = path.removeprefix("units/").split(".", 1)[0]
        if not (stem.isascii() and stem.isdecimal() and int(stem) < plan.num_units):
            continue
        if path == marker_path(int(stem)):
            done[int(stem)] = seconds
        elif path == claim_path(int(stem)):
            claimed.add(int(stem))
    claimed -= done.keys()
    left = plan.num_units - len(done) - len(claimed)
    samples_done = sum(plan.unit(number).stop - plan.unit(number).start for number in done)
    total = plan.num_samples * plan.num_views
    rows_rate, samples_rate = _rates(objects, manifest, digest_bytes(stored), done)
    return Status(
        cache=objects.url,
        state="complete" if len(done) == plan.num_units else "running" if claimed else "stopped",
        units_total=plan.num_units,
        units_done=len(done),
        units_claimed=len(claimed),
        units_left=left,
        samples_total=total,
        samples_done=samples_done,
        rows_per_second=rows_rate,
        samples_per_second=samples_rate,
        seconds_left=(total - samples_done) / samples_rate if samples_rate else None,
        quiet_seconds=max(0.0, (time.time() if now is None else now) - max(done.values())) if done else None,
    )


def _rates(
    objects: Objects, manifest: Manifest, sha256: str, done: dict[int, float]
) -> tuple[float | None, float | None]:
    """Returns rows and samples per second of the newest units; None where there are too few."""
    newest = sorted(done, key=lambda number: done[number])[-WINDOW:]
    seconds = done[newest[-1]] - done[newest[0]] if newest else 0.0
    if seconds <= 0:
        return None, None
    rows = samples = 0
    for number in newest[1:]:
        marker = read_marker(objects, manifest, sha256, number)
        if marker is not None:
            rows, samples = rows + marker.num_rows, samples + marker.stop - marker.start
    return rows / seconds, samples / seconds
