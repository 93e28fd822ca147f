"""Columns of vectors: a `VectorLabels`, whose numbers are stored as they are encoded.

A vector of width D is one column of its name with the inner axis (NAME_component: D); encodings with a scale per row have
`NAME_scale` with it. `hidden` is the vector that the head of the cache, an object that all rows share, takes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from softcache.cache.codecs.base import CODECS, Codec
from softcache.cache.codecs.column import Column, refuse_wrong
from softcache.errors import LabelError
from softcache.labels.vectors import ENCODINGS, VectorLabels, scale_name

__all__ = ["HeadFacts", "Vector", "VectorCodec", "vector_faults"]

MAX_WIDTH = 2**20
NAME = re.compile(r"[a-z][a-z0-9_]{0,30}")
RESERVED = frozenset({"fingerprint", "num_rows", "position", "sample", "temperature", "view"})


@dataclass(frozen=True)
class Vector:
    """A vector column.

    Attributes:
        size: D.
        values: its encoding.
    """

    size: int
    values: str


@dataclass(frozen=True)
class HeadFacts:
    """How the head makes logits of the vector `hidden`, besides its tensors.

    Attributes:
        logit_scale: factor on its output.
        softcap: c of c tanh(x / c) on the scaled output, or None.
    """

    logit_scale: float = 1.0
    softcap: float | None = None


@CODECS.register("vectors")
@dataclass(frozen=True)
class VectorCodec(Codec):
    """See the module docstring.

    Attributes:
        num_classes: V of the head; 1 where there is none.
        vectors: pairs of name and column.
        head: of the vector `hidden`, or None.
    """

    num_classes: int
    vectors: tuple[tuple[str, Vector], ...]
    head: HeadFacts | None = None

    name = "vectors"
    kinds = frozenset({"image", "tokens"})
    captures_softmax = False
    temperatures = ()
    stats = False
    max_temperature = None
    sampling = None

    @property
    def k(self) -> int:  # type: ignore[override]
        """V: of every class the probability is known."""
        return self.num_classes

    @property
    def shared(self) -> tuple[str, ...]:  # type: ignore[override]
        return () if self.head is None else ("head",)

    @property
    def features(self) -> tuple[str, ...]:
        return ("vectors",)

    @property
    def columns(self) -> tuple[Column, ...]:
        out = []
        for name, vector in self.vectors:
            dtype, largest = ENCODINGS[vector.values]
            out.append(Column(name, dtype, ((f"{name}_component", vector.size),), is_vector=True))
            if largest is not None:
                out.append(Column(scale_name(name), "float32"))
        return tuple(out)

    def encode(self, labels: VectorLabels) -> dict[str, np.ndarray]:
        """Returns the columns [P, ...] of a NumPy record.

        Raises:
            LabelError: the record does not fit the codec, or holds what is no finite number; its row is named.
        """
        expected = {name: vector.values for name, vector in self.vectors}
        if not isinstance(labels, VectorLabels) or dict(labels.encodings) != expected:
            raise LabelError(
                f"codec vectors: expected VectorLabels with {expected}; found {type(labels).__name__} with "
                f"{dict(getattr(labels, 'encodings', {}))}; make a cache for each label policy"
            )
        columns = {}
        for column in self.columns:
            columns[column.name] = np.ascontiguousarray(labels.arrays[column.name])
            if columns[column.name].shape[1:] != column.shape:
                raise LabelError(
                    f"codec vectors, column {column.name}: expected vectors of {column.shape} numbers; found "
                    f"{columns[column.name].shape[1:]}; make a cache for each teacher"
                )
        self.validate(columns)
        return columns

    def decode(self, columns: Mapping[str, np.ndarray]) -> VectorLabels:
        """Returns the record of columns [P, ...], without its head; nothing is copied or converted."""
        return VectorLabels(
            {column.name: columns[column.name] for column in self.columns},
            {name: vector.values for name, vector in self.vectors},
            self.num_classes,
        )

    def validate(self, arrays: Mapping[str, np.ndarray]) -> None:
        for name, wrong, expected in vector_faults(self, arrays):
            refuse_wrong(name, arrays[name], wrong, expected)

    def to_dict(self) -> dict[str, Any]:
        """Returns the codec's part of a manifest."""
        described = {
            "name": self.name,
            "num_classes": self.num_classes,
            "k": self.k,
            "temperatures": [],
            "vectors": {name: {"size": v.size, "values": v.values} for name, v in self.vectors},
        }
        if self.head is not None:
            described["head"] = {"logit_scale": self.head.logit_scale, "softcap": self.head.softcap}
        return described

    @classmethod
    def from_dict(cls, described: Mapping[str, Any]) -> VectorCodec:
        """Returns the codec that a manifest describes; raises ValueError, TypeError or KeyError for one that is none."""
        head = described.get("head")
        codec = cls(
            num_classes=described["num_classes"],
            vectors=tuple(sorted((name, Vector(**vector)) for name, vector in described["vectors"].items())),
            head=None if head is None else HeadFacts(**head),
        )
        names = {column.name for column in codec.columns}
        widths = [vector.size for _, vector in codec.vectors]
        numbers = [] if codec.head is None else [codec.head.logit_scale, codec.head.softcap or 1.0]
        if not (
            type(codec.num_classes) is int
            and 1 <= codec.num_classes <= 2**31
            and 1 <= len(widths) <= 16
            and all(type(width) is int and 1 <= width <= MAX_WIDTH for width in widths)
            and all(NAME.fullmatch(name) for name, _ in codec.vectors)
            and len(names) == len(codec.columns)
            and not names & RESERVED
            and all(type(number) is float and np.isfinite(number) for number in numbers)
            and (codec.head is None or "hidden" in names)
            and (codec.head is None or codec.head.softcap is None or codec.head.softcap > 0)
        ):
            raise ValueError("out of range")
        if codec.to_dict() != {**described, "temperatures": list(described["temperatures"])}:
            raise ValueError("unknown parameters")
        return codec


def vector_faults(codec: VectorCodec, arrays: Mapping[str, np.ndarray]) -> list[tuple[str, np.ndarray, str]]:
    """Returns column, where it is wrong (bool, of the column's shape), and what is expected, of each column at fault."""
    faults = []
    for name, vector in codec.vectors:
        values = arrays[name]
        wrong = {
            "float32": lambda x: ~np.isfinite(x),
            "bfloat16": lambda x: (x & 0x7F80) == 0x7F80,
            "float8_e4m3": lambda x: (x & 0x7F) == 0x7F,
            "int8": lambda x: x == -128,
        }[vector.values](values)
        found = [(name, wrong, f"a finite number of {vector.values}")]
        if ENCODINGS[vector.values].largest is not None:
            scales = arrays[scale_name(name)]
            found.append((scale_name(name), ~(np.isfinite(scales) & (scales > 0)), "a finite number above 0"))
        faults += [fault for fault in found if fault[1].any()]
    return faults
