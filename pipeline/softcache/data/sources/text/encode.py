"""Documents as tokens: texts, chats, and ids that are there already."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from softcache.data.sources.text.chat import ChatEncoder, check_offsets, mark_tokens, tokenize
from softcache.data.sources.text.documents import Document
from softcache.data.sources.text.packing import Encoded
from softcache.data.sources.text.special_tokens import SpecialTokens
from softcache.errors import SourceError

if TYPE_CHECKING:
    from softcache.data.sources.text.settings import TextSettings

__all__ = ["DocumentEncoder", "UnknownTokens", "batches"]

BATCH_DOCUMENTS, BATCH_CHARACTERS = 1024, 2**20
"""What the tokenizer gets at once: what it returns takes some 150 bytes a token until it is an array."""

MAX_LOG_PROB = 1e-4
"""Rounding of a log-probability of 0, as engines in half precision write it."""


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yields documents in lists of at most `BATCH_DOCUMENTS`, which end where they have `BATCH_CHARACTERS`."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.size
        if len(batch) == BATCH_DOCUMENTS or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class UnknownTokens:
    """Counts the tokens that stand for what a tokenizer does not know; none of one that uses another token for it."""

    def __init__(self, tokenizer: Any) -> None:
        number, others = tokenizer.unk_token_id, (tokenizer.bos_token_id, tokenizer.eos_token_id)
        self._id = None if number in others else number
        self.count = self.total = 0

    def add(self, tokens: np.ndarray) -> None:
        self.total += len(tokens)
        if self._id is not None:
            self.count += int((tokens == self._id).sum())


class DocumentEncoder:
    """Encodes documents.

    Args:
        around: what the tokenizer puts around a text.
        of: names the documents in errors.
    """

    def __init__(self, tokenizer: Any, settings: TextSettings, around: SpecialTokens, *, of: str) -> None:
        self._tokenizer, self._around, self._of = tokenizer, around, of
        self._settings, self._vocab_size = settings, len(tokenizer)
        self._chat = ChatEncoder(tokenizer, settings)

    def all(self, documents: Iterable[Document]) -> list[Encoded]:
        """Returns documents as tokens, encoded batch by batch."""
        return [encoded for batch in batches(documents) for encoded in self(batch)]

    def __call__(self, batch: Iterable[Document]) -> Iterator[Encoded]:
        for encode, group in groupby(batch, self._encoder):
            yield from encode(list(group))

    def _encoder(self, document: Document) -> Any:
        if document.tokens is not None:
            return self._ids
        if document.log_probs is not None:
            return self._rollouts
        return self._chat if len(document.messages) else self._texts

    def _texts(self, batch: Sequence[Document]) -> Iterator[Encoded]:
        prefix = self._around.prefix
        if given := any(document.num_given for document in batch):
            check_offsets(self._tokenizer, self._settings.tokenizer)
        encoded = tokenize(self._tokenizer, [document.text for document in batch], with_offsets=given)
        for number, document in enumerate(batch):
            ids = encoded["input_ids"][number]
            learnt = np.full(len(ids), not document.num_given)
            if document.num_given:
                passage = (document.num_given, len(document.text))
                learnt = mark_tokens(encoded["offset_mapping"][number], [passage])
            # Texts that a chat template wrote have them already.
            begins = [self._tokenizer.bos_token_id] if self._settings.bos is False else [*self._around.prefix]
            if begins and ids[: len(begins)] == begins:
                ids, learnt = ids[len(begins) :], learnt[len(begins) :]
            suffix = () if ids[-len(self._around.suffix) :] == [*self._around.suffix] else self._around.suffix
            tokens = np.array([*prefix, *ids, *suffix], np.int32)
            # Without a text, there is nothing that leads to its end.
            has_end = bool(len(ids) and learnt[-1])
            learnt = np.concatenate([np.zeros(len(prefix), bool), learnt, np.full(len(suffix), has_end)])
            yield Encoded(document.key, tokens, learnt, len(prefix), has_prompt=document.num_given > 0)

    def _ids(self, batch: Sequence[Document]) -> Iterator[Encoded]:
        """Yields documents of ids as they are, but for what `source.bos` asks for."""
        prefix = np.array(self._around.prefix, np.int32)
        for document in batch:
            assert document.tokens is not None
            tokens = self._checked(document, document.tokens).astype(np.int32)
            learnt = np.ones(len(tokens), bool)
            if document.learnt is not None:
                learnt = np.array(document.learnt, bool)
            log_probs = _of_tokens(document, learnt)
            has_prefix = len(prefix) > 0 and np.array_equal(tokens[: len(prefix)], prefix)
            if len(tokens) and len(prefix) and not has_prefix:
                self._check_start(document, int(tokens[0]))
                tokens = np.concatenate([prefix, tokens])
                learnt = np.concatenate([np.zeros(len(prefix), bool), learnt])
                if log_probs is not None:
                    log_probs = np.concatenate([np.full(len(prefix), np.nan, np.float32), log_probs])
                has_prefix = True
            elif self._settings.bos is False and tokens[:1].tolist() == [self._tokenizer.bos_token_id]:
                tokens, learnt = tokens[1:], learnt[1:]
                log_probs = None if log_probs is None else log_probs[1:]
            num_prefix = len(prefix) if has_prefix else 0
            has_prompt = document.learnt is not None
            yield Encoded(document.key, tokens, learnt, num_prefix, has_prompt, log_probs)

    def _rollouts(self, batch: Sequence[Document]) -> Iterator[Encoded]:
        """Yields prompts and sampled responses of text: each tokenized by itself, as a policy reads and writes them."""
        prefix = list(self._around.prefix)
        texts = [part for one in batch for part in (one.text[: one.num_given], one.text[one.num_given :])]
        ids = tokenize(self._tokenizer, texts)["input_ids"]
        for document, prompt, response in zip(batch, ids[::2], ids[1::2], strict=True):
            if prompt[: len(prefix)] != prefix:
                prompt = [*prefix, *prompt]
            tokens = np.array([*prompt, *response], np.int32)
            learnt = np.arange(len(tokens)) >= len(prompt)
            yield Encoded(
                document.key, tokens, learnt, len(prefix), True, log_probs=_of_tokens(document, learnt)
            )

    def _checked(self, document: Document, ids: np.ndarray) -> np.ndarray:
        if len(ids) and not (ids.min() >= 0 and ids.max() < self._vocab_size):
            wrong = int(np.flatnonzero((ids < 0) | (ids >= self._vocab_size))[0])
            raise SourceError(
                f"source {self._of}, document {document.key!r}: token {wrong} has the id {ids[wrong]}; expected 0 to "
                f"{self._vocab_size - 1:,}, the ids of source.tokenizer {self._settings.tokenizer!r}; name the tokenizer "
                "that made the ids (of a file without a header, check source.dtype, too)"
            )
        return ids

    def _check_start(self, document: Document, first: int) -> None:
        if self._settings.bos == "auto":
            token = self._tokenizer.convert_ids_to_tokens(self._around.prefix[0])
            raise SourceError(
                f"source {self._of}, document {document.key!r}: starts with id {first}; expected "
                f"{list(self._around.prefix)} ({token}), which tokenizer {self._settings.tokenizer!r} puts in front of each "
                "text; set source.bos = true to add it where it is missing, or false to label documents without it"
            )


def _of_tokens(document: Document, learnt: np.ndarray) -> np.ndarray | None:
    """The log-probabilities of a rollout's tokens [L] float32, NaN where they are given.

    Raises:
        SourceError: they are not one for each sampled token, or are none.
    """
    if document.log_probs is None:
        return None
    found = np.asarray(document.log_probs, np.float64)
    if len(found) != (expected := int(learnt.sum())):
        raise SourceError(
            f"document {document.key!r}: {len(found)} log-probabilities of a response of {expected} tokens; expected one "
            "for each token that was sampled; of a text, write its end token, too, where the policy sampled one, or give "
            "prompt and response as token ids"
        )
    bad = np.flatnonzero(~((found <= MAX_LOG_PROB) & np.isfinite(found)))
    if len(bad):
        raise SourceError(
            f"document {document.key!r}: log-probability {found[bad[0]]} of response token {bad[0]}; expected a finite "
            "number of at most 0, in nats, of the policy that sampled the token"
        )
    of_tokens = np.full(len(learnt), np.nan, np.float32)
    of_tokens[learnt] = found
    return of_tokens
