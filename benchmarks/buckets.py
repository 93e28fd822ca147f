"""Reading in windows from a bucket that is far away, against one large request per window.

    python -m benchmarks.buckets [--quick] [--rounds N] [--latency 0.015] [--json FILE]

The bucket is simulated in this process: every request takes the latency, 96 run at once, and bytes come as fast as from the
page cache. *One request* asks for all chunks of a window by a single one: nothing less can be done, and no bucket
offers it. Units have been compared with their markers before; that reads each of them once, whole.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.harness import Figure, compare, measure, save, show
from benchmarks.reading import made_images, made_text
from benchmarks.reading_contenders import Made, cache_reader
from softcache.cache.storage.cloud.client import CONCURRENT_RANGES
from softcache.reader.cache import Cache
from softcache.runtime.logging import log_info

__all__ = ["DistantObjects", "distant_readers", "main"]


class DistantObjects:
    """Objects of a folder as a bucket gives them: each request takes `latency` seconds.

    Attributes:
        at_once: whether all ranges of a call are one request.
        num_requests: so far.
    """

    def __init__(self, objects: Any, latency: float, *, at_once: bool) -> None:
        self._objects, self._latency, self.at_once, self.num_requests = objects, latency, at_once, 0
        self._threads = ThreadPoolExecutor(CONCURRENT_RANGES)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objects, name)

    def kvstore(self, prefix: str) -> None:
        """None: it is to be read by ranges."""

    def get_suffixes(self, lengths: Mapping[str, int]) -> Sequence[tuple[bytes, int]]:
        return self._each(lambda item: self._objects.get_suffixes(dict([item]))[0], list(lengths.items()))

    def get_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> Sequence[bytes]:
        if self.at_once:
            return self._each(self._objects.get_ranges, [ranges])[0]
        return self._each(lambda item: self._objects.get_ranges([item])[0], ranges)

    def _each(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        def one(item: Any) -> Any:
            time.sleep(self._latency)
            return function(item)

        self.num_requests += len(items)
        return list(self._threads.map(one, items))


def distant_readers(made: Made, codec: str, latency: float) -> dict[str, Callable[[], int]]:
    """Returns what reads an epoch by one request per window, and as softcache does; by name."""
    out: dict[str, Callable[[], int]] = {}
    for name, at_once in (("one request a window", True), (f"cache, {codec}", False)):

        def distant(cache: Cache, at_once: bool = at_once) -> None:
            if not isinstance(cache._objects, DistantObjects):
                cache._objects = DistantObjects(cache._objects, latency, at_once=at_once)  # type: ignore[assignment]
                cache._windows._fetch = cache._fetch

        reader = cache_reader(name, made, codec, memmap=False, full=False, prepare=distant)
        reader.run(0)
        out[name] = Epochs(reader.run)
    return out


class Epochs:
    """Runs one epoch after the other."""

    def __init__(self, run: Callable[[int], int]) -> None:
        self._run, self._number = run, 0

    def __call__(self) -> int:
        self._number += 1
        return self._run(self._number)


@click.command()
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Interleaved rounds.")
@click.option(
    "--latency", default=0.015, show_default=True, type=click.FloatRange(0), help="Of a request, seconds."
)
@click.option("--quick", is_flag=True, help="Small sizes and vocabulary, to see that it runs.")
@click.option("--json", "json_path", metavar="FILE", help="Also write the figures as JSON.")
def main(rounds: int, latency: float, quick: bool, json_path: str | None) -> None:
    """Measure reading from a distant bucket."""
    torch.set_num_threads(1)
    small: dict[str, int] = {"num_classes": 2048} if quick else {}
    results: dict[str, list[Figure]] = {}
    with tempfile.TemporaryDirectory() as name:
        log_info("writing the layouts")
        made = {
            "images": made_images(Path(name, "images"), 4096 if quick else 200_000, **small),
            "text": made_text(Path(name, "text"), 64 if quick else 1024, **small),
        }
        for kind, layouts in made.items():
            for codec in layouts.caches:
                runs = distant_readers(layouts, codec, latency)
                title = f"{kind}, {codec}, {1000 * latency:g} ms"
                results[title] = compare(measure(runs, rounds), "one request a window")
                show(title, results[title])
    if json_path:
        save(json_path, results)


if __name__ == "__main__":
    main()
