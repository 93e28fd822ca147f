"""One TOML file per run, with overrides, as a `RunConfig`.

    config = load_config("configs/digits.toml", ["loss.temperature=2", "student.model=cnn"])

An unknown, missing, mistyped or out-of-range key is refused by its dotted name, with what is allowed.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from softcache.config.overrides import parse_override
from softcache.config.run import RunConfig
from softcache.errors import ConfigError
from softcache.runtime.registry import Variant
from softcache.runtime.suggest import did_you_mean

__all__ = ["build_config", "load_config", "models_of"]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Returns the config of a TOML file with `a.b=v` overrides applied.

    An override's value is read as TOML (`3`, `0.5`, `true`, `["a", "b"]`), or else taken as a string.

    Raises:
        ConfigError: the file is missing or no TOML, or a key is unknown, missing, mistyped or out of range.
    """
    path = Path(path)
    try:
        tables = tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise ConfigError(
            f"config {path}: cannot be read: {error.strerror}; `softcache init` writes one, and `softcache init --list` "
            "shows what there is"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path}: not valid TOML: {error}") from error
    for override in overrides:
        _apply(tables, override)
    tables.setdefault("name", path.stem)
    return build_config(tables, str(path)).with_overrides(
        override.partition("=")[0] for override in overrides
    )


def build_config(tables: dict[str, Any], where: str) -> RunConfig:
    """Returns the config that tables describe; `where` is what errors call it.

    Raises:
        ConfigError: a key is unknown, missing, mistyped or out of range.
    """
    try:
        return RunConfig.model_validate(tables)
    except ValidationError as error:
        lines = "\n  ".join(_explain(problem) for problem in error.errors())
        raise ConfigError(f"config {where}:\n  {lines}") from error


def _apply(tables: dict[str, Any], override: str) -> None:
    parents, key, value = parse_override(override)
    for parent in parents:
        tables = tables.setdefault(parent, {})
        if not isinstance(tables, dict):
            raise ConfigError(f"--set {override!r}: {parent!r} is a value, not a table")
    tables[key] = value


def _explain(problem: Any) -> str:
    """Returns one readable line for one of pydantic's errors."""
    loc = problem["loc"]
    dotted = ".".join(map(str, loc))
    if problem["type"] == "extra_forbidden":
        known = _keys_of(loc[:-1])
        hint = did_you_mean(str(loc[-1]), known) or f"known keys: {', '.join(known)}"
        return f"{dotted}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{dotted}: missing; it has no default"
    if problem["type"] == "variant":  # of a table that is read by the variant that it names
        instead = f"--set '{'.'.join(map(str, loc[:-1]))}={{…}}' replaces the whole table"
        return f"{dotted}: {problem['msg']}; found {problem['input']!r}; leave it out ({instead})"
    if problem["type"] == "value_error":
        message = str(problem["ctx"]["error"])
        if not loc or message.startswith(f"{loc[0]}."):  # of several keys: the message names them
            return message
        found = "" if isinstance(problem["input"], dict) else f"; found {problem['input']!r}"
        return f"{dotted}: {message}{found}"
    line = f"{dotted}: {problem['msg'].lower()}; found {problem['input']!r}"
    choices = re.findall(r"'([^']*)'", problem.get("ctx", {}).get("expected", ""))
    if problem["type"] == "literal_error" and (hint := did_you_mean(str(problem["input"]), choices)):
        return f"{line}; {hint}"
    return line


def _keys_of(parents: Sequence[Any]) -> list[str]:
    """Returns the keys of the table at a path; of a table of variants, those that any of them reads."""
    models: list[type[BaseModel]] = [RunConfig]
    for parent in parents:
        fields = [model.model_fields[parent] for model in models if parent in model.model_fields]
        models = [found for field in fields for found in models_of(field)]
    return list(dict.fromkeys(key for model in models for key in model.model_fields))


def models_of(field: FieldInfo) -> list[type[BaseModel]]:
    """Returns the models of a field that is a table: of one that variants read, those of all variants."""
    parts = _parts_of(field.annotation)
    rules = [*field.metadata, *(rule for part in parts for rule in getattr(part, "__metadata__", ()))]
    for rule in rules:
        if isinstance(found := getattr(rule, "func", None), Variant):
            return list(found.models())
    return [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]


def _parts_of(annotation: Any) -> list[Any]:
    """Returns an annotation and all that it is made of."""
    return [annotation] + [part for inner in getattr(annotation, "__args__", ()) for part in _parts_of(inner)]
