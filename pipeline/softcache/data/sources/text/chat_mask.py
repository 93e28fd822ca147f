"""Which part of a rendered chat the assistant writes, derived from how its template renders the turns.

Published templates (of Qwen, Llama 3, Gemma 3, gpt-oss) mark no passages, and many render an earlier turn otherwise once
another follows, for instance without its reasoning. For an assistant's message i of a chat that renders to F:

    start   where render(messages[:i], prompt=True), what a server would let the model continue, ends in F. It must be a
            prefix of F; or what is before the reasoning part that it opens, if the turn has none or another in F. Of a
            chat's first message: where F begins to differ from the chat with another content in it.
    end     where render(messages[:i + 1]) ends in F, if that is a prefix of F; else where F is the same again as the chat
            with another content in message i, and the special token after that, which ends the turn.

White space after the token that ends a turn is the template's, not the model's. What fits none of these is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from softcache.errors import SourceError

__all__ = ["Passages", "Render", "assistant_passages"]

Passages = list[tuple[int, int]]
REASONING_OPENED = re.compile(r"<think>\s*(</think>\s*)?$")
# Two contents that share no first and no last character, so that one of them differs from any content in either.
OTHER_CONTENTS = ("x another content x", "y another content y")


class Render(Protocol):
    """Renders messages by a template; with `prompt`, the start of the assistant's next turn follows."""

    def __call__(self, messages: Sequence[Mapping[str, Any]], *, prompt: bool = False) -> str: ...


def assistant_passages(
    messages: Sequence[Mapping[str, Any]],
    render: Render,
    *,
    special: Sequence[str],
    key: str,
    is_learnt: Sequence[bool] | None = None,
) -> tuple[str, Passages]:
    """Returns a chat's text, and the characters [first, last) of it that the assistant writes.

    Args:
        special: the texts of the tokenizer's special tokens, longest first.
        key: of the document, for errors.
        is_learnt: of each message, whether it counts; None: all of the assistant's do.

    Raises:
        SourceError: the template does not show which part that is.
    """
    text, passages = render(messages), list[tuple[int, int]]()
    pattern = "|".join(map(re.escape, special)) or r"(?!)"
    for number, message in enumerate(messages):
        if message.get("role") != "assistant" or (is_learnt is not None and not is_learnt[number]):
            continue
        passage = _passage(messages, number, render, text, pattern)
        if passage is None or (passages and passage[0] < passages[-1][1]):
            raise SourceError(
                f"document {key!r}: the chat template does not show which part of it message {number}, the assistant's, is; "
                "put {% generation %} … {% endgeneration %} around the assistant's words in a copy of the template, and "
                "name that as source.chat_template"
            )
        passages.append(passage)
    return text, passages


def _passage(
    messages: Sequence[Mapping[str, Any]], number: int, render: Render, text: str, pattern: str
) -> tuple[int, int] | None:
    """Returns the characters of message `number`; None where they are not clear."""
    start = _start(messages, number, render, text, pattern)
    end = None if start is None else _end(messages, number, render, text, pattern, start)
    if start is None or end is None or end < start + bool(messages[number].get("content")):
        return None
    return start, end


def _start(
    messages: Sequence[Mapping[str, Any]], number: int, render: Render, text: str, pattern: str
) -> int | None:
    if number == 0:  # templates refuse a chat without messages
        others = [render(_with_content(messages, 0, other)) for other in OTHER_CONTENTS]
        start = min(_num_common(text, other) for other in others)
        opened = REASONING_OPENED.search(text[:start])
        return None if text in others else opened.start() if opened else start
    prompt = render(messages[:number], prompt=True)
    if text.startswith(prompt):
        content = _num_common(text, render(_with_content(messages, number, OTHER_CONTENTS[0])))
        is_headed = re.search(pattern, text[len(prompt) : content]) is not None
        # A template that writes a turn's header, and no prompt for it, does not show where the header ends.
        return None if is_headed and prompt == render(messages[:number]) else len(prompt)
    # Where the prompt opens a reasoning part, this turn may be rendered without it, or with another one.
    opened = REASONING_OPENED.search(prompt)
    return opened.start() if opened and text.startswith(prompt[: opened.start()]) else None


def _end(
    messages: Sequence[Mapping[str, Any]], number: int, render: Render, text: str, pattern: str, start: int
) -> int | None:
    message = messages[number]
    content = message.get("content")
    if content and text == render(_with_content(messages, number, OTHER_CONTENTS[0])):
        return None  # the template leaves it out
    so_far = render(messages[: number + 1])
    if text.startswith(so_far):
        closing = re.search(rf"({pattern})\s*$", so_far[start:])
        return start + closing.end(1) if closing else len(so_far)
    # What follows the turn is the same where it has another content, whose last character differs.
    without_calls = {key: value for key, value in message.items() if key != "tool_calls"}
    plain = [*messages[:number], without_calls, *messages[number + 1 :]]
    others = [render(_with_content(plain, number, other)) for other in OTHER_CONTENTS]
    end = len(text) - min(_num_common(text[::-1], other[::-1]) for other in others)
    if closing := re.match(rf"\s*({pattern})", text[end:]):
        # As the last turn it ends in a token, too; so what follows is no header of the next turn.
        as_last = render(_with_content(plain[: number + 1], number, OTHER_CONTENTS[0]))
        tail = as_last[as_last.rfind(OTHER_CONTENTS[0]) + len(OTHER_CONTENTS[0]) :]
        if re.match(rf"\s*({pattern})", tail):
            return end + closing.end(1)
    return end


def _with_content(
    messages: Sequence[Mapping[str, Any]], number: int, content: str
) -> list[Mapping[str, Any]]:
    return [*messages[:number], {**messages[number], "content": content}, *messages[number + 1 :]]


def _num_common(one: str, other: str) -> int:
    """Returns how many first characters two texts have in common."""
    pairs = zip(one, other, strict=False)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
