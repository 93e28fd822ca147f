"""JSON Schema of manifest and markers, made from the models that readers check them by; published next to docs/format.md."""

from __future__ import annotations

from typing import Any

from softcache.cache.kinds import CELL_TRUTHS, IDENTITY_SCHEMA, IDENTITY_SCHEMA_BY_KIND
from softcache.cache.manifest import EXTENSION_NAME, FORMAT_VERSION, Manifest, UnitMarker

__all__ = ["SCHEMAS", "manifest_schema", "marker_schema"]

DRAFT = "https://json-schema.org/draft/2020-12/schema"
TYPES = {str: "string", int: "integer", list: "array", dict: "object"}

_COUNT = {"type": "integer", "minimum": 1, "maximum": 2**31}
_GRID = {"type": "array", "items": {"type": "number", "minimum": 1}, "maxItems": 64}
_VALUES = {"enum": ["float16", "float32"]}
_COMMON = {"num_classes": _COUNT, "k": _COUNT, "temperatures": _GRID}
_SAMPLING = {
    "type": "object",
    "properties": {
        "exact": {"type": "integer", "minimum": 0},
        "draws": {"type": "integer", "minimum": 1, "maximum": 65535},
        "exponent": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "replacement": {"type": "boolean"},
    },
    "required": ["exact", "draws", "exponent", "replacement"],
    "additionalProperties": False,
}
_SOFTMAX = _COMMON | {
    "temperatures": _GRID | {"minItems": 1, "prefixItems": [{"const": 1}]},
    "stats": {"const": False},
    "max_temperature": {"type": "number", "minimum": 1},
    "sampling": _SAMPLING,
}
_SHAPE = {"type": "array", "items": {"type": "integer", "minimum": 1}, "maxItems": 2}


def _codec(name: str, properties: dict[str, Any], *optional: str) -> dict[str, Any]:
    return {
        "properties": {"name": {"const": name}, **properties},
        "required": ["name", *(key for key in properties if key not in optional)],
        "additionalProperties": False,
    }


EXTENSIONS_SCHEMA = {"type": "object", "propertyNames": {"pattern": EXTENSION_NAME}}
_LEVEL = {"type": "integer", "minimum": 2, "maximum": 22}
_STATED = ("stats", "max_temperature", "sampling")
CODEC_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["name", "num_classes", "k", "temperatures"],
    "oneOf": [
        _codec("open", _SOFTMAX | {"values": _VALUES}, *_STATED),
        _codec(
            "packed",
            _SOFTMAX
            | {
                "step": {"type": "number", "minimum": 2**-14, "maximum": 8},
                "tail": {"enum": ["fixed", "steps", "float32"]},
                "level": _LEVEL,
            },
            *_STATED,
            "level",
        ),
        _codec(
            "packed",
            _SOFTMAX | {"values": {"const": "float16"}, "tail": {"const": "float32"}, "level": _LEVEL},
            *_STATED,
            "level",
        ),
        _codec("bernoulli", _COMMON | {"temperatures": {"const": []}, "values": _VALUES}),
        _codec(
            "cells",
            _COMMON
            | {
                "distribution": {"enum": ["bernoulli", "categorical"]},
                "num_cells": _COUNT,
                "columns": {
                    "type": "object",
                    "properties": {"boxes": {"const": [4]}, "bins": _SHAPE, "centerness": {"const": []}},
                    "additionalProperties": False,
                },
                "values": _VALUES,
            },
        ),
        _codec(
            "vectors",
            _COMMON
            | {
                "temperatures": {"const": []},
                "vectors": {
                    "type": "object",
                    "propertyNames": {"pattern": "^[a-z][a-z0-9_]{0,30}$"},
                    "additionalProperties": {
                        "type": "object",
                        "properties": {
                            "size": {"type": "integer", "minimum": 1, "maximum": 2**20},
                            "values": {"enum": ["float32", "bfloat16", "float8_e4m3", "int8"]},
                        },
                        "required": ["size", "values"],
                        "additionalProperties": False,
                    },
                    "minProperties": 1,
                    "maxProperties": 16,
                },
                "head": {
                    "type": "object",
                    "properties": {
                        "logit_scale": {"type": "number"},
                        "softcap": {"type": ["number", "null"], "exclusiveMinimum": 0},
                    },
                    "required": ["logit_scale", "softcap"],
                    "additionalProperties": False,
                },
            },
            "head",
        ),
        {"properties": {"name": {"pattern": ":"}}},  # package.module:Name of a codec that is a user's
    ],
}


def manifest_schema() -> dict[str, Any]:
    """Returns the schema of `manifest.json`. What no schema can express (sizes, sums, digests) is in docs/format.md."""
    schema = Manifest.model_json_schema()
    schema["properties"] |= {
        "codec": CODEC_SCHEMA,
        "identity": _identity(IDENTITY_SCHEMA),
        "extensions": EXTENSIONS_SCHEMA,
    }
    schema["allOf"] = [
        {
            "if": {"properties": {"kind": {"const": kind}}},
            "then": {
                "properties": {
                    "identity": _identity(parts) | _either(CELL_TRUTHS if kind == "cells" else ()),
                    **({} if kind == "image" else {"rows": {"type": "object"}}),
                },
                **({} if kind == "image" else {"required": ["rows"]}),
            },
        }
        for kind, parts in IDENTITY_SCHEMA_BY_KIND.items()
    ]
    return _published("manifest", schema, "format_version")


def marker_schema() -> dict[str, Any]:
    """Returns the schema of `units/NNNNN.json`."""
    schema = UnitMarker.model_json_schema()
    schema["properties"]["extensions"] = EXTENSIONS_SCHEMA
    return _published("marker", schema)


SCHEMAS = {"manifest": manifest_schema, "marker": marker_schema}


def _identity(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": {"type": "object"},
        "required": list(parts),
        "properties": {
            part: {
                "type": "object",
                "required": list(fields),
                "properties": {name: {"type": TYPES[kind]} for name, kind in fields.items()},
            }
            for part, fields in parts.items()
        },
    }


def _either(parts: tuple[str, ...]) -> dict[str, Any]:
    return {"anyOf": [{"required": [part]} for part in parts]} if parts else {}


def _published(name: str, schema: dict[str, Any], *required: str) -> dict[str, Any]:
    return {
        "$schema": DRAFT,
        "$id": f"https://softcache.invalid/format/{FORMAT_VERSION}/{name}.schema.json",
        **_plain(schema),
        "required": [*required, *schema["required"]],
    }


def _plain(value: Any) -> Any:
    """A schema without the docstrings of the code."""
    if isinstance(value, dict):
        return {
            key: _plain(item)
            for key, item in value.items()
            if key != "description" or not isinstance(item, str)
        }
    return [_plain(item) for item in value] if isinstance(value, list) else value
