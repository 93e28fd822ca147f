"""The page of every config key: its table, type, default, and what the docstring of its settings has on it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from softcache.config.run import RunConfig
from softcache.data.sources.base import SourceTable
from softcache.runtime.registry import Variant
from softcache.settings import Settings

__all__ = ["ConfigTable", "config_tables", "key_description", "keys_page"]

INTRODUCTION = """# All config keys

Every table and key of a config file (TOML). Unknown keys, wrong types and numbers out of range are errors. A key whose
default is *none* is left out to have none. `--set TABLE.KEY=VALUE` overrides a key for one command.
"""
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


class ConfigTable(NamedTuple):
    """A table of a config: its dotted name, the settings that all of its variants have, and the variants."""

    name: str
    model: type[BaseModel]
    variants: dict[type[BaseModel], str]
    """Each with the key and the value that choose it."""


def config_tables() -> list[ConfigTable]:
    """Returns the tables of a config in the order of a run's, the top level first; each once."""
    found: dict[str, ConfigTable] = {}

    def visit(name: str, model: type[BaseModel], variants: dict[type[BaseModel], str]) -> None:
        if name in found:
            return
        found[name] = ConfigTable(name, model, variants)
        for kind in (model, *variants):
            for key, field in kind.model_fields.items():
                for inner in _settings_of(field.annotation)[:1]:
                    chosen = _variants(field.annotation, field.metadata)
                    visit(f"{name}.{key}".lstrip("."), inner, chosen)

    visit("", RunConfig, {})
    return list(found.values())


def _variants(annotation: Any, metadata: Iterable[Any]) -> dict[type[BaseModel], str]:
    """Returns the settings of what a table may name, such as those of the sources."""
    found: dict[type[BaseModel], str] = {}
    for variant in (rule.func for rule in metadata if isinstance(getattr(rule, "func", None), Variant)):
        names: dict[type[BaseModel], list[str]] = {}
        for name, chosen in [] if isinstance(variant, SourceTable) else variant.registry.items():
            names.setdefault(variant.settings_of(chosen), []).append(f'{variant.key} = "{name}"')
        found |= {model: ", or ".join(those) for model, those in names.items()}
        if isinstance(variant, SourceTable):
            found |= {model: _source_title(model) for model in variant.models()}
    for part in get_args(annotation):
        found |= _variants(part, getattr(part, "__metadata__", ()))
    return found


def _source_title(model: type[BaseModel]) -> str:
    given = []
    for key in ("modality", "name"):
        field = model.model_fields[key]
        values = get_args(field.annotation) if get_origin(field.annotation) is Literal else (field.default,)
        known = [f'"{value}"' for value in values if isinstance(value, str)]
        given.append(f"{key} = {' or '.join(known)}" if known else f"{key} = package.module:Name")
    return ", ".join(given)


def _settings_of(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    return [kind for part in get_args(annotation) for kind in _settings_of(part)]


def key_description(model: type[BaseModel], key: str) -> str:
    """Returns what the docstrings of a settings class and of its bases have on a key; empty if none mentions it."""
    if described := model.model_fields[key].description:
        return described
    for kind in model.__mro__:
        text = inspect.cleandoc(kind.__dict__.get("__doc__") or "")
        attributes = re.search(rf"^    (?:\w+, )*{key}(?:, \w+)*: (.+(?:\n {{8,}}.+)*)", text, re.MULTILINE)
        sentences = re.split(r"(?<=\.)\s+(?=[A-Z`])|\n\n", text.partition("\n\nAttributes:")[0])
        found = (
            [attributes[1]]
            if attributes
            else [one for one in sentences if re.search(rf"`{key}\b[^`]*`", one)]
        )
        if found:
            return " ".join(" ".join(found).split())
    return ""


def keys_page() -> str:
    """Returns the page, Markdown: a section for each table, and in it one for each variant that adds keys."""
    parts = [INTRODUCTION]
    for name, model, variants in config_tables():
        first = len(parts)
        parts += [f"## {f'[{name}]' if name else 'Top level'}\n", f"{_first_paragraph(model)}\n"]
        parts.append(_rows(model, list(model.model_fields)))
        for variant, title in variants.items():
            added = [key for key in variant.model_fields if key not in model.model_fields]
            if added and f"### `{title}`\n" not in parts[first:]:
                parts += [
                    f"### `{title}`\n",
                    f"{_first_paragraph(variant)}\n",
                    _rows(variant, added),
                ]
    return "\n".join(parts)


def _first_paragraph(model: type[BaseModel]) -> str:
    return " ".join(inspect.cleandoc(model.__doc__ or "").split("\n\n")[0].split())


def _rows(model: type[BaseModel], keys: list[str]) -> str:
    schema = model.model_json_schema()["properties"]
    lines = ["| key | type | default | what it is |", "|---|---|---|---|"]
    for key in keys:
        field = model.model_fields[key]
        cells = (f"`{key}`", _type(schema[key], field), _default(field), key_description(model, key))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)  # type: ignore[call-arg]
    if value is PydanticUndefined:
        return "*required*"
    if value is None:
        return "none"
    if isinstance(value, BaseModel):
        return "its defaults"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def _type(schema: dict[str, Any], field: FieldInfo) -> str:
    if _settings_of(field.annotation):
        return "table"
    if kinds := schema.get("anyOf"):
        return " or ".join(dict.fromkeys(_type(kind, field) for kind in kinds if kind.get("type") != "null"))
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}), field)}"
    bounds = " and ".join(f"{sign} {schema[name]:g}" for name, sign in _BOUNDS.items() if name in schema)
    return f"{schema.get('type', 'any')} {bounds}".strip()
