"""Plain columns that any Zarr or Parquet reader can read.

`open` is lossless but for `log_probs`, which it keeps in float16 by default:
relative error at most 2^-11, so |error| <= 2^-11 * |log p| nats (0.002 at p = 0.02, 0.008 at p = 1e-7), and
2^-25 nats absolute close to p = 1. `values = "float32"` keeps them as they were computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from softcache.cache.codecs.base import CODECS, CodecSettings
from softcache.cache.codecs.column import Column, ids_dtype, sampling_column
from softcache.cache.codecs.precision import EXACT, HALF, Precision
from softcache.cache.codecs.soft_labels import SoftLabelCodec
from softcache.errors import LabelError
from softcache.labels import STATS, SoftLabels

__all__ = ["OpenCodec", "OpenSettings"]


class OpenSettings(CodecSettings):
    """`[capture.codec]` of plain columns.

    Attributes:
        values: dtype of the log-probabilities.
    """

    name: Literal["open"] = "open"
    values: Literal["float16", "float32"] = "float16"


@CODECS.register("open")
@dataclass(frozen=True)
class OpenCodec(SoftLabelCodec):
    """Plain columns; see the module docstring for the error of `values`.

    ids are uint16 up to 65,535 classes (V itself marks an unused slot), else uint32; `sampling` adds the column `counts` or
    `log_threshold`.

    Attributes:
        values: dtype of the log-probabilities.

    Raises:
        LabelError: another dtype.
    """

    values: Literal["float16", "float32"] = "float16"

    name = "open"
    captures_detections = True
    settings = OpenSettings

    def __post_init__(self) -> None:
        if self.values not in ("float16", "float32"):
            raise LabelError(f"codec open, values: expected float16 or float32; found {self.values!r}")

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

    @property
    def precision(self) -> Precision:
        return Precision(log_probs=HALF if self.values == "float16" else EXACT)

    def encode(self, labels: SoftLabels) -> dict[str, np.ndarray]:
        """Returns the columns [P, ...] of a NumPy record with targets and, unless `stats` is off, statistics.

        Finite log-probabilities below float16's range are kept at its lowest finite value; -inf stays -inf.

        Raises:
            LabelError: the record does not fit the codec, or holds NaN.
        """
        arrays, columns = self.arrays_of(labels), {}
        for column in self.columns:
            values = arrays[column.name]
            if column.dtype == "float16":
                lowest = np.finfo(np.float16).min
                values = np.where(np.isneginf(values), values, np.maximum(values, lowest))
            columns[column.name] = np.ascontiguousarray(values, column.dtype)
        return columns
