"""What tokenizers put before and after a text."""

from __future__ import annotations

from contextlib import suppress
from itertools import chain
from typing import Any, Literal, NamedTuple

from softcache.errors import SpecError
from softcache.runtime.optional import text_library

__all__ = ["SpecialTokens", "around", "begin_texts", "end_tokens", "special_tokens"]


class SpecialTokens(NamedTuple):
    """The ids that a tokenizer puts around a text."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]


def special_tokens(tokenizer: Any, *, bos: Literal["auto"] | bool, of: str) -> SpecialTokens:
    """Returns what goes before and after each text.

    Args:
        bos: "auto": what the tokenizer adds by default; true: its BOS in front, added where it adds none; false: nothing
            in front. The end-of-text token ends a text in any case, once, where the tokenizer has one.
        of: names the tokenizer in errors.

    Raises:
        SpecError: BOS is asked for, and the tokenizer has none; or what it adds is not clear.
    """
    prefix, suffix = around(tokenizer, of)
    if bos is False:
        prefix = []
    elif bos is True:
        if tokenizer.bos_token_id is None:
            raise SpecError(
                f'{of}: has no BOS token, which source.bos = true asks for; set source.bos = "auto"'
            )
        if prefix[:1] != [tokenizer.bos_token_id]:
            prefix = [tokenizer.bos_token_id, *prefix]
    if tokenizer.eos_token_id is not None and suffix[-1:] != [tokenizer.eos_token_id]:
        suffix = [*suffix, tokenizer.eos_token_id]
    return SpecialTokens(tuple(prefix), tuple(suffix))


def around(tokenizer: Any, of: str) -> tuple[list[int], list[int]]:
    """Returns what a tokenizer by itself puts before and after a text."""
    text, plain = _known_text(tokenizer, of)
    ids = tokenizer(text)["input_ids"]
    start = next((n for n in range(len(ids)) if ids[n : n + len(plain)] == plain), None)
    if start is None:
        raise SpecError(
            f"{of}: makes {plain} of {text!r}, and {ids} with special tokens, which are not around it; expected some before "
            "or after; name another tokenizer, or give token ids (source.input_ids_column)"
        )
    return ids[:start], ids[start + len(plain) :]


def _known_text(tokenizer: Any, of: str) -> tuple[str, list[int]]:
    """Returns a text that a tokenizer knows, and its ids; one of few letters, such as of DNA, may not know "a"."""
    special = set(tokenizer.all_special_ids)
    tokens = (tokenizer.decode([number]) for number in range(len(tokenizer)) if number not in special)
    for text in chain(("a",), tokens):
        with suppress(Exception):  # without an unknown token, it refuses other texts, in ways of its own
            if text.strip() and (ids := tokenizer(text, add_special_tokens=False)["input_ids"]):
                return text, ids
    raise SpecError(f"{of}: makes no token of any text; expected a tokenizer that has a vocabulary")


def end_tokens(tokenizer: Any) -> list[int]:
    """Returns the id that ends a text: the end-of-text token, or what the tokenizer ends texts with; none without both."""
    of = f"tokenizer {tokenizer.name_or_path!r}"
    return list(special_tokens(tokenizer, bos="auto", of=of).suffix[-1:])


def begin_texts(tokenizer: Any, bos: Literal["auto"] | bool, *, of: str) -> None:
    """Has a tokenizer begin texts by itself as `bos` has it, if it can be changed."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if bos == "auto" or backend is None:
        return
    before, after = around(tokenizer, of)
    prefix = special_tokens(tokenizer, bos=bos, of=of).prefix
    if tuple(before) == prefix:
        return
    names = {number: tokenizer.convert_ids_to_tokens(number) for number in (*prefix, *after)}
    first, last = ([names[number] for number in ids] for ids in (prefix, after))
    backend.post_processor = text_library("tokenizers").processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, "$B", *last],
        special_tokens=[(name, number) for number, name in names.items()],
    )
