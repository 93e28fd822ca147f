"""Plain columns of independent classes: `ids`, `logits`, `dropped_bound` and `dropped_mass` of a `BernoulliLabels`.

Logits are float16 by default, with a relative error of at most 2^-11; `values = "float32"` keeps them as they were computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from softcache.cache.codecs.base import CODECS, Codec, CodecSettings
from softcache.cache.codecs.column import Column, ids_dtype, refuse_wrong
from softcache.cache.codecs.precision import EXACT, HALF, Precision
from softcache.errors import LabelError
from softcache.labels import BernoulliLabels

__all__ = ["BernoulliCodec", "BernoulliSettings"]


class BernoulliSettings(CodecSettings):
    """`[capture.codec]` of the labels of independent classes.

    Attributes:
        values: dtype of the logits.
    """

    name: Literal["bernoulli"] = "bernoulli"
    values: Literal["float16", "float32"] = "float16"


@CODECS.register("bernoulli")
@dataclass(frozen=True)
class BernoulliCodec(Codec):
    """See the module docstring.

    Attributes:
        num_classes: V.
        k: kept classes.
        values: dtype of the logits.
    """

    num_classes: int
    k: int
    values: Literal["float16", "float32"] = "float16"

    name = "bernoulli"
    kinds = frozenset({"image"})
    captures_softmax = False
    settings = BernoulliSettings
    temperatures = ()
    stats = True
    max_temperature = None
    sampling = None

    @property
    def columns(self) -> tuple[Column, ...]:
        rank = (("rank", self.k),)
        return (
            Column("ids", ids_dtype(self.num_classes), rank),
            Column("logits", self.values, rank),
            Column("dropped_bound", "float32"),
            Column("dropped_mass", "float32"),
        )

    @property
    def precision(self) -> Precision:
        return Precision(log_probs=HALF if self.values == "float16" else EXACT)

    def encode(self, labels: BernoulliLabels) -> dict[str, np.ndarray]:
        """Returns the columns [P, ...] of a NumPy record.

        Finite logits outside of float16's range are kept at its end; -inf stays -inf.

        Raises:
            LabelError: the record does not fit the codec, or holds a number that none of it can be; its row is named.
        """
        if not isinstance(labels, BernoulliLabels) or labels.dropped_mass is None:
            raise LabelError(
                f"codec bernoulli: expected BernoulliLabels with dropped_mass; found {type(labels).__name__}; make a "
                "cache for each teacher"
            )
        if (labels.num_classes, labels.k) != (self.num_classes, self.k):
            raise LabelError(
                f"codec bernoulli: expected {self.k} of {self.num_classes} classes; found {labels.k} of "
                f"{labels.num_classes}; make a cache for each teacher"
            )
        logits = labels.logits
        if self.values == "float16":
            limit = np.finfo(np.float16).max
            logits = np.where(np.isfinite(logits), np.clip(logits, -limit, limit), logits)
        found = {"ids": labels.ids, "logits": logits}
        found |= {"dropped_bound": labels.dropped_bound, "dropped_mass": labels.dropped_mass}
        columns = {
            column.name: np.ascontiguousarray(found[column.name], column.dtype) for column in self.columns
        }
        self.validate(columns)
        return columns

    def decode(self, columns: Mapping[str, np.ndarray]) -> BernoulliLabels:
        """Returns the record of columns [P, ...]; nothing is copied or converted."""
        arrays: dict[str, Any] = {column.name: columns[column.name] for column in self.columns}
        return BernoulliLabels(**arrays, num_classes=self.num_classes)

    def validate(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Looks at every number of columns [P, ...].

        Raises:
            LabelError: a class that there is not, NaN, or an infinity where there can be none; the row is named.
        """
        checks = {
            "ids": (lambda x: (x < 0) | (x >= self.num_classes), f"0 to {self.num_classes - 1}"),
            "logits": (lambda x: np.isnan(x) | (x == np.inf), "numbers below +inf"),
            "dropped_bound": (lambda x: np.isnan(x) | (x == np.inf), "numbers below +inf"),
            "dropped_mass": (lambda x: ~(np.isfinite(x) & (x >= 0)), "finite numbers from 0 on"),
        }
        for name, (is_wrong, expected) in checks.items():
            refuse_wrong(name, arrays[name], is_wrong(arrays[name]), expected)

    def to_dict(self) -> dict[str, Any]:
        """Returns the codec's part of a manifest."""
        return {
            "name": self.name,
            "num_classes": self.num_classes,
            "k": self.k,
            "temperatures": [],  # there is no tail whose mass has any
            "values": self.values,
        }

    @classmethod
    def from_dict(cls, described: Mapping[str, Any]) -> BernoulliCodec:
        """Returns the codec that a manifest describes; raises ValueError, TypeError or KeyError for one that is none."""
        codec = cls(num_classes=described["num_classes"], k=described["k"], values=described["values"])
        counts = (codec.num_classes, codec.k)
        if not all(type(count) is int for count in counts) or not 1 <= codec.k <= codec.num_classes <= 2**31:
            raise ValueError("out of range")
        if codec.values not in ("float16", "float32") or codec.to_dict() != {
            **described,
            "temperatures": list(described["temperatures"]),
        }:
            raise ValueError("unknown parameters")
        return codec
