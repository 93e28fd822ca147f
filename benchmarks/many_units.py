"""What caches of many units cost to open, to ask for their status, to continue and to clean up: CPU, memory and requests.

    python -m benchmarks.many_units [--units N ...] [--s3] [--loose] [--json FILE]

A cache is a manifest and what is below units/: markers (--loose) or blocks of folded markers, as the captures of one or the
other kind leave them, with the 31 retired generations of each block; one of 1,000 units is too small for blocks. It has ten
samples per unit, six columns, and no shards, as nothing here reads any. Each figure is of a process of its own, with its
imports done before:

    open      the cache opened, which units are finished, their rows and bytes by column
    status    what `softcache status` shows
    rerun     which units a run has to make, where one is missing
    gc        what `softcache gc` lists; of a real cache the listing of its shards comes on top

--s3 takes a bucket under $SOFTCACHE_BENCH_BUCKET (s3://...), and counts requests in the client, a listing as one for each
thousand names. `--measure URL WHAT` is one process; it runs in older versions, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from softcache.cache import units
from softcache.cache.codecs import OpenCodec
from softcache.cache.manifest import (
    MAX_MANIFEST_BYTES,
    Manifest,
    Plan,
    Shard,
    UnitMarker,
    marker_path,
)
from softcache.cache.storage.open import open_objects
from softcache.hashing.digests import digest_bytes
from softcache.reader.open import open_cache
from softcache.tools.garbage import collect_garbage
from softcache.tools.status import read_status

__all__ = ["main", "write_cache"]

WHAT = ("open", "status", "rerun", "gc")
UNIT_SAMPLES = 10


def memory_bytes(field: str) -> int:
    """A line of /proc/self/status: VmRSS, what this process holds; VmHWM, the peak; `ru_maxrss` is inherited."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status: no {field}; this benchmark needs Linux")


# -- caches -------------------------------------------------------------------------------------------------


def write_cache(url: str, num_units: int, *, loose: bool, missing: int) -> None:
    """Writes manifest and finished units of a cache; the unit `missing` is not finished."""
    from tests.support.manifests import bare_manifest  # not where older versions are measured

    plan = Plan(
        num_samples=num_units * UNIT_SAMPLES,
        num_views=1,
        unit_samples=UNIT_SAMPLES,
        chunk_samples=UNIT_SAMPLES,
    )
    manifest = bare_manifest(OpenCodec(num_classes=1000, k=10, temperatures=(1.0, 2.0)), plan)
    stored, objects = manifest.to_bytes(), open_objects(url, create=True)
    objects.put("manifest.json", stored)
    (_write_loose if loose else _write_blocks)(objects, manifest, digest_bytes(stored), missing)


def _write_loose(objects: Any, manifest: Manifest, digest: str, missing: int) -> None:
    store = units.open_store(manifest, objects)

    def put(number: int) -> None:
        unit = manifest.plan.unit(number)
        marker = UnitMarker(
            unit=number,
            view=unit.view,
            start=unit.start,
            stop=unit.stop,
            num_rows=UNIT_SAMPLES,
            manifest_sha256=digest,
            shards=tuple(
                Shard(path=path, column=column, num_bytes=100, sha256=f"{number:064x}")
                for path, column in store.shard_paths(unit).items()
            ),
        )
        if hasattr(objects, "root"):  # without flushing each
            path = Path(objects.root) / marker_path(number)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(marker.to_bytes())
        else:
            objects.put(marker_path(number), marker.to_bytes())

    numbers = [number for number in range(manifest.plan.num_units) if number != missing]
    if hasattr(objects, "root"):
        for number in numbers:
            put(number)
    else:
        for _ in objects._client.at_once(put, numbers):
            pass


def _write_blocks(objects: Any, manifest: Manifest, digest: str, missing: int) -> None:
    from softcache.cache.folded import (
        BLOCK_UNITS,
        FENCE,
        FENCE_CONTENT,
        RETIRED,
        block_path,
        block_range,
        encode_block,
    )

    index = units.open_index(objects, manifest, digest)
    objects.put(FENCE, FENCE_CONTENT)
    for block in range(-(-manifest.plan.num_units // BLOCK_UNITS)):
        start, stop = block_range(manifest.plan, block)
        finished = np.arange(start, stop) != missing
        records = np.zeros(int(finished.sum()), index.dtype)
        records["num_rows"], records["num_bytes"] = UNIT_SAMPLES, 100
        records["sha256"] = np.random.default_rng(block).integers(0, 256, records["sha256"].shape, np.uint8)
        for generation in range(1, 32):
            objects.put(block_path(block, generation), RETIRED)
        objects.put(block_path(block, 32), encode_block(index.limits, block, finished, records))


# -- one process --------------------------------------------------------------------------------------------


def measure(url: str, what: str) -> dict[str, float]:
    """Returns CPU seconds, seconds, memory [bytes] at most, and requests of one use of a cache."""
    requests = _count_requests()
    use: dict[str, Callable[[str], int]] = {
        "open": _open,
        "status": lambda url: read_status(open_objects(url)).units_done,
        "rerun": _rerun,
        "gc": lambda url: len(collect_garbage(open_objects(url), delete=False).foreign),
    }
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before, cpu, started = memory_bytes("VmRSS"), time.process_time(), time.perf_counter()
    found = use[what](url)
    return {
        "cpu": time.process_time() - cpu,
        "seconds": time.perf_counter() - started,
        "bytes": memory_bytes("VmHWM") - before,
        "requests": requests["count"],
        "found": found,
    }


def _open(url: str) -> int:
    cache = open_cache(url)
    assert cache.num_rows_done == UNIT_SAMPLES * len(cache.markers)
    assert sum(cache.bytes_by_column().values()) > 0
    return len(cache.markers)


def _rerun(url: str) -> int:
    objects = open_objects(url)
    stored = objects.get("manifest.json", max_bytes=MAX_MANIFEST_BYTES)
    manifest = Manifest.parse(stored, where=url)
    finished: Any = units.finished_units(objects, manifest, digest_bytes(stored))
    if hasattr(finished, "missing"):
        missing = finished.missing.tolist()
    else:  # before markers were folded
        missing = [unit.number for unit in manifest.plan.units() if unit.number not in finished]
    assert len(missing) == 1
    return missing[0]


def _count_requests() -> dict[str, int]:
    """Counts what the client of buckets asks for, from now on."""
    from softcache.cache.storage.cloud.client import CloudClient
    from softcache.cache.storage.cloud.store import CloudObjects

    counted, ask, listed = {"count": 0}, CloudClient.ask, CloudObjects._listed

    def counting(self: Any, *arguments: Any, **named: Any) -> Any:
        counted["count"] += 1
        return ask(self, *arguments, **named)

    def listing(self: Any, *arguments: Any, **named: Any) -> Any:
        found = listed(self, *arguments, **named)
        counted["count"] += len(found) // 1000
        return found

    CloudClient.ask, CloudObjects._listed = counting, listing  # type: ignore[method-assign]
    return counted


# -- all ----------------------------------------------------------------------------------------------------


def in_process(url: str, what: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.many_units", "--measure", url, what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{what} of {url}: exited with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


@click.command()
@click.option("--units", "sizes", multiple=True, type=int, default=(1_000, 10_000, 100_000, 1_000_000))
@click.option("--s3", is_flag=True, help="In a bucket, under $SOFTCACHE_BENCH_BUCKET.")
@click.option("--loose", is_flag=True, help="Markers that no run folded.")
@click.option("--json", "json_path", metavar="FILE", help="Also write the figures as JSON.")
@click.option(
    "--measure", "one", nargs=2, metavar="URL WHAT", help="Measure one use of one cache in this process."
)
def main(
    sizes: tuple[int, ...], s3: bool, loose: bool, json_path: str | None, one: tuple[str, str] | None
) -> None:
    """Measure what caches of many units cost to open, to ask for their status, to continue and to clean up."""
    if one:
        click.echo(json.dumps(measure(*one)))
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        base = os.environ["SOFTCACHE_BENCH_BUCKET"].rstrip("/") if s3 else folder
        for num_units in sizes:
            url = f"{base}/{num_units}-{'loose' if loose else 'folded'}"
            write_cache(url, num_units, loose=loose or num_units < 1024, missing=num_units // 2)
            for what in WHAT:
                found = in_process(url, what)
                results.append({"units": num_units, "what": what, "s3": s3, "loose": loose, **found})
                click.echo(
                    f"{num_units:>9,} {what:<7} {found['cpu']:8.2f} s CPU {found['seconds']:8.2f} s "
                    f"{found['bytes'] / 1e6:8.1f} MB {found['requests']:>9,} requests"
                )
    if json_path:
        Path(json_path).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
