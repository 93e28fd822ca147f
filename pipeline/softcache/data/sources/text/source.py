"""Text for language models: tokenized once into a memory-mapped Arrow table, read by sample.

    stdlib.py, hugging_face.py   a split's documents, in order
    files.py                     their files, copied and unpacked where they have to be
    tokenizer.py                 their tokenizer
    mixture.py, interleave.py    documents of several sources, by weights of tokens
    encode.py, shards.py         documents as tokens, by several processes and in shards that a kill leaves
    chat.py                      chats as their template writes them, and which of their tokens are to be learned
    chat_mask.py                 which part of a chat the assistant writes, where a template does not mark it
    packing.py                   tokens cut into samples
    table.py                     the table, written and read
    build_cache.py               its folder, complete or absent

A text has around it what the tokenizer adds by default (BOS, where a model was trained with one; `source.bos`), and ends
with the end-of-text token, where there is one; a chat is what its template writes. On two cores, the standard library's
3.4 million tokens are made in about 8 s and found again in 0.1 s.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softcache.data.sources.build_cache import build_dir_path, build_folder
from softcache.data.sources.text.chat import read_tools
from softcache.data.sources.text.documents import Documents
from softcache.data.sources.text.encode import UnknownTokens
from softcache.data.sources.text.interleave import MixtureDocuments
from softcache.data.sources.text.packing import Account, Encoded, cut_documents
from softcache.data.sources.text.shards import ShardedEncoder
from softcache.data.sources.text.special_tokens import SpecialTokens
from softcache.data.sources.text.table import TableWriter, TokenSource, described_table
from softcache.data.sources.text.tokenizer import (
    describe_tokenizer,
    digest_tokenizer,
    load_tokenizer,
    tokenizer_parts,
)
from softcache.errors import SourceError
from softcache.runtime.logging import log_info, progress_bar

if TYPE_CHECKING:
    from softcache.data.sources.text.settings import Split, TextSettings

__all__ = ["TokenSource", "digest_tokenizer", "load_tokenizer", "open_text"]

TABLE_VERSION = 6


def open_text(settings: TextSettings, *, split: Split) -> TokenSource:
    """Returns a split of tokenized text; tokenized now if it was not before.

    Raises:
        SourceError: the dataset cannot be read, or nothing of it can be learnt.
        SpecError: the tokenizer cannot be loaded or trained.
        StorageError: `data_dir` cannot be written.
        MissingExtraError: transformers, or for hf datasets, is not installed.
    """
    documents = settings.documents(split)
    tokenizer = describe_tokenizer(settings)
    around = SpecialTokens(tuple(tokenizer["prefix"]), tuple(tokenizer["suffix"]))
    if settings.seq_len < len(around.prefix) + 2:
        raise SourceError(
            f"source.seq_len: {settings.seq_len} holds no row after the {len(around.prefix)} tokens that the tokenizer "
            "puts before a text; raise it"
        )
    made_from = {
        "version": TABLE_VERSION,
        "documents": documents.digest,
        "tokenizer": tokenizer["digest"],
        "prefix": tokenizer["prefix"],
        "suffix": tokenizer["suffix"],
        "bos": settings.bos,
        "chat": [tokenizer["chat_template"], settings.template_args, read_tools(settings)]
        if settings.may_have_chats
        else None,
        **{name: tokenizer[name] for name in ("split_special_tokens",) if name in tokenizer},
        "seq_len": settings.seq_len,
        "packing": settings.cut,
        "max_samples": settings.max_samples(split),
    }
    folder = build_dir_path(settings, "tokens", made_from)
    if described_table(folder) is None:
        _tokenize(documents, settings, around, folder, made_from)
    return TokenSource(folder, name=documents.name)


def _tokenize(
    documents: Documents,
    settings: TextSettings,
    around: SpecialTokens,
    folder: Path,
    made_from: Mapping[str, Any],
) -> None:
    """Builds the table."""
    tokenizer = load_tokenizer(settings)
    name, account = documents.name, Account()
    names = ("tokenizer", "split_special_tokens", "prefix", "suffix", "bos", "chat")
    depends_on = {key: made_from[key] for key in names if key in made_from}
    encoder, unknown = ShardedEncoder(tokenizer, settings, around, depends_on), UnknownTokens(tokenizer)

    mixture = documents if isinstance(documents, MixtureDocuments) else None

    def encoded() -> Iterator[Encoded]:
        with progress_bar(f"tokenize {name}", len(documents), "documents") as advance:
            encode = partial(
                encoder.encode, advance=advance, num_streams=len(mixture.parts) if mixture else 1
            )
            for document in mixture.encoded(encode) if mixture else encode(documents):
                unknown.add(document.tokens)
                yield document

    samples = cut_documents(
        encoded(),
        packing=settings.cut,
        seq_len=settings.seq_len,
        account=account,
    )
    with (
        encoder.processes(),
        build_folder(folder, lambda made: described_table(made) is not None) as staged,
    ):
        writer = TableWriter(staged / "samples.arrow", has_log_probs=settings.has_rollouts)
        for sample in islice(samples, made_from["max_samples"]):
            writer.add(sample)
        described = writer.close()
        if not writer.num_samples:
            raise SourceError(
                f"source {name}: nothing to predict in {len(documents)} documents, {account.skipped} of them skipped, "
                f"{account.dropped} with a prompt that fills source.seq_len; "
                "expected some with two tokens or more; check the column, or for a held-out part raise source.eval_share"
            )
        if writer.largest >= len(tokenizer):
            raise SourceError(
                f"source {name}: token {writer.largest} in the table; expected all below the vocabulary's "
                f"{len(tokenizer)}; the tokenizer {settings.tokenizer!r} has holes in its ids: use another"
            )
        mixed = {"sources": [asdict(part) for part in mixture.account]} if mixture else {}
        fill = writer.num_tokens / (writer.num_samples * settings.seq_len)
        described |= {
            "account": {**asdict(account), "fill": fill, **mixed},
            "tokenizer_digest": digest_tokenizer(tokenizer),
            "tokenizer_parts": tokenizer_parts(tokenizer),
            "vocab_size": len(tokenizer),
            "made_from": dict(made_from),
        }
        # Last: a folder without it is not a table.
        (staged / "table.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    encoder.remove_shards()
    log_info(
        f"source {name}: {account}; {writer.num_tokens:,} tokens in {writer.num_samples:,} samples of at most "
        f"{settings.seq_len:,} ({settings.cut}, {fill:.1%} full)"
    )
    for part in mixed.get("sources", ()):
        share = part["tokens"] / max(sum(each["tokens"] for each in mixed["sources"]), 1)
        log_info(
            f"source {name}, {part['label']}: {part['documents']:,} documents, {part['tokens']:,} tokens ({share:.1%})"
        )
    if unknown.count:
        log_info(
            f"source {name}: {unknown.count:,} of {unknown.total:,} tokens ({unknown.count / unknown.total:.1%}) are "
            f"{tokenizer.unk_token}, by which tokenizer {settings.tokenizer!r} replaces what it does not know; expected "
            "few or none; compare tokenizer.tokenize(text) of a document with what the teacher was trained on"
        )
