"""One loop of a benchmark for so many seconds, for a profiler to look at.

    pip install py-spy
    python -m benchmarks.profiled images --seconds 40 &
    py-spy record --function --threads --duration 10 -o docs/figures/flame-images.svg --pid $!  # once it prints "running"

*images* reads shuffled batches of 256 from the memory map of a cache (`benchmarks.reading`), *chunks* reads them from its
chunks; *step* trains the smallest student of digits from a cache at T = 1 (`benchmarks.epochs`); *capture* labels texts,
V = 4,096, K = 128, and writes them (`benchmarks.capture`).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click

from benchmarks.capture import text_config
from benchmarks.epochs import cases, contenders, repeated_case
from benchmarks.reading import direct_contenders, made_images
from benchmarks.reading_contenders import cache_reader
from softcache.runs import capture_labels, open_data, open_teacher


def images(folder: Path) -> Callable[[int], object]:
    (memmap,) = (x for x in direct_contenders(made_images(folder, 300_000)) if x.name == "cache, memory map")
    return memmap.run


def chunks(folder: Path) -> Callable[[int], object]:
    made = made_images(folder, 131_072)
    return cache_reader("chunks", made, next(iter(made.caches)), memmap=False, full=False).run


def step(folder: Path) -> Callable[[int], object]:
    config, copies, students = cases(str(folder), "", quick=False)["images, 8x8"]
    data, made = repeated_case(config, copies, f"{folder}/cache")
    runs = contenders(config, data, config.reader.open_cache(made.url), next(iter(students)), 20)
    return lambda number: runs["cache, T = 1"]()


def capture(folder: Path) -> Callable[[int], object]:
    config = text_config(str(folder), 320, {"k": 128}, quick=False)
    data = open_data(config)
    teacher = open_teacher(config, data)
    return lambda number: capture_labels(config, data, teacher, f"{folder}/{number}")


LOOPS = {"images": images, "chunks": chunks, "step": step, "capture": capture}


@click.command()
@click.argument("what", type=click.Choice(list(LOOPS)))
@click.option("--seconds", default=15.0, show_default=True)
def main(what: str, seconds: float) -> None:
    """Run a loop over and over."""
    with tempfile.TemporaryDirectory() as folder:
        run = LOOPS[what](Path(folder))
        run(0)
        click.echo("running")
        number, end = 1, time.monotonic() + seconds
        while time.monotonic() < end:
            run(number)
            number += 1


if __name__ == "__main__":
    main()
