"""The shapes in which servers write log-probabilities. There are three, tried in this order:

1.  vLLM's `prompt_logprobs` with `prompt_token_ids`. Entry i is the distribution over token i given those before
    it, so label row t is entry t+1, and entry 0 is null. A request gets both with "prompt_logprobs": K and
    "return_token_ids": true (vLLM 0.10.2 or later).

        "prompt_token_ids": [5, 9, …],
        "prompt_logprobs": [null, {"9": {"logprob": -1.2, "rank": 3, "decoded_token": " a"}, "4": {…}}, …]
        "prompt_logprobs": [null, {"9": -1.2, "4": -0.7}, …]

2.  Completions with "echo": true and "logprobs": K. Tokens must be written as ids ("return_tokens_as_token_ids":
    true): as text they are ambiguous, because several ids may have one text, so text is refused. Tokens that were
    generated after the prompt are left out, if `usage.prompt_tokens` is given.

        "logprobs": {"tokens": ["token_id:5", "token_id:9", …], "token_logprobs": [null, -1.2, …],
                     "top_logprobs": [null, {"token_id:4": -0.7, "token_id:9": -1.2}, …]}

3.  Chat completions with "logprobs": true, "top_logprobs": K, "return_tokens_as_token_ids": true and
    "return_token_ids": true: `prompt_token_ids` and after them the generated tokens, in `content`, are the sample's
    tokens. Only what was generated has distributions, so the sample may have one learnt passage, the last; for
    several turns of the assistant use shape 1.

        "prompt_token_ids": [5, 9],
        "logprobs": {"content": [{"token": "token_id:4", "logprob": -0.7,
                                  "top_logprobs": [{"token": "token_id:4", "logprob": -0.7}, …]}, …]}

`parse_logprobs` checks the whole answer's form, but a row only when it is read (`Given.read`): rows that the source does not
want need not be well-formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from softcache.errors import LabelError
from softcache.tools.import_logprobs.jsonl import Answer, LineLocation, expect

__all__ = ["ParsedLogprobs", "parse_logprobs"]


class ParsedLogprobs(NamedTuple):
    """The log-probabilities of an answer, whichever its shape.

    Attributes:
        tokens: their ids.
        rows: for each token the distribution over it, as it was written; None where there is none.
        read: makes one of `rows` into log-probabilities by id.
        num_prompt: how many of the tokens were sent; None if the answer lacks it.
    """

    tokens: list[int]
    rows: list[Any]
    read: Callable[[Any], dict[int, float]]
    num_prompt: int | None


def parse_logprobs(answer: Answer) -> ParsedLogprobs:
    """Returns the tokens and log-probabilities of an answer.

    Raises:
        LabelError: it has none of the shapes.
    """
    place, logprobs = answer.place, answer.field("logprobs", dict) or {}
    prompt_ids, prompt_rows = answer.field("prompt_token_ids", list), answer.field("prompt_logprobs", list)
    if prompt_ids is not None and prompt_rows is not None:
        _check_aligned(place, prompt_token_ids=prompt_ids, prompt_logprobs=prompt_rows)
        return ParsedLogprobs(prompt_ids, prompt_rows, _prompt_row, len(prompt_ids))
    if logprobs.get("tokens") is not None:
        return _echoed(answer, logprobs)
    if prompt_ids is not None and logprobs.get("content") is not None:
        content = expect(place, "logprobs.content", logprobs["content"], list)
        texts = [expect(place, "logprobs.content[]", entry, dict).get("token") for entry in content]
        tokens = [*prompt_ids, *_token_ids(place, "logprobs.content", texts)]
        return ParsedLogprobs(tokens, [None] * len(prompt_ids) + content, _chat_row, len(prompt_ids))
    if prompt_rows is not None or logprobs.get("content") is not None:
        raise LabelError(
            f"{place}: no prompt_token_ids with the log-probabilities, so they cannot be compared with the source; ask "
            'with "return_token_ids": true (vLLM 0.10.2 or later)'
        )
    raise LabelError(
        f"{place}: no log-probabilities: expected prompt_logprobs with prompt_token_ids, logprobs.tokens (echo), or "
        "logprobs.content (chat); docs/how-to/import-logprobs.md shows the request"
    )


def _echoed(answer: Answer, logprobs: Mapping[str, Any]) -> ParsedLogprobs:
    names = ("tokens", "token_logprobs", "top_logprobs")
    texts, own, top = (expect(answer.place, f"logprobs.{name}", logprobs.get(name), list) for name in names)
    _check_aligned(answer.place, tokens=texts, top_logprobs=top, token_logprobs=own)
    tokens = _token_ids(answer.place, "logprobs.tokens", texts)
    rows = [None if row[1:] == (None, None) else row for row in zip(tokens, own, top, strict=True)]
    usage = answer.field("usage", dict) or {}
    return ParsedLogprobs(tokens, rows, _echo_row, usage.get("prompt_tokens"))


def _check_aligned(place: LineLocation, **lists: list[Any]) -> None:
    """Raises unless the lists are of one length and the last begins with null, as servers write it."""
    sizes = {name: len(values) for name, values in lists.items()}
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise LabelError(
            f"{place}: {found} entries; expected as many of each: entry i is of token i, and of the first token null"
        )
    name, values = list(lists.items())[-1]
    if values and values[0] is not None:
        raise LabelError(
            f"{place}: {name}[0] is not null, but nothing comes before the first token: entry i must be the distribution "
            "over token i, not over the one after it (and of a completion, the echo); import what the server sent"
        )


def _token_ids(place: LineLocation, name: str, texts: list[Any]) -> list[int]:
    try:
        return [_id_in(text) for text in texts]
    except (AttributeError, ValueError) as error:
        raise LabelError(f"{place}: {name}: {error}") from error


def _id_in(text: str) -> int:
    if not text.startswith("token_id:"):
        raise ValueError(
            f"{text!r} is not 'token_id:NUMBER'; several ids may have one text, so text does not say which is meant; ask "
            'with "return_tokens_as_token_ids": true, or start vLLM with --return-tokens-as-token-ids'
        )
    return int(text[9:])


def _prompt_row(row: Any) -> dict[int, float]:
    pairs = ((int(key), value["logprob"] if isinstance(value, dict) else value) for key, value in row.items())
    return _distinct(pairs, len(row))


def _echo_row(row: Any) -> dict[int, float]:
    token, own, top = row
    top = top or {}
    values = _distinct(((_id_in(text), value) for text, value in top.items()), len(top))
    return values if own is None else {token: own} | values


def _chat_row(row: Any) -> dict[int, float]:
    top = row.get("top_logprobs") or []
    values = _distinct(((_id_in(entry["token"]), entry["logprob"]) for entry in top), len(top))
    return {_id_in(row["token"]): row["logprob"]} | values


def _distinct(pairs: Iterable[tuple[int, float]], count: int) -> dict[int, float]:
    values = dict(pairs)
    if len(values) != count:
        raise ValueError("a token comes twice")
    return values
