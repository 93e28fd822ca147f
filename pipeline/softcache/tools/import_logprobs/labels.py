"""Answers beside the source's tokens: the labels of a batch's rows.

An answer is believed only where its token ids are the source's; the first that differs is named. Label row t is the
distribution over token t + 1.
"""

from __future__ import annotations

import numpy as np

from softcache.cache.codecs import Codec
from softcache.data.sources.text.source import TokenSource
from softcache.data.tokens import TokenBatch
from softcache.errors import AlignmentError, LabelError
from softcache.labels import SoftLabels, concat
from softcache.tools.import_logprobs.formats import read_given
from softcache.tools.import_logprobs.index import Responses
from softcache.tools.import_logprobs.jsonl import Answer
from softcache.tools.import_logprobs.record import make_record

__all__ = ["label_batch"]


def label_batch(batch: TokenBatch, source: TokenSource, responses: Responses, codec: Codec) -> SoftLabels:
    """Returns the labels of a batch's rows."""
    ends = np.cumsum(batch.row_counts)
    positions_P, targets_P = batch.positions, batch.targets.numpy()
    records = []
    for number, sample in enumerate(batch.samples.tolist()):
        rows = slice(ends[number] - batch.row_counts[number], ends[number])
        answer = responses.answer(sample, source.key(sample))
        tokens = batch.tokens[number, : batch.lengths[number]].tolist()
        given = _rows_of(answer, tokens, positions_P[rows].tolist())
        try:
            records.append(make_record(given, targets_P[rows], codec))
        except LabelError as error:
            at = int(positions_P[rows][error.position])
            raise LabelError(
                f"{answer.place}, position {at}, over token {at + 1}: {error}", position=at
            ) from error
    return concat(records)


def _rows_of(answer: Answer, tokens: list[int], positions: list[int]) -> list[dict[int, float]]:
    """Returns the log-probabilities by id of every label row of a sample.

    Args:
        tokens: the sample's, as the source has them.
        positions: the rows' positions in it; row t is over token t+1.

    Raises:
        AlignmentError: the answer is of other tokens; the first is named.
        LabelError: a row is missing or malformed.
    """
    given, place = read_given(answer), answer.place
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
