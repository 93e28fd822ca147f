"""Pairs of texts under stable keys: a source text, its translation, the language of that.

    gettext     the catalogs that an installed package ships, from English (gettext.py)
    files       a JSON-lines or TSV file of the user's, or a folder of them (files.py)
    generated   the output of `softcache teacher-generate` (generated.py)

A hash of the *source text* decides whether a pair is held out: no source text is then both learnt from and scored on,
and all languages are cut alike. Another hash, of the key, decides its place in the order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from softcache.data.sources.base import Split
from softcache.errors import SourceError
from softcache.hashing.digests import digest_json

if TYPE_CHECKING:
    from softcache.data.sources.translation.settings import Pair, TranslationSettings

__all__ = ["Pairs", "load_pairs"]


@dataclass(frozen=True)
class Pairs:
    """The pairs of a split, in an order that does not depend on the machine.

    Attributes:
        name: of the dataset and split, for messages.
        pairs: in order.
        languages: of all pairs of the source, sorted.
    """

    name: str
    pairs: list[Pair]
    languages: list[str]

    @cached_property
    def digest(self) -> str:
        """Names keys, order and contents."""
        return digest_json([[pair.key, pair.language, pair.source, pair.target] for pair in self.pairs])


def load_pairs(settings: TranslationSettings, split: Split) -> Pairs:
    """Returns the pairs of a split.

    Raises:
        SourceError: they cannot be read, a side of one is empty, or there are none.
    """
    name, everything, is_cut = settings.read(split)
    languages = sorted({pair.language for pair in everything})
    pairs = everything
    if not is_cut:
        pairs = [pair for pair in everything if _is_held_out(pair, settings) == (split == "eval")]
        pairs.sort(key=lambda pair: (_number(pair.key), pair.key))
    if not pairs:
        raise SourceError(
            f"source {name}/{split}: none of {len(everything)} pairs; give more pairs, or another source.eval_share "
            f"(now {settings.eval_share})"
        )
    _check_keys(name, pairs)
    return Pairs(f"{name}/{split}", pairs, languages)


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def _is_held_out(pair: Pair, settings: TranslationSettings) -> bool:
    return _number(pair.source) < settings.eval_share * 2**64


def _check_keys(name: str, pairs: Iterable[Pair]) -> None:
    seen: set[str] = set()
    for pair in pairs:
        if pair.key in seen:
            raise SourceError(
                f"source {name}: key {pair.key!r} comes twice; keys name samples and must differ"
            )
        seen.add(pair.key)
