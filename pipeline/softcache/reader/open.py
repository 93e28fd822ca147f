"""A cache, or several as one, opened for reading by its place."""

from __future__ import annotations

import os
from collections.abc import Sequence

from softcache.reader.cache import DEFAULT_WINDOW_BLOCKS, Cache
from softcache.reader.memmap import MemmapSettings
from softcache.reader.parts import CacheParts, expand_parts, is_pattern

__all__ = ["open_cache"]


def open_cache(
    url: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    window_blocks: int = DEFAULT_WINDOW_BLOCKS,
    verify: bool = True,
    memmap: MemmapSettings | None = None,
    several_teachers: bool = False,
) -> Cache:
    """Returns the cache at a path or URL, its manifest validated; of several places, all of them as one.

    Args:
        url: a place, a list of places, or a pattern of local folders (`runs/lm/part-*`), which are taken in the order of
            the numbers in their names. A list and a pattern give a `CacheParts`, also of one place: its source is the
            parts' sources, one after the other.
        window_blocks: decoded blocks that are kept, of each part that is in use; the shuffle's window should fit.
        verify: compare each unit with its marker's sha256 before its first row is trusted.
        memmap: decode a view into a local memory map when it is first read, if the cache fits and the view is finished,
            or use the existing one; None reads the cache's own chunks.
        several_teachers: parts may be of different teachers, each the one of its own samples.

    Raises:
        CacheNotFoundError: there is no manifest there, or no part.
        ManifestError: the manifest is malformed or of another format version.
        IdentityError: the parts do not go together.
    """

    def open_one(place: str | os.PathLike[str]) -> Cache:
        return Cache(os.fspath(place), window_blocks=window_blocks, verify=verify, memmap=memmap)

    if isinstance(url, str | os.PathLike):
        if not is_pattern(place := os.fspath(url)) or os.path.exists(place):
            return open_one(url)
        url = expand_parts(place)
    return CacheParts([open_one(place) for place in url], several_teachers=several_teachers)
