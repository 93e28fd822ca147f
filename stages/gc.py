"""Find and delete orphaned files of crashed runs in a cache.

softcache gc runs/digits/cache
softcache gc runs/digits/cache --delete
"""

import re
from dataclasses import asdict

import click

from softcache.cache.storage.open import open_objects
from softcache.runtime.display import format_duration
from softcache.tools.garbage import collect_garbage

from .options import CACHE, json_option, print_json

__all__ = ["gc"]

SHOWN = 20


@click.command()
@click.argument("url", metavar="CACHE", type=CACHE)
@json_option
@click.option("--delete", is_flag=True, help="Delete the orphaned files; without it, list them.")
@click.option(
    "--older-than",
    metavar="AGE",
    default="1h",
    callback=lambda context, option, value: _seconds(value),
    help="Keep what was written since, such as 90s, 30m, 2h or 1d; 0: leave it to locks alone.",
)
def gc(url: str, delete: bool, older_than: float, as_json: bool) -> None:
    """List the orphaned files in CACHE: staged files of crashed writers, and shards of units that were never finished.
    With --delete, delete them.

    Files that the manifest or a marker names, units that a run holds, files that are younger than --older-than, and files
    that softcache did not write are kept. Stale claims are released. Materialized views of this machine are elsewhere:
    `softcache materialize --clear`.

    \b
    Example:
      softcache gc runs/digits/cache --delete
    """
    report = collect_garbage(open_objects(url), delete=delete, older_than=older_than)
    if as_json:
        num_bytes = sum(report.stray.values())
        print_json({"cache": url, "deleted": delete, "num_bytes": num_bytes, **asdict(report)})
        return
    verb = "deleted" if delete else "orphaned"
    _show(verb, [f"{path} ({size:,} bytes)" for path, size in sorted(report.stray.items())])
    _show("not written by softcache, kept:", report.foreign)
    summary = f"cache {url}: {verb} {len(report.stray)} objects, {sum(report.stray.values()):,} bytes"
    if report.stale_claims:
        summary += f"; {report.stale_claims} stale claims released"
    if report.held:
        summary += f"; {len(report.held)} units of live runs, or of runs that ended less than "
        summary += f"{format_duration(older_than)} ago, kept"
    if report.unmarked:
        summary += (
            f"; {len(report.unmarked)} units that were made meanwhile are unfinished again: rerun its command"
        )
    if report.young:
        summary += (
            f"; {len(report.young)} files younger than {format_duration(older_than)} kept (--older-than)"
        )
    if report.foreign:
        summary += f"; {len(report.foreign)} files that softcache did not write kept"
    if report.stray and not delete:
        summary += "; delete them with --delete"
    click.echo(summary)


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if match is None:
        raise click.BadParameter(f"expected a number with s, m, h or d, such as 30m; found {text!r}")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def _show(what: str, paths: list[str]) -> None:
    for path in paths[:SHOWN]:
        click.echo(f"{what} {path}")
    if len(paths) > SHOWN:
        click.echo(f"{what} … and {len(paths) - SHOWN:,} more")
