"""Pairs of texts in tokens, in the table that texts have: a pair is a sample of two segments.

Segment 0 is what the encoder reads, segment 1 what the decoder is given, start token first; only what follows that is to
be predicted. So a sample's rows are the tokens of the target, its fingerprint covers both sides, and all that comes after
(cache, reader, losses) is as for any text.

    pairs.py, gettext.py, files.py, generated.py   where the pairs come from
    tokenizer.py                                   their tokenizer
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from softcache.data.sources.base import Split
from softcache.data.sources.build_cache import build_dir_path, build_folder
from softcache.data.sources.text.packing import KeyedSample, TokenSample
from softcache.data.sources.text.table import TableWriter, TokenSource, described_table
from softcache.data.sources.translation.pairs import Pairs, load_pairs
from softcache.data.sources.translation.tokenizer import PairTokenizer, load_pair_tokenizer
from softcache.errors import SourceError
from softcache.runtime.logging import log_info, progress_bar

if TYPE_CHECKING:
    from softcache.data.sources.translation.settings import Pair, TranslationSettings

__all__ = ["load_pair_tokenizer", "load_pairs", "open_translation"]

PAIR_TABLE_VERSION = 2
BATCH_PAIRS = 1024


def open_translation(settings: TranslationSettings, *, split: Split) -> TokenSource:
    """Returns a split of tokenised pairs; tokenised now if it was not before.

    Raises:
        SourceError: the pairs cannot be read, or all are too long.
        SpecError: the tokenizer cannot be loaded or trained, or cannot say into which language.
        StorageError: `data_dir` cannot be written.
        MissingExtraError: transformers or Babel is not installed.
    """
    pairs, tokenizer = load_pairs(settings, split), load_pair_tokenizer(settings)
    tokenizer.check_languages(pairs.languages)
    made_from = {
        "pairs": PAIR_TABLE_VERSION,
        "documents": pairs.digest,
        "tokenizer": tokenizer.digest,
        "tokens": [tokenizer.pad, tokenizer.end],
        "prefixes": dict(settings.prefixes),
        "max_tokens": settings.max_tokens,
        "seq_len": 2 * settings.max_tokens + 1,
        "packing": "pairs",
        "max_samples": settings.max_samples(split),
    }
    folder = build_dir_path(settings, "tokens", made_from)
    if described_table(folder) is None:
        _tokenize(pairs, tokenizer, folder, made_from)
    return TokenSource(folder, name=pairs.name)


def _tokenize(pairs: Pairs, tokenizer: PairTokenizer, folder: Path, made_from: dict[str, Any]) -> None:
    """Builds the table."""
    too_long = 0
    with build_folder(folder, lambda made: described_table(made) is not None) as staged:
        writer = TableWriter(staged / "samples.arrow")
        with progress_bar(f"tokenize {pairs.name}", len(pairs.pairs), "pairs") as advance:
            for pair, source, target in _encoded(pairs.pairs, tokenizer):
                advance(1)
                if writer.num_samples == made_from["max_samples"]:
                    break
                if max(len(source), len(target) - 1) > made_from["max_tokens"]:
                    too_long += 1
                    continue
                writer.add(_cut(pair.key, source, target))
        if not writer.num_samples:
            raise SourceError(
                f"source {pairs.name}: all {len(pairs.pairs)} pairs have a side of over {made_from['max_tokens']} tokens; "
                "raise source.max_tokens"
            )
        described = writer.close() | {
            "account": {"skipped": too_long},
            "tokenizer_digest": tokenizer.digest,
            "vocab_size": max(len(tokenizer), writer.largest + 1),
            "made_from": made_from,
        }
        # Last: a folder without it is not a table.
        (staged / "table.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    if too_long:
        log_info(
            f"source {pairs.name}: left out {too_long} pairs with a side of more than {made_from['max_tokens']} tokens"
        )


def _encoded(pairs: list[Pair], tokenizer: PairTokenizer) -> Iterator[tuple[Pair, np.ndarray, np.ndarray]]:
    for start in range(0, len(pairs), BATCH_PAIRS):
        batch = pairs[start : start + BATCH_PAIRS]
        for pair, (source, target) in zip(batch, tokenizer.encode(batch), strict=True):
            yield pair, source, target


def _cut(key: str, source: np.ndarray, target: np.ndarray) -> KeyedSample:
    lengths = np.array([len(source), len(target)], np.int32)
    learnt = np.ones(lengths.sum(), bool)
    learnt[: len(source) + 1] = False  # neither the source nor the start token is predicted
    segments = np.arange(2, dtype=np.int32).repeat(lengths)
    return KeyedSample(key, TokenSample(np.concatenate([source, target]), segments, learnt), lengths)
