"""Fuse several teachers' caches of one source into one cache; no teacher is run.

softcache fuse runs/a/cache runs/b/cache runs/c/cache --rule mean --out runs/fused
"""

from typing import Any

import click

from softcache.reader.open import open_cache
from softcache.runtime.logging import progress_bar
from softcache.tools.fuse import RULES, FusionSettings, fuse_caches

from .options import CACHE, cache_report, json_option, print_json

__all__ = ["fuse"]


@click.command()
@click.argument("urls", metavar="CACHE CACHE …", type=CACHE, nargs=-1, required=True)
@click.option(
    "--rule", type=click.Choice(RULES), required=True, help="How the teachers are weighted (docs/fusion.md)."
)
@json_option
@click.option("--out", metavar="URL", type=CACHE, required=True, help="The fused cache.")
@click.option(
    "--k", type=click.IntRange(1), help="Classes kept in each row [default: as the CACHE with most]."
)
@click.option(
    "--values",
    type=click.Choice(["float16", "float32"]),
    default="float16",
    help="Precision of the log-probabilities.",
)
@click.option(
    "--allow-weak-teachers",
    is_flag=True,
    help="Fuse also teachers at chance level, or with less than half of the best one's accuracy.",
)
def fuse(urls: tuple[str, ...], out: str, as_json: bool, **how: Any) -> None:
    """Fuse the labels of several teachers for the same samples and views into one cache.

    OUT is a cache like any other: every student, temperature and loss works on it. A rerun after a kill goes on. The
    probability of a class that only some teachers kept is estimated; docs/fusion.md has the errors.

    \b
    Example:
      softcache fuse runs/a/cache runs/b/cache --rule geometric --out runs/fused
    """
    caches = [open_cache(url) for url in urls]
    rows = caches[0].manifest.total_rows if caches else 0
    with progress_bar("fuse", rows, "rows") as advance:
        fused = fuse_caches(caches, out, FusionSettings.model_construct(caches=urls, **how), progress=advance)
    if as_json:
        print_json(cache_report(fused) | {"rule": how["rule"], "teachers": list(urls)})
        return
    plan, size = fused.manifest.plan, sum(fused.bytes_by_column().values())
    click.echo(
        f"cache {out}: {len(caches)} teachers by rule {how['rule']}, {len(fused.markers)} of {plan.num_units} units, "
        f"K={fused.manifest.codec['k']} of {fused.num_classes} classes, {size:,} bytes"
    )
