"""One record of bytes for each position: half to seven tenths of what `open` takes on disk, within a stated error.

Layout: `pipeline/softcache/cache/codecs/packed/layout.py`. What is lost, with `step` = d nats:

    log_probs        |error| <= d/2, each by itself: it is the differences of whole numbers of steps that are stored
    log_tail         |error| <= d/2 at every temperature but T = 1, where it is float32; all float32 with tail = "float32";
                     with tail = "steps" at T = 1 too: |error| <= d/32
    target_log_prob  |error| <= d/2; equal to its slot's value wherever it was, so also to the first's
    stats            float16 but for `support`: relative error 2^-11
    ids, counts, log_threshold, support, -inf and unused slots: nothing

So at every temperature T >= 1 of the grid KL(stored || decoded) over the kept classes and the tail is at most d^2/8:
for any errors e_i with |e_i| <= d/2 it is log E[exp(e - E[e])], and a variable within an interval of width d has no
more than that (Hoeffding 1963, lemma 1). Drawn classes fall under the first line. Beyond 65,504 nats finite numbers are
kept there. What is decoded is float32, whose rounding comes on top.

A teacher whose logits are rounded (bfloat16 has 8 bits) gives log-probabilities that differ by whole multiples of a
power of two. Steps count from the first slot, so those whole multiples of `step` lose nothing but the first slot's d/512
(d/32 with tail = "steps").

With `step` None log-probabilities are float16 (error as in `softcache.cache.codecs.plain`), tail and target float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from pydantic import Field

from softcache.cache.codecs.base import CODECS, CodecSettings
from softcache.cache.codecs.column import Column, RowPlaces
from softcache.cache.codecs.packed.layout import SUBSTEPS, Layout, layout_of
from softcache.cache.codecs.precision import EXACT, HALF, Error, Precision
from softcache.cache.codecs.soft_labels import SoftLabelCodec
from softcache.errors import LabelError
from softcache.labels import SoftLabels

__all__ = ["COARSEST", "DEFAULT_STEP", "FINEST", "HIGHEST_LEVEL", "PackedCodec", "PackedSettings", "Tail"]

Tail = Literal["fixed", "steps", "float32"]
"""How the tail is stored."""

DEFAULT_STEP = 1 / 128
"""Measured (`benchmarks.codecs`, K = 64): mean KL 4e-7 of float32 logits and 2e-9 of bfloat16 ones; 1/32 saves 7 to 12
bytes of some 155."""
FINEST, COARSEST = 1 / 16384, 8.0  # 65,504 nats are less than 2^31 steps
DEFAULT_LEVEL, HIGHEST_LEVEL = 1, 22
"""Of zstd. Measured: levels 3 to 15 take 1 to 2% more than level 1 for text, where they find false repetitions in what is
all but random; 16 splits blocks where the numbers change their distribution. Above it nothing is gained."""
_ROWS = 4096
"""Rows that are encoded at once: what is made meanwhile stays in the processor's cache."""


class PackedSettings(CodecSettings):
    """`[capture.codec]` of packed records; see the module docstring for what is lost.

    Attributes:
        step: nats between neighboring log-probabilities that differ.
        tail: "fixed": float32 at T = 1 and whole steps elsewhere; "steps": steps at T = 1 too, 16 times as fine; "float32".
        level: of zstd, which a writer spends time on and a reader does not: 16 takes 0.5 to 15% fewer bytes, and zstd then
            some 30 microseconds of a core for a row of K = 64 in place of 0.7.
    """

    name: Literal["packed"] = "packed"
    step: float = Field(DEFAULT_STEP, ge=FINEST, le=COARSEST)
    tail: Tail = "fixed"
    level: int = Field(DEFAULT_LEVEL, ge=DEFAULT_LEVEL, le=HIGHEST_LEVEL)


@CODECS.register("packed")
@dataclass(frozen=True)
class PackedCodec(SoftLabelCodec):
    """Packed records; see the module docstring for what is lost.

    Attributes:
        step: nats between neighboring log-probabilities that differ; None for float16.
        tail: "fixed": float32 at T = 1 and whole steps elsewhere; "steps": steps at T = 1 too, 16 times as fine; "float32".
        level: of zstd.

    Raises:
        LabelError: a step that is not between 1/16384 and 8 nats, a tail of steps without a step, or a level that zstd
            has not.
    """

    step: float | None = DEFAULT_STEP
    tail: Tail = "fixed"
    level: int = DEFAULT_LEVEL

    name = "packed"
    settings = PackedSettings

    def __post_init__(self) -> None:
        if self.step is not None and not FINEST <= self.step <= COARSEST:
            raise LabelError(f"codec packed, step: expected 1/16384 to 8 nats; found {self.step}")
        if self.tail not in SUBSTEPS or (self.step is None and self.tail != "float32"):
            raise LabelError(
                f'codec packed, tail: expected "float32", or "fixed" or "steps" with a step; found {self.tail!r}'
            )
        if not (type(self.level) is int and DEFAULT_LEVEL <= self.level <= HIGHEST_LEVEL):
            raise LabelError(
                f"codec packed, level: expected {DEFAULT_LEVEL} to {HIGHEST_LEVEL}; found {self.level!r}"
            )

    @property
    def features(self) -> tuple[str, ...]:
        return ("tail_steps",) if self.tail == "steps" else ()

    @property
    def substep(self) -> float:
        """Nats in which the first slot's log-probability is counted, and with `tail` = "steps" the tail at T = 1."""
        assert self.step is not None
        return self.step / SUBSTEPS[self.tail]

    @cached_property
    def layout(self) -> Layout:
        return layout_of(self)

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column("record", "uint8", (("byte", self.layout.num_bytes),), planar=True, level=self.level),)

    @property
    def precision(self) -> Precision:
        if self.step is None:
            return Precision(log_probs=HALF, moments=HALF)
        half_step = Error(self.step / 2, 0.0)
        return Precision(
            log_probs=half_step,
            tail_at_one=Error(self.substep / 2, 0.0) if self.tail == "steps" else EXACT,
            tail=EXACT if self.tail == "float32" else half_step,
            target=half_step,
            moments=HALF,
        )

    def encode(self, labels: SoftLabels) -> dict[str, np.ndarray]:
        """Returns the column `record` [P, R] of a NumPy record with targets and, unless `stats` is off, statistics.

        Slots are put in order: descending log-probability, unused ones last; a tie stays as it was.

        Raises:
            LabelError: the record does not fit the codec, holds NaN or +inf, or a slot that was kept exactly has a lower
                log-probability than one that was drawn.
        """
        from softcache.cache.codecs.packed.encode import pack

        arrays = self.arrays_of(labels)
        planes = np.zeros((self.layout.num_bytes, len(labels)), np.uint8)
        for start in range(0, len(labels), _ROWS):
            part = slice(start, start + _ROWS)
            pack(self, {name: values[part] for name, values in arrays.items()}, planes[:, part], start)
        return {"record": planes.T}

    def unpack(self, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the arrays of the record by name, and any other columns unchanged.

        Columns that are unpacked already come back as they are.
        """
        from softcache.cache.codecs.packed.decode import unpack

        out = dict(columns)
        if "record" in out:
            out |= unpack(self, out.pop("record"))
        return out

    def unpack_to(
        self, columns: Mapping[str, np.ndarray], places: RowPlaces, out: Mapping[str, np.ndarray]
    ) -> None:
        from softcache.cache.codecs.packed.decode import unpack_rows

        if "record" not in columns or not unpack_rows(self, columns, places, out):
            super().unpack_to(columns, places, out)

    def own_parameters(self) -> dict[str, Any]:
        values = {"values": "float16"} if self.step is None else {"step": self.step}
        return {**values, "tail": self.tail, **({} if self.level == DEFAULT_LEVEL else {"level": self.level})}

    @classmethod
    def own_arguments(cls, described: dict[str, Any]) -> dict[str, Any]:
        own = dict(described)
        step = own.pop("step", None)
        if step is None and own.pop("values") != "float16":
            raise ValueError("values other than float16 need a step")
        return {**own, "step": None if step is None else float(step)}
