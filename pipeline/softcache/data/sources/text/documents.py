"""Documents under stable keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from softcache.errors import SourceError
from softcache.hashing.digests import digest_json

__all__ = ["Document", "Documents", "InMemoryDocuments"]


@dataclass(frozen=True)
class Document:
    """A text under its stable key, a chat, or token ids; with `num_given`, a prompt and its answer.

    Attributes:
        messages: of a chat, each with `role` and `content`; or ShareGPT's, with `from` and `value`.
        num_given: the characters of `text`, or the messages, that are the prompt: given, not learned. 0: of a text,
            everything is learned, of a chat, what the assistant writes.
        tools: JSON schemas that the chat template describes to the model; None: those of the settings.
        tokens: [L] ids of a document that is tokenized already, of the tokenizer in the settings; None: it is not.
        learnt: [L] bool, which of them are learned, the others are a prompt; None: all, and there is no prompt.
        log_probs: of a rollout, the sampling policy's log-probability of each learned token, in order, in nats; None: not
            known, or no rollout.
    """

    key: str
    text: str = ""
    messages: Sequence[Any] = field(default_factory=tuple)
    num_given: int = 0
    tools: Sequence[Any] | None = None
    tokens: np.ndarray | None = None
    learnt: np.ndarray | None = None
    log_probs: np.ndarray | None = None

    @property
    def size(self) -> int:
        """How much there is of a document, in characters; a token counts as four."""
        return len(self.text) if self.tokens is None else 4 * len(self.tokens)


class Documents(Protocol):
    """The documents of a split, in an order that does not depend on the machine.

    Attributes:
        name: of the dataset and split, for messages.
        digest: names keys, order and contents.
    """

    name: str

    @property
    def digest(self) -> str: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Document]: ...


class InMemoryDocuments:
    """Documents of a list, in its order; the digest is of all that they hold.

    Raises (from the constructor):
        SourceError: two documents have the same key.
    """

    def __init__(self, name: str, documents: Sequence[Document]) -> None:
        self.name, self._documents = name, list(documents)
        if len({document.key for document in self._documents}) != len(self._documents):
            raise SourceError(f"source {name}: two documents have the same key; give each its own")
        self.digest = digest_json([_described(found) for found in self._documents])

    def __len__(self) -> int:
        return len(self._documents)

    def __iter__(self) -> Iterator[Document]:
        return iter(self._documents)


def _described(document: Document) -> dict[str, Any]:
    described = asdict(document)
    for name in ("tokens", "learnt", "log_probs"):
        if (array := described.pop(name)) is not None:
            described[name] = np.asarray(array).tolist()
    return described
