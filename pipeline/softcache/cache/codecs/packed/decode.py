"""Reading packed records: fields by name into the arrays of a label record; `kernels` does the work.

Shape suffixes: `P` positions, `R` bytes of a record, `S` slots of a field, `K` slots of a record, `G` grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from softcache.cache.codecs.column import RowPlaces, ids_dtype, sampling_column
from softcache.cache.codecs.packed.layout import MAX_NEG_LOG_PROB, tail_weights
from softcache.cache.codecs.precision import ARITHMETIC
from softcache.errors import LabelError
from softcache.labels import STATS

if TYPE_CHECKING:
    from softcache.cache.codecs.packed.codec import PackedCodec

__all__ = ["unpack", "unpack_rows"]


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
    return out | fields.sampling()


def unpack_rows(
    codec: PackedCodec, columns: Mapping[str, np.ndarray], places: RowPlaces, out: Mapping[str, np.ndarray]
) -> bool:
    """Writes the arrays of records to the rows of larger ones; returns False where `unpack` and `validate` have to.

    The same numbers, bit by bit, without arrays for all of them in between: ids and log-probabilities are written once.
    """
    record_PR = columns["record"]
    fields = codec.layout.fields.values()
    if (
        codec.step is None
        or codec.tail == "float32"
        or not len(record_PR)
        or max(field.width for field in fields) > 4
    ):
        return False
    from softcache.cache.codecs.packed import window_kernels

    read, rows = _Fields(codec, record_PR), len(record_PR)
    planes_RP, place = read._planes_RP, read._place
    used_P, finite_P = np.empty((2, rows), np.int64)
    anchor_P, mass_P, target_P = np.empty(rows), np.empty(rows, np.uint32), np.empty(rows, np.float32)
    stats = np.empty((rows if codec.stats else 0, len(STATS)), np.float32)
    single = [place(name) for name in ("used", "finite", "first", "tail", "target", "moments", "support")]
    window_kernels.heads(
        planes_RP,
        *single,
        codec.step,
        codec.substep,
        _halves(),
        (used_P, finite_P, anchor_P, mass_P, target_P, stats.view(np.uint32)),
    )
    if codec.tail == "fixed":
        stored: np.ndarray = mass_P.view(np.float32)
    else:
        stored = anchor_P - _signed(mass_P.astype(np.int64)) * codec.substep
    arrays = {"target_log_prob": target_P, **({"stats": stats} if codec.stats else {})}
    log_count_P, mean_P, log_mass_P = read.tail_start(
        stored, stats if codec.stats else None, used_P, finite_P
    )
    arrays["log_tail"] = log_tail_PG = np.empty((rows, len(codec.temperatures)), np.float32)
    log_tail_PG[:, 0] = stored
    weights = tail_weights(codec.temperatures, slope=codec.stats)
    window_kernels.tails(
        planes_RP, place("tail_rest"), log_count_P, mean_P, log_mass_P, weights, codec.step, log_tail_PG
    )
    read.put_infinities(log_tail_PG, target_P)
    arrays |= read.sampling()
    most, least = window_kernels.slots(
        planes_RP,
        place("ids"),
        place("ids_high"),
        codec.layout.high_bits,
        place("gaps"),
        used_P,
        finite_P,
        anchor_P,
        codec.step,
        codec.num_classes,
        places.given,
        out["ids"],
        out["log_probs"],
    )
    if "counts" in arrays and (arrays["counts"] > codec._draws()).any():
        return False
    is_sound = (
        most < codec.num_classes
        and least >= 0
        and anchor_P.max() <= ARITHMETIC.absolute  # and so are those below it
        and (finite_P <= used_P).all()
        and (used_P <= codec.k).all()
    )
    if not is_sound:
        return False
    codec.validate_numbers(arrays)
    for name, values in (
        arrays | {name: values for name, values in columns.items() if name != "record"}
    ).items():
        if name in out:
            places.put(values, out[name])
    return True


@cache
def _halves() -> np.ndarray:
    """The bits of float32 of each number of float16."""
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32)


class _Fields:
    """The fields of some records."""

    def __init__(self, codec: PackedCodec, record_PR: np.ndarray) -> None:
        from softcache.cache.codecs.packed import kernels  # compiles, or loads what was compiled before

        self._codec, self._kernels, self._layout, self._rows = codec, kernels, codec.layout, len(record_PR)
        whole = len(record_PR) % kernels.BLOCK == 0 and record_PR.flags.writeable
        if record_PR.flags.f_contiguous and whole:
            self._planes_RP = record_PR.T
        elif record_PR.strides[0] == 1:
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
        known = self.tail_start(stored[:, 0], stats, used_P, finite_P)
        weights = tail_weights(codec.temperatures, slope=codec.stats)
        self._kernels.tails(self.numbers("tail_rest"), *known, weights, codec.step, out_PG)
        return out_PG

    def tail_start(
        self, mass_P: np.ndarray, stats: np.ndarray | None, used_P: np.ndarray, finite_P: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns what is known of the tail beforehand, float64 [P]: the log of its classes' number, their mean, its mass.

        Args:
            mass_P: the stored tail at T = 1.
        """
        codec = self._codec
        exact = codec.k if codec.sampling is None else codec.sampling.exact
        if stats is None:
            dropped_P, mean_P = codec.num_classes - np.minimum(used_P, exact), np.zeros(len(mass_P))
        else:
            dropped_P, mean_P = stats[:, 3] - np.minimum(finite_P, exact), stats[:, 1].astype(np.float64)
        log_count_P = np.log(np.maximum(dropped_P.astype(np.float64), 1.0))
        mass_P = np.where(np.isneginf(mass_P), 0.0, np.maximum(mass_P, -MAX_NEG_LOG_PROB)).astype(np.float64)
        return log_count_P, mean_P, mass_P

    def sampling(self) -> dict[str, np.ndarray]:
        """Returns the arrays that labels with sampled classes have in addition."""
        out = {}
        for column in sampling_column(self._codec.sampling, self._codec.k):
            if column.name == "counts":
                out["counts"] = self.numbers("counts").T.astype(column.dtype)
            else:
                out["log_threshold"] = self.floats("threshold")[:, 0]
        return out

    def put_infinities(self, log_tail_PG: np.ndarray, target_P: np.ndarray) -> None:
        flags = self.numbers("infinite").T
        if flags.any():
            bits = np.unpackbits(flags.astype(np.uint8), axis=1, bitorder="little").astype(bool)
            grid = log_tail_PG.shape[1]
            log_tail_PG[bits[:, :grid]] = -np.inf
            target_P[bits[:, grid]] = -np.inf


def _signed(zigzag: np.ndarray) -> np.ndarray:
    return (zigzag >> 1) ^ -(zigzag & 1)
