"""Where the time of reading by chunks goes, in CPU time: against a memory map in the same order and bare decompression.

    python -m benchmarks.chunked [--quick] [--rounds N] [--json FILE]

memory map     a gather of the same numbers through np.memmap, in block order: no checks, nothing to decompress.
decompression  crc32c and decompression of all stored chunks into the same memory, by numcodecs: the limit of any reader.
chunks         the same, unpacked, its numbers looked at, and its rows written to their places in a window, by one thread.
windows        `Cache.read_stored` in block order: decoded ahead by threads, batches as slices; all threads counted.

Rows for each second of CPU time of one core; the best of interleaved rounds, since neighbours can only slow a round
down. With two cores and nothing else to do, wall time is half of that of `windows`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from benchmarks.harness import Figure, best, compare, save, show
from benchmarks.made_labels import write_cache
from benchmarks.reading import labels_of, made_images, made_text
from benchmarks.reading_contenders import Contender, Made, cache_reader, map_reader
from benchmarks.synthetic_logits import image_logits
from softcache.cache.arrays.zarr_chunks import decode_chunk
from softcache.cache.codecs import CODECS
from softcache.reader.cache import DEFAULT_WINDOW_BLOCKS, Cache
from softcache.reader.open import open_cache
from softcache.reader.windows import Window
from softcache.runtime.logging import log_info
from softcache.teacher.capture.plan import CaptureSettings

__all__ = ["decoding", "decompression", "main"]

LIMIT = "memory map"


def decompression(cache: Cache) -> Callable[[], int]:
    """Returns what decompresses every chunk of a cache's columns of rows, and gives the number of rows."""
    store, plan = cache._opened_store(), cache.manifest.plan
    layouts, work = store._parts.layouts, []
    for unit in plan.units():
        span = cache.rows.span(unit, unit.start, unit.stop)
        (found,) = store.fetch_parts([(unit, unit.start, unit.stop, span)])
        work += [(name, data) for name, chunks in found.items() for data in chunks.data if data is not None]
    memory = {name: np.empty(layout.num_bytes, np.uint8) for name, layout in layouts.items()}

    def run() -> int:
        for name, data in work:
            assert decode_chunk(data, layouts[name].compressor, memory[name])
        return cache.manifest.total_rows

    return run


def decoding(cache: Cache) -> Callable[[], int]:
    """Returns what decodes the windows of an epoch, chunk by chunk in this thread, and gives the number of rows."""
    random, size = np.random.default_rng(0), cache.manifest.plan.chunk_samples

    def run() -> int:
        blocks = random.permutation(-(-len(cache) // size))
        for first in range(0, len(blocks), DEFAULT_WINDOW_BLOCKS):
            starts = blocks[first : first + DEFAULT_WINDOW_BLOCKS] * size
            samples = (starts[:, None] + np.arange(size)).reshape(-1)
            window = Window(0, random.permutation(samples[samples < len(cache)]), cache.rows, size)
            cache._windows._allocate(window)
            for block in window.blocks:
                cache._decode_to(window, block)
        return cache.manifest.total_rows

    return run


def epochs(contender: Contender) -> Callable[[], int]:
    """Returns what walks the next epoch."""
    numbers = iter(range(1_000_000))
    return lambda: contender.run(next(numbers))


def measure(made: Made, codec: str, rounds: int) -> list[Figure]:
    cache = open_cache(made.caches[codec])
    runs: dict[str, Callable[[], int]] = {
        LIMIT: epochs(map_reader(LIMIT, made, made.records, full=False)),
        "decompression": decompression(cache),
        "chunks": decoding(cache),
        "windows": epochs(cache_reader("windows", made, codec, memmap=False, full=False)),
    }
    return compare({name: [rate] for name, (_, rate) in best(runs, rounds).items()}, LIMIT)


@click.command()
@click.option("--rounds", default=4, show_default=True, type=click.IntRange(1), help="Interleaved rounds.")
@click.option("--quick", is_flag=True, help="Small sizes and vocabulary, to see that it runs.")
@click.option("--json", "json_path", metavar="FILE", help="Also write the figures as JSON.")
def main(rounds: int, quick: bool, json_path: str | None) -> None:
    """Measure reading by chunks in CPU time."""
    torch.set_num_threads(1)
    small: dict[str, Any] = {"num_classes": 2048} if quick else {}
    results: dict[str, list[Figure]] = {}
    with tempfile.TemporaryDirectory() as name:
        log_info("writing the layouts")
        images = made_images(Path(name, "images"), 4096 if quick else 131_072, **small)
        base = labels_of(image_logits(4096, small.get("num_classes", 1000)), 16)
        settings = CaptureSettings(codec=CODECS.get("packed").settings(name="packed"))
        images.caches["packed"] = write_cache(str(images.folder / "packed"), images.data, base, settings)
        text = made_text(Path(name, "text"), 64 if quick else 512, **small)
        for kind, made in (("images", images), ("text", text)):
            for codec in made.caches:
                results[title := f"{kind}, {codec}"] = measure(made, codec, rounds)
                show(title, results[title], "rows/CPU s")
    if json_path:
        save(json_path, results)


if __name__ == "__main__":
    main()
