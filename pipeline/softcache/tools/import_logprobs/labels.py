"""Soft labels of a batch from a server's answers.

An answer is used only where its token ids equal the source's; the first difference is named in the error. Label row t is
the distribution over token t + 1.

The K most likely of the given tokens are kept; further slots stay unused. Servers write -9999 for log 0. `log_tail` is
known at T=1 only, as what is missing to 1 (at least the mass of the tokens that were given and not kept): served numbers
are float32 or were float16, so the tail mass is known to about 1e-6, whereas a captured cache has full precision. Where
rounding leaves nothing, it is 2^-24. There are no `stats`, and a temperature other than 1 is refused, because the shape
of the tail is unknown.

A server that renormalizes over its top-k or top-p leaves nothing, either: that of one row may be a confident teacher, but
not where it is every row, and in some of them the least likely token that is given is likely. Such labels are of a teacher
that is truncated so, and are taken as that only if the caller declares it; their tail mass is 0.

Shapes: R rows, E entries of all rows one after the other, K kept entries of a row.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from softcache.cache.codecs import Codec
from softcache.data.sources.text.source import TokenSource
from softcache.data.tokens import TokenBatch
from softcache.errors import AlignmentError, LabelError
from softcache.labels import SoftLabels, concat
from softcache.runtime.logging import log_info
from softcache.tools.import_logprobs.formats import LOG_ZERO, parse_logprobs
from softcache.tools.import_logprobs.index import Responses
from softcache.tools.import_logprobs.jsonl import Answer, LineLocation

__all__ = ["build_labels", "check_not_renormalized", "label_batch"]


ROUNDING = 1e-3  # of a log-probability above 0, and of a sum above 1: float16 near 1 has steps of 5e-4
MISSING = 0.02  # of 1, beyond which it is no rounding: the numbers may be bfloat16's
LEAST_TAIL = 2.0**-24
# Heads are padded to a multiple of up to 512 rows (152,064 for 151,665 tokens); what they give there is next to nothing.
MAX_PADDING, MAX_PADDING_MASS = 1024, 1e-3
WHOLE = 1e-4  # how far from 1 the sum of a renormalized row may be: numbers may be written with four digits
LEAST_ROWS, LIKELY = 64, 10 * WHOLE
"""Rows of a unit from which on it is looked at, and a token without which no model would leave all others nothing."""


def build_labels(
    rows: list[dict[int, float]], targets_R: np.ndarray, codec: Codec, *, is_truncated: bool = False
) -> tuple[SoftLabels, np.ndarray]:
    """Returns the K most likely of each row's tokens, ties by lower id, and what is left of 1; and where nothing is.

    Args:
        is_truncated: the tokens that are given are all that the teacher has.

    Returns:
        The labels; [R] the probability of the least likely token that is given, of rows that sum to 1 without being the
        whole vocabulary, NaN of all others.

    Raises:
        LabelError: as `_entries` and `_check_likeliest`, the actual token is not among those given, or a truncated row does
            not sum to 1.
    """
    row_of, ids, log_probs = _entries(rows, codec.num_classes)
    is_padding = ids >= codec.num_classes
    padding_R = np.bincount(row_of[is_padding], np.exp(log_probs[is_padding]), len(rows))
    row_of, ids, log_probs = row_of[~is_padding], ids[~is_padding], log_probs[~is_padding]
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
    dropped_R = padding_R + np.bincount(
        row_of[~kept], np.exp(log_probs[~kept]), len(rows)
    )  # given, and not kept
    sum_R = padding_R + np.bincount(row_of, np.exp(log_probs), len(rows))
    for row in np.flatnonzero(np.abs(sum_R - 1) > ROUNDING)[:1] if is_truncated else ():
        raise LabelError(
            f"the probabilities sum to {sum_R[row]:.6f}; expected 1 of a truncated teacher: drop --truncated",
            position=int(row),
        )
    _check_likeliest(_Entries(row_of, ids, log_probs), targets_R, sum_R, counts_R, codec.num_classes)
    left_R = np.maximum(1.0 - np.exp(log_probs_RK).sum(1), np.maximum(dropped_R, LEAST_TAIL))
    is_all_R = counts_R == codec.num_classes
    tail_R = np.where(is_all_R | is_truncated, dropped_R, left_R)  # all are given: nothing is left
    least_R = np.full(len(rows), np.inf)
    is_possible = log_probs > -np.inf
    np.minimum.at(least_R, row_of[is_possible], np.exp(log_probs[is_possible]))
    least_R[is_all_R | (np.abs(sum_R - 1) > WHOLE)] = np.nan
    with np.errstate(divide="ignore"):
        log_tail_R = np.log(tail_R)
    labels = SoftLabels(
        ids=ids_RK,
        log_probs=log_probs_RK.astype(np.float32),
        log_tail=log_tail_R.astype(np.float32)[:, None],
        num_classes=codec.num_classes,
        temperatures=codec.temperatures,
        target_log_prob=target_log_prob_R.astype(np.float32),
        max_temperature=codec.max_temperature,
    )
    return labels, least_R


def check_not_renormalized(least_R: np.ndarray, num_classes: int, place: LineLocation) -> None:
    """Raises LabelError where the rows of a unit can only be renormalized ones.

    Args:
        least_R: as `build_labels` returns it, of all rows.
        place: of the first row.
    """
    if len(least_R) < LEAST_ROWS or np.isnan(least_R).any() or (likely := least_R.max()) < LIKELY:
        return
    raise LabelError(
        f"{place}: the given probabilities sum to 1 in each of the {len(least_R):,} rows from here on, of {num_classes:,} "
        f"tokens, though the least of them is up to {likely:.2g}: the server renormalized them over its top_k or top_p, "
        "and what the others have is lost; ask for those of the model (vLLM: --logprobs-mode raw_logprobs), or give "
        "--truncated, if students shall learn from a teacher that is cut so"
    )


@cache
def _log_padding(num_classes: int) -> None:
    """Logs, once, that ids of a head's padding are counted in the tail."""
    log_info(
        f"responses: some hold tokens at and above {num_classes}, the tokenizer's vocabulary: padding of the server's head, "
        "whose probability is counted in the tail"
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
    outside = (ids < 0) | (ids >= num_classes + MAX_PADDING)
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
    if (is_padding := ids >= num_classes).any():
        padding_R = np.bincount(row_of[is_padding], np.exp(log_probs[is_padding]), len(rows))
        for row in np.flatnonzero(padding_R > MAX_PADDING_MASS)[:1]:
            raise LabelError(
                f"tokens at and above the vocabulary of {num_classes} have a probability of {padding_R[row]:.2g}; expected "
                "none but rounding, of a head's padding; is source.tokenizer the server's?",
                position=int(row),
            )
        _log_padding(num_classes)
    sum_R = np.bincount(row_of, np.exp(log_probs), len(rows))
    for row in np.flatnonzero(sum_R > 1 + ROUNDING)[:1]:
        raise LabelError(
            f"the probabilities sum to {sum_R[row]:.6f}; expected at most 1: are these log-probabilities at T=1?",
            position=int(row),
        )
    return _Entries(row_of, ids, log_probs)


def _check_likeliest(
    entries: _Entries, targets_R: np.ndarray, sum_R: np.ndarray, counts_R: np.ndarray, num_classes: int
) -> None:
    """Raises LabelError where the tokens that are not given cannot have what those that are given lack of 1.

    Each of them has at most what the least of the likeliest has, so many a row gives away logarithms to another base than e,
    and a list of other tokens than the likeliest.
    """
    is_other = (
        entries.ids != targets_R[entries.row_of]
    )  # the actual token is given whether it is likely or not
    least_R = np.ones(len(sum_R))
    np.minimum.at(least_R, entries.row_of[is_other], np.exp(entries.log_probs[is_other]))
    missing_R = np.where(counts_R == num_classes, 0, num_classes + MAX_PADDING - counts_R)
    for row in np.flatnonzero(sum_R + missing_R * least_R < 1 - MISSING)[:1]:
        raise LabelError(
            f"the probabilities sum to {sum_R[row]:.6f}, the least of them is {least_R[row]:.2g}, and "
            + (
                f"each of the other {missing_R[row]:,} tokens is at most that; "
                if missing_R[row]
                else "no token is left; "
            )
            + "expected 1 in all: are these natural logarithms at T=1 of the likeliest tokens?",
            position=int(row),
        )


def label_batch(
    batch: TokenBatch, source: TokenSource, responses: Responses, codec: Codec, *, is_truncated: bool = False
) -> tuple[SoftLabels, np.ndarray]:
    """Returns the labels of a batch's rows, and the probabilities [P] that `build_labels` returns with them."""
    ends = np.cumsum(batch.row_counts)
    positions_P, targets_P = batch.positions, batch.targets.numpy()
    records, least = [], []
    for number, sample in enumerate(batch.samples.tolist()):
        rows = slice(ends[number] - batch.row_counts[number], ends[number])
        answer = responses.answer(sample, source.key(sample))
        tokens = batch.tokens[number, : batch.lengths[number]].tolist()
        given = _rows_of(answer, tokens, positions_P[rows].tolist())
        try:
            labels, least_R = build_labels(given, targets_P[rows], codec, is_truncated=is_truncated)
        except LabelError as error:
            at = int(positions_P[rows][error.position])
            raise LabelError(
                f"{answer.place}, position {at}, over token {at + 1}: {error}", position=at
            ) from error
        records.append(labels)
        least.append(least_R)
    return concat(records), np.concatenate(least)


def _rows_of(answer: Answer, tokens: list[int], positions: list[int]) -> list[dict[int, float]]:
    """Returns the log-probabilities by id of every label row of a sample.

    Args:
        tokens: the sample's, as the source has them.
        positions: the rows' positions in it; row t is over token t+1.

    Raises:
        AlignmentError: the answer is of other tokens; the first is named.
        LabelError: a row is missing or malformed.
    """
    given, place = parse_logprobs(answer), answer.place
    length = min(len(tokens), len(given.tokens))
    if given.tokens[:length] != tokens[:length]:
        at = next(i for i in range(length) if given.tokens[i] != tokens[i])
        raise AlignmentError(
            f"{place}, position {at}: the server saw token {given.tokens[at]!r}, the source has {tokens[at]}; send the "
            "sample's token ids as the prompt, not its text, to a model of source.tokenizer"
        )
    if len(given.tokens) > len(tokens) and given.num_prompt != len(tokens):
        raise AlignmentError(
            f"{place}, position {len(tokens)}: the server saw {given.num_prompt or len(given.tokens)} tokens, the source's "
            f"sample has {len(tokens)}; send the sample's token ids as the prompt (of an echo, keep usage.prompt_tokens)"
        )
    rows = []
    for t in positions:
        row = given.rows[t + 1] if t + 1 < len(given.tokens) else None
        if row is None:
            raise LabelError(
                f"{place}, position {t}: no log-probabilities over token {t + 1} of {len(tokens)}; the answer has "
                f"{len(given.tokens)} tokens, {given.num_prompt} of them sent; send the whole sample as the prompt"
            )
        try:
            rows.append(given.read(row))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise LabelError(
                f"{place}, position {t}: the log-probabilities over token {t + 1} are malformed: {error or type(error)}"
            ) from error
    return rows
