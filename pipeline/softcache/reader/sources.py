"""The source of a cache, opened and compared with what was labeled."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from softcache.cache.kinds import FOREIGN
from softcache.data.sources.base import SOURCES, SourceSettings, Split, open_source
from softcache.errors import AlignmentError, ConfigError, SourceError, SpecError

if TYPE_CHECKING:
    from softcache.reader.cache import Cache

__all__ = ["open_labeled_source"]


def open_labeled_source(
    cache: Cache, settings: SourceSettings | Mapping[str, Any] | str | os.PathLike[str] | None
) -> Any:
    """See `Cache.source`."""
    labeled = cache.manifest.identity["source"]
    name, _, split = str(labeled["name"]).rpartition("/")
    chosen: Split = "eval" if split == "eval" else "train"
    if settings is None:
        source = _open_by_name(cache, name, chosen)
    else:
        table = _table_of(Path(settings)) if isinstance(settings, str | os.PathLike) else settings
        source = open_source(table, split=chosen)
    if source.digest == labeled["digest"]:
        return source
    keys, found = cache.keys, source.keys()
    if len(keys) != len(found):
        difference = f"{len(keys):,} samples were labeled, the source has {len(found):,}"
    else:
        pairs = enumerate(zip_longest(keys, found))
        changed = next(((n, there, here) for n, (there, here) in pairs if there != here), None)
        if changed is None and str(labeled["digest"]).startswith(
            FOREIGN
        ):  # of another writer: keys are all that there is
            return source
        difference = "keys are the same, ground truth or contents are not"
        if changed is not None:
            difference = "sample {:,} was {!r} when labeled and is {!r} now".format(*changed)
    raise AlignmentError(
        f"cache {cache.url}: {difference}; give cache.source the [source] table of the config that made the cache, or the "
        "path of its file"
    )


def _open_by_name(cache: Cache, name: str, split: Split) -> Any:
    """Returns a built-in source that needs no more than its name.

    Raises:
        SpecError: there is no such source, or it needs more.
    """
    where = f"cache {cache.url}: its source is {name!r}"
    give = "give cache.source the [source] table of the config that made the cache, or the path of its file"
    known = {key.partition("/")[0] for key in SOURCES.names() if key.partition("/")[2] == name}
    if ":" in name or not known:
        raise SpecError(f"{where}, which is none of softcache's, and a cache names no code to run; {give}")
    found: Exception | None = None
    for modality in sorted(known):
        try:
            return open_source({"modality": modality, "name": name}, split=split)
        except (ValidationError, SourceError) as error:
            found = error
    raise SpecError(f"{where}, whose other settings a cache does not keep; {give}") from found


def _table_of(path: Path) -> Mapping[str, Any]:
    """Returns the [source] table of a config."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")).get("source")
    except (OSError, ValueError) as error:
        raise ConfigError(f"config {path}: cannot be read: {error}") from error
    if not isinstance(table, dict):
        raise ConfigError(f"config {path}: it has no [source] table; give the config that made the cache")
    return table
