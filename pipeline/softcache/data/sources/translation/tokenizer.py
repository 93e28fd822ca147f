"""A tokenizer of pairs: one vocabulary for both sides, a token (or a prefix) for the target language.

    source side   <2de> tokens </s>          or, where the vocabulary has no token <2de>, prefix + text
    target side   <pad> tokens </s>          the decoder starts with the padding token, as T5 and Marian do

What a tokenizer puts before a text by itself (<s> of CodeT5) stands before both sides' tokens, as in its model's training.

`bpe[?vocab_size=…&min_frequency=…]` is a byte-level BPE trained once on both sides of the train split, of all languages
together.
Any other name is a folder or a hub name; it needs a padding and an end token, and for several languages source.prefixes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from softcache.data.sources.build_cache import build_dir_path, build_folder
from softcache.data.sources.text.special_tokens import special_tokens
from softcache.data.sources.text.tokenizer import bpe_arguments, digest_tokenizer, is_bpe, train_byte_level
from softcache.data.sources.translation.pairs import Pairs, load_pairs
from softcache.errors import MissingExtraError, SourceError, SpecError
from softcache.runtime.optional import auto_tokenizer, text_library

if TYPE_CHECKING:
    from softcache.data.sources.translation.settings import Pair, TranslationSettings

__all__ = ["PairTokenizer", "load_pair_tokenizer"]

PAD, END = "<pad>", "</s>"
PAIR_BPE_VERSION = 1


class PairTokenizer:
    """A Hugging Face tokenizer with what a pair needs.

    Attributes:
        tokenizer: as it was loaded.
        pad, end: token ids; the decoder starts with `pad`.
    """

    def __init__(self, tokenizer: Any, name: str, prefixes: dict[str, str]) -> None:
        self.tokenizer, self._name, self._prefixes = tokenizer, name, prefixes
        self.pad, self.end = tokenizer.pad_token_id, tokenizer.eos_token_id
        if self.pad is None or self.end is None:
            raise SpecError(
                f"source.tokenizer {name!r}: no padding or no end-of-text token; expected one of an encoder-decoder model, "
                "such as T5 or Marian, or bpe?vocab_size=…"
            )
        self._vocab = tokenizer.get_vocab()
        self._around = special_tokens(tokenizer, bos="auto", of=f"source.tokenizer {name!r}")

    def __len__(self) -> int:
        return len(self.tokenizer)

    @property
    def digest(self) -> str:
        """Names what the tokenizer does to a text."""
        return digest_tokenizer(self.tokenizer)

    def check_languages(self, languages: Sequence[str]) -> None:
        """Raises SpecError unless a model can know into which of several languages to translate."""
        unsaid = [x for x in languages if f"<2{x}>" not in self._vocab and x not in self._prefixes]
        if unsaid and len(languages) > 1:
            raise SpecError(
                f"source.tokenizer {self._name!r}: nothing says that the target is {' or '.join(unsaid)}; give "
                'source.prefixes, e.g. {de = "translate English to German: "}, or use bpe?vocab_size=…'
            )

    def encode(self, pairs: Sequence[Pair]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns both sides of each pair, int32, with their first and last tokens."""
        sources = self._ids([self._prefixes.get(pair.language, "") + pair.source for pair in pairs])
        targets = self._ids([pair.target for pair in pairs], target=True)
        prefix, suffix = self._around
        return [
            (
                np.array([*prefix, *self._tag(pair.language), *source, *suffix], np.int32),
                np.array([self.pad, *prefix, *target, *suffix], np.int32),
            )
            for pair, source, target in zip(pairs, sources, targets, strict=True)
        ]

    def _tag(self, language: str) -> list[int]:
        tag = self._vocab.get(f"<2{language}>")
        return [] if tag is None else [tag]

    def _ids(self, texts: list[str], *, target: bool = False) -> list[list[int]]:
        # Marian's tokenizers have another vocabulary for what is translated into.
        arguments = {"text_target" if target else "text": texts}
        encoded = self.tokenizer(
            **arguments,
            add_special_tokens=False,
            truncation=False,
            return_attention_mask=False,
            verbose=False,
        )
        return encoded["input_ids"]

    def decode(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        """Returns the texts of target sides, without special tokens, stripped."""
        kept = [list(map(int, ids)) for ids in tokens]
        if not kept:  # of which transformers makes one empty text
            return []
        texts = self.tokenizer.batch_decode(
            kept, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return [text.strip() for text in texts]

    def save(self, folder: Path) -> None:
        """Writes the tokenizer as transformers loads it."""
        self.tokenizer.save_pretrained(str(folder))


def load_pair_tokenizer(settings: TranslationSettings) -> PairTokenizer:
    """Returns the tokenizer of a source of pairs; a `bpe` is trained now if it was not before.

    Raises:
        SpecError: it cannot be loaded, or lacks a token.
        MissingExtraError: it needs a package that is not installed.
        SourceError: the pairs that it is to be trained on cannot be read.
    """
    name = settings.tokenizer_spec
    prefixes = dict(settings.prefixes)
    if is_bpe(name):
        folder = _bpe_folder(settings, name)
        tokenizer = text_library("transformers").PreTrainedTokenizerFast.from_pretrained(str(folder))
        return PairTokenizer(tokenizer, name, prefixes)
    path = Path(name).expanduser()
    try:
        tokenizer = auto_tokenizer(str(path) if path.exists() else name, of=f"source.tokenizer {name!r}")
    except MissingExtraError:
        raise
    except Exception as error:
        # transformers raises many kinds of errors here; the user needs to know which name it was.
        raise SpecError(
            f"source.tokenizer {name!r}: cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())[:200]}; "
            "expected a folder with a tokenizer, a hub name, or bpe?vocab_size=…"
        ) from error
    return PairTokenizer(tokenizer, name, prefixes)


def _bpe_folder(settings: TranslationSettings, spec: str) -> Path:
    arguments, pairs = bpe_arguments(spec), load_pairs(settings, "train")
    made_from = {
        "pairs": PAIR_BPE_VERSION,
        "documents": pairs.digest,
        "languages": pairs.languages,
        **arguments,
    }
    folder = build_dir_path(settings, "tokenizers", made_from)

    def is_whole(made: Path) -> bool:
        return (made / "bpe.json").exists()

    if not is_whole(folder):
        with build_folder(folder, is_whole) as staged:
            _train(pairs, arguments).save_pretrained(str(staged))
            (staged / "bpe.json").write_text(
                json.dumps({"made_from": made_from}, indent=2) + "\n", encoding="utf-8"
            )
    return folder


def _train(pairs: Pairs, arguments: dict[str, int]) -> Any:
    tags = [f"<2{language}>" for language in pairs.languages]
    if arguments["vocab_size"] < 256 + 2 + len(tags):
        raise SourceError(
            f"source {pairs.name}: vocab_size {arguments['vocab_size']} is too small for all bytes and {len(tags)} languages"
        )
    tokenizer = train_byte_level(
        (text for pair in pairs.pairs for text in (pair.source, pair.target)),
        special_tokens=[PAD, END, *tags],
        **arguments,
    )
    fast = text_library("transformers").PreTrainedTokenizerFast
    return fast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, additional_special_tokens=tags)
