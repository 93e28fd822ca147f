"""Chats as tokens, with the assistant's marked: a template writes the chat and marks the speaker of each part."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from softcache.data.sources.text.documents import Document
from softcache.data.sources.text.packing import Encoded
from softcache.errors import SourceError, SpecError
from softcache.runtime.optional import text_library

if TYPE_CHECKING:
    from softcache.data.sources.text.settings import TextSettings

__all__ = ["check_chat_template", "encode_chats"]


def check_chat_template(tokenizer: Any, settings: TextSettings) -> None:
    """Raises SpecError where chats are asked for and the tokenizer cannot say which tokens are the assistant's."""
    if not settings.is_chat:
        return
    if not tokenizer.chat_template:
        raise SpecError(
            f"source.tokenizer {settings.tokenizer!r}: no chat template, which source.messages_column needs; name a "
            "tokenizer that has one"
        )
    if not tokenizer.is_fast:
        raise SpecError(
            f"source.tokenizer {settings.tokenizer!r}: it cannot say where in a text its tokens are, which chats need; "
            "name a fast tokenizer (with a tokenizer.json)"
        )
    if not re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()):
        raise SpecError(
            f"source.tokenizer {settings.tokenizer!r}: its chat template marks no assistant tokens; put "
            "{% generation %} … {% endgeneration %} around the assistant's words (see transformers, chat templates)"
        )


def encode_chats(batch: list[Document], tokenizer: Any) -> Iterator[Encoded]:
    """Yields chats with the assistant's tokens marked.

    transformers' own mask is not used: where a marked passage ends in a character that no token covers, such as
    a space that the tokenizer drops, it marks all that follows, the user's words too (5.23).
    """
    rendered = [_rendered(document, tokenizer) for document in batch]
    encoded = tokenizer(
        [words for words, _ in rendered],
        add_special_tokens=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    found = zip(batch, rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    for document, (_, passages), ids, offsets in found:
        learnt = _marked(np.array(offsets, np.int64).reshape(-1, 2), passages)
        yield Encoded(document.key, np.array(ids, np.int32), learnt)


def _rendered(document: Document, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """Returns a chat as its template writes it, and where in it the assistant's words are."""
    if not document.messages:
        return "", []
    render = text_library("transformers.utils.chat_template_utils").render_jinja_template
    try:
        # Tables fill what a message lacks with None; a template expects it to be missing.
        messages = [{k: v for k, v in message.items() if v is not None} for message in document.messages]
        texts, passages = render(
            conversations=[messages],
            chat_template=tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # a template is a program and fails in its own ways
        raise SourceError(
            f"document {document.key!r}: the chat template refuses it: {type(error).__name__}: {error}; expected "
            "messages of role and content"
        ) from error
    return texts[0], passages[0]


def _marked(offsets: np.ndarray, passages: Iterable[tuple[int, int]]) -> np.ndarray:
    """Returns which tokens [L] bool lie in the passages: from the first that touches one to the last.

    Tokens of whitespace alone may be reported with no width; they count where they start.
    """
    marked = np.zeros(len(offsets), bool)
    starts, ends = offsets[:, 0], offsets[:, 1]
    for first, last in passages:
        inside = np.flatnonzero((starts < last) & ((ends > first) | ((ends == starts) & (starts >= first))))
        if len(inside) and last > first:
            marked[inside[0] : inside[-1] + 1] = True
    return marked
