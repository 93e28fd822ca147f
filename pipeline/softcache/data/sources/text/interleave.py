"""Documents of several sources in one order, by weights of tokens.

The next document is of the source that has the fewest tokens for its weight, so that at any place of the order the shares of
the sources are their weights, to within a document. Nothing is drawn: the order follows from the documents alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from softcache.data.sources.text.documents import Document, Documents
from softcache.data.sources.text.packing import Encoded
from softcache.hashing.digests import digest_json

__all__ = ["MixtureAccount", "MixtureDocuments", "OnEnd", "interleave"]

Item = TypeVar("Item")
OnEnd = Literal["stop", "continue"]


def interleave(
    sources: Sequence[Iterable[Item]],
    weights: Sequence[float],
    *,
    size: Callable[[Item], int],
    on_end: OnEnd = "stop",
) -> Iterator[tuple[int, Item]]:
    """Yields items with the number of their source: always of the one with the least size for its weight.

    Args:
        on_end: "stop": ends when it is the turn of a source that has no more; "continue": goes on with the others.

    >>> [item for _, item in interleave(["aaaaaa", "bbb"], [2, 1], size=len)]
    ['a', 'b', 'a', 'a', 'b', 'a', 'a', 'b', 'a']
    """
    iterators: dict[int, Iterator[Item]] = {number: iter(source) for number, source in enumerate(sources)}
    taken = [0] * len(sources)
    while iterators:
        number = min(iterators, key=lambda number: (taken[number] / weights[number], number))
        for item in iterators[number]:
            taken[number] += size(item)
            yield number, item
            break
        else:
            if on_end == "stop":
                return
            del iterators[number]


class LabeledDocuments:
    """Documents of one source of a mixture, with its label in front of their keys."""

    def __init__(self, label: str, documents: Documents) -> None:
        self.label, self._documents = label, documents
        self.name = f"{label}: {documents.name}"

    @property
    def digest(self) -> str:
        return digest_json([self.label, self._documents.digest])

    def __len__(self) -> int:
        return len(self._documents)

    def __iter__(self) -> Iterator[Document]:
        for document in self._documents:
            yield replace(document, key=f"{self.label}/{document.key}")


@dataclass
class MixtureAccount:
    """What a mixture took of one of its sources."""

    label: str
    weight: float
    documents: int = 0
    tokens: int = 0


class MixtureDocuments:
    """Documents of several sources.

    Attributes:
        parts: the documents of each.
        account: what `encoded` took of each.
    """

    def __init__(
        self, name: str, parts: Sequence[LabeledDocuments], weights: Sequence[float], *, on_end: OnEnd
    ) -> None:
        self.name, self.parts, self._weights, self._on_end = name, parts, weights, on_end
        self.account = [
            MixtureAccount(part.label, weight) for part, weight in zip(parts, weights, strict=True)
        ]

    @property
    def digest(self) -> str:
        described = [[part.digest, weight] for part, weight in zip(self.parts, self._weights, strict=True)]
        return digest_json(["mixture", described, self._on_end])

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __iter__(self) -> Iterator[Document]:
        """Yields documents by weights of characters: for what is not tokenized yet."""
        found = interleave(
            self.parts, self._weights, size=lambda document: document.size, on_end=self._on_end
        )
        return (document for _, document in found)

    def encoded(self, encode: Callable[[Documents], Iterator[Encoded]]) -> Iterator[Encoded]:
        """Yields documents as tokens, by weights of tokens."""
        streams = [encode(part) for part in self.parts]
        found = interleave(
            streams, self._weights, size=lambda document: len(document.tokens), on_end=self._on_end
        )
        for number, document in found:
            self.account[number].documents += 1
            self.account[number].tokens += len(document.tokens)
            yield document
