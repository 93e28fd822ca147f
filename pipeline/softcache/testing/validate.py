"""Whether a cache of any writer is as docs/format.md specifies; schemas and vectors of that page."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from softcache.cache.schema import SCHEMAS
from softcache.reader.cache import Cache
from softcache.reader.open import open_cache
from softcache.tools.verify.checksums import verify_units

__all__ = ["schema", "validate", "vectors"]


def validate(cache: str | Path | Cache) -> list[str]:
    """Returns one line for every fault of a cache: units that are missing, and each invariant that is broken, by number.

    Every object is compared with its marker and every row is looked at; `softcache verify` does the same.

    Args:
        cache: a path, a URL, or an open cache.

    Raises:
        CacheNotFoundError: there is none.
        ManifestError: its manifest is malformed, of another version, or names a feature that is not known.

    Example:
        >>> validate("tests/golden/v1/zarr")
        []
    """
    return list(verify_units(cache if isinstance(cache, Cache) else open_cache(str(cache))))


def schema(name: str) -> dict[str, Any]:
    """Returns the JSON Schema of "manifest" or "marker", as it is published in docs/format."""
    return SCHEMAS[name]()


@cache
def vectors() -> dict[str, Any]:
    """Returns the test vectors of docs/format.md: fingerprints, packed records, tails between temperatures.

    None stands for -inf. A reader that gives other numbers is wrong.
    """
    found: dict[str, Any] = json.loads((files("softcache.testing") / "vectors.json").read_text("utf-8"))
    return found
