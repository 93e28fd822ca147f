"""Copy a cache into the other store, losslessly.

softcache convert runs/digits/cache runs/digits/cache-parquet --store parquet
"""

import click

from softcache.reader.open import open_cache
from softcache.runtime.logging import progress_bar
from softcache.tools.card import write_card
from softcache.tools.convert import convert_cache

from .options import CACHE, PATH, cache_report, json_option, print_json

__all__ = ["convert"]


@click.command()
@click.argument("source_url", metavar="CACHE", type=CACHE)
@click.argument("target_url", metavar="OUT", type=PATH)
@json_option
@click.option("--store", type=click.Choice(["zarr", "parquet"]), required=True, help="The store to write.")
@click.option(
    "--card", is_flag=True, help="Write a README.md by which datasets.load_dataset reads OUT (Parquet)."
)
def convert(source_url: str, target_url: str, store: str, card: bool, as_json: bool) -> None:
    """Copy CACHE to OUT in another store; every value stays the same, bit for bit.

    A rerun after a kill goes on; OUT is refused if it holds something else.

    \b
    Example:
      softcache convert runs/digits/cache runs/digits/cache-parquet --store parquet
    """
    if card and store != "parquet":
        raise click.UsageError("--card: the datasets library reads Parquet alone; give --store parquet")
    cache = open_cache(source_url)
    plan, total = cache.manifest.plan, cache.num_rows_done
    with progress_bar("convert", total, "rows") as advance:
        copied = convert_cache(cache, target_url, store=store, progress=advance)
    if card:
        write_card(target_url)
    if as_json:
        print_json(cache_report(copied))
        return
    click.echo(f"cache {target_url}: {len(copied.markers)} of {plan.num_units} units, store {store}")
