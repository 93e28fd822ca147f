"""Chats as tokens, with the assistant's marked.

A chat is what its template writes, special tokens included. Which part of it the assistant writes is marked by the
template ({% generation %}), or derived from how it renders the turns (chat_mask.py), which is checked on every chat.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date, time, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from softcache.data.sources.text.chat_mask import Passages, assistant_passages
from softcache.data.sources.text.documents import Document
from softcache.data.sources.text.packing import Encoded
from softcache.errors import SourceError, SpecError
from softcache.runtime.files import parse_json
from softcache.runtime.optional import text_library

if TYPE_CHECKING:
    from softcache.data.sources.text.settings import TextSettings

__all__ = ["ChatEncoder", "check_offsets", "mark_tokens", "read_tools", "tokenize"]

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_call": "assistant",
}
"""The `from` of ShareGPT's messages, and the `role` that it is."""


TODAY = date(2024, 7, 26)
"""What a template that asks for the date gets: that of Llama 3's templates where there is no clock. Otherwise the tokens of
a chat would differ from day to day, and so would a source."""


class ChatEncoder:
    """Writes chats by the tokenizer's template."""

    def __init__(self, tokenizer: Any, settings: TextSettings) -> None:
        self._tokenizer, self._name, self._bos = tokenizer, settings.tokenizer, settings.bos
        self._arguments, self._tools = settings.template_args, read_tools(settings)
        if clash := sorted({"messages", "tools", "add_generation_prompt"} & self._arguments.keys()):
            raise SpecError(
                f"source.template_args: has {clash[0]!r}, which each chat sets by itself; drop it"
            )

    def __call__(self, batch: Sequence[Document]) -> Iterator[Encoded]:
        """Yields chats with the assistant's tokens marked.

        transformers' own mask is not used: where a marked passage ends in a character that no token covers, such as
        a space that the tokenizer drops, it marks all that follows, the user's words too (5.23).

        Raises:
            SpecError: the tokenizer has no template, or does not know where in a text its tokens are.
            SourceError: the template refuses a chat, or which part of it the assistant writes is not clear.
        """
        self._check()
        rendered = [self._rendered(document) for document in batch]
        encoded = tokenize(self._tokenizer, [text for text, _ in rendered], with_offsets=True)
        found = zip(batch, rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        for document, (_, passages), ids, offsets in found:
            tokens, learnt = np.array(ids, np.int32), mark_tokens(offsets, passages)
            bos = self._tokenizer.bos_token_id
            has_bos = len(tokens) > 0 and tokens[0] == bos
            if self._bos is True and not has_bos:
                tokens, learnt = np.insert(tokens, 0, bos), np.insert(learnt, 0, False)
            elif self._bos is False and has_bos:
                tokens, learnt = tokens[1:], learnt[1:]
            yield Encoded(document.key, tokens, learnt, has_prompt=True)

    def _check(self) -> None:
        if not self._tokenizer.chat_template:
            raise SpecError(
                f"source.tokenizer {self._name!r}: no chat template, which chats need; name a tokenizer that has one, or "
                "a file as source.chat_template"
            )
        check_offsets(self._tokenizer, self._name)

    def _rendered(self, document: Document) -> tuple[str, Passages]:
        """Returns a chat as its template writes it, and where in it the assistant's words are."""
        messages = _messages(document)
        tools = self._tools if document.tools is None else _without_none(list(document.tools))
        template = _with_fixed_date(self._tokenizer.get_chat_template(tools=tools or None))
        library = text_library("transformers.utils.chat_template_utils").render_jinja_template

        def render(messages: Sequence[Mapping[str, Any]], *, mask: bool = False, prompt: bool = False) -> Any:
            try:
                texts, passages = library(
                    conversations=[list(messages)],
                    tools=tools or None,
                    chat_template=template,
                    return_assistant_tokens_mask=mask,
                    add_generation_prompt=prompt,
                    **{**self._tokenizer.special_tokens_map, **self._arguments},
                )
            except Exception as error:  # a template is a program and fails in its own ways
                raise SourceError(
                    f"document {document.key!r}: the chat template refuses it: {type(error).__name__}: {error}; expected "
                    "messages of role and content"
                ) from error
            return (texts[0], passages[0]) if mask else texts[0]

        if any(isinstance(one.get("content"), list | Mapping) for one in messages):
            _check_contents(document, messages, render(messages))
        given = document.num_given  # answers of the prompt itself are given, not learned
        is_learnt = [
            number >= given and _weight(document, number, one) > 0 for number, one in enumerate(messages)
        ]
        if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
            special = _special_texts(self._tokenizer)
            return assistant_passages(
                messages, render, special=special, key=document.key, is_learnt=is_learnt
            )
        text, passages = render(messages, mask=True)
        authors = [number for number, one in enumerate(messages) if one.get("role") == "assistant"]
        if not all(is_learnt[number] for number in authors if number >= given):
            if len(passages) != len(authors):
                raise SourceError(
                    f"document {document.key!r}: {len(passages)} passages that the chat template marks, of {len(authors)} "
                    "messages of the assistant, so which of them has weight 0 is not clear; expected one passage for each; "
                    "name another template as source.chat_template"
                )
            passages = [
                passage for number, passage in zip(authors, passages, strict=True) if is_learnt[number]
            ]
        if not given:
            return text, passages
        prompt = render(messages[:given])
        if not text.startswith(prompt):
            raise SourceError(
                f"document {document.key!r}: the chat template renders its {given} messages of prompt otherwise once the "
                "completion follows, so where that starts is not clear; expected a template that renders turns one by one; "
                "name another as source.chat_template"
            )
        return text, [passage for passage in passages if passage[0] >= len(prompt)]


def check_offsets(tokenizer: Any, name: str) -> None:
    """Raises SpecError where a tokenizer does not know where in a text its tokens are."""
    if not tokenizer.is_fast:
        raise SpecError(
            f"source.tokenizer {name!r}: it cannot say where in a text its tokens are, which chats and prompts need; "
            "name a fast tokenizer (with a tokenizer.json)"
        )


def read_tools(settings: TextSettings) -> list[Any] | None:
    """Returns the JSON schemas in `source.tools`, a file; None where there is none."""
    if settings.tools is None:
        return None
    try:
        tools = parse_json(Path(settings.tools).expanduser().read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(
            f"source.tools {settings.tools!r}: cannot be read: {error}; expected a JSON file with a list of schemas"
        ) from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise SourceError(f"source.tools {settings.tools!r}: expected a list of JSON schemas")
    return tools


def tokenize(tokenizer: Any, texts: list[str], *, with_offsets: bool = False) -> Any:
    """Returns the ids of texts as they are, with nothing put around them.

    Raises:
        SourceError: the tokenizer refuses a text, as one without an unknown token may.
    """
    try:
        return tokenizer(
            texts,
            add_special_tokens=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=with_offsets,
            verbose=False,
        )
    except Exception as error:  # the tokenizers library raises nothing more precise
        if len(texts) > 1:
            for text in texts:  # find it
                tokenize(tokenizer, [text], with_offsets=with_offsets)
        raise SourceError(
            f"source.tokenizer {tokenizer.name_or_path!r}: refuses the text {texts[0][:60]!r}: {type(error).__name__}: "
            f"{error}; expected a tokenizer with a token for what it does not know (unk_token), or texts of its characters"
        ) from error


def mark_tokens(offsets: Any, passages: Iterable[tuple[int, int]]) -> np.ndarray:
    """Returns which tokens [L] bool lie in the passages: from the first that touches one to the last.

    Tokens of whitespace alone may be reported with no width; they count where they start.

    Args:
        offsets: [L, 2], where each token starts and ends in the text.
    """
    offsets = np.asarray(offsets, np.int64).reshape(-1, 2)
    marked = np.zeros(len(offsets), bool)
    starts, ends = offsets[:, 0], offsets[:, 1]
    for first, last in passages:
        inside = np.flatnonzero((starts < last) & ((ends > first) | ((ends == starts) & (starts >= first))))
        if len(inside) and last > first:
            marked[inside[0] : inside[-1] + 1] = True
    return marked


def _with_fixed_date(template: str) -> str:
    """A template whose `strftime_now` is of `TODAY`: a macro of that name; transformers passes no functions on."""
    if "strftime_now" not in template:
        return template
    codes = [*(f"%-{code}" for code in "dmyHIMS"), *(f"%{code}" for code in "aAbBcdfHIjmMpSUwWxXyYzZ")]
    values = {code: TODAY.strftime(code.replace("-", "")) for code in codes}
    values |= {code: value.lstrip("0") or "0" for code, value in values.items() if "-" in code}
    filters = "".join(f"|replace({code!r}, {value!r})" for code, value in values.items())
    # The newline is dropped with the end of the block, and what starts a line in the template still does.
    return "{% macro strftime_now(format) %}{{ format" + filters + " }}{% endmacro %}\n" + template


def _messages(document: Document) -> list[dict[str, Any]]:
    """Returns the messages of a chat as `role` and `content`."""
    messages = []
    for message in document.messages:
        if not isinstance(message, Mapping):
            raise SourceError(
                f"document {document.key!r}: a message is a {type(message).__name__}; expected messages of role and content"
            )
        message = _without_none(dict(message))
        if "from" in message and "role" not in message:
            author = message.pop("from")
            if author not in SHAREGPT_ROLES:
                raise SourceError(
                    f"document {document.key!r}: a message is from {author!r}; expected one of "
                    f"{', '.join(SHAREGPT_ROLES)}"
                )
            message = {"role": SHAREGPT_ROLES[author], "content": message.pop("value", ""), **message}
        if isinstance(message.get("content"), date | time | timedelta):
            raise SourceError(
                f"document {document.key!r}: the content of a message is a {type(message['content']).__name__}, as the "
                "datasets library reads a column of dates, so how it is written is lost; expected text; write the file as "
                "parquet with strings"
            )
        messages.append(message)
    return messages


def _weight(document: Document, number: int, message: Mapping[str, Any]) -> float:
    """Returns the weight of a message, as OpenAI's and Open-Orca's chats have it: 0 of one that is given, not learned."""
    weight = message.get("weight", 1)
    if message.get("role") == "assistant" and weight not in (0, 1):
        raise SourceError(
            f"document {document.key!r}: message {number} has the weight {weight!r}; expected 1, or 0 of what is not "
            "learned; drop the field, or the chats with others"
        )
    return float(weight == 1)


def _check_contents(document: Document, messages: Sequence[Mapping[str, Any]], text: str) -> None:
    """Raises SourceError where a content that is no text, such as a list of parts, stands in a chat as Python writes it."""
    for number, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list | Mapping) and content and str(content) in text:
            raise SourceError(
                f"document {document.key!r}: the content of message {number} is a {type(content).__name__}, which the chat "
                "template writes out as Python does; expected text; join its parts, or name a template that reads them as "
                "source.chat_template"
            )


def _without_none(value: Any) -> Any:
    """Returns a value without the fields that are None: a table fills so what a message lacks, a template expects it
    to be missing."""
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _special_texts(tokenizer: Any) -> list[str]:
    """Returns the texts of the tokens that no text of a user contains, longest first."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
