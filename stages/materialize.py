"""Decode a cache into local memory maps, which read equally fast in any order.

softcache materialize runs/digits/cache
softcache materialize s3-copy/cache --limit 64GiB
softcache materialize --list
softcache materialize --clear
"""

from datetime import datetime
from typing import Any

import click
from pydantic import ByteSize, TypeAdapter, ValidationError

from softcache.errors import IncompleteCacheError, StorageError
from softcache.reader.memmap import MemmapFolder, MemmapSettings
from softcache.reader.open import open_cache
from softcache.runtime.logging import progress_bar

from .options import CACHE, LOCAL, json_option, print_json, print_table

__all__ = ["materialize"]


@click.command()
@click.argument("url", metavar="CACHE", type=CACHE, required=False)
@click.option(
    "--views", "num_views", type=click.IntRange(1), help="Number of views, from the first [default: all]."
)
@click.option(
    "--limit",
    default="8GiB",
    metavar="SIZE",
    help="Largest size of all files in the folder together.",
)
@click.option(
    "--folder",
    metavar="DIR",
    type=LOCAL,
    help="Folder of the files [default: $SOFTCACHE_MEMMAP_DIR, or ~/.cache/softcache/thaw].",
)
@json_option
@click.option("--list", "listing", is_flag=True, help="List the materialized views of this machine.")
@click.option("--clear", is_flag=True, help="Remove every materialized view that is not in use.")
def materialize(
    url: str | None,
    num_views: int | None,
    limit: str,
    folder: str | None,
    listing: bool,
    clear: bool,
    as_json: bool,
) -> None:
    """Decode CACHE once into a local memory map, which all students and loader processes of this machine share.

    train-student does so by itself if CACHE fits reader.memmap_limit_bytes. Existing views are only checked. At the
    limit, the least recently used views are removed, unless they are in use.

    \b
    Example:
      softcache materialize runs/digits/cache
    """
    if (url is None) != (listing or clear):
        raise click.UsageError("give either CACHE, or --list or --clear")
    place = MemmapFolder(folder)
    result: dict[str, Any] = {"folder": str(place.root)}
    if clear:
        result |= _clear(place, as_json)
    if listing:
        result |= _list(place, as_json)
    if url is not None:
        result |= _materialize(url, num_views, _bytes(limit), place, as_json)
    if as_json:
        print_json(result)


def _materialize(
    url: str, num_views: int | None, limit: int, place: MemmapFolder, as_json: bool
) -> dict[str, Any]:
    cache = open_cache(url, memmap=MemmapSettings(limit, str(place.root), required=True))
    views = range(min(num_views or cache.num_views, cache.num_views))
    plans = [cache.memmap_plan(view) for view in views]
    rows: list[dict[str, Any]] = []
    total = 0
    for view, plan in enumerate(plans):
        if plan is None:
            raise IncompleteCacheError(
                f"cache {url}: view {view} is not finished; rerun `softcache teacher-logits`, then materialize it"
            )
        total += plan.num_bytes
        size = {"rows": plan.num_rows, "num_bytes": plan.num_bytes}
        rows.append({"view": view, **size, "state": "found" if place.holds(plan) else "made"})
    if total > limit:
        raise StorageError(
            f"cache {url}: {len(rows)} views take {total:,} bytes as memory maps; the limit is {limit:,}; raise "
            "--limit, or materialize fewer --views"
        )
    with progress_bar("materialize", sum(plan.num_rows for plan in plans if plan), "rows") as advance:
        for view in views:
            cache.memmap(view, limit_bytes=limit, progress=advance)
    if not as_json:
        shown = [(row["view"], f"{row['rows']:,}", f"{row['num_bytes']:,}", row["state"]) for row in rows]
        print_table(f"{url}, materialized in {place.root}", ("view", "rows", "bytes", ""), shown)
    return {"cache": url, "views": rows}


def _list(place: MemmapFolder, as_json: bool) -> dict[str, Any]:
    entries = place.entries()
    rows = [
        (entry.about, f"{entry.num_bytes:,}", datetime.fromtimestamp(entry.used).isoformat(" ", "seconds"))
        for entry in reversed(entries)
    ]
    total = sum(entry.num_bytes for entry in entries)
    if not as_json:
        title = f"{len(rows)} views, {total:,} bytes in {place.root}"
        print_table(title, ("of", "bytes", "last used"), rows)
    listed = [
        {"of": entry.about, "num_bytes": entry.num_bytes, "used": entry.used} for entry in reversed(entries)
    ]
    return {"memmaps": listed, "num_bytes": total}


def _clear(place: MemmapFolder, as_json: bool) -> dict[str, Any]:
    entries = place.entries()
    gone = [entry for entry in entries if place.remove(entry)]
    kept = len(entries) - len(gone)
    num_bytes = sum(entry.num_bytes for entry in gone)
    if not as_json:
        result = f"{place.root}: removed {len(gone)} views, {num_bytes:,} bytes"
        click.echo(result + (f"; {kept} in use were kept" if kept else ""))
    return {"removed": len(gone), "removed_bytes": num_bytes, "kept_in_use": kept}


def _bytes(text: str) -> int:
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise click.BadParameter(
            f"{text!r}; expected a number of bytes, such as 64GiB", param_hint="--limit"
        ) from error
