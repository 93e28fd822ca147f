"""The tables of text sources inside of another text source's table."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from softcache.data.sources.base import source_class
from softcache.data.sources.text.settings import TextSettings
from softcache.errors import SoftcacheError

__all__ = ["nested_source"]

INHERITED = ("modality", "tokenizer", "seq_len", "packing", "bos", "data_dir")
OUTER = set(TextSettings.model_fields) - {"name"}


def nested_source(
    outer: TextSettings, table: dict[str, Any], where: str, *, inherited: tuple[str, ...] = INHERITED
) -> TextSettings:
    """Returns the settings of a nested table, with the keys that all sources of the outer one share.

    Args:
        where: the table's dotted name.
        inherited: keys that it has of the outer one.

    Raises:
        ValueError: it has a key that is the outer one's, or is no table of a text source.
    """
    if given := sorted(OUTER & table.keys()):
        raise ValueError(f"{where}.{given[0]}: one for all sources; set source.{given[0]}")
    if not isinstance(name := table.get("name"), str):
        raise ValueError(f"{where}.name: missing; expected the name of a text source")
    try:
        chosen = source_class("text", name)
        part = chosen.model_validate({**{key: getattr(outer, key) for key in inherited}, **table})
    except ValidationError as error:
        listed = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"{where} ({name}): {listed}") from error
    except SoftcacheError as error:
        raise ValueError(f"{where}: {error}") from error
    if not isinstance(part, TextSettings):
        raise ValueError(f"{where}.name: {name!r} is no source of text; name one that is")
    return part
