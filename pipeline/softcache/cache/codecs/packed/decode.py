"""Reading packed records: fields by name into the arrays of a label record; `kernels` does the work.

Shape suffixes: `P` positions, `R` bytes of a record, `S` slots of a field, `K` slots of a record, `G` grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

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
    rows = len(record_PR)
    ids_PK = np.empty((rows, codec.k), ids_dtype(codec.num_classes))
    log_probs_PK = np.empty((rows, codec.k), np.float32)
    arrays, _ = _read(codec, record_PR, np.arange(rows), ids_PK, log_probs_PK)
    return {"ids": ids_PK, "log_probs": log_probs_PK, **arrays}


def unpack_rows(
    codec: PackedCodec, columns: Mapping[str, np.ndarray], places: RowPlaces, out: Mapping[str, np.ndarray]
) -> bool:
    """Writes the arrays of records to the rows of larger ones; returns False where `unpack` and `validate` have to.

    The same numbers, without arrays for all of them in between: ids and log-probabilities are written once.
    """
    if codec.step is None or not len(columns["record"]):
        return False
    arrays, is_sound = _read(codec, columns["record"], places.given, out["ids"], out["log_probs"])
    if not is_sound or ("counts" in arrays and (arrays["counts"] > codec._draws()).any()):
        return False
    codec.validate_numbers(arrays)
    others = {name: values for name, values in columns.items() if name != "record"}
    for name, values in (arrays | others).items():
        if name in out:
            places.put(values, out[name])
    return True


def _read(
    codec: PackedCodec,
    record_PR: np.ndarray,
    places_P: np.ndarray,
    ids_NK: np.ndarray,
    log_probs_NK: np.ndarray,
) -> tuple[dict[str, np.ndarray], bool]:
    """Writes ids and log-probabilities to the rows `places_P`, none to row -1, and returns the other arrays [P, ...].

    Without a step `log_probs` float16 is among those. Also returns whether ids and log-probabilities are possible ones.
    """
    from softcache.cache.codecs.packed import kernels  # compiles, or loads what was compiled before

    fields, rows = _Fields(codec, record_PR, kernels), len(record_PR)
    planes_RP, place = fields.planes_RP, fields.place
    widest = max(field.width for field in codec.layout.fields.values())
    number = np.empty(kernels.BLOCK, np.uint32 if widest <= 4 else np.uint64)
    step, substep = (0.0, 0.0) if codec.step is None else (codec.step, codec.substep)
    used_P, finite_P = np.empty((2, rows), np.int64)
    anchor_P, mass_P, target_P = np.empty(rows), np.empty(rows, np.uint64), np.empty(rows, np.float32)
    stats = np.empty((rows if codec.stats else 0, len(STATS)), np.float32)
    single = [place(name) for name in ("used", "finite", "first", "tail", "target", "moments", "support")]
    heads = (used_P, finite_P, anchor_P, mass_P, target_P, stats.view(np.uint32))
    kernels.heads(planes_RP, *single, step, substep, _halves(), number, heads)
    log_tail_PG = np.empty((rows, len(codec.temperatures)), np.float32)
    if codec.tail == "float32":
        log_tail_PG[:] = fields.floats("tail")
    else:
        stored: np.ndarray = mass_P.astype(np.uint32).view(np.float32)
        if codec.tail == "steps":
            stored = anchor_P - _signed(mass_P.astype(np.int64)) * substep
        log_tail_PG[:, 0] = stored
        known = _tail_start(codec, stored, stats if codec.stats else None, used_P, finite_P)
        weights = tail_weights(codec.temperatures, slope=codec.stats)
        kernels.tails(planes_RP, place("tail_rest"), *known, weights, step, number, log_tail_PG)
    arrays: dict[str, Any] = {
        "log_tail": log_tail_PG,
        "target_log_prob": target_P,
        **({"stats": stats} if codec.stats else {}),
    }
    ids = (place("ids"), place("ids_high"), codec.layout.high_bits)
    into = (places_P, ids_NK, log_probs_NK)
    most, least = kernels.slots(
        planes_RP, *ids, place("gaps"), used_P, finite_P, anchor_P, step, codec.num_classes, *into
    )
    if codec.step is None:
        half_PK = np.ascontiguousarray(fields.numbers("half").T.astype(np.uint16)).view(np.float16)
        half_PK[np.arange(codec.k) >= finite_P[:, None]] = -np.inf
        target_P[:] = fields.floats("target")[:, 0]
        arrays["log_probs"] = half_PK
    fields.put_infinities(log_tail_PG, target_P)
    is_sound = (
        most < codec.num_classes
        and least >= 0
        and anchor_P.max(initial=0.0) <= ARITHMETIC.absolute  # and so are those below it
        and bool((finite_P <= used_P).all())
        and bool((used_P <= codec.k).all())
    )
    return arrays | fields.sampling(), is_sound


def _tail_start(
    codec: PackedCodec, mass_P: np.ndarray, stats: np.ndarray | None, used_P: np.ndarray, finite_P: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns what is known of the tail beforehand, float64 [P]: the log of its classes' number, their mean, its mass.

    Args:
        mass_P: the stored tail at T = 1.
    """
    exact = codec.k if codec.sampling is None else codec.sampling.exact
    if stats is None:
        dropped_P, mean_P = codec.num_classes - np.minimum(used_P, exact), np.zeros(len(mass_P))
    else:
        dropped_P, mean_P = stats[:, 3] - np.minimum(finite_P, exact), stats[:, 1].astype(np.float64)
    log_count_P = np.log(np.maximum(dropped_P.astype(np.float64), 1.0))
    mass_P = np.where(np.isneginf(mass_P), 0.0, np.maximum(mass_P, -MAX_NEG_LOG_PROB)).astype(np.float64)
    return log_count_P, mean_P, mass_P


@cache
def _halves() -> np.ndarray:
    """The bits of float32 of each number of float16."""
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32)


class _Fields:
    """The fields of some records.

    Attributes:
        planes_RP: [R, P'] uint8, one byte of all records in each row; P' is the next multiple of a block.
    """

    def __init__(self, codec: PackedCodec, record_PR: np.ndarray, kernels: Any) -> None:
        self._codec, self._rows = codec, len(record_PR)
        whole = len(record_PR) % kernels.BLOCK == 0 and record_PR.flags.writeable
        if record_PR.flags.f_contiguous and whole:
            self.planes_RP = record_PR.T
        elif record_PR.strides[0] == 1:
            blocks = -(-len(record_PR) // kernels.BLOCK)
            self.planes_RP = np.zeros((record_PR.shape[1], blocks * kernels.BLOCK), np.uint8)
            self.planes_RP[:, : self._rows] = record_PR.T
        else:
            # Compiled code is for one kind of array: writeable, C order.
            self.planes_RP = kernels.planes_of(np.require(record_PR, requirements=["C", "W"]))

    def place(self, name: str) -> tuple[int, int, int]:
        """Returns where a field is: its first byte, slots, width; zeros where there is none."""
        field = self._codec.layout.fields.get(name)
        return (0, 0, 0) if field is None else (field.start, field.slots, field.width)

    def numbers(self, name: str) -> np.ndarray:
        """Returns a field, [S, P] int64."""
        start, slots, width = self.place(name)
        planes = self.planes_RP[start : start + slots * width, : self._rows].reshape(width, slots, -1)
        out_SP = planes[0].astype(np.int64)
        for byte in range(1, width):
            out_SP |= planes[byte].astype(np.int64) << 8 * byte
        return out_SP

    def floats(self, name: str) -> np.ndarray:
        """Returns a field of float32 numbers, [P, S]."""
        return self.numbers(name).T.astype(np.uint32).view(np.float32)

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
