"""Log-probabilities by token id, row by row, to a label record.

What is kept of a row are the K most likely of the tokens given, the rest of the K slots stay unused. Servers write
-9999 for log 0; so it is read. `log_tail` is known at T=1 only, as what is missing to 1 (at least the mass of the
tokens that were given and not kept): served numbers are float32 or were float16, so the tail's mass is known to
about 1e-6, where a cache that softcache captured has all of its digits. Where rounding leaves nothing, it is 2^-24.
There are no `stats`, and a temperature other than 1 is refused: the shape of the tail is not known.

Shapes: R rows, E entries of all rows one after the other, K kept entries of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from softcache.cache.codecs import Codec
from softcache.errors import LabelError
from softcache.labels import SoftLabels

__all__ = ["make_record"]

LOG_ZERO = -9999.0  # what vLLM and OpenAI write for -inf, which JSON has not
ROUNDING = 1e-3  # of a log-probability above 0, and of a sum above 1: float16 near 1 has steps of 5e-4
LEAST_TAIL = 2.0**-24


def make_record(rows: list[dict[int, float]], targets_R: np.ndarray, codec: Codec) -> SoftLabels:
    """Returns the K most likely of each row's tokens, ties by lower id, and what is left of 1.

    Raises:
        LabelError: as `_entries`, or the actual token is not among those given.
    """
    row_of, ids, log_probs = _entries(rows, codec.num_classes)
    target_log_prob_R = np.full(len(rows), np.nan)
    is_target = ids == targets_R[row_of]
    target_log_prob_R[row_of[is_target]] = log_probs[is_target]
    for row in np.flatnonzero(np.isnan(target_log_prob_R))[:1]:
        raise LabelError(
            f"the actual token, {targets_R[row]}, is not among those given; is entry i over token i?",
            position=int(row),
        )
    order = np.lexsort((ids, -log_probs, row_of))
    ids, log_probs = ids[order], log_probs[order]
    counts_R = np.bincount(row_of, minlength=len(rows))
    rank = np.arange(len(ids)) - (np.cumsum(counts_R) - counts_R)[row_of]
    kept = (rank < codec.k) & (log_probs > -np.inf)
    ids_RK = np.full((len(rows), codec.k), codec.num_classes, np.int64)
    log_probs_RK = np.full((len(rows), codec.k), -np.inf)
    ids_RK[row_of[kept], rank[kept]], log_probs_RK[row_of[kept], rank[kept]] = ids[kept], log_probs[kept]
    dropped_R = np.bincount(row_of[~kept], np.exp(log_probs[~kept]), len(rows))  # given, and not kept
    left_R = np.maximum(1.0 - np.exp(log_probs_RK).sum(1), np.maximum(dropped_R, LEAST_TAIL))
    tail_R = np.where(counts_R == codec.num_classes, dropped_R, left_R)  # all are given: nothing is left
    with np.errstate(divide="ignore"):
        log_tail_R = np.log(tail_R)
    return SoftLabels(
        ids=ids_RK,
        log_probs=log_probs_RK.astype(np.float32),
        log_tail=log_tail_R.astype(np.float32)[:, None],
        num_classes=codec.num_classes,
        temperatures=codec.temperatures,
        target_log_prob=target_log_prob_R.astype(np.float32),
        max_temperature=codec.max_temperature,
    )


class _Entries(NamedTuple):
    """What is given for some rows, one entry after the other, the rows ascending: [E] each."""

    row_of: np.ndarray
    ids: np.ndarray
    log_probs: np.ndarray


def _entries(rows: list[dict[int, float]], num_classes: int) -> _Entries:
    """Returns the entries of some rows, checked.

    Raises:
        LabelError: an id outside of the vocabulary, or what cannot be log-probabilities; `position` is the row's index.
    """
    row_of = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    try:
        ids = np.array([token for row in rows for token in row], np.int64)
        log_probs = np.array([value for row in rows for value in row.values()], np.float64)
    except (OverflowError, TypeError, ValueError) as error:
        if len(rows) > 1:
            for number, row in enumerate(rows):  # find the row
                try:
                    _entries([row], num_classes)
                except LabelError as found:
                    raise LabelError(str(found), position=number) from error
        raise LabelError(f"holds something else than ids and numbers: {error}", position=0) from error
    outside = (ids < 0) | (ids >= num_classes)
    for at in np.flatnonzero(outside)[:1]:
        raise LabelError(
            f"token {ids[at]} is outside of the vocabulary of {num_classes}; is source.tokenizer the server's?",
            position=int(row_of[at]),
        )
    for at in np.flatnonzero(~(log_probs <= ROUNDING))[:1]:  # NaN is neither above nor below
        raise LabelError(
            f"token {ids[at]} has log-probability {log_probs[at]:g}; expected at most 0",
            position=int(row_of[at]),
        )
    log_probs = np.where(log_probs <= LOG_ZERO, -np.inf, np.minimum(log_probs, 0.0))
    sum_R = np.bincount(row_of, np.exp(log_probs), len(rows))
    for row in np.flatnonzero(sum_R > 1 + ROUNDING)[:1]:
        raise LabelError(
            f"the probabilities sum to {sum_R[row]:.6f}; expected at most 1: are these log-probabilities at T=1?",
            position=int(row),
        )
    return _Entries(row_of, ids, log_probs)
