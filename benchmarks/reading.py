"""How fast labels are read, against the limit and the peers' files.

    python -m benchmarks.reading [--quick] [--rounds N] [--json FILE] [--plot FILE]

images      500,000 samples of one row, V = 1,000, K = 16; batches of 256
text        2,048 samples of 512 rows, V = 131,072, K = 64; batches of 32

1. In this process, warm and cold: a gather of the same numbers, uncompressed, through np.memmap is the limit. The cache is
   read by chunks (in block-shuffled order, the next window decoded ahead) and from memory maps. Every block is decoded in
   every epoch; checksums are compared in the first, which is not timed. Cold: files are flushed and
   dropped from the page cache.
2. Through loaders with 0, 1 and 2 workers, joined with their samples (constant images; tokens from their table) and compared
   with their fingerprints: the cache, the memory map, and the peers' files through loaders of their own.

A first epoch of everybody is not timed; workers persist, but for TinyViT, whose workers live for one epoch. Memory takes
about four times the raw size of the labels on the disk of $TMPDIR: 3 GB.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.codecs import labels_of
from benchmarks.harness import Figure, compare, draw, measure, save, show
from benchmarks.made_labels import MadeImages, made_tokens, write_cache
from benchmarks.peer_files import write_distillkit, write_fkd, write_megatron, write_tinyvit
from benchmarks.raw_files import drop_from_memory, write_raw
from benchmarks.reading_contenders import Contender, Made, cache_reader, loaders, map_reader, peer_loaders
from benchmarks.synthetic_logits import image_logits, text_logits
from softcache.cache.codecs import CODECS
from softcache.reader.open import open_cache
from softcache.runtime.logging import log_info
from softcache.teacher.capture.plan import CaptureSettings

__all__ = ["direct_contenders", "loader_contenders", "made_images", "made_text", "main"]

LIMIT = "memory map, a record per row"
WORKERS = (0, 1, 2)
COLD_SHARE = 0.02
"""Of the pages, still in memory after they were dropped: above it a cold figure would not be one."""


def made_images(
    folder: Path, num_samples: int, *, num_classes: int = 1000, k: int = 16, settings: Any = None
) -> Made:
    """Writes images' labels in every layout."""
    data = MadeImages(num_samples, num_classes)
    base = labels_of(image_logits(min(8192, num_samples), num_classes), k)
    url = write_cache(str(folder / "open"), data, base, settings or CaptureSettings())
    cache, peers, peer_samples = open_cache(url), folder / "peers", min(8192, num_samples)
    records, columns = write_raw(cache, folder / "raw")
    write_tinyvit(cache, data.source.keys(), peers / "tinyvit")
    write_fkd(cache, peer_samples, peers / "fkd")
    return Made(folder, data, 256, {"open": url}, records, columns, peers, peer_samples)


def made_text(
    folder: Path,
    num_samples: int,
    *,
    num_classes: int = 131_072,
    k: int = 64,
    rows: int = 512,
    settings: dict[str, Any] | None = None,
) -> Made:
    """Writes texts' labels in every layout, by both codecs."""
    data = made_tokens(folder / "tokens", num_samples, rows=rows, vocab_size=num_classes)
    base = labels_of(text_logits(1024, num_classes, bfloat16=False), k)
    urls = {
        codec: write_cache(
            str(folder / codec),
            data,
            base,
            CaptureSettings(codec=CODECS.get(codec).settings(name=codec), **(settings or {})),
        )
        for codec in ("open", "packed")
    }
    cache, peers, peer_samples = open_cache(urls["open"]), folder / "peers", min(64, num_samples)
    records, columns = write_raw(cache, folder / "raw")
    write_megatron(cache, peers / "megatron.tar", 32)
    write_distillkit(cache, peers / "distillkit.parquet", peer_samples)
    return Made(folder, data, 32, urls, records, columns, peers, peer_samples)


def direct_contenders(made: Made) -> list[Contender]:
    """In this process: the limit first. Texts are read in blocks by all, images in the order that suits the cache."""
    full = made.data.kind == "image"
    out = [
        map_reader(LIMIT, made, made.records, full=full),
        map_reader("memory map, column by column", made, made.columns, full=full),
    ]
    for codec in made.caches:
        name = "cache" if len(made.caches) == 1 else f"cache, {codec}"
        out.append(cache_reader(f"{name}, block-shuffled", made, codec, memmap=False, full=False))
        out.append(cache_reader(f"{name}, memory map", made, codec, memmap=True, full=full))
    return out


def loader_contenders(made: Made, workers: int) -> list[Contender]:
    """Through loaders: the baseline first, TinyViT's for images and the memory map for text."""
    ours = loaders(made, workers, list(made.caches)[-1], full=made.data.kind == "image")
    peers = peer_loaders(made, workers)
    return [*peers, *ours] if made.data.kind == "image" else [*ours, *peers]


def race(
    contenders: list[Contender], rounds: int, *, prepare: Callable[[str], None] = lambda name: None
) -> list[Figure]:
    """Returns their figures; the first is the baseline. An epoch of each is walked before the time is taken."""
    for contender in contenders:
        contender.run(0)
    numbers = count(1)
    runs = {one.name: partial(lambda one: one.run(next(numbers)), one) for one in contenders}
    rates = measure(runs, rounds, prepare=prepare)
    for contender in contenders:
        contender.close()
    return compare(rates, contenders[0].name)


def cold_race(contenders: list[Contender], rounds: int) -> list[Figure] | None:
    """The same from the disk; None where pages cannot be dropped from memory."""
    by_name = {contender.name: contender for contender in contenders}
    worst = 0.0

    def prepare(name: str) -> None:
        nonlocal worst
        for contender in contenders:  # pages that anybody maps stay
            contender.close()
        worst = max(worst, drop_from_memory(by_name[name].files))

    figures = race(contenders, rounds, prepare=prepare)
    if worst > COLD_SHARE:
        click.echo(
            f"cold: up to {worst:.0%} of the pages stayed in memory; this system does not let go of them: no figures"
        )
        return None
    click.echo(f"cold: at most {worst:.2%} of the pages were in memory before a run")
    return figures


def measure_reading(made: Made, kind: str, rounds: int, results: dict[str, list[Figure]]) -> None:
    unit = "rows/s"
    for temperature, run in (("warm", race), ("cold", cold_race)):
        figures = run(direct_contenders(made), rounds)
        if figures is not None:
            results[title := f"{kind}, {temperature}"] = figures
            show(title, figures, unit)
    for workers in WORKERS:
        title = f"{kind}, through a loader, {workers} worker{'' if workers == 1 else 's'}"
        results[title] = race(loader_contenders(made, workers), rounds)
        show(title, results[title], unit)


@click.command()
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Interleaved rounds.")
@click.option(
    "--images", default=500_000, show_default=True, type=click.IntRange(1), help="Samples of images."
)
@click.option("--texts", default=2048, show_default=True, type=click.IntRange(1), help="Samples of text.")
@click.option("--only", type=click.Choice(["images", "text"]), help="One of the two kinds.")
@click.option("--quick", is_flag=True, help="Small sizes and vocabulary, to see that it runs.")
@click.option("--json", "json_path", metavar="FILE", help="Also write the figures as JSON.")
@click.option("--plot", "plot_path", metavar="FILE", help="Also draw them; PNG or SVG.")
def main(
    rounds: int,
    images: int,
    texts: int,
    only: str | None,
    quick: bool,
    json_path: str | None,
    plot_path: str | None,
) -> None:
    """Measure reading against memory maps and the peers' files."""
    torch.set_num_threads(1)
    results: dict[str, list[Figure]] = {}
    small = {"num_classes": 2048}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if only != "text":
            log_info("images: writing the layouts")
            made = made_images(
                folder / "images", min(images, 4096) if quick else images, **(small if quick else {})
            )
            measure_reading(made, "images", rounds, results)
        if only != "images":
            log_info("text: writing the layouts")
            made = made_text(folder / "text", min(texts, 64) if quick else texts, **(small if quick else {}))
            measure_reading(made, "text", rounds, results)
    if json_path:
        save(json_path, results)
    if plot_path:
        draw(plot_path, results)


if __name__ == "__main__":
    main()
