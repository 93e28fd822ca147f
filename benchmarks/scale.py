"""What a cache costs before its first row, and what memory an epoch needs, as the number of samples grows.

    python -m benchmarks.scale [--quick] [--rounds N] [--json FILE] [--plot FILE]

1. Opening: `open_cache`, every marker read and validated, and the index of rows; seconds of all processes together, and what
   they hold more afterwards, the order up to an epoch's first batch included, whose seconds are printed as well: TinyViT's
   sampler draws an order, too. Where each of W loader processes opens the cache that is W times; with `SoftLabelLoader` it
   is once, in the process that trains. TinyViT's layout has all of its keys parsed by every worker.
   The caches are whole (manifest, samples, markers, shards), of units as large as the plan makes them; their rows are
   tiny, K = 1 of V = 2, since no row is read.
2. By how much memory rises at most in an epoch, at 1, 4 and 16 times as many samples, K = 16 of V = 1,000: read by chunks,
   from memory maps (their pages count, though all processes share them and the kernel takes them back at will), and from
   TinyViT's files.

Every figure is of a fresh process, with its imports done before; W workers run one after the other, so that they need not
share the cores, nor the memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.codecs import labels_of
from benchmarks.harness import Figure, compare, draw, save, show
from benchmarks.made_labels import MadeImages, made_tokens, write_cache
from benchmarks.peer_files import TinyVitFiles, parse_keys, write_tinyvit
from benchmarks.synthetic_logits import image_logits
from softcache.reader.cache import DEFAULT_WINDOW_BLOCKS, Cache
from softcache.reader.memmap import MemmapSettings
from softcache.reader.open import open_cache
from softcache.reader.order import BlockShuffle
from softcache.runtime.logging import log_info
from softcache.teacher.capture.plan import CaptureSettings

__all__ = ["epoch_of", "main", "open_everything", "parse_everything"]

WORKERS = (1, 4)
GROWTH = (1, 4, 16)
STEPS = ("manifest", "markers", "rows", "order")
TINYVIT, EVERY, ONCE = "TinyViT, keys parsed", "cache, opened by every worker", "cache, SoftLabelLoader"


# -- in a process of its own -------------------------------------------------------------------------------


def memory_bytes(field: str) -> int:
    """A line of /proc/self/status: VmRSS, what this process holds; RssAnon, of it what is no mapped file; VmHWM, the peak.

    Not `ru_maxrss`: a process inherits that of its parent.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status: no {field}; this benchmark needs Linux")


def open_everything(url: str) -> dict[str, float]:
    """Returns seconds by step, their sum and what memory rose by, of opening a cache."""
    before, times = memory_bytes("VmRSS"), [time.perf_counter()]
    cache = open_cache(url)
    times.append(time.perf_counter())
    markers = cache.markers
    times.append(time.perf_counter())
    rows = cache.rows
    times.append(time.perf_counter())
    order = _order(cache)
    first = next(iter(order))
    times.append(time.perf_counter())
    assert len(markers) == cache.manifest.plan.num_units
    assert len(first) == min(256, len(cache))
    steps = dict(zip(STEPS, np.diff(times).tolist(), strict=True))
    held = memory_bytes("VmRSS") - before
    del rows, order
    return steps | {"seconds": times[-2] - times[0], "held_bytes": held}


def parse_everything(path: str) -> dict[str, float]:
    """The same of TinyViT's keys."""
    before, started = memory_bytes("VmRSS"), time.perf_counter()
    places = parse_keys(Path(path))
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "held_bytes": memory_bytes("VmRSS") - before, "keys": len(places)}


def epoch_of(url: str, how: str, memmap: str) -> dict[str, float]:
    """Returns by how much memory rose at most while an epoch was read: "chunks", "memmap" or "TinyViT"."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before, rows = memory_bytes("VmRSS"), 0
    cache = open_cache(url, memmap=MemmapSettings(folder=memmap, required=True) if how == "memmap" else None)
    order = _order(cache, full=how != "chunks")
    files = TinyVitFiles(Path(url).parent / "tinyvit", MadeImages(len(cache), cache.num_classes).source, 16)
    for request in order:
        if how == "TinyViT":
            rows += len([files[sample] for sample in request.samples.tolist()])
        else:
            rows += len(cache.read_stored(request.samples, request.view).labels)
    assert rows == len(cache)
    return {
        "peak_bytes": memory_bytes("VmHWM") - before,
        "anonymous_bytes": memory_bytes("RssAnon"),
    }


def _order(cache: Cache, *, full: bool = False) -> BlockShuffle:
    samples = cache.samples_in(0)
    return BlockShuffle(
        lambda view: samples,
        batch_size=256,
        view_of=lambda epoch: 0,
        block_samples=cache.manifest.plan.chunk_samples,
        window_blocks=None if full else DEFAULT_WINDOW_BLOCKS,
        seed=0,
    )


def in_process(function: Callable[..., dict[str, float]], *arguments: str) -> dict[str, float]:
    """Returns what a function of this module returns in a fresh process."""
    code = f"import json; from benchmarks.scale import {function.__name__} as f; print(json.dumps(f(*{arguments!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{function.__name__}{arguments}: exited with {done.returncode}: {done.stderr[-2000:]}"
        )
    return json.loads(done.stdout)


# -- opening -----------------------------------------------------------------------------------------------


def measure_opening(folder: Path, sizes: tuple[int, ...], rounds: int) -> dict[str, list[Figure]]:
    results: dict[str, list[Figure]] = {}
    base = labels_of(image_logits(1024, 2), 1)
    for num_samples in sizes:
        log_info(f"opening: writing a cache of {num_samples:,} samples")
        data, here = MadeImages(num_samples, 2), folder / str(num_samples)
        url = write_cache(str(here / "cache"), data, base, CaptureSettings())
        with (here / "keys.txt").open("w") as file:
            file.writelines(f"{data.source.key(sample)}\n" for sample in range(num_samples))
        for workers in WORKERS:
            name = f"{num_samples:,} samples, {workers} worker{'' if workers == 1 else 's'}"
            results |= _race_opening(name, url, str(here / "keys.txt"), num_samples, workers, rounds)
    return results


def _race_opening(
    name: str, url: str, keys: str, num_samples: int, workers: int, rounds: int
) -> dict[str, list[Figure]]:
    contenders: dict[str, tuple[Any, str, int]] = {
        TINYVIT: (parse_everything, keys, workers),
        EVERY: (open_everything, url, workers),
        ONCE: (open_everything, url, 1),
    }
    rates: dict[str, list[float]] = {who: [] for who in contenders}
    held: dict[str, list[float]] = {who: [] for who in contenders}
    for number in range(rounds):
        for who, (function, argument, processes) in contenders.items():
            results = [in_process(function, argument) for _ in range(processes)]
            seconds = sum(one["seconds"] for one in results)
            rates[who].append(num_samples / seconds)
            held[who].append(sum(one["held_bytes"] for one in results) / 1e6)
            log_info(
                f"round {number + 1}/{rounds} {who}: {_format(results[0])}{' each' if processes > 1 else ''}"
            )
    speed, memory = f"opening {name}", f"MB held after opening {name}"
    figures = {speed: compare(rates, TINYVIT), memory: compare(held, TINYVIT)}
    show(speed, figures[speed], "samples/s")
    show(memory, figures[memory], "MB")
    return figures


def _format(one: dict[str, float]) -> str:
    steps = [f"{step} {one[step]:.4f}" for step in STEPS if step in one]
    return f"{one['seconds']:.4f} s, {one['held_bytes'] / 1e6:,.1f} MB ({', '.join(steps)})"


def measure_texts(folder: Path, num_samples: int, rounds: int) -> None:
    """Prints what opening costs where samples have many rows: the table of samples is then read."""
    data = made_tokens(folder / "tokens", num_samples, rows=4, vocab_size=2)
    url = write_cache(str(folder / "texts"), data, labels_of(image_logits(1024, 2), 1), CaptureSettings())
    for _ in range(rounds):
        opened = _format(in_process(open_everything, url))
        click.echo(f"opening {num_samples:,} texts of 4 rows: {opened}")


# -- memory ------------------------------------------------------------------------------------------------


def measure_memory(folder: Path, num_samples: int) -> dict[str, list[Figure]]:
    """Returns the peak of an epoch in MB; a ratio is to the same reader's at 1x."""
    base = labels_of(image_logits(8192, 1000), 16)
    peaks: dict[str, list[float]] = {how: [] for how in ("chunks", "memmap", "TinyViT")}
    for growth in GROWTH:
        log_info(f"memory: writing a cache of {growth * num_samples:,} samples")
        here, data = folder / f"x{growth}", MadeImages(growth * num_samples, 1000)
        url = write_cache(str(here / "cache"), data, base, CaptureSettings())
        write_tinyvit(open_cache(url), data.source.keys(), here / "tinyvit")
        in_process(epoch_of, url, "memmap", str(here / "memmaps"))  # makes the map
        for how, values in peaks.items():
            measured = in_process(epoch_of, url, how, str(here / "memmaps"))
            values.append(measured["peak_bytes"] / 1e6)
            anonymous = measured["anonymous_bytes"] / 1e6
            log_info(
                f"{growth}x, {how}: {values[-1]:,.0f} MB more at most; {anonymous:,.0f} MB of no file at the end"
            )
    figures = [
        Figure(f"{how}, {growth}x", value, value / values[0], value / values[0], value / values[0])
        for how, values in peaks.items()
        for growth, value in zip(GROWTH, values, strict=True)
    ]
    title = f"peak MB of an epoch over {num_samples:,} samples and more"
    show(title, figures, "MB")
    return {title: figures}


@click.command()
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Interleaved rounds.")
@click.option(
    "--samples", "sizes", multiple=True, type=int, default=(1_280_000, 10_000_000), show_default=True
)
@click.option("--quick", is_flag=True, help="Small sizes, to see that it runs.")
@click.option("--json", "json_path", metavar="FILE", help="Also write the figures as JSON.")
@click.option("--plot", "plot_path", metavar="FILE", help="Also draw them; PNG or SVG.")
def main(
    rounds: int, sizes: tuple[int, ...], quick: bool, json_path: str | None, plot_path: str | None
) -> None:
    """Measure opening and memory against the number of samples."""
    if quick:
        rounds, sizes = 1, (40_000,)
    with tempfile.TemporaryDirectory() as name:
        results = measure_opening(Path(name), sizes, rounds)
        measure_texts(Path(name), 2_000 if quick else sizes[0], rounds)
        results |= measure_memory(Path(name), 4096 if quick else 65_536)
    if json_path:
        save(json_path, results)
    if plot_path:
        draw(plot_path, results)


if __name__ == "__main__":
    main()
