"""Check a cache: every checksum and marker, and with a config the teacher itself on a sample of rows.

softcache verify runs/digits/cache
softcache verify runs/digits/cache --config configs/digits.toml --rows 512
"""

import sys
from typing import Any

import click

from softcache.errors import missing_extra
from softcache.reader.cache import Cache
from softcache.reader.open import open_cache
from softcache.runtime.logging import progress_bar
from softcache.tools.verify.checksums import unmark_damaged, verify_units

from .options import CACHE, config_file_options, json_option, print_json

__all__ = ["verify"]


@click.command()
@click.argument("url", metavar="CACHE", type=CACHE)
@config_file_options(help="Also run this config's teacher again on some rows.")
@click.option("--rows", default=256, type=click.IntRange(1), help="Rows for the teacher.")
@click.option(
    "--threshold",
    default=1e-3,
    type=click.FloatRange(0),
    help="Largest KL(soft labels || rerun teacher) of a row, in nats.",
)
@json_option
@click.option(
    "--repair", is_flag=True, help="Unmark damaged units: the next `teacher-logits` makes them again."
)
@click.option("--seed", default=0, help="Seed of the choice of rows.")
def verify(
    url: str,
    config_path: str | None,
    overrides: tuple[str, ...],
    rows: int,
    threshold: float,
    seed: int,
    as_json: bool,
    repair: bool,
) -> None:
    """Check CACHE; exit with 1 and one line per fault if anything is wrong.

    \b
    Example:
      softcache verify runs/digits/cache --config configs/digits.toml
    """
    cache = open_cache(url)
    damaged: dict[str, tuple[Cache, list[int]]] = {}
    with progress_bar("verify", cache.num_units, "units") as advance:
        faults = list(
            verify_units(
                cache,
                advance,
                on_damaged=lambda part, unit: damaged.setdefault(part.url, (part, []))[1].append(unit),
            )
        )
    unmarked = sum(len(unmark_damaged(*found)) for found in damaged.values()) if repair else 0
    checked, num_rows = f"{cache.num_units} units", 0
    if config_path and not faults:
        num_rows = min(rows, len(cache) * cache.num_views)
        faults = _teacher_faults(cache, config_path, overrides, num_rows, threshold, seed)
        checked += f", {num_rows} rows against the teacher"
    for fault in faults:
        click.echo(f"FAULT {fault}", err=True)
    if as_json:
        units = cache.num_units
        found = {"cache": url, "units": units, "teacher_rows": num_rows, "faults": faults}
        print_json(found | ({"unmarked": unmarked} if repair else {}))
    else:
        click.echo(f"cache {url}: {checked}; {len(faults)} faults")
        if repair and unmarked:
            click.echo(
                f"{unmarked} damaged units unmarked; rerun `softcache teacher-logits`, which makes them again"
            )
    if faults:
        sys.exit(1)


def _teacher_faults(
    cache: Cache, config_path: str, overrides: tuple[str, ...], num_rows: int, threshold: float, seed: int
) -> list[str]:
    """Compares rows with a rerun of the teacher; imports torch here, so that checksums need none."""
    try:
        from softcache.config.load import load_config
        from softcache.runs import open_data, open_teacher
        from softcache.tools.verify.teacher import verify_against_teacher
    except ModuleNotFoundError as error:
        raise missing_extra(error, "softcache verify --config") from error
    config = load_config(config_path, overrides)
    data = open_data(config)
    teacher = open_teacher(config, data)
    how: dict[str, Any] = {"num_rows": num_rows, "threshold_nats": threshold, "seed": seed}
    with progress_bar("verify: teacher", num_rows, "rows") as advance:
        return list(verify_against_teacher(cache, data.train, teacher, progress=advance, **how))
