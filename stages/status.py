"""Show the progress of a capture, from any machine that reaches the cache.

softcache status runs/digits/cache
softcache status runs/digits/cache --watch 10
"""

import time
from dataclasses import asdict

import click

from softcache.cache.storage.open import open_objects
from softcache.runtime.display import format_duration
from softcache.tools.status import Status, read_status

from .options import CACHE, json_option, print_json

__all__ = ["status"]


@click.command()
@click.argument("url", metavar="CACHE", type=CACHE)
@json_option
@click.option(
    "--watch",
    type=click.FloatRange(min=0.1),
    metavar="SECONDS",
    help="Repeat every so many seconds, until the cache is complete.",
)
def status(url: str, as_json: bool, watch: float | None) -> None:
    """Show the progress of a capture: units done, claimed and left, rows per second, time left.

    Reads names, times and a few markers from the store; the run may be on any machine, and is not disturbed.

    \b
    Example:
      softcache status runs/digits/cache --watch 10
    """
    objects = open_objects(url)
    while True:
        found = read_status(objects)
        if as_json:
            print_json(asdict(found))
        else:
            click.echo(_format(found))
        if watch is None or found.state == "complete":
            return
        time.sleep(watch)


def _format(found: Status) -> str:
    share = found.samples_done / found.samples_total
    units = f"{found.units_done:,} of {found.units_total:,} units done"
    claims = f"{found.units_claimed:,} claimed, {found.units_left:,} left"
    words = [f"cache {found.cache}: {found.state}; {units}, {claims} ({share:.1%} of the samples)"]
    if found.rows_per_second is not None:
        words.append(f"{found.rows_per_second:,.0f} rows/s")
    if found.state != "complete" and found.seconds_left is not None:
        words.append(f"{format_duration(found.seconds_left)} left")
    if found.quiet_seconds is not None:
        words.append(f"last unit {format_duration(found.quiet_seconds)} ago")
    return "; ".join(words)
