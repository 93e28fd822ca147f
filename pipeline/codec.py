"""The label record as named, typed columns, and back.

A codec names itself and its parameters in the manifest, so a reader needs no configuration. `open` is plain
columns that anybody can read. It is lossless but for `log_probs`, which it keeps in float16 by default:
relative error at most 2^-11, so |error| <= 2^-11 * |log p| nats (0.002 at p = 0.02, 0.008 at p = 1e-7), and
2^-25 nats absolute close to p = 1. `values = "float32"` keeps them as they were computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from pipeline.errors import LabelError, ManifestError
from pipeline.labels import STATS, SoftLabels

__all__ = ["Column", "OpenCodec", "codec_from_dict"]


@dataclass(frozen=True)
class Column:
    """One array of a cache, beyond its (view, sample) axes.

    Attributes:
        name: of the column.
        dtype: NumPy's name.
        dims: (name, size) of the inner axes.
        per_sample: one value for a sample, however many rows it has.
    """

    name: str
    dtype: str
    dims: tuple[tuple[str, int], ...] = ()
    per_sample: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(size for _, size in self.dims)


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
    """

    num_classes: int
    k: int
    temperatures: tuple[float, ...]
    values: Literal["float16", "float32"] = "float16"
    stats: bool = True
    max_temperature: float | None = None

    name = "open"

    @property
    def columns(self) -> tuple[Column, ...]:
        rank = (("rank", self.k),)
        stats = (Column("stats", "float32", (("stat", len(STATS)),)),) if self.stats else ()
        return (
            Column("ids", "uint16" if self.num_classes <= 65535 else "uint32", rank),
            Column("log_probs", self.values, rank),
            Column("log_tail", "float32", (("temperature", len(self.temperatures)),)),
            Column("target_log_prob", "float32"),
            *stats,
        )

    def encode(self, labels: SoftLabels) -> dict[str, np.ndarray]:
        """Returns the columns [P, ...] of a NumPy record with targets and, unless `stats` is off, statistics.

        Finite log-probabilities below float16's range are kept at its lowest finite value; -inf stays -inf.

        Raises:
            LabelError: the record does not fit the codec, or holds NaN.
        """
        if labels.target_log_prob is None or (self.stats and labels.stats is None):
            raise LabelError(
                "codec open: the record has no target_log_prob or no stats; pass targets to sparsify"
            )
        columns = {}
        for column in self.columns:
            values = np.asarray(getattr(labels, column.name))
            if values.shape != (len(labels), *column.shape):
                raise LabelError(
                    f"codec open, column {column.name}: expected shape {(len(labels), *column.shape)}; found {values.shape}"
                )
            if values.dtype.kind == "f" and np.isnan(values).any():
                row = int(np.argwhere(np.isnan(values))[0][0])
                raise LabelError(
                    f"codec open, column {column.name}: NaN in row {row}; expected numbers", position=row
                )
            if column.dtype == "float16":
                lowest = np.finfo(np.float16).min
                values = np.where(np.isneginf(values), values, np.maximum(values, lowest))
            columns[column.name] = np.ascontiguousarray(values, column.dtype)
        return columns

    def decode(self, columns: Mapping[str, np.ndarray]) -> SoftLabels:
        """Returns the record of columns [P, ...]; nothing is copied or converted."""
        return SoftLabels(
            **{column.name: columns[column.name] for column in self.columns},
            num_classes=self.num_classes,
            temperatures=self.temperatures,
            max_temperature=self.max_temperature,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns what a manifest says; `stats` and `max_temperature` only where they are not the default, so that
        manifests stay, byte for byte, what they were before there were these two."""
        described: dict[str, Any] = {
            "name": self.name,
            "num_classes": self.num_classes,
            "k": self.k,
            "temperatures": list(self.temperatures),
            "values": self.values,
        }
        if not self.stats:
            described["stats"] = False
        if self.max_temperature is not None:
            described["max_temperature"] = self.max_temperature
        return described


def codec_from_dict(described: Mapping[str, Any]) -> OpenCodec:
    """Returns the codec that a manifest describes.

    Raises:
        ManifestError: unknown name, or parameters out of range.
    """
    parameters = dict(described)
    name = parameters.pop("name", None)
    if name != OpenCodec.name:
        raise ManifestError(f"codec.name {name!r}: unknown; this version reads: open; upgrade softcache")
    highest = parameters.pop("max_temperature", None)
    try:
        codec = OpenCodec(
            num_classes=int(parameters.pop("num_classes")),
            k=int(parameters.pop("k")),
            temperatures=tuple(float(t) for t in parameters.pop("temperatures")),
            values=parameters.pop("values"),
            stats=parameters.pop("stats", True),
            max_temperature=None if highest is None else float(highest),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ManifestError(f"codec open: bad parameters: {error!r}") from error
    grid = codec.temperatures
    sound = (
        1 <= codec.k <= codec.num_classes <= 2**31
        and codec.values in ("float16", "float32")
        and 1 <= len(grid) <= 64
        and grid[0] == 1.0
        and all(a < b < float("inf") for a, b in pairwise(grid))
        and isinstance(codec.stats, bool)
        and (codec.max_temperature is None or grid[-1] <= codec.max_temperature < float("inf"))
    )
    if not sound or parameters:
        raise ManifestError(f"codec open: parameters out of range or unknown: {dict(described)}")
    return codec
