"""Tokenizers: loaded from a folder or the hub, or trained once on the documents; and the digest that names one.

    tokenizer         a folder or hub name, or `bpe[?vocab_size=4096&min_frequency=2]`: a byte-level BPE trained
                      once on the documents of the train split

A trained one lies under `data_dir`, in tokenizers/DIGEST: a Hugging Face tokenizer, and bpe.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import parse_qsl

from softcache.data.sources.build_cache import build_dir_path, build_folder
from softcache.data.sources.text.special_tokens import begin_texts, special_tokens
from softcache.errors import IdentityError, MissingExtraError, SourceError, SpecError
from softcache.hashing.digests import digest_json
from softcache.runtime.files import read_json
from softcache.runtime.logging import log_info, progress_bar
from softcache.runtime.optional import auto_tokenizer, text_library

if TYPE_CHECKING:
    from softcache.data.sources.text.documents import Documents
    from softcache.data.sources.text.settings import TextSettings
    from softcache.data.sources.text.table import TokenSource

__all__ = [
    "accept_tokenizer",
    "bpe_arguments",
    "describe_tokenizer",
    "digest_tokenizer",
    "is_bpe",
    "load_tokenizer",
    "tokenizer_parts",
    "train_byte_level",
]

END_OF_TEXT = "<|endoftext|>"
BPE_VERSION = 2
# Training reads no further than this into the train split: about 10 s; the standard library (11 MB) takes 2.
BPE_MAX_CHARACTERS = 2**25


def load_tokenizer(settings: TextSettings) -> Any:
    """Returns the Hugging Face tokenizer of `settings.tokenizer`, which begins texts by itself as `settings.bos` has it.

    One that cannot be changed (without a tokenizers library's backend) begins them as it did. A `bpe` is trained now if it
    was not before.

    Raises:
        SpecError: it cannot be loaded, or its arguments are wrong.
        SourceError: the documents that it is to be trained on cannot be read.
    """
    tokenizer = _load(settings)
    begin_texts(tokenizer, settings.bos, of=f"source.tokenizer {settings.tokenizer!r}")
    if settings.chat_template is not None:
        try:
            tokenizer.chat_template = Path(settings.chat_template).expanduser().read_text("utf-8-sig")
        except OSError as error:
            raise SourceError(
                f"source.chat_template {settings.chat_template!r}: cannot be read: {error}; expected a file that holds a "
                "Jinja template"
            ) from error
    return tokenizer


def _load(settings: TextSettings) -> Any:
    transformers = text_library("transformers")
    if is_bpe(settings.tokenizer):
        return transformers.PreTrainedTokenizerFast.from_pretrained(str(_bpe_folder(settings)))
    path = Path(settings.tokenizer).expanduser()
    try:
        return auto_tokenizer(
            str(path) if path.exists() else settings.tokenizer, of=f"source.tokenizer {settings.tokenizer!r}"
        )
    except MissingExtraError:
        raise
    except Exception as error:
        # transformers raises many kinds of errors here; the user needs to know which name it was.
        raise SpecError(
            f"source.tokenizer {settings.tokenizer!r}: cannot be loaded: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}; expected a folder with a tokenizer, a hub name, or bpe?vocab_size=…"
        ) from error


def digest_tokenizer(tokenizer: Any) -> str:
    """Returns the digest of what a tokenizer does to text: its vocabulary, merges and special tokens.

    Names, paths, chat templates, truncation, padding, and what only touches decoding or what is put around a
    text, are left out: they change no id of a text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        described = json.loads(backend.to_str())
        for name in ("truncation", "padding", "post_processor", "decoder"):
            described.pop(name, None)
        return digest_json(described)
    return digest_json({"vocab": tokenizer.get_vocab(), "special": tokenizer.special_tokens_map})


def tokenizer_parts(tokenizer: Any) -> dict[str, Any]:
    """Returns what gives ids their meaning: the digest of what cuts a text into tokens, and the tokens added to it by id."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        added = {str(number): str(token) for number, token in tokenizer.added_tokens_decoder.items()}
        vocabulary = {token: n for token, n in tokenizer.get_vocab().items() if str(n) not in added}
        return {"core": digest_json(vocabulary), "added": added}
    described = json.loads(backend.to_str())
    for name in ("truncation", "padding", "post_processor", "decoder"):
        described.pop(name, None)
    added = {str(token["id"]): token["content"] for token in described.pop("added_tokens")}
    return {"core": digest_json(described), "added": added}


def accept_tokenizer(tokenizer: Any, source: TokenSource, *, of: str) -> None:
    """Accepts a model's tokenizer if each id of the source's tokens means the same to both; what differs is logged.

    Tokens that one of the two adds (a pad token, most often) are accepted where no text has them.

    Args:
        of: names the tokenizer, for messages.

    Raises:
        IdentityError: an id that occurs would be another token.
    """
    digest = digest_tokenizer(tokenizer)
    if digest == source.tokenizer_digest:
        return
    ours, theirs = source.tokenizer_parts or {"core": None, "added": {}}, tokenizer_parts(tokenizer)
    here, there = ({int(n): token for n, token in parts["added"].items()} for parts in (ours, theirs))
    other = sorted(n for n in here.keys() & there.keys() if here[n] != there[n])
    less = sorted(here.keys() - there.keys())
    if ours["core"] == theirs["core"] and not other and not (used := source.find_tokens(less)):
        more = {n: token for n, token in there.items() if n not in here}
        listed = ", ".join(
            f"{token} ({n})" for n, token in sorted({**more, **{n: here[n] for n in less}}.items())
        )
        log_info(
            f"{of}: its tokenizer differs from that of source {source.name} in tokens that no text here has: "
            f"{listed or 'their flags only'}"
        )
        return
    if ours["core"] != theirs["core"]:
        why = "it cuts texts otherwise"
    elif other:
        why = f"its token {other[0]} is {there[other[0]]!r}, here {here[other[0]]!r}"
    else:
        why = f"it lacks token {used[0]}, {here[used[0]]!r}, which texts here have"
    raise IdentityError(
        f"{of}: its tokenizer (digest {digest[:12]}…, {len(tokenizer)} tokens) is not the one of source {source.name} "
        f"(digest {source.tokenizer_digest[:12]}…, {source.vocab_size} tokens): {why}, so a label of token i would be read "
        "as another token; set source.tokenizer to the model's and make the cache with it, or give a student of another "
        'vocabulary student.tokenizer and loss.name = "uld"'
    )


def describe_tokenizer(settings: TextSettings) -> dict[str, Any]:
    """What a table depends on; for a trained `bpe` this reads one small file."""
    if is_bpe(settings.tokenizer) and settings.bos != "auto":
        raise SpecError(
            f'source.bos: {settings.bos} with source.tokenizer = "bpe", which has no BOS token; drop it'
        )
    if is_bpe(settings.tokenizer) and settings.chat_template is None:
        file = _bpe_folder(settings) / "bpe.json"
        return read_json(file, "remove its folder: the tokenizer is then trained again", error=SourceError)
    return _described_tokenizer(load_tokenizer(settings), settings.bos, settings.tokenizer)


def _described_tokenizer(tokenizer: Any, bos: Literal["auto"] | bool, name: str) -> dict[str, Any]:
    around = special_tokens(tokenizer, bos=bos, of=f"source.tokenizer {name!r}")
    # Of a tokenizer, no part of its vocabulary: what it makes of the letters of a special token.
    splits = {"split_special_tokens": True} if getattr(tokenizer, "split_special_tokens", False) else {}
    return {
        **splits,
        "digest": digest_tokenizer(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "prefix": list(around.prefix),
        "suffix": list(around.suffix),
        "chat_template": tokenizer.chat_template,
    }


def is_bpe(spec: str) -> bool:
    """Whether a tokenizer is one to be trained."""
    return spec.partition("?")[0] == "bpe"


def bpe_arguments(spec: str) -> dict[str, int]:
    """Returns the arguments of a `bpe` spec, complete."""
    arguments = {"vocab_size": 4096, "min_frequency": 2}
    least = {"vocab_size": 257, "min_frequency": 1}  # every byte and the end of text
    for name, value in parse_qsl(spec.partition("?")[2], keep_blank_values=True):
        if name not in arguments or not value.isdecimal() or int(value) < least[name]:
            raise SpecError(
                f"source.tokenizer {spec!r}: {name}={value}; expected vocab_size of at least 257 and min_frequency of "
                "at least 1, whole numbers"
            )
        arguments[name] = int(value)
    return arguments


def _bpe_folder(settings: TextSettings) -> Path:
    """Returns the folder of a byte-level BPE of the train split, trained now if it was not before."""
    arguments = bpe_arguments(settings.tokenizer)
    if settings.has_tokens:
        raise SpecError(
            f"source.tokenizer {settings.tokenizer!r}: it is trained on texts, and documents are token ids here; name the "
            "tokenizer that made them"
        )
    if settings.has_prompts:
        raise SpecError(
            f"source.tokenizer {settings.tokenizer!r}: it has no chat template, which chats need, and is "
            "trained on texts only; name a tokenizer that has one"
        )
    documents = settings.documents("train")
    made_from = {"version": BPE_VERSION, "documents": documents.digest, **arguments}
    folder = build_dir_path(settings, "tokenizers", made_from)

    def is_whole(made: Path) -> bool:
        return (made / "bpe.json").exists()

    if not is_whole(folder):
        with build_folder(folder, is_whole) as staged:
            tokenizer = _train_bpe(documents, **arguments)
            tokenizer.save_pretrained(str(staged))
            described = _described_tokenizer(tokenizer, "auto", settings.tokenizer) | {"made_from": made_from}
            (staged / "bpe.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return folder


def _train_bpe(documents: Documents, *, vocab_size: int, min_frequency: int) -> Any:
    transformers = text_library("transformers")

    def texts() -> Iterator[str]:
        left = BPE_MAX_CHARACTERS
        with progress_bar(f"train bpe on {documents.name}", len(documents), "documents") as advance:
            for document in documents:
                yield document.text[:left]
                advance(1)
                left -= len(document.text)
                if left <= 0:
                    return

    tokenizer = train_byte_level(
        texts(), special_tokens=[END_OF_TEXT], vocab_size=vocab_size, min_frequency=min_frequency
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)


def train_byte_level(
    texts: Iterable[str], *, special_tokens: list[str], vocab_size: int, min_frequency: int
) -> Any:
    """Returns a byte-level BPE trained on texts, of the tokenizers library; special tokens come first."""
    tokenizers = text_library("tokenizers")
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=special_tokens,
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
