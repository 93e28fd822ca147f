"""Documents in memory-mapped files of token ids: the base of sources whose files hold ids and nothing else."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from pydantic import Field

from softcache.data.sources.base import Split
from softcache.data.sources.files import CorpusFiles, find_files
from softcache.data.sources.splits import choose_samples
from softcache.data.sources.text.documents import Document
from softcache.data.sources.text.settings import TextSettings
from softcache.errors import SourceError
from softcache.hashing.digests import digest_json

__all__ = ["MappedDocuments", "MappedIds", "TokenFileSettings", "token_files"]

MAX_DOCUMENT_TOKENS = 2**20
"""A longer run of ids is several documents."""


class TokenFileSettings(TextSettings):
    """[source] of files of token ids, which `tokenizer` made.

    `path` and `eval_path` are a file or a glob of files, also in a bucket. Without `eval_path`, `eval_share` of the
    documents, chosen by a hash of their key (FILE/NUMBER), are held out; documents come in the order of another hash of
    their key, or with `shuffle_documents = false` in that of the files. More than 1,048,576 ids without an end are
    several documents.
    """

    path: str
    eval_path: str | None = None
    eval_share: float = Field(0.1, gt=0, lt=1)
    shuffle_documents: bool = True

    @property
    def has_tokens(self) -> bool:
        return True

    @abstractmethod
    def mapped(self, path: str) -> tuple[list[MappedIds], Any]:
        """Returns the files of a path, and what names their contents.

        Raises:
            SourceError: one is missing, truncated, corrupt or of something else.
        """

    def documents(self, split: Split) -> MappedDocuments:
        return MappedDocuments(self, split)


@dataclass(frozen=True)
class MappedIds:
    """A file of ids.

    Attributes:
        name: of the file, in keys.
        ids: [L] whole numbers, memory-mapped.
        ends: [N] int64, where each document ends and the next one starts, ascending.
    """

    name: str
    ids: np.ndarray
    ends: np.ndarray

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each document starts [N] int64, long ones several times."""
        starts = np.concatenate([[0], self.ends]).astype(np.int64)[:-1]
        lengths = self.ends - starts
        if lengths.max(initial=0) <= MAX_DOCUMENT_TOKENS:
            return starts
        pieces = np.maximum(-(-lengths // MAX_DOCUMENT_TOKENS), 1)
        before = np.concatenate([[0], np.cumsum(pieces)[:-1]])
        return np.repeat(starts, pieces) + MAX_DOCUMENT_TOKENS * (
            np.arange(pieces.sum()) - np.repeat(before, pieces)
        )

    def document(self, number: int) -> np.ndarray:
        """Returns the ids of one document."""
        last = number + 1 == len(self.starts)
        return np.asarray(self.ids[self.starts[number] : self.ends[-1] if last else self.starts[number + 1]])


class MappedDocuments:
    """Documents of files of ids, under FILE/NUMBER."""

    def __init__(self, settings: TokenFileSettings, split: Split) -> None:
        path, self._share = settings.path, settings.eval_share
        if settings.eval_path == settings.path:
            raise SourceError(
                f"source.eval_path: {path!r} is what is trained on; give other files, or none to hold out "
                "source.eval_share of the documents"
            )
        self._is_held_out = settings.eval_path is None
        if split == "eval" and settings.eval_path is not None:
            path = settings.eval_path
        self.name = f"{path}/{split}"
        self._settings, self._split = settings, split
        self._mapped, self._contents = settings.mapped(path)

    @cached_property
    def digest(self) -> str:
        part = [self._split, self._share] if self._is_held_out else None
        return digest_json([self._contents, part, self._settings.shuffle_documents])

    @cached_property
    def _firsts(self) -> np.ndarray:
        """The number of the first document of each file, and of all."""
        return np.cumsum([0, *(len(mapped.starts) for mapped in self._mapped)])

    @cached_property
    def _numbers(self) -> np.ndarray:
        keys = (f"{mapped.name}/{number}" for mapped in self._mapped for number in range(len(mapped.starts)))
        share = self._share if self._is_held_out else None
        return choose_samples(keys, self._split, eval_share=share, shuffle=self._settings.shuffle_documents)

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Document]:
        places = np.searchsorted(self._firsts, self._numbers, side="right") - 1
        for number, place in zip(self._numbers.tolist(), places.tolist(), strict=True):
            mapped, inside = self._mapped[place], number - int(self._firsts[place])
            yield Document(f"{mapped.name}/{inside}", tokens=mapped.document(inside))


def token_files(path: str, settings: TextSettings, *, kind: str, what: str) -> CorpusFiles:
    """Returns the files of one kind that a path names, unpacked where they are compressed.

    Args:
        kind: the suffix, such as ".bin".
        what: the files, for messages.

    Raises:
        SourceError: there are none, or the path is a folder.
    """
    files = find_files(path, settings, kinds=(kind,))
    if files is None or files.is_folder:
        found = "no such file" if files is None else "a folder"
        raise SourceError(
            f"source.path {path!r}: {found}; expected {what}: a file or a glob such as DIR/*{kind}"
        )
    return files


def check_same(names: Sequence[str], others: Sequence[str], *, path: str, kinds: tuple[str, str]) -> None:
    """Raises SourceError unless two lists of names without suffix are the same."""
    if lonely := sorted(set(names) ^ set(others)):
        missing = kinds[1] if lonely[0] in names else kinds[0]
        raise SourceError(
            f"source.path {path!r}: {lonely[0]}{missing} is missing next to the other of the pair {kinds[0]} and "
            f"{kinds[1]}; copy both"
        )
