"""The base of the codecs of `SoftLabels`: their common parameters, and what is checked when labels are written or read.

A checksum proves that bytes are those that were written, not that they were written in good faith. Compiled losses follow
an id to a logit without a check, and one NaN ends a training run, so ids and numbers are checked once, when they are
decoded: 7 microseconds for a chunk of 2,048 images, which takes some 700 to decode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, ClassVar, Self

import numpy as np

from softcache.cache.codecs.base import Codec
from softcache.cache.codecs.column import refuse_wrong, sampling_column
from softcache.cache.codecs.precision import ARITHMETIC, Precision
from softcache.errors import LabelError
from softcache.labels import ARRAYS, STATS, Sampling, SoftLabels

__all__ = ["SoftLabelCodec"]

FLOATS = ("log_probs", "log_tail", "stats", "log_threshold")


@dataclass(frozen=True)
class SoftLabelCodec(Codec):
    """A codec of `SoftLabels`; the parameters that a subclass adds are its fields.

    Attributes:
        num_classes: V.
        k: slots of a row.
        temperatures: [G] the tail's grid.
        stats: whether the labels have statistics.
        max_temperature: the highest temperature at which the labels are known (`SoftLabels.max_temperature`).
        sampling: how classes were sampled (`SoftLabels.sampling`).
    """

    num_classes: int
    k: int
    temperatures: tuple[float, ...]
    stats: bool = True
    max_temperature: float | None = None
    sampling: Sampling | None = None

    kinds: ClassVar[frozenset[str]] = frozenset({"image", "tokens", "cells"})

    @property
    def precision(self) -> Precision | None:
        """How far stored numbers may be from those that were computed; None where the codec does not state it."""
        return None

    def arrays_of(self, labels: SoftLabels) -> dict[str, np.ndarray]:
        """Returns the arrays that the codec keeps of labels, by name, as NumPy arrays of the labels' dtypes.

        Raises:
            LabelError: the record lacks something, has another shape or sampling, or a number that none of it can be:
                NaN, +inf, an id outside of 0 to V, more draws than were made. The first such row is named.
        """
        where = f"codec {self.name}"
        if labels.target_log_prob is None or (self.stats and labels.stats is None):
            raise LabelError(
                f"{where}: the record has no target_log_prob or no stats; pass targets to sparsify"
            )
        if labels.sampling != self.sampling:
            raise LabelError(
                f"{where}: expected a record with sampling {self.sampling}; found {labels.sampling}; "
                "make a cache of its own for each label policy"
            )
        rows, k = len(labels), self.k
        shapes: dict[str, tuple[int, ...]] = {
            "ids": (k,),
            "log_probs": (k,),
            "log_tail": (len(self.temperatures),),
            "target_log_prob": (),
        }
        if self.stats:
            shapes["stats"] = (len(STATS),)
        for column in sampling_column(self.sampling, k):
            shapes[column.name] = column.shape
        arrays, draws = {}, self._draws()
        for name, shape in shapes.items():
            values = np.asarray(getattr(labels, name))
            if values.shape != (rows, *shape):
                raise LabelError(
                    f"{where}, column {name}: expected shape {(rows, *shape)}; found {values.shape}"
                )
            most = self.num_classes if name == "ids" else draws if name == "counts" else np.inf
            _refuse(where, name, values, most)
            arrays[name] = values
        return arrays

    @property
    def tail_rounding(self) -> tuple[float, float]:
        """How far a stored tail may be off at T = 1 and above, nats, besides float32."""
        precision = self.precision or Precision()
        return precision.tail_at_one.absolute, precision.tail.absolute

    def decode(self, columns: Mapping[str, np.ndarray]) -> SoftLabels:
        """Returns the labels of columns [P, ...]; nothing is copied or converted but what `unpack` converts."""
        arrays: Mapping[str, Any] = self.unpack(columns)
        return SoftLabels(
            **{name: arrays[name] for name in ARRAYS if name in arrays},
            num_classes=self.num_classes,
            temperatures=self.temperatures,
            max_temperature=self.max_temperature,
            sampling=self.sampling,
            tail_rounding=self.tail_rounding,
        )

    def validate(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Checks the unpacked arrays [P, ...] of labels that come from a cache by those invariants that cost no time.

        Raises:
            LabelError: an id above V, an unused slot (id V) with a probability, a probability above 1, more draws than were
                made, NaN or +inf; the first such row is named.
        """
        ids, most, draws = arrays["ids"], self.num_classes, self._draws()
        if not len(ids):
            return
        highest = int(ids.max())
        if highest > most:
            refuse_wrong("ids", ids, ids > most, f"0 to {most}")
        if highest == most:
            wrong = (ids == most) & (arrays["log_probs"] > -np.inf)
            refuse_wrong("log_probs", arrays["log_probs"], wrong, "-inf in an unused slot")
        if "counts" in arrays and int(arrays["counts"].max()) > draws:
            refuse_wrong("counts", arrays["counts"], arrays["counts"] > draws, "draws that were made")
        self.validate_numbers(arrays)

    def validate_numbers(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Checks those arrays of some labels, [P, ...], that hold log-probabilities, masses and statistics.

        Raises:
            LabelError: NaN or +inf, or a probability above 1; the first such row is named.
        """
        for name in FLOATS:
            limit = ARITHMETIC.absolute if name == "log_probs" else np.inf
            if name in arrays and _has_bad(arrays[name], limit):
                values = arrays[name]
                refuse_wrong(name, values, np.isnan(values) | (values == np.inf), "numbers below +inf")
                refuse_wrong(name, values, values > limit, "at most 0: no probability is above 1")
        target = arrays.get("target_log_prob")  # NaN where there is no ground truth
        if target is not None and (wrong := target > ARITHMETIC.absolute).any():
            refuse_wrong("target_log_prob", target, wrong, "at most 0: no probability is above 1")

    def _draws(self) -> int:
        return 0 if self.sampling is None else self.sampling.draws

    def own_parameters(self) -> dict[str, Any]:
        """Returns what a manifest holds of the parameters that a subclass adds; by default its fields."""
        common = {field.name for field in fields(SoftLabelCodec)}
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in common}

    @classmethod
    def own_arguments(cls, described: dict[str, Any]) -> dict[str, Any]:
        """Returns the constructor's arguments from what `own_parameters` gave; by default the same."""
        return described

    def to_dict(self) -> dict[str, Any]:
        """Returns the codec's part of a manifest.

        `stats`, `max_temperature` and `sampling` are left out where they are the default, so that manifests stay, byte for
        byte, what they were before there were these.
        """
        return {
            "name": self.name,
            "num_classes": self.num_classes,
            "k": self.k,
            "temperatures": list(self.temperatures),
            **self.own_parameters(),
            **({} if self.stats else {"stats": False}),
            **({} if self.max_temperature is None else {"max_temperature": self.max_temperature}),
            **({} if self.sampling is None else {"sampling": asdict(self.sampling)}),
        }

    @classmethod
    def from_dict(cls, described: Mapping[str, Any]) -> Self:
        own = dict(described)
        del own["name"]
        highest, sampling = own.pop("max_temperature", None), own.pop("sampling", None)
        temperatures = own.pop("temperatures")
        if not isinstance(temperatures, list | tuple):
            raise TypeError("temperatures are no list")
        codec = cls(
            num_classes=int(own.pop("num_classes")),
            k=int(own.pop("k")),
            temperatures=tuple(float(t) for t in temperatures),
            stats=own.pop("stats", True),
            max_temperature=None if highest is None else float(highest),
            sampling=None if sampling is None else Sampling(**sampling),
            **cls.own_arguments(own),
        )
        # Whatever could be read in two ways ("10" for 10, 10.5 for 10) is refused.
        again = {**described, "temperatures": list(codec.temperatures)}
        if not codec._is_sound() or codec.to_dict() != again:
            raise ValueError("parameters out of range or unknown")
        return codec

    def _is_sound(self) -> bool:
        grid, sampling = self.temperatures, self.sampling
        return (
            1 <= self.k <= self.num_classes <= 2**31
            and 1 <= len(grid) <= 64
            and grid[0] == 1.0
            and all(a < b < float("inf") for a, b in pairwise(grid))
            and isinstance(self.stats, bool)
            and (self.max_temperature is None or grid[-1] <= self.max_temperature < float("inf"))
            and (
                sampling is None
                or (
                    type(sampling.replacement) is bool
                    and type(sampling.exact) is type(sampling.draws) is int
                    and sampling.exact <= self.k
                )
            )
        )


def _has_bad(values: np.ndarray, limit: float) -> bool:
    """Whether NaN, +inf or a number above the limit is among floats."""
    if values.dtype == np.float16:  # as bits: NumPy compares half-precision numbers one at a time
        # The largest number without its sign bit's meaning is -inf, with it +inf; what lies beyond is NaN.
        most = np.float16(limit).view(np.int16)
        return bool(values.view(np.uint16).max() > 0xFC00 or values.view(np.int16).max() > min(most, 0x7BFF))
    most = values.max(initial=-np.inf)
    return not (most < np.inf and most <= limit)


def _refuse(where: str, name: str, values: np.ndarray, most: float) -> None:
    if values.dtype.kind == "f":
        bad, expected = np.isnan(values) | (values == np.inf), "numbers"
    else:
        bad, expected = (values < 0) | (values > most), f"0 to {most:.0f}"
    if bad.any():
        place = np.argwhere(bad)[0]
        found = values[tuple(place)]
        shown = "NaN" if found != found else found
        raise LabelError(
            f"{where}, column {name}: {shown} in row {place[0]}; expected {expected}", position=int(place[0])
        )
