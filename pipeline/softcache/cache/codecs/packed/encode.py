"""Writing packed records, in NumPy: a row is made once, and read in every epoch.

Shape suffixes: `N` rows of a part, `K` slots, `G` grid of temperatures, `R` bytes of a record.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from softcache.cache.codecs.packed.layout import MAX_NEG_LOG_PROB, tail_weights
from softcache.errors import LabelError

if TYPE_CHECKING:
    from softcache.cache.codecs.packed.codec import PackedCodec

__all__ = ["pack"]


def pack(codec: PackedCodec, arrays: dict[str, np.ndarray], planes_RN: np.ndarray, first_row: int) -> None:
    """Writes the records of some rows.

    Args:
        arrays: by name, [N, ...], checked (`checked_arrays`).
        planes_RN: zeros; where the records go, one byte of them in each row.
        first_row: number of the first row, for errors.

    Raises:
        LabelError: an unused slot has a log-probability, or a drawn slot a higher one than an exact slot.
    """
    write = _Writer(codec, planes_RN)
    ids, log_probs, counts = _in_order(codec, arrays, first_row)
    used_NK = ids < codec.num_classes
    finite_NK = log_probs > -np.inf
    write("ids", np.where(used_NK, ids, 0))
    write.high_bits(np.where(used_NK, ids, 0))
    write("used", used_NK.sum(axis=1))
    write("finite", finite_NK.sum(axis=1))
    target, tail = arrays["target_log_prob"], arrays["log_tail"]
    if codec.step is None:
        lowest = np.where(finite_NK, np.maximum(log_probs, -MAX_NEG_LOG_PROB), 0.0)
        write("half", lowest.astype(np.float16).view(np.uint16))
        write("target", _bits(np.where(np.isneginf(target), 0.0, target)))
    else:
        first_N = _steps(np.where(finite_NK[:, 0], log_probs[:, 0], 0.0), codec.substep)
        anchor_N = first_N * codec.substep
        write("first", _zigzag(first_N))
        below_NK = _steps(anchor_N[:, None] - np.where(finite_NK, log_probs, 0.0), codec.step)
        below_NK[:, 0] = 0
        np.maximum(below_NK, 0, out=below_NK)
        write("gaps", np.where(finite_NK[:, 1:], np.diff(below_NK, axis=1), 0))
        write(
            "target", _zigzag(_steps(anchor_N - np.where(np.isneginf(target), anchor_N, target), codec.step))
        )
    infinite = np.concatenate([np.isneginf(tail), np.isneginf(target)[:, None]], axis=1)
    write("infinite", np.packbits(infinite, axis=1, bitorder="little"))
    means_N = None
    if codec.stats:
        stats = arrays["stats"]
        moments = np.clip(stats[:, :3], -MAX_NEG_LOG_PROB, MAX_NEG_LOG_PROB).astype(np.float16)
        write("moments", moments.view(np.uint16))
        write("support", _bits(stats[:, 3]))
        means_N = moments[:, 1].astype(np.float64)
    if codec.tail == "float32":
        write("tail", _bits(tail))
    else:
        if codec.tail == "steps":
            lower_N = _steps(anchor_N - np.where(infinite[:, 0], anchor_N, tail[:, 0]), codec.substep)
            write("tail", _zigzag(lower_N))
            tail = np.concatenate([(anchor_N - lower_N * codec.substep)[:, None], tail[:, 1:]], axis=1)
        else:
            write("tail", _bits(tail[:, :1]))
        if tail.shape[1] > 1:
            support = arrays["stats"][:, 3] if codec.stats else None
            write("tail_rest", _zigzag(_tail_steps(codec, tail, used_NK, finite_NK, support, means_N)))
    if counts is not None:
        write("counts", counts)
    if "log_threshold" in arrays:
        write("threshold", _bits(arrays["log_threshold"]))


class _Writer:
    """Fields into the planes of some records."""

    def __init__(self, codec: PackedCodec, planes_RN: np.ndarray) -> None:
        self._layout, self._planes_RN = codec.layout, planes_RN

    def __call__(self, name: str, numbers: np.ndarray) -> None:
        """Writes whole numbers [N] or [N, slots] that are not negative, where the layout has such a field."""
        field = self._layout.fields.get(name)
        if field is None:
            return
        numbers_SN = numbers.reshape(len(numbers), field.slots).T
        for byte in range(field.width):
            first = field.start + byte * field.slots
            self._planes_RN[first : first + field.slots] = (numbers_SN >> 8 * byte) & 255

    def high_bits(self, ids_NK: np.ndarray) -> None:
        bits, fields = self._layout.high_bits, self._layout.fields
        if not bits:
            return
        high_NK = ids_NK >> 8 * (fields["ids"].width if "ids" in fields else 0)
        for slot in range(high_NK.shape[1]):
            byte, place = divmod(slot * bits, 8)
            self._planes_RN[fields["ids_high"].start + byte] |= (high_NK[:, slot] << place).astype(np.uint8)


def _in_order(
    codec: PackedCodec, arrays: dict[str, np.ndarray], first_row: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Returns ids int64, log-probabilities and counts [N, K], the most likely first and unused slots last."""
    ids, log_probs = arrays["ids"].astype(np.int64), arrays["log_probs"]
    if log_probs.dtype.itemsize < 4:
        log_probs = log_probs.astype(np.float32)
    counts = arrays["counts"].astype(np.int64) if "counts" in arrays else None
    unused = ids == codec.num_classes
    wrong = unused & (log_probs > -np.inf)
    if wrong.any():
        row = first_row + int(np.argwhere(wrong)[0][0])
        raise LabelError(
            f"codec packed, column log_probs: an unused slot (id {codec.num_classes}) of row {row} has a "
            "log-probability; expected -inf",
            position=row,
        )
    in_order = (log_probs[:, 1:] <= log_probs[:, :-1]) & (unused[:, 1:] >= unused[:, :-1])
    if in_order.all():
        return ids, log_probs, counts
    order = np.lexsort((-log_probs, unused), axis=1)
    exact = 0 if codec.sampling is None else codec.sampling.exact
    moved = (order[:, :exact] >= exact).any(axis=1)
    if moved.any():
        row = first_row + int(np.flatnonzero(moved)[0])
        raise LabelError(
            f"codec packed, column log_probs: a drawn slot of row {row} is more likely than an exact one; expected the "
            f"{exact} most likely classes in the exact slots",
            position=row,
        )
    counts = None if counts is None else np.take_along_axis(counts, order, 1)
    return np.take_along_axis(ids, order, 1), np.take_along_axis(log_probs, order, 1), counts


def _tail_steps(
    codec: PackedCodec,
    tail_NG: np.ndarray,
    used_NK: np.ndarray,
    finite_NK: np.ndarray,
    support_N: np.ndarray | None,
    means_N: np.ndarray | None,
) -> np.ndarray:
    """Returns the steps [N, G - 1] between the tail and what is expected, in the order in which they are read."""
    assert codec.step is not None
    exact = codec.k if codec.sampling is None else codec.sampling.exact
    known = np.zeros((len(tail_NG), tail_NG.shape[1] + 2))
    if support_N is None:
        dropped_N = codec.num_classes - used_NK[:, :exact].sum(axis=1)
    else:
        dropped_N = support_N.astype(np.float64) - finite_NK[:, :exact].sum(axis=1)
    known[:, 0] = np.log(np.maximum(dropped_N, 1.0))
    if means_N is not None:
        known[:, 1] = means_N
    known[:, 2:] = np.where(np.isneginf(tail_NG), 0.0, np.maximum(tail_NG, -MAX_NEG_LOG_PROB))
    weights = tail_weights(codec.temperatures, slope=codec.stats)
    steps = np.zeros((len(tail_NG), len(weights)), np.int64)
    for row, column in enumerate(range(known.shape[1] - 1, 2, -1)):
        expected_N = known @ weights[row]
        steps[:, row] = np.rint((known[:, column] - expected_N) / codec.step)
        known[:, column] = expected_N + steps[:, row] * codec.step
    return steps


def _steps(nats: np.ndarray, step: float) -> np.ndarray:
    """Whole steps, int64, of numbers that are equal beyond `MAX_NEG_LOG_PROB`."""
    return np.rint(np.clip(nats.astype(np.float64), -MAX_NEG_LOG_PROB, MAX_NEG_LOG_PROB) / step).astype(
        np.int64
    )


def _zigzag(numbers: np.ndarray) -> np.ndarray:
    return (numbers << 1) ^ (numbers >> 63)


def _bits(numbers: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(numbers, np.float32).view(np.uint32)
