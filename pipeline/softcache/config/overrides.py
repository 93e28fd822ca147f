"""What `--set TABLE.KEY=VALUE` means; it imports no torch, as `softcache init` needs none."""

from __future__ import annotations

import tomllib
from typing import Any

from softcache.errors import ConfigError

__all__ = ["parse_override"]


def parse_override(override: str) -> tuple[list[str], str, Any]:
    """Returns the tables, the key and the value of `a.b.key=value`.

    Raises:
        ConfigError: it is something else.
    """
    dotted, equals, text = override.partition("=")
    if not equals or not all(dotted.split(".")):
        raise ConfigError(f"--set {override!r}: expected table.key=value, e.g. --set loss.temperature=2")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, key = dotted.split(".")
    return parents, key, value
