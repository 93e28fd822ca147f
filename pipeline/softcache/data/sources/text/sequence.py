"""Token sources one after the other, as one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from softcache.data.sources.text.packing import TokenSample
from softcache.data.sources.text.table import TokenSource
from softcache.errors import SourceError
from softcache.hashing.digests import digest_of_parts

__all__ = ["TokenSequence"]


class TokenSequence(TokenSource):
    """Samples of the first source, then those of the second, and so on, under the keys that they have there; picklable.

    Attributes:
        parts: the sources.

    Raises (from the constructor):
        SourceError: they are of different tokenizers, or cut otherwise.
    """

    def __init__(self, parts: Sequence[TokenSource]) -> None:
        self.parts, first = list(parts), parts[0]
        for name in ("tokenizer_digest", "vocab_size", "seq_len", "packing", "prefix"):
            for part in self.parts:
                if getattr(part, name) != getattr(first, name):
                    raise SourceError(
                        f"source {part.name}: {name} is {getattr(part, name)!r}; expected {getattr(first, name)!r} as in "
                        f"{first.name}; parts of one corpus are made with the same settings"
                    )
        self.name = first.name if len(self.parts) == 1 else f"{first.name} and {len(self.parts) - 1} more"
        self.digest = digest_of_parts([part.digest for part in self.parts])
        self.tokenizer_digest, self.tokenizer_parts = first.tokenizer_digest, first.tokenizer_parts
        self.vocab_size, self.prefix = first.vocab_size, first.prefix
        self.seq_len, self.packing = first.seq_len, first.packing
        self.num_tokens = sum(part.num_tokens for part in self.parts)
        self.account: dict[str, Any] = {}
        self._starts = np.cumsum([0, *map(len, self.parts)])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _part_of(self, sample: int) -> tuple[TokenSource, int]:
        if not 0 <= sample < len(self):
            raise IndexError(f"source {self.name}: sample {sample} of {len(self)}")
        number = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return self.parts[number], sample - int(self._starts[number])

    def key(self, sample: int) -> str:
        part, inside = self._part_of(sample)
        return part.key(inside)

    def keys(self) -> list[str]:
        return list(chain.from_iterable(part.keys() for part in self.parts))

    def num_rows(self) -> np.ndarray:
        return np.concatenate([part.num_rows() for part in self.parts])

    def find_tokens(self, ids: Iterable[int]) -> list[int]:
        wanted = list(ids)
        return sorted({token for part in self.parts for token in part.find_tokens(wanted)})

    def sample(self, sample: int) -> TokenSample:
        part, inside = self._part_of(sample)
        return part.sample(inside)
