"""The shapes in which servers write log-probabilities, tried in this order (4 to 7 before 3):

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

    llama.cpp's server writes ids as "id" of each entry, and needs no "return_tokens_as_token_ids"; `prompt_token_ids` is
    then what the client sent, in the line.

4.  vLLM's `FlatLogprobs` as `prompt_logprobs`, as `dataclasses.asdict` writes it; without `decoded_tokens` and `ranks`, too.

        "prompt_logprobs": {"start_indices": [0, 0, 2, …], "end_indices": [0, 2, 4, …], "token_ids": [9, 4, …],
                            "logprobs": [-1.2, -0.7, …]}

5.  SGLang's `/generate` with "input_ids", "return_logprob": true, "logprob_start_len": 0 and "top_logprobs_num": K.

        "meta_info": {"prompt_tokens": 2, "input_token_logprobs": [[null, 5, null], [-1.2, 9, null], …],
                      "input_top_logprobs": [null, [[-0.7, 4, null], [-1.2, 9, null]], …]}

6.  llama.cpp's `/completion` with "n_probs": K: what was generated, behind `prompt_token_ids`, which the client writes into
    the line.

        "completion_probabilities": [{"id": 4, "logprob": -0.7, "top_logprobs": [{"id": 4, "logprob": -0.7}, …]}, …]

7.  TGI's `/generate` with "decoder_input_details": true, "details": true and "top_n_tokens": K: what was generated. Of the
    prompt it gives the actual token's log-probability alone, which makes no label.

        "details": {"prefill": [{"id": 5, "logprob": null}, …], "tokens": [{"id": 4, "logprob": -0.7}, …],
                    "top_tokens": [[{"id": 4, "logprob": -0.7}, …], …]}

`parse_logprobs` checks the whole answer's form, but a row only when it is read (`Given.read`): rows that the source does not
want need not be well-formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from softcache.errors import LabelError
from softcache.tools.import_logprobs.jsonl import Answer, LineLocation, expect

__all__ = ["LOG_ZERO", "ParsedLogprobs", "parse_logprobs"]

LOG_ZERO = -9999.0
"""What vLLM and OpenAI write for -inf, which JSON has not."""
SAME, SAME_SHARE = 1e-3, 2.0**-7
"""How far two writings of one log-probability may be apart: four digits, or a step of bfloat16."""


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
    prompt_ids, given = answer.field("prompt_token_ids", list), answer.field("prompt_logprobs", (list, dict))
    if isinstance(given, dict):
        return _flat(answer, prompt_ids, given)
    prompt_rows = given
    if prompt_ids is not None and prompt_rows is not None:
        _check_aligned(place, prompt_token_ids=prompt_ids, prompt_logprobs=prompt_rows)
        return ParsedLogprobs(prompt_ids, prompt_rows, _prompt_row, len(prompt_ids))
    if logprobs.get("tokens") is not None:
        return _echoed(answer, logprobs)
    if (meta := answer.field("meta_info", dict)) is not None and "input_token_logprobs" in meta:
        return _sglang(place, meta)
    if (details := answer.field("details", dict)) is not None and "prefill" in details:
        return _tgi(place, details)
    for name, content in (
        ("completion_probabilities", answer.field("completion_probabilities", list)),
        ("logprobs.content", logprobs.get("content")),
    ):
        if prompt_ids is not None and content is not None:
            entries = [
                expect(place, f"{name}[]", entry, dict) for entry in expect(place, name, content, list)
            ]
            tokens = [*prompt_ids, *_token_ids(place, name, entries)]
            return ParsedLogprobs(tokens, [None] * len(prompt_ids) + entries, _chat_row, len(prompt_ids))
    if answer.field("completion_probabilities", list) is not None:
        raise LabelError(
            f"{place}: completion_probabilities without prompt_token_ids: llama.cpp gives the ids of what was generated "
            "only; write the prompt's ids into the line, as prompt_token_ids"
        )
    if prompt_rows is not None or logprobs.get("content") is not None:
        raise LabelError(
            f"{place}: no prompt_token_ids with the log-probabilities, so they cannot be compared with the source; ask "
            'with "return_token_ids": true (vLLM 0.10.2 or later)'
        )
    raise LabelError(
        f"{place}: no log-probabilities: expected prompt_logprobs with prompt_token_ids, logprobs.tokens (echo), or "
        "logprobs.content (chat), or those of SGLang, llama.cpp or TGI; docs/how-to/import-logprobs.md shows the request"
    )


def _echoed(answer: Answer, logprobs: Mapping[str, Any]) -> ParsedLogprobs:
    names = ("tokens", "token_logprobs", "top_logprobs")
    texts, own, top = (expect(answer.place, f"logprobs.{name}", logprobs.get(name), list) for name in names)
    _check_aligned(answer.place, tokens=texts, top_logprobs=top, token_logprobs=own)
    tokens = _token_ids(answer.place, "logprobs.tokens", texts)
    rows = [None if row[1:] == (None, None) else row for row in zip(tokens, own, top, strict=True)]
    usage = answer.field("usage", dict) or {}
    return ParsedLogprobs(tokens, rows, _echo_row, usage.get("prompt_tokens"))


def _flat(answer: Answer, prompt_ids: list[int] | None, flat: Mapping[str, Any]) -> ParsedLogprobs:
    """Returns what vLLM's `FlatLogprobs` hold."""
    names = ("start_indices", "end_indices", "token_ids", "logprobs")
    place = answer.place
    starts, ends, ids, values = (
        expect(place, f"prompt_logprobs.{name}", flat.get(name), list) for name in names
    )
    if prompt_ids is None:
        raise LabelError(
            f"{place}: no prompt_token_ids with the log-probabilities, so they cannot be compared with the source; write "
            "them into the line"
        )
    if len(starts) != len(ends) or len(ids) != len(values):
        raise LabelError(
            f"{place}: prompt_logprobs has {len(starts)} start_indices, {len(ends)} end_indices, {len(ids)} token_ids and "
            f"{len(values)} logprobs; expected as many starts as ends, and as many ids as log-probabilities"
        )
    spans: list[Any] = [
        None if start == end else (start, end) for start, end in zip(starts, ends, strict=True)
    ]
    _check_aligned(place, prompt_token_ids=prompt_ids, prompt_logprobs=spans)

    def read(span: tuple[int, int]) -> dict[int, float]:
        start, end = span
        if not 0 <= start < end <= len(ids):
            raise ValueError(f"entries {start} to {end} of {len(ids)}")
        return _distinct(zip(ids[start:end], values[start:end], strict=True), end - start)

    return ParsedLogprobs(prompt_ids, spans, read, len(prompt_ids))


def _sglang(place: LineLocation, meta: Mapping[str, Any]) -> ParsedLogprobs:
    """Returns what SGLang gives of a prompt: lists of [log-probability, id, text]."""
    own = expect(place, "meta_info.input_token_logprobs", meta["input_token_logprobs"], list)
    top = expect(place, "meta_info.input_top_logprobs", meta.get("input_top_logprobs"), list)
    _check_aligned(place, input_token_logprobs=own, input_top_logprobs=top)
    try:
        tokens = [int(entry[1]) for entry in own]
    except (IndexError, TypeError, ValueError) as error:
        raise LabelError(
            f"{place}: meta_info.input_token_logprobs: {error}; expected [log-probability, id, text] of each token"
        ) from error
    rows = [None if theirs is None else (mine, theirs) for mine, theirs in zip(own, top, strict=True)]
    return ParsedLogprobs(tokens, rows, _sglang_row, meta.get("prompt_tokens", len(tokens)))


def _sglang_row(row: Any) -> dict[int, float]:
    own, top = row
    return _with_actual(own[1], own[0], _distinct(((entry[1], entry[0]) for entry in top), len(top)))


def _tgi(place: LineLocation, details: Mapping[str, Any]) -> ParsedLogprobs:
    """Returns what TGI gives: of the prompt the ids, of what it generated the likeliest tokens, too."""
    prefill = expect(place, "details.prefill", details["prefill"], list)
    generated = expect(place, "details.tokens", details.get("tokens", []), list)
    top = expect(place, "details.top_tokens", details.get("top_tokens") or [[]] * len(generated), list)
    _check_sizes(place, {"details.tokens": len(generated), "details.top_tokens": len(top)})
    tokens = _token_ids(place, "details", [*prefill, *generated])
    rows = [None, *prefill[1:]][: len(prefill)]
    rows += [entry | {"top_logprobs": likely} for entry, likely in zip(generated, top, strict=True)]
    return ParsedLogprobs(tokens, rows, _tgi_row, len(prefill))


def _tgi_row(row: Any) -> dict[int, float]:
    if "top_logprobs" not in row:
        raise ValueError(
            "TGI gives of a prompt the actual token's alone, not the likeliest; label with another server, or import a "
            "passage that TGI generated"
        )
    return _chat_row(row)


def _check_aligned(place: LineLocation, **lists: list[Any]) -> None:
    """Raises unless the lists are of one length and the last begins with null, as servers write it."""
    _check_sizes(place, {name: len(values) for name, values in lists.items()})
    name, values = list(lists.items())[-1]
    if values and values[0] is not None:
        raise LabelError(
            f"{place}: {name}[0] is not null, but nothing comes before the first token: entry i must be the distribution "
            "over token i, not over the one after it (and of a completion, the echo); import what the server sent"
        )


def _check_sizes(place: LineLocation, sizes: Mapping[str, int]) -> None:
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise LabelError(
            f"{place}: {found} entries; expected as many of each: entry i is of token i, and of the first token null"
        )


def _token_ids(place: LineLocation, name: str, entries: list[Any]) -> list[int]:
    """Returns the ids of entries: texts, or objects with an id or a text."""
    try:
        return [_id_of(entry) if isinstance(entry, dict) else _id_in(entry) for entry in entries]
    except (AttributeError, KeyError, ValueError) as error:
        raise LabelError(f"{place}: {name}: {error}") from error


def _id_of(entry: Mapping[str, Any]) -> int:
    number = entry.get("id")
    return number if isinstance(number, int) else _id_in(entry["token"])


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
    return values if own is None else _with_actual(token, own, values)


def _chat_row(row: Any) -> dict[int, float]:
    top = row.get("top_logprobs") or []
    values = _distinct(((_id_of(entry), entry["logprob"]) for entry in top), len(top))
    return _with_actual(_id_of(row), row["logprob"], values)


def _with_actual(token: int, own: float, likeliest: dict[int, float]) -> dict[int, float]:
    """Returns the likeliest tokens and the actual one, which servers give apart.

    Raises:
        ValueError: the two are not of one distribution: the likeliest are those of another position, or at another T.
    """
    allowed = SAME + SAME_SHARE * abs(own) if likeliest else 0.0
    same = likeliest.get(token)
    if same is not None and abs(max(same, LOG_ZERO) - max(own, LOG_ZERO)) > allowed:
        raise ValueError(
            f"the actual token, {token}, has {own:g} alone and {same:g} among the likeliest, so these are of another "
            "position or temperature; is entry i of both over token i?"
        )
    if likeliest and same is None and own > (least := min(likeliest.values())) + allowed:
        raise ValueError(
            f"the actual token, {token}, has {own:g} and is not among the likeliest, of which the least has {least:g}, so "
            "these are of another position or temperature; is entry i of both over token i?"
        )
    return {token: own} | likeliest


def _distinct(pairs: Iterable[tuple[int, float]], count: int) -> dict[int, float]:
    values = dict(pairs)
    if len(values) != count:
        raise ValueError("a token comes twice")
    return values
