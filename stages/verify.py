"""Check a cache: every checksum and marker, and with a config the teacher itself on a sample of rows.

softcache verify runs/digits/cache
softcache verify runs/digits/cache --config configs/digits.toml --rows 512
"""

import sys

import click

from pipeline.cache import open_cache
from pipeline.config import load_config
from pipeline.progress import track
from pipeline.runs import open_data, open_teacher
from pipeline.verify import verify_against_teacher, verify_units
from stages.options import json_option, print_json

__all__ = ["verify"]


@click.command()
@click.argument("url", metavar="CACHE")
@click.option(
    "--config", "config_path", metavar="FILE", help="Also run this config's teacher again on some rows."
)
@click.option(
    "--set", "overrides", multiple=True, metavar="TABLE.KEY=VALUE", help="Override a key of the config."
)
@click.option("--rows", default=256, show_default=True, type=click.IntRange(1), help="Rows for the teacher.")
@click.option(
    "--threshold",
    default=1e-3,
    show_default=True,
    type=click.FloatRange(0),
    help="Largest KL(record || fresh teacher) in nats that a row may have.",
)
@json_option
@click.option("--seed", default=0, show_default=True, help="Of the choice of rows.")
def verify(
    url: str,
    config_path: str | None,
    overrides: tuple[str, ...],
    rows: int,
    threshold: float,
    seed: int,
    as_json: bool,
) -> None:
    """Check CACHE; exit with 1 and one line per fault if anything is wrong.

    \b
    Example:
      softcache verify runs/digits/cache --config configs/digits.toml
    """
    cache = open_cache(url)
    with track("verify", cache.manifest.plan.num_units, "units") as advance:
        faults = list(verify_units(cache, advance))
    checked, num_rows = f"{cache.manifest.plan.num_units} units", 0
    if config_path and not faults:
        config = load_config(config_path, overrides)
        data = open_data(config)
        teacher = open_teacher(config, data)
        num_rows = min(rows, len(cache) * cache.num_views)
        with track("verify: teacher", num_rows, "rows") as advance:
            faults = list(
                verify_against_teacher(
                    cache,
                    data.train,
                    teacher,
                    num_rows=rows,
                    threshold_nats=threshold,
                    seed=seed,
                    progress=advance,
                )
            )
        checked += f", {num_rows} rows against the teacher"
    for fault in faults:
        click.echo(f"FAULT {fault}", err=True)
    if as_json:
        units = cache.manifest.plan.num_units
        print_json({"cache": url, "units": units, "teacher_rows": num_rows, "faults": faults})
    else:
        click.echo(f"cache {url}: {checked}; {len(faults)} faults")
    if faults:
        sys.exit(1)
