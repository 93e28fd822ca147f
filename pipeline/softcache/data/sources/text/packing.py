"""Samples of tokens: how documents are cut into them, and which of their positions have a label row.

A sample is a run of at most `seq_len` tokens, cut into *segments*: pieces of one document each. With
`packing = "packed"` documents follow one another and a sample is filled to `seq_len`; with "documents" a
sample is one document, and a longer one becomes several samples, from its start on. No token is cut away,
except where a whole sample has nothing to predict (one token alone; a chat's prompt). A sample's key is that
of its first token: DOCUMENT@OFFSET.

A label row exists for position t where token t+1 belongs to the same segment and is to be learnt (chat data:
the assistant's words only). Row t is the distribution over token t+1, so a segment of L tokens has L-1 rows.
Attention stays inside a segment.

Shapes: L tokens of a sample or document, R label rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

__all__ = [
    "Encoded",
    "KeyedSample",
    "Pieces",
    "TokenSample",
    "concat_pieces",
    "one_sample_per_document",
    "packed",
]


class TokenSample(NamedTuple):
    """One sample.

    Attributes:
        tokens: [L] int32.
        segments: [L] int32, the number of the segment that each token belongs to, from 0.
        learnt: [L] bool, whether the token is to be predicted.
    """

    tokens: np.ndarray
    segments: np.ndarray
    learnt: np.ndarray

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
    """A document in tokens."""

    key: str
    tokens: np.ndarray  # [L] int32
    learnt: np.ndarray  # [L] bool


class KeyedSample(NamedTuple):
    """A sample under its key."""

    key: str
    sample: TokenSample
    lengths: np.ndarray  # of the segments


Pieces = list[tuple[np.ndarray, np.ndarray]]


def concat_pieces(pieces: Pieces) -> TokenSample:
    """Returns the sample whose segments are these pieces of documents."""
    lengths = [len(tokens) for tokens, _ in pieces]
    tokens, learnt = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    return TokenSample(tokens, np.arange(len(pieces), dtype=np.int32).repeat(lengths), learnt)


def one_sample_per_document(documents: Iterable[Encoded], seq_len: int) -> Iterator[tuple[str, Pieces]]:
    """Cuts each document by itself, from its start on."""
    for document in documents:
        for start in range(0, len(document.tokens), seq_len):
            piece = slice(start, start + seq_len)
            yield f"{document.key}@{start}", [(document.tokens[piece], document.learnt[piece])]


def packed(documents: Iterable[Encoded], seq_len: int) -> Iterator[tuple[str, Pieces]]:
    """Fills samples to `seq_len`; only the last may be shorter."""
    pieces: Pieces = []
    key, room = "", seq_len
    for document in documents:
        start = 0
        while start < len(document.tokens):
            if not pieces:
                key = f"{document.key}@{start}"
            piece = slice(start, start + room)
            pieces.append((document.tokens[piece], document.learnt[piece]))
            start += len(pieces[-1][0])
            room -= len(pieces[-1][0])
            if room == 0:
                yield key, pieces
                pieces, room = [], seq_len
    if pieces:
        yield key, pieces
