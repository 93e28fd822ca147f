"""Plain columns that anybody can read.

`open` is lossless but for `log_probs`, which it keeps in float16 by default:
relative error at most 2^-11, so |error| <= 2^-11 * |log p| nats (0.002 at p = 0.02, 0.008 at p = 1e-7), and
2^-25 nats absolute close to p = 1. `values = "float32"` keeps them as they were computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from softcache.cache.codecs.column import (
    Column,
    checked_arrays,
    ids_dtype,
    optional_parameters,
    record_of,
    sampling_column,
)
from softcache.labels import STATS, Sampling, SoftLabels

__all__ = ["OpenCodec"]


@dataclass(frozen=True)
class OpenCodec:
    """Plain columns; see the module docstring for the error of `values`.

    Attributes:
        num_classes: V; ids are uint16 up to 65,535 classes (V itself marks an unused slot), else uint32.
        k: kept classes.
        temperatures: [G] the tail's grid.
        values: dtype of the log-probabilities.
        stats: whether there is a column of them; a record without one has `stats` None.
        max_temperature: the highest temperature at which the labels are known (`SoftLabels.max_temperature`).
        sampling: how classes were drawn (`SoftLabels.sampling`); adds the column `counts` or `log_threshold`.
    """

    num_classes: int
    k: int
    temperatures: tuple[float, ...]
    values: Literal["float16", "float32"] = "float16"
    stats: bool = True
    max_temperature: float | None = None
    sampling: Sampling | None = None

    name = "open"

    @property
    def columns(self) -> tuple[Column, ...]:
        rank = (("rank", self.k),)
        stats = (Column("stats", "float32", (("stat", len(STATS)),)),) if self.stats else ()
        return (
            Column("ids", ids_dtype(self.num_classes), rank),
            Column("log_probs", self.values, rank),
            Column("log_tail", "float32", (("temperature", len(self.temperatures)),)),
            Column("target_log_prob", "float32"),
            *stats,
            *sampling_column(self.sampling, self.k),
        )

    def encode(self, labels: SoftLabels) -> dict[str, np.ndarray]:
        """Returns the columns [P, ...] of a NumPy record with targets and, unless `stats` is off, statistics.

        Finite log-probabilities below float16's range are kept at its lowest finite value; -inf stays -inf.

        Raises:
            LabelError: the record does not fit the codec, or holds NaN.
        """
        arrays, columns = checked_arrays(self, labels), {}
        for column in self.columns:
            values = arrays[column.name]
            if column.dtype == "float16":
                lowest = np.finfo(np.float16).min
                values = np.where(np.isneginf(values), values, np.maximum(values, lowest))
            columns[column.name] = np.ascontiguousarray(values, column.dtype)
        return columns

    def unpack(self, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the arrays of a record by name: here, the columns as they are."""
        return dict(columns)

    def decode(self, columns: Mapping[str, np.ndarray]) -> SoftLabels:
        """Returns the record of columns [P, ...]; nothing is copied or converted."""
        return record_of(self, self.unpack(columns))

    def to_dict(self) -> dict[str, Any]:
        """Returns what a manifest says."""
        return {
            "name": self.name,
            "num_classes": self.num_classes,
            "k": self.k,
            "temperatures": list(self.temperatures),
            "values": self.values,
            **optional_parameters(self),
        }
