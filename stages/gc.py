"""Remove from a cache what no reader will ever look at: what the dead left behind.

softcache gc runs/digits/cache
softcache gc runs/digits/cache --delete
"""

from dataclasses import asdict

import click

from softcache.cache.storage.open import open_objects
from softcache.tools.garbage import collect_garbage

from .options import complete_cache, json_option, print_json

__all__ = ["gc"]

SHOWN = 20


@click.command()
@click.argument("url", metavar="CACHE", shell_complete=complete_cache)
@json_option
@click.option("--delete", is_flag=True, help="Remove what is stray; without it, only list it.")
def gc(url: str, delete: bool, as_json: bool) -> None:
    """List what no reader of CACHE will ever look at: files on their way whose writer died, and shards of units that
    were never finished. With --delete, remove it.

    Nothing that the manifest or a marker names is touched, nor a unit that a run holds, nor a file that softcache did not
    write. Claims that outlived their process end when they are looked at. Views thawed on this machine are elsewhere:
    `softcache materialize --clear`.

    \b
    Example:
      softcache gc runs/digits/cache --delete
    """
    report = collect_garbage(open_objects(url), delete=delete)
    if as_json:
        num_bytes = sum(report.stray.values())
        print_json({"cache": url, "deleted": delete, "num_bytes": num_bytes, **asdict(report)})
        return
    verb = "removed" if delete else "stray"
    _show(verb, [f"{path} ({size:,} bytes)" for path, size in sorted(report.stray.items())])
    _show("not ours, left alone:", report.foreign)
    summary = f"cache {url}: {verb} {len(report.stray)} objects, {sum(report.stray.values()):,} bytes"
    if report.stale_claims:
        summary += f"; {report.stale_claims} claims of dead runs ended"
    if report.held:
        summary += f"; {len(report.held)} units are being made by a run and were left alone"
    if report.foreign:
        summary += f"; {len(report.foreign)} files that softcache did not write"
    if report.stray and not delete:
        summary += "; remove the strays with --delete"
    click.echo(summary)


def _show(what: str, paths: list[str]) -> None:
    for path in paths[:SHOWN]:
        click.echo(f"{what} {path}")
    if len(paths) > SHOWN:
        click.echo(f"{what} … and {len(paths) - SHOWN:,} more")
