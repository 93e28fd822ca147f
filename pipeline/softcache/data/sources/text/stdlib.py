"""The Python standard library's own source files, tests left out: real text on every machine."""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from pydantic import Field

from softcache.data.sources.base import SOURCES, Split
from softcache.data.sources.splits import choose_samples
from softcache.data.sources.text.documents import Document
from softcache.data.sources.text.settings import TextSettings
from softcache.errors import SourceError
from softcache.hashing.digests import digest_json

__all__ = ["StdlibDocuments", "StdlibTexts"]


@SOURCES.register("text/stdlib")
class StdlibTexts(TextSettings):
    """Python files of the standard library.

    `eval_share` of the documents, chosen by a hash of their key, are held out; they come in the order of another hash of
    their key, or with `shuffle_documents = false` in that of their paths.
    """

    name: str = "stdlib"
    eval_share: float = Field(0.1, gt=0, lt=1)
    shuffle_documents: bool = True

    def documents(self, split: Split) -> StdlibDocuments:
        return StdlibDocuments(self, split)


class StdlibDocuments:
    """Python files of the standard library under their relative paths.

    Left out are tests and what differs between installations of one Python version.
    """

    _LEFT_OUT = re.compile(
        r"(test|tests|idle_test|site-packages|dist-packages|__pycache__|lib2to3|turtledemo|config-.*"
        r"|_sysconfigdata_.*|(site|user)customize\.py)"
    )

    def __init__(self, settings: StdlibTexts, split: Split) -> None:
        self.name = f"stdlib/{split}"
        self._root = Path(sysconfig.get_paths()["stdlib"])
        keys = []
        for folder, folders, files in os.walk(self._root):
            folders[:] = [name for name in folders if not self._LEFT_OUT.fullmatch(name)]
            keys += [
                (Path(folder) / name).relative_to(self._root).as_posix()
                for name in files
                if name.endswith(".py") and not self._LEFT_OUT.fullmatch(name)
            ]
        if not keys:
            raise SourceError(
                f"source stdlib: no Python files under {self._root}; use a Python with its library's sources"
            )
        keys.sort()
        self._keys = [
            keys[number]
            for number in choose_samples(
                keys, split, eval_share=settings.eval_share, shuffle=settings.shuffle_documents
            )
        ]

    @cached_property
    def digest(self) -> str:
        texts = [[document.key, hashlib.sha256(document.text.encode()).hexdigest()] for document in self]
        return digest_json(texts)

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Document]:
        for key in self._keys:
            try:
                text = (self._root / key).read_text(encoding="utf-8", errors="replace")
            except OSError as error:
                raise SourceError(
                    f"source stdlib: {self._root / key} cannot be read: {error}; check its permissions"
                ) from error
            yield Document(key, text)
