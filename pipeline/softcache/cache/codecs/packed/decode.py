"""Reading packed records: fields by name into the arrays of a label record; `kernels` does the work.

Shape suffixes: `P` positions, `R` bytes of a record, `S` slots of a field, `K` slots of a record, `G` grid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from softcache.cache.codecs.column import ids_dtype, sampling_column
from softcache.cache.codecs.packed.layout import MAX_NEG_LOG_PROB, tail_weights
from softcache.errors import LabelError
from softcache.labels import STATS

if TYPE_CHECKING:
    from softcache.cache.codecs.packed.codec import PackedCodec

__all__ = ["unpack"]


def unpack(codec: PackedCodec, record_PR: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the arrays of a record by name, all new; floats are float32 (`log_probs` float16 without a step).

    Args:
        record_PR: [P, R] uint8. Fastest in Fortran order, where equal places of the records lie together; the Zarr
            store gives them so.

    Raises:
        LabelError: records of another size.
    """
    if record_PR.ndim != 2 or record_PR.shape[1] != codec.layout.num_bytes or record_PR.dtype != np.uint8:
        raise LabelError(
            f"codec packed, column record: expected uint8 [P, {codec.layout.num_bytes}]; found {record_PR.dtype} "
            f"{list(record_PR.shape)}; give it the codec of its own manifest"
        )
    fields = _Fields(codec, record_PR)
    used_P, finite_P = fields.numbers("used")[0], fields.numbers("finite")[0]
    out = {"ids": fields.ids(used_P), **fields.values(finite_P)}
    if codec.stats:
        out["stats"] = np.empty((len(record_PR), len(STATS)), np.float32)
        out["stats"][:, :3] = fields.numbers("moments").T.astype(np.uint16).view(np.float16)
        out["stats"][:, 3:] = fields.floats("support")
    out["log_tail"] = fields.tail(out.get("stats"), used_P, finite_P)
    fields.put_infinities(out["log_tail"], out["target_log_prob"])
    for column in sampling_column(codec.sampling, codec.k):
        if column.name == "counts":
            out["counts"] = fields.numbers("counts").T.astype(column.dtype)
        else:
            out["log_threshold"] = fields.floats("threshold")[:, 0]
    return out


class _Fields:
    """The fields of some records."""

    def __init__(self, codec: PackedCodec, record_PR: np.ndarray) -> None:
        from softcache.cache.codecs.packed import kernels  # compiles, or loads what was compiled before

        self._codec, self._kernels, self._layout, self._rows = codec, kernels, codec.layout, len(record_PR)
        whole = len(record_PR) % kernels.BLOCK == 0 and record_PR.flags.writeable
        if record_PR.flags.f_contiguous and whole:
            self._planes_RP = record_PR.T
        elif record_PR.flags.f_contiguous:
            blocks = -(-len(record_PR) // kernels.BLOCK)
            self._planes_RP = np.zeros((record_PR.shape[1], blocks * kernels.BLOCK), np.uint8)
            self._planes_RP[:, : self._rows] = record_PR.T
        else:
            # Compiled code is for one kind of array: writeable, C order.
            self._planes_RP = kernels.planes_of(np.require(record_PR, requirements=["C", "W"]))

    def _place(self, name: str) -> tuple[int, int, int]:
        field = self._layout.fields.get(name)
        return (0, 0, 0) if field is None else (field.start, field.slots, field.width)

    def numbers(self, name: str) -> np.ndarray:
        """Returns a field, [S, P] int64."""
        return self._kernels.numbers(self._planes_RP, self._rows, *self._place(name))

    def floats(self, name: str) -> np.ndarray:
        """Returns a field of float32 numbers, [P, S]."""
        return self.numbers(name).T.astype(np.uint32).view(np.float32)

    def ids(self, used_P: np.ndarray) -> np.ndarray:
        codec = self._codec
        out_PK = np.empty((len(used_P), codec.k), ids_dtype(codec.num_classes))
        (start, _, width), (high, _, _) = self._place("ids"), self._place("ids_high")
        self._kernels.ids(self._planes_RP, start, width, high, self._layout.high_bits, out_PK)
        self._kernels.fill_from(used_P, codec.num_classes, out_PK)
        return out_PK

    def values(self, finite_P: np.ndarray) -> dict[str, np.ndarray]:
        """Returns `log_probs` [P, K] and `target_log_prob` [P], where it is not -inf."""
        codec = self._codec
        if codec.step is None:
            half_PK = np.ascontiguousarray(self.numbers("half").T.astype(np.uint16)).view(np.float16)
            half_PK[np.arange(codec.k) >= finite_P[:, None]] = -np.inf
            return {"log_probs": half_PK, "target_log_prob": self.floats("target")[:, 0]}
        anchor_P = self._anchor_P()
        out_PK = np.empty((len(finite_P), codec.k), np.float32)
        start, _, width = self._place("gaps")
        self._kernels.log_probs(self._planes_RP, start, width, anchor_P, codec.step, out_PK)
        self._kernels.fill_from(finite_P, -np.inf, out_PK)
        target_P = anchor_P - _signed(self.numbers("target")[0]) * codec.step
        return {"log_probs": out_PK, "target_log_prob": target_P.astype(np.float32)}

    def _anchor_P(self) -> np.ndarray:
        return _signed(self.numbers("first")[0]) * self._codec.substep

    def tail(self, stats: np.ndarray | None, used_P: np.ndarray, finite_P: np.ndarray) -> np.ndarray:
        """Returns the tail [P, G], where it is not -inf."""
        codec = self._codec
        if codec.tail == "float32":
            return self.floats("tail")
        if codec.tail == "fixed":
            stored = self.floats("tail")
        else:
            stored = (self._anchor_P() - _signed(self.numbers("tail")[0]) * codec.substep)[:, None]
        out_PG = np.empty((len(stored), len(codec.temperatures)), np.float32)
        out_PG[:, :1] = stored
        exact = codec.k if codec.sampling is None else codec.sampling.exact
        if stats is None:
            dropped_P, mean_P = codec.num_classes - np.minimum(used_P, exact), np.zeros(len(stored))
        else:
            dropped_P, mean_P = stats[:, 3] - np.minimum(finite_P, exact), stats[:, 1].astype(np.float64)
        log_count_P = np.log(np.maximum(dropped_P.astype(np.float64), 1.0))
        mass_P = stored[:, 0]
        mass_P = np.where(np.isneginf(mass_P), 0.0, np.maximum(mass_P, -MAX_NEG_LOG_PROB)).astype(np.float64)
        weights = tail_weights(codec.temperatures, slope=codec.stats)
        steps_SP = self.numbers("tail_rest")
        self._kernels.tails(steps_SP, log_count_P, mean_P, mass_P, weights, codec.step, out_PG)
        return out_PG

    def put_infinities(self, log_tail_PG: np.ndarray, target_P: np.ndarray) -> None:
        flags = self.numbers("infinite").T
        if flags.any():
            bits = np.unpackbits(flags.astype(np.uint8), axis=1, bitorder="little").astype(bool)
            grid = log_tail_PG.shape[1]
            log_tail_PG[bits[:, :grid]] = -np.inf
            target_P[bits[:, grid]] = -np.inf


def _signed(zigzag: np.ndarray) -> np.ndarray:
    return (zigzag >> 1) ^ -(zigzag & 1)
