"""Plain columns of a detector's cells: the distribution's, which cell a row is of, and the head's outputs there.

The distribution's columns are those of its kind: of "bernoulli" `ids`, `logits`, `dropped_bound` and `dropped_mass`; of
"categorical" what `open` has but for `target_log_prob` (the ground truth of a cell is a matter of matching, which a loss
does). With them are `cells` and whatever the manifest names: `boxes`, `bins`, `centerness`. Logits and log-probabilities
are float16 by default, with the error that `softcache.cache.codecs.plain` states; `bins` are float16; the rest is float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from softcache.cache.codecs.base import CODECS, Codec, CodecSettings
from softcache.cache.codecs.column import Column, ids_dtype, refuse_wrong
from softcache.cache.codecs.plain import OpenCodec
from softcache.cache.codecs.precision import EXACT, HALF, Precision
from softcache.errors import LabelError
from softcache.labels import COLUMNS, STATS, BernoulliLabels, DetectionLabels, SoftLabels

__all__ = ["CellCodec", "CellSettings"]

Distribution = Literal["bernoulli", "categorical"]
BELOW_INFINITY = ("logits", "log_probs", "log_tail", "dropped_bound")
"""Columns that may hold -inf: an impossible class, or nothing that was dropped."""


class CellSettings(CodecSettings):
    """`[capture.codec]` of a detector's labels.

    Attributes:
        values: dtype of the logits, or log-probabilities.
    """

    name: Literal["cells"] = "cells"
    values: Literal["float16", "float32"] = "float16"


@CODECS.register("cells")
@dataclass(frozen=True)
class CellCodec(Codec):
    """See the module docstring.

    Attributes:
        num_classes: V; of a softmax with the background.
        k: kept classes.
        distribution: its kind.
        num_cells: A, the cells of the teacher's grid.
        head_columns: the other columns by name, sorted: (name, inner shape).
        temperatures: [G] the tail's grid of "categorical"; empty of "bernoulli", which has no tail.
        values: dtype of the logits, or log-probabilities.
    """

    num_classes: int
    k: int
    distribution: Distribution
    num_cells: int
    head_columns: tuple[tuple[str, tuple[int, ...]], ...] = ()
    temperatures: tuple[float, ...] = ()
    values: Literal["float16", "float32"] = "float16"

    name = "cells"
    kinds = frozenset({"cells"})
    captures_detections = True
    settings = CellSettings
    stats = True
    max_temperature = None
    sampling = None

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        rank = (("rank", self.k),)
        ids = Column("ids", ids_dtype(self.num_classes), rank)
        if self.distribution == "bernoulli":
            kept = (
                Column("logits", self.values, rank),
                Column("dropped_bound", "float32"),
                Column("dropped_mass", "float32"),
            )
        else:
            kept = (
                Column("log_probs", self.values, rank),
                Column("log_tail", "float32", (("temperature", len(self.temperatures)),)),
                Column("stats", "float32", (("stat", len(STATS)),)),
            )
        axes = {"boxes": ("side",), "bins": ("side", "bin"), "centerness": ()}
        head_columns = (
            Column(
                name, "float16" if name == "bins" else "float32", tuple(zip(axes[name], shape, strict=True))
            )
            for name, shape in self.head_columns
        )
        return (ids, *kept, Column("cells", "int32"), *head_columns)

    @property
    def precision(self) -> Precision:
        return Precision(log_probs=HALF if self.values == "float16" else EXACT)

    @cached_property
    def softmax(self) -> OpenCodec:
        """The codec of the distribution alone, of "categorical"."""
        return OpenCodec(self.num_classes, self.k, self.temperatures, values=self.values)

    def encode(self, labels: DetectionLabels) -> dict[str, np.ndarray]:
        """Returns the columns [P, ...] of a NumPy record.

        Finite numbers below float16's range are kept at its lowest finite value; -inf stays -inf.

        Raises:
            LabelError: the record does not fit the codec, or holds a number that none of it can be; its row is named.
        """
        kind = BernoulliLabels if self.distribution == "bernoulli" else SoftLabels
        if not isinstance(labels, DetectionLabels) or not isinstance(labels.labels, kind):
            found = type(labels.labels if isinstance(labels, DetectionLabels) else labels).__name__
            raise LabelError(
                f"codec cells: expected DetectionLabels of {kind.__name__}; found {found}; make a cache for "
                "each teacher"
            )
        found_columns = {"cells": labels.cells, **labels.columns}
        arrays = found_columns | {
            column.name: getattr(labels.labels, column.name)
            for column in self.columns
            if column.name not in ("cells", *COLUMNS)
        }
        expected = {column.name for column in self.columns}
        if set(arrays) != expected or any(array is None for array in arrays.values()):
            given = sorted(name for name, array in arrays.items() if array is not None)
            raise LabelError(
                f"codec cells: expected the columns {sorted(expected)}; found {given}; the teacher's head changed"
            )
        columns = {
            column.name: self._encoded(column, arrays[column.name], len(labels)) for column in self.columns
        }
        self.validate(columns)
        return columns

    @staticmethod
    def _encoded(column: Column, values: np.ndarray, num_rows: int) -> np.ndarray:
        if values.shape != (num_rows, *column.shape):
            raise LabelError(
                f"codec cells, column {column.name}: expected shape {(num_rows, *column.shape)}; found {values.shape}; "
                "the teacher's head changed"
            )
        if column.dtype == "float16":
            lowest, highest = np.finfo(np.float16).min, np.finfo(np.float16).max
            limited = np.minimum(np.maximum(values, lowest), highest)
            values = np.where(np.isfinite(values), limited, values)
        elif column.dtype.startswith("uint") and values.size and values.min() < 0:
            raise LabelError(f"codec cells, column {column.name}: a negative number; expected classes")
        return np.ascontiguousarray(values, column.dtype)

    def decode(self, columns: Mapping[str, np.ndarray]) -> DetectionLabels:
        """Returns the record of columns [P, ...]; nothing is copied or converted."""
        labels: SoftLabels | BernoulliLabels
        if self.distribution == "bernoulli":
            names = ("ids", "logits", "dropped_bound", "dropped_mass")
            arrays: dict[str, Any] = {name: columns[name] for name in names}
            labels = BernoulliLabels(**arrays, num_classes=self.num_classes)
        else:
            labels = SoftLabels(
                ids=columns["ids"],
                log_probs=columns["log_probs"],
                log_tail=columns["log_tail"],
                stats=columns["stats"],
                num_classes=self.num_classes,
                temperatures=self.temperatures,
            )
        return DetectionLabels(
            labels, columns["cells"], {name: columns[name] for name, _ in self.head_columns}
        )

    def validate(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Looks at every number of columns [P, ...].

        Raises:
            LabelError: a class or cell that there is not, NaN, or an infinity where there can be none; the row is named.
        """
        for column in self.columns:
            values = arrays[column.name]
            if column.name in ("ids", "cells"):
                most = self.num_classes if column.name == "ids" else self.num_cells
                wrong, expected = (values < 0) | (values >= most), f"0 to {most - 1}"
            elif column.name in BELOW_INFINITY:
                wrong, expected = np.isnan(values) | (values == np.inf), "numbers below +inf"
            else:
                wrong, expected = ~np.isfinite(values), "finite numbers"
            refuse_wrong(column.name, values, wrong, expected)

    def to_dict(self) -> dict[str, Any]:
        """Returns the codec's part of a manifest."""
        return {
            "name": self.name,
            "num_classes": self.num_classes,
            "k": self.k,
            "distribution": self.distribution,
            "num_cells": self.num_cells,
            "columns": {name: list(shape) for name, shape in self.head_columns},
            "temperatures": list(self.temperatures),
            "values": self.values,
        }

    @classmethod
    def from_dict(cls, described: Mapping[str, Any]) -> CellCodec:
        """Returns the codec that a manifest describes; raises ValueError, TypeError or KeyError for one that is none."""
        codec = cls(
            num_classes=described["num_classes"],
            k=described["k"],
            distribution=described["distribution"],
            num_cells=described["num_cells"],
            head_columns=tuple(sorted((name, tuple(shape)) for name, shape in described["columns"].items())),
            temperatures=tuple(described["temperatures"]),
            values=described["values"],
        )
        codec._check_parameters()
        if codec.to_dict() != {**described, "temperatures": list(codec.temperatures)}:
            raise ValueError("unknown parameters")
        return codec

    def _check_parameters(self) -> None:
        grid, names = self.temperatures, {name for name, _ in self.head_columns}
        shapes = {"boxes": lambda s: s == (4,), "centerness": lambda s: s == ()}
        shapes["bins"] = lambda s: len(s) == 2 and s[0] == 4 and 2 <= s[1] <= 1024
        counts = (
            self.num_classes,
            self.k,
            self.num_cells,
            *(n for _, shape in self.head_columns for n in shape),
        )
        sound = (
            all(type(count) is int for count in counts)
            and all(type(t) is float for t in grid)
            and 1 <= self.k <= self.num_classes <= 2**31
            and 1 <= self.num_cells < 2**31
            and self.distribution in ("bernoulli", "categorical")
            and self.values in ("float16", "float32")
            and names <= set(COLUMNS)
            and not {"boxes", "bins"} <= names
            and all(shapes[name](shape) for name, shape in self.head_columns)
            and (len(grid) == 0) == (self.distribution == "bernoulli")
            and len(grid) <= 64
            and (not grid or grid[0] == 1.0)
            and all(a < b < float("inf") for a, b in pairwise(grid))
        )
        if not sound:
            raise ValueError("out of range")
