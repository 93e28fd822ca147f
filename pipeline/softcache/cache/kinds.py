"""The kinds of labels that a cache may hold, and what the manifest of each must contain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softcache.cache.codecs import Codec
from softcache.labels import LabelKind

__all__ = ["FOREIGN", "check_kind"]

FOREIGN = "foreign:"
"""What the digest of another writer begins with, which softcache cannot derive."""

RAGGED: frozenset[LabelKind] = frozenset({"tokens", "cells"})
"""Kinds of which a sample may have several rows."""
IDENTITY_SCHEMA: dict[str, dict[str, Any]] = {
    "teacher": {"spec": str, "dtype": str},
    "source": {"name": str, "digest": str},
    "labels": {"policy": str, "k": int, "temperatures": list},
}
"""The fields of every identity; each kind has more."""
IDENTITY_SCHEMA_BY_KIND: dict[LabelKind, dict[str, dict[str, Any]]] = {
    "image": {"views": {"digest": str, "settings": dict}},
    "tokens": {"tokenizer": {"digest": str}, "attention": {"digest": str}},
    "cells": {
        "views": {"digest": str, "settings": dict},
        "grid": {"digest": str, "num_cells": int},
    },
}
CELL_TRUTHS = ("boxes", "masks")
"""Parts of the identity of cells, one of which names their ground truth."""


def check_kind(
    kind: LabelKind, *, codec: Codec, identity: Mapping[str, Mapping[str, Any]], has_rows: bool
) -> None:
    """Checks the parts of a manifest that depend on the kind of its labels.

    Raises:
        ValueError: the rows, the codec or the identity are not of this kind.
    """
    if (kind in RAGGED) != has_rows:
        raise ValueError("rows: caches of tokens and cells have them, caches of images do not")
    if kind not in codec.kinds:
        raise ValueError(f"codec {codec.name}: is not of labels of kind {kind}")
    schema = IDENTITY_SCHEMA | IDENTITY_SCHEMA_BY_KIND[kind]
    if kind == "cells":
        truth = CELL_TRUTHS["masks" in identity]
        schema = schema | {truth: {"digest": str, "settings": dict}}
    for part, fields in schema.items():
        for name, expected in fields.items():
            if not isinstance(identity.get(part, {}).get(name), expected):
                raise ValueError(f"identity.{part} must have {name}, a {expected.__name__}")
    if not all(isinstance(t, int | float) for t in identity["labels"]["temperatures"]):
        raise ValueError("identity.labels.temperatures must be numbers")
    num_cells = getattr(codec, "num_cells", None)
    if num_cells is not None and identity["grid"]["num_cells"] != num_cells:
        raise ValueError(f"identity.grid.num_cells differs from the codec's {num_cells}")
