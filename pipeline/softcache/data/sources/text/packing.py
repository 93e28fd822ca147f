"""Samples of tokens: how documents are cut into them, and which of their positions have a label row.

A sample is a run of at most `seq_len` tokens, cut into *segments*: pieces of one document each.

    packed      documents follow one another; samples are filled to `seq_len`, and a document is cut at their ends
    documents   a sample is one document; a longer one becomes several samples, from its start on
    best_fit    whole documents, longest first, each into the fullest sample that has room for it (best-fit decreasing)

Text is never cut away: what is longer than `seq_len` continues in another sample, where it starts with the tokenizer's
own prefix (BOS) again, because a segment is read by itself. Documents with a prompt (chats, too) never continue:
without their prompt, answers are labels of something else. They are truncated from the right, and what is lost is
counted in the `Account`. A sample's key is that of its first token: DOCUMENT@OFFSET.

A label row exists for position t where token t+1 belongs to the same segment and is to be learned (of a chat, the
assistant's words only). Row t is the distribution over token t+1, so a segment of L tokens has L-1 rows. Attention
stays inside a segment.

Best fit looks at `WINDOW_TOKENS` of documents at a time, so that memory is bounded.

Shapes: L tokens of a sample or document, R label rows.

References:
    Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv:2404.10830: best-fit packing.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from softcache.errors import SourceError

__all__ = [
    "PACKINGS",
    "Account",
    "Encoded",
    "KeyedSample",
    "TokenSample",
    "best_fit",
    "cut_documents",
    "one_sample_per_document",
    "packed",
]

WINDOW_TOKENS = 2**22


class TokenSample(NamedTuple):
    """One sample.

    Attributes:
        tokens: [L] int32.
        segments: [L] int32, the number of the segment that each token belongs to, from 0.
        learnt: [L] bool, whether the token is to be predicted.
        log_probs: [L] float32, of the policy that sampled the token, in nats, NaN where none did; None: of all.
    """

    tokens: np.ndarray
    segments: np.ndarray
    learnt: np.ndarray
    log_probs: np.ndarray | None = None

    @property
    def rows(self) -> np.ndarray:
        """The positions [R] int64 that have a label: row t predicts token t+1 of the same segment.

        >>> TokenSample(np.arange(5), np.array([0, 0, 0, 1, 1]), np.array([1, 1, 0, 1, 1], bool)).rows.tolist()
        [0, 3]
        """
        return np.flatnonzero((self.segments[1:] == self.segments[:-1]) & self.learnt[1:])

    @property
    def content(self) -> np.ndarray:
        """What a fingerprint is taken of: int32 [2, L], tokens, and segment and mask in one number."""
        content = np.empty((2, len(self.tokens)), np.int32)
        content[0] = self.tokens
        content[1] = self.segments * 2 + self.learnt
        return content


class Encoded(NamedTuple):
    """A document in tokens.

    Attributes:
        tokens: [L] int32.
        learnt: [L] bool.
        num_prefix: how many of the first tokens are the tokenizer's own, such as BOS; each piece starts with them.
        has_prompt: whether it is a chat or a prompt with its answer, which must not continue in another sample.
        log_probs: [L] float32, as in `TokenSample`; of a document with a prompt only.
    """

    key: str
    tokens: np.ndarray
    learnt: np.ndarray
    num_prefix: int = 0
    has_prompt: bool = False
    log_probs: np.ndarray | None = None

    def piece(self, start: int, room: int) -> Piece:
        """Returns at most `room` tokens: those from `start` on, after the prefix where it is not the start.

        The first token of a continuation is not learned: what came before it is not there to predict it from.
        """
        if start == 0 or self.num_prefix == 0:
            stop = min(start + room, len(self.tokens))
            log_probs = None if self.log_probs is None else self.log_probs[start:stop]
            return Piece(
                f"{self.key}@{start}", self.tokens[start:stop], self.learnt[start:stop], stop, log_probs
            )
        stop = min(start + room - self.num_prefix, len(self.tokens))
        learnt = np.concatenate([np.zeros(self.num_prefix, bool), self.learnt[start:stop]])
        learnt[self.num_prefix] = False
        tokens = np.concatenate([self.tokens[: self.num_prefix], self.tokens[start:stop]])
        return Piece(f"{self.key}@{start}", tokens, learnt, stop)

    def pieces(self, seq_len: int) -> Iterator[Piece]:
        """Yields the document in pieces of `seq_len` tokens, the last one shorter."""
        stop = 0
        while stop < len(self.tokens):
            yield (piece := self.piece(stop, seq_len))
            stop = piece.stop


class Piece(NamedTuple):
    """A piece of a document, a segment of a sample; `stop` is where the next one starts."""

    key: str
    tokens: np.ndarray
    learnt: np.ndarray
    stop: int
    log_probs: np.ndarray | None = None


class KeyedSample(NamedTuple):
    """A sample under its key."""

    key: str
    sample: TokenSample
    lengths: np.ndarray  # of the segments


@dataclass
class Account:
    """What became of the documents of a table.

    Attributes:
        documents: that have something to learn, in part or whole.
        skipped: documents with nothing to learn.
        truncated: documents cut to `seq_len`.
        cut_tokens: tokens that truncation cut away.
        dropped: documents of which truncation leaves nothing to learn.
        left_out: samples with nothing to learn, such as the last token of a long document alone.
    """

    documents: int = 0
    skipped: int = 0
    truncated: int = 0
    cut_tokens: int = 0
    dropped: int = 0
    left_out: int = 0

    def __str__(self) -> str:
        parts = [
            f"{self.documents:,} documents",
            self.skipped and f"{self.skipped:,} skipped, which have nothing to predict",
            self.truncated and f"{self.truncated:,} truncated by {self.cut_tokens:,} tokens in all",
            self.dropped and f"{self.dropped:,} dropped, of which seq_len holds the prompt alone",
            self.left_out and f"{self.left_out:,} samples left out, which have nothing to predict",
        ]
        return ", ".join(part for part in parts if part)


def cut_documents(
    documents: Iterable[Encoded], *, packing: str, seq_len: int, account: Account
) -> Iterator[KeyedSample]:
    """Yields samples that have something to learn; what is skipped, truncated and left out is counted.

    Args:
        packing: a name of `PACKINGS`.

    Raises:
        SourceError: a document with a prompt is to be "packed", which cuts answers from their prompts.
    """

    def learnable() -> Iterator[Encoded]:
        for document in documents:
            if document.has_prompt and packing == "packed":
                raise SourceError(
                    f'document {document.key!r}: source.packing = "packed" would cut its answer from its prompt; set it to '
                    '"best_fit", or "documents"'
                )
            whole = _truncated(document, seq_len) if document.has_prompt else document
            if not document.learnt[1:].any():
                account.skipped += 1
            elif not whole.learnt[1:].any():
                account.dropped += 1
            else:
                lost = len(document.tokens) - len(whole.tokens)
                account.documents += 1
                account.truncated += lost > 0
                account.cut_tokens += lost
                yield whole

    for pieces in PACKINGS[packing](learnable(), seq_len):
        sample = _concat(pieces)
        if len(sample.rows):
            yield KeyedSample(
                pieces[0].key, sample, np.array([len(piece.tokens) for piece in pieces], np.int32)
            )
        else:
            account.left_out += 1


def _truncated(document: Encoded, seq_len: int) -> Encoded:
    return document._replace(
        tokens=document.tokens[:seq_len],
        learnt=document.learnt[:seq_len],
        log_probs=None if document.log_probs is None else document.log_probs[:seq_len],
    )


def one_sample_per_document(documents: Iterable[Encoded], seq_len: int) -> Iterator[list[Piece]]:
    """Cuts each document by itself, from its start on."""
    for document in documents:
        for piece in document.pieces(seq_len):
            yield [piece]


def packed(documents: Iterable[Encoded], seq_len: int) -> Iterator[list[Piece]]:
    """Fills samples to `seq_len`; shorter are only the last, and one without room for a prefix and a row."""
    pieces: list[Piece] = []
    room = seq_len
    for document in documents:
        stop = 0
        while stop < len(document.tokens):
            if pieces and room <= document.num_prefix + (stop > 0):
                yield pieces
                pieces, room = [], seq_len
            pieces.append(document.piece(stop, room))
            stop = pieces[-1].stop
            room -= len(pieces[-1].tokens)
            if room == 0:
                yield pieces
                pieces, room = [], seq_len
    if pieces:
        yield pieces


def best_fit(documents: Iterable[Encoded], seq_len: int) -> Iterator[list[Piece]]:
    """Puts whole pieces together, longest first, each where the least room is left; samples come in document order."""
    window: list[Piece] = []
    num_tokens = 0
    for document in documents:
        for piece in document.pieces(seq_len):
            window.append(piece)
            num_tokens += len(piece.tokens)
        if num_tokens >= WINDOW_TOKENS:
            yield from _best_fit(window, seq_len)
            window, num_tokens = [], 0
    yield from _best_fit(window, seq_len)


def _best_fit(window: list[Piece], seq_len: int) -> list[list[Piece]]:
    lengths = np.array([len(piece.tokens) for piece in window])
    samples: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # what each sample has left, and its number; ascending
    for number in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[number])
        place = bisect.bisect_left(rooms, (length, -1))
        if place < len(rooms):
            room, sample = rooms.pop(place)
            samples[sample].append(number)
        else:
            room, sample = seq_len, len(samples)
            samples.append([number])
        if room > length:
            bisect.insort(rooms, (room - length, sample))
    return [[window[number] for number in sorted(sample)] for sample in sorted(samples, key=min)]


PACKINGS: dict[str, Callable[[Iterable[Encoded], int], Iterator[list[Piece]]]] = {
    "packed": packed,
    "documents": one_sample_per_document,
    "best_fit": best_fit,
}


def _concat(pieces: list[Piece]) -> TokenSample:
    lengths = [len(piece.tokens) for piece in pieces]
    tokens = np.concatenate([piece.tokens for piece in pieces])
    learnt = np.concatenate([piece.learnt for piece in pieces])
    segments = np.arange(len(pieces), dtype=np.int32).repeat(lengths)
    if all(piece.log_probs is None for piece in pieces):
        return TokenSample(tokens, segments, learnt)
    unknown = (np.full(length, np.nan, np.float32) for length in lengths)
    log_probs = [
        filler if piece.log_probs is None else piece.log_probs
        for piece, filler in zip(pieces, unknown, strict=True)
    ]
    return TokenSample(tokens, segments, learnt, np.concatenate(log_probs))
