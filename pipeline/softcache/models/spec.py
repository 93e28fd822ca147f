"""Model specs: `FAMILY:NAME?ARGUMENTS` as a value."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from softcache.errors import SpecError

__all__ = ["ModelSpec", "parse_spec"]


@dataclass(frozen=True)
class ModelSpec:
    """A parsed spec: `family` is builtin, timm, torchvision or factory."""

    family: str
    name: str
    args: dict[str, Any] = field(default_factory=dict)


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def parse_spec(spec: str) -> ModelSpec:
    """Returns the parts of a model spec.

    Raises:
        SpecError: the spec is empty or has no model name.

    Examples:
        >>> parse_spec("timm:resnet18?drop_rate=0.1")
        ModelSpec(family='timm', name='resnet18', args={'drop_rate': 0.1})
        >>> parse_spec("mlp").family
        'builtin'
    """
    path, _, query = spec.partition("?")
    args = {key: _json_or_text(value) for key, value in parse_qsl(query, keep_blank_values=True)}
    family, colon, name = path.partition(":")
    if not colon:
        family, name = "builtin", path
    elif family not in ("timm", "torchvision"):
        family, name = "factory", path
    if not name or name.endswith(":"):
        raise SpecError(
            f"model spec {spec!r}: no model name; expected e.g. mlp, timm:resnet18, module:factory"
        )
    return ModelSpec(family, name, args)
