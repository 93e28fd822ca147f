"""What a column is, and what every codec checks before it encodes a record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from softcache.errors import LabelError
from softcache.labels import ARRAYS, STATS, Sampling, SoftLabels

__all__ = ["Column", "checked_arrays", "ids_dtype", "optional_parameters", "record_of", "sampling_column"]


@dataclass(frozen=True)
class Column:
    """One array of a cache, beyond its (view, sample) axes.

    Attributes:
        name: of the column.
        dtype: NumPy's name.
        dims: (name, size) of the inner axes.
        per_sample: one value for a sample, however many rows it has.
        planar: bytes of a record; a store keeps equal places of neighbouring rows together, where they compress.
    """

    name: str
    dtype: str
    dims: tuple[tuple[str, int], ...] = ()
    per_sample: bool = False
    planar: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(size for _, size in self.dims)


def ids_dtype(num_classes: int) -> str:
    """The smallest that holds V, the mark of an unused slot, as well as every class."""
    return "uint16" if num_classes <= 65535 else "uint32"


def sampling_column(sampling: Sampling | None, k: int) -> tuple[Column, ...]:
    """What a record of drawn classes has beside the columns of every record."""
    if sampling is None:
        return ()
    if not sampling.replacement:
        return (Column("log_threshold", "float32"),)
    return (Column("counts", "uint8" if sampling.draws <= 255 else "uint16", (("rank", k),)),)


def optional_parameters(codec: Any) -> dict[str, Any]:
    """What a manifest says of `stats`, `max_temperature` and `sampling`: only what is not the default, so that
    manifests stay, byte for byte, what they were before there were these."""
    described: dict[str, Any] = {}
    if not codec.stats:
        described["stats"] = False
    if codec.max_temperature is not None:
        described["max_temperature"] = codec.max_temperature
    if codec.sampling is not None:
        described["sampling"] = asdict(codec.sampling)
    return described


def checked_arrays(codec: Any, labels: SoftLabels) -> dict[str, np.ndarray]:
    """Returns what a codec keeps of a record, by name, as NumPy arrays of the record's own dtypes.

    Raises:
        LabelError: the record lacks something, has another shape or sampling, or a number that none of it can be:
            NaN, +inf, an id outside of 0 to V, more draws than were made. The first such row is named.
    """
    where = f"codec {codec.name}"
    if labels.target_log_prob is None or (codec.stats and labels.stats is None):
        raise LabelError(f"{where}: the record has no target_log_prob or no stats; pass targets to sparsify")
    if labels.sampling != codec.sampling:
        raise LabelError(
            f"{where}: expected a record with sampling {codec.sampling}; found {labels.sampling}; "
            "make a cache of its own for each label policy"
        )
    rows, k = len(labels), codec.k
    shapes: dict[str, tuple[int, ...]] = {
        "ids": (k,),
        "log_probs": (k,),
        "log_tail": (len(codec.temperatures),),
        "target_log_prob": (),
    }
    if codec.stats:
        shapes["stats"] = (len(STATS),)
    for column in sampling_column(codec.sampling, k):
        shapes[column.name] = column.shape
    arrays = {}
    for name, shape in shapes.items():
        values = np.asarray(getattr(labels, name))
        if values.shape != (rows, *shape):
            raise LabelError(f"{where}, column {name}: expected shape {(rows, *shape)}; found {values.shape}")
        most = codec.num_classes if name == "ids" else codec.sampling.draws if name == "counts" else np.inf
        _refuse(where, name, values, most)
        arrays[name] = values
    return arrays


def record_of(codec: Any, arrays: Mapping[str, np.ndarray]) -> SoftLabels:
    """Returns the record whose arrays these are, with what its codec knows of it; nothing is copied or converted."""
    return SoftLabels(
        **{name: arrays[name] for name in ARRAYS if name in arrays},
        num_classes=codec.num_classes,
        temperatures=codec.temperatures,
        max_temperature=codec.max_temperature,
        sampling=codec.sampling,
    )


def _refuse(where: str, name: str, values: np.ndarray, most: float) -> None:
    if values.dtype.kind == "f":
        bad, expected = np.isnan(values) | (values == np.inf), "numbers"
    else:
        bad, expected = (values < 0) | (values > most), f"0 to {most:.0f}"
    if bad.any():
        place = np.argwhere(bad)[0]
        found = values[tuple(place)]
        said = "NaN" if found != found else found
        raise LabelError(
            f"{where}, column {name}: {said} in row {place[0]}; expected {expected}", position=int(place[0])
        )
