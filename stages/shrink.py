"""Make a smaller cache from a bigger one, as a capture would have made it; the teacher is not run.

softcache shrink runs/stdlib-lm/cache runs/stdlib-lm/cache-16 --k 16
softcache shrink runs/stdlib-lm/cache runs/stdlib-lm/cache-packed --codec packed --step 0.03125
"""

from typing import Any, get_args

import click

from softcache.cache.codecs import COARSEST, FINEST, HIGHEST_LEVEL, Tail
from softcache.reader.open import open_cache
from softcache.runtime.logging import progress_bar

from .options import CACHE, PATH, cache_report, json_option, parse_temperatures, print_json

__all__ = ["shrink"]


@click.command()
@click.argument("source_url", metavar="CACHE", type=CACHE)
@click.argument("target_url", metavar="OUT", type=PATH)
@json_option
@click.option(
    "--policy",
    type=click.Choice(["top_k", "top_p", "sample", "hybrid"]),
    help="[default: as CACHE]",
)
@click.option("--k", type=click.IntRange(1), help="Classes kept in each row.")
@click.option("--p", type=click.FloatRange(0, 1, min_open=True), help="Mass that top_p keeps.")
@click.option("--num-samples", type=click.IntRange(1, 65535), help="Classes that sample and hybrid draw.")
@click.option(
    "--proposal-temperature",
    metavar="T",
    type=click.FloatRange(1),
    help="Classes are drawn in proportion to p^(1/T).",
)
@click.option("--seed", type=click.IntRange(0), help="Seed of the sampled classes.")
@click.option("--temperatures", metavar="T,T,…", help="Grid temperatures to keep.")
@click.option("--views", "num_views", type=click.IntRange(1), help="Keep the first so many views.")
@click.option(
    "--statistics", type=click.Choice(["all", "none"]), help="none leaves the rows' statistics out."
)
@click.option(
    "--codec", type=click.Choice(["open", "packed"]), help="How rows become columns [default: as CACHE]."
)
@click.option(
    "--values", type=click.Choice(["float16", "float32"]), help="Precision of the log-probabilities."
)
@click.option("--step", type=click.FloatRange(FINEST, COARSEST), help="Nats between values of codec packed.")
@click.option("--tail", type=click.Choice(get_args(Tail)), help="How codec packed stores the tail.")
@click.option(
    "--level",
    type=click.IntRange(1, HIGHEST_LEVEL),
    help="zstd level of codec packed; 16 makes the fewest bytes.",
)
@click.option(
    "--store", type=click.Choice(["zarr", "parquet"]), help="The store to write [default: as CACHE]."
)
@click.option(
    "--chunk-rows",
    type=click.IntRange(1),
    help="Rows of texts or detectors that are compressed together.",
)
def shrink(source_url: str, target_url: str, temperatures: str | None, as_json: bool, **changes: Any) -> None:
    """Make a smaller cache OUT from CACHE: fewer classes, views or temperatures, another codec or store.

    OUT is what a capture with these settings would have made; teacher-logits and train-student take it as such. What
    cannot be derived from CACHE is refused. A rerun after a kill goes on.

    \b
    Example:
      softcache shrink runs/digits/cache runs/digits/cache-4 --k 4
    """
    from softcache.tools.shrink import ShrinkSettings, shrink_cache

    cache = open_cache(source_url)
    settings = ShrinkSettings(
        **changes, temperatures=parse_temperatures(temperatures) if temperatures else None
    )
    with progress_bar("shrink", cache.num_rows_done, "rows") as advance:
        smaller = shrink_cache(cache, target_url, settings, progress=advance)
    before, after = (sum(c.bytes_by_column().values()) for c in (cache, smaller))
    plan, labels = smaller.manifest.plan, smaller.manifest.identity["labels"]
    if as_json:
        print_json(cache_report(smaller) | {"num_bytes_before": before, "labels": labels})
        return
    click.echo(
        f"cache {target_url}: {len(smaller.markers)} of {plan.num_units} units, {labels['policy']}, k {labels['k']}, "
        f"codec {smaller.manifest.codec['name']}; {after:,} bytes of {before:,}"
    )
