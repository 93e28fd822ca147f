"""Tokenizers as they are written next to a student: transformers loads them as texts were cut and begun in its training."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from softcache.data.sources.text.special_tokens import around, begin_texts, end_tokens, special_tokens
from softcache.data.sources.text.tokenizer import tokenizer_parts
from softcache.errors import SpecError
from softcache.runtime.optional import auto_tokenizer, text_library

__all__ = ["check_tokenizer_is_saved", "save_tokenizer", "save_with_tokenizer"]


def save_with_tokenizer(folder: Path, tokenizer: Any, *, bos: Literal["auto"] | bool = "auto") -> None:
    """Writes a tokenizer next to a saved model, and into its generation config the special tokens that are missing there.

    A model with fresh weights has no end-of-text token in its configuration, and would never stop; a pretrained one may have
    another than the tokenizer's, with which the texts of its training ended.

    Args:
        bos: what texts began with (`special_tokens`); the tokenizer that is written begins them so.

    Raises:
        SpecError: what transformers would load from there begins texts otherwise, or cuts them otherwise.
    """
    save_tokenizer(folder, tokenizer, bos)
    if not (Path(folder) / "generation_config.json").exists():
        return
    config = text_library("transformers").GenerationConfig.from_pretrained(folder)
    is_token = _is_token(Path(folder))
    for key in ("bos_token_id", "pad_token_id"):
        if not is_token(getattr(config, key)):
            setattr(config, key, getattr(tokenizer, key))
    given = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = list(dict.fromkeys([*filter(is_token, given), *end_tokens(tokenizer)]))
    config.eos_token_id = ends if len(ends) > 1 else next(iter(ends), None)
    config.save_pretrained(folder)


def _is_token(folder: Path) -> Callable[[int | None], bool]:
    """Returns whether a number is an id of a saved model: a copied configuration may have those of another vocabulary."""
    path = folder / "config.json"
    described = json.loads(path.read_text("utf-8")) if path.exists() else {}
    size = (described.get("text_config") or described).get("vocab_size")
    return lambda number: number is not None and (size is None or 0 <= number < size)


def check_tokenizer_is_saved(tokenizer: Any, bos: Literal["auto"] | bool) -> None:
    """Raises what `save_with_tokenizer` would: before a training, in place of after it.

    Raises:
        SpecError: see there.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder), tokenizer, bos)


def save_tokenizer(folder: Path, tokenizer: Any, bos: Literal["auto"] | bool = "auto") -> None:
    """Writes a tokenizer so that transformers loads it as it is: some classes make a part of it anew (GPT-NeoX, BERT).

    Args:
        bos: as of `save_with_tokenizer`.

    Raises:
        SpecError: what transformers would load from there begins texts otherwise, or cuts them otherwise.
    """
    of = f"tokenizer {tokenizer.name_or_path!r}"
    begin_texts(tokenizer, bos, of=of)
    expected = list(special_tokens(tokenizer, bos=bos, of=of).prefix)
    tokenizer.save_pretrained(folder)
    if not type(tokenizer).__module__.startswith("transformers."):
        return  # a class of the user's own, which is loaded by their code
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        begins, cuts_alike = around(tokenizer, of)[0], True
        why = "it has no tokenizer.json, in which that can be written"
    else:
        begins, cuts_alike = _loaded_again(folder, tokenizer, of)
        if begins != expected or not cuts_alike:
            _set_tokenizer_class(folder, "PreTrainedTokenizerFast")  # which takes tokenizer.json as it is
            begins, cuts_alike = _loaded_again(folder, tokenizer, of)
        why = "it is made anew when it is loaded" + ("" if cuts_alike else ", and cuts texts otherwise")
    if begins != expected or not cuts_alike:
        raise SpecError(
            f"{of} ({type(tokenizer).__name__}): saved, it begins texts with {begins}; expected {expected}, as in the "
            f"training (source.bos = {json.dumps(bos)}): {why}; set source.bos to what the tokenizer does by itself, or "
            "name another one"
        )


def _loaded_again(folder: Path, tokenizer: Any, of: str) -> tuple[list[int], bool]:
    """Returns what the tokenizer that was saved begins texts with, and whether it cuts them as it did before."""
    saved = auto_tokenizer(str(folder), of=of)
    return around(saved, of)[0], tokenizer_parts(saved) == tokenizer_parts(tokenizer)


def _set_tokenizer_class(folder: Path, name: str) -> None:
    path = Path(folder) / "tokenizer_config.json"
    described = json.loads(path.read_text("utf-8")) | {"tokenizer_class": name}
    path.write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
