"""Documents under stable keys: which of them a split has, and in what order.

    stdlib            the Python standard library's own source files (tests left out): real text on every machine
    hf                a Hugging Face dataset: `path` is a hub name, or a local file or folder (parquet, json,
                      jsonl, txt; of a txt file, each paragraph is a document); chats with `messages_column`

A hash of a document's key decides whether it is held out, another one its place in the order.

Local files are hashed in full on every open (about 1 GB/s): size and time miss an edit in place. What the
datasets library makes of them lies under `data_dir`, in datasets/DIGEST.
"""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from softcache.data.sources.text.settings import Split, TextSettings
from softcache.errors import MissingExtraError, SourceError
from softcache.hashing.digests import digest_json
from softcache.runtime.optional import text_library

__all__ = ["Document", "Documents", "load_documents"]


@dataclass(frozen=True)
class Document:
    """A text under its stable key, or a chat."""

    key: str
    text: str = ""
    messages: Sequence[Any] = field(default_factory=tuple)


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


def load_documents(settings: TextSettings, split: Split) -> Documents:
    """Returns the documents of a split.

    Raises:
        SourceError: the settings name no dataset; or, once its documents are asked for, it cannot be read, has
            no such column or split, or two documents have the same key.
    """
    return StdlibDocuments(settings, split) if settings.name == "stdlib" else HfDocuments(settings, split)


def _key_numbers(key: str) -> tuple[int, int]:
    """Two 64-bit numbers that a key alone decides (unlike Python's salted hash): one for the hold-out, one
    for the order."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8]), int.from_bytes(digest[8:16])


def _chosen(keys: Iterable[str], settings: TextSettings, split: Split) -> np.ndarray:
    """Returns the numbers [N] int64 of the keys that are of the split, in order."""
    numbers = np.fromiter((_key_numbers(key) for key in keys), np.dtype(("<u8", 2)))
    chosen = np.arange(len(numbers))
    if settings.eval_split is None:
        held_out = numbers[:, 0] < np.uint64(settings.eval_share * 2**64)
        chosen = np.flatnonzero(held_out == (split == "eval"))
    return chosen[np.argsort(numbers[chosen, 1], kind="stable")] if settings.shuffle_documents else chosen


class StdlibDocuments:
    """Python files of the standard library under their relative paths.

    Left out are tests and what differs between installations of one Python version.
    """

    _LEFT_OUT = re.compile(
        r"(test|tests|idle_test|site-packages|dist-packages|__pycache__|lib2to3|turtledemo|config-.*"
        r"|_sysconfigdata_.*|(site|user)customize\.py)"
    )

    def __init__(self, settings: TextSettings, split: Split) -> None:
        unused = ("path", "subset", "eval_split", "messages_column", "key_column")
        given = [name for name in unused if getattr(settings, name) is not None]
        if given:
            raise SourceError(
                f"source.{given[0]}: not for the source stdlib; take it out, or use name = 'hf'"
            )
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
        self._keys = [keys[number] for number in _chosen(keys, settings, split)]

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


class HfDocuments:
    """Rows of a Hugging Face dataset under their `key_column`, or SPLIT/NUMBER."""

    _KINDS: Mapping[str, str] = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".txt": "text"}
    _ROWS_READ = 256

    def __init__(self, settings: TextSettings, split: Split) -> None:
        if settings.path is None:
            raise SourceError(
                "source.path: missing; give a hub name, a folder, or a parquet, json, jsonl or txt file"
            )
        if settings.eval_split == settings.train_split:
            raise SourceError(
                f"source.eval_split: {settings.eval_split!r} is what is trained on; give another split, or none to "
                "hold out source.eval_share of the documents"
            )
        self.name = f"{settings.path}/{split}"
        self._settings, self._split = settings, split
        self._hf_split = settings.train_split
        if split == "eval" and settings.eval_split is not None:
            self._hf_split = settings.eval_split
        self._column = settings.messages_column or settings.text_column
        path = Path(settings.path).expanduser()
        self._path = path.resolve() if path.exists() else None
        kinds = ", ".join(self._KINDS)
        if path.is_file() and path.suffix not in self._KINDS:
            raise SourceError(
                f"source.path {settings.path!r}: a file must end in {kinds}; found {path.suffix!r}"
            )
        if self._path is None and path.suffix in self._KINDS:
            raise SourceError(f"source.path {settings.path!r}: no such file; check source.path")

    @cached_property
    def _contents(self) -> str:
        # The fingerprint that datasets gives a table of the hub follows its commit.
        return self._table._fingerprint if self._path is None else _contents_digest(self._path)

    @cached_property
    def digest(self) -> str:
        settings = self._settings
        part = None if settings.eval_split is not None else [self._split, settings.eval_share]
        columns = [self._column, settings.messages_column is not None, settings.key_column]
        return digest_json(
            [self._contents, settings.subset, self._hf_split, part, columns, settings.shuffle_documents]
        )

    @cached_property
    def _table(self) -> Any:
        settings = self._settings
        try:
            with _without_bars() as datasets:
                table = datasets.load_dataset(**self._arguments(), split=self._hf_split)
        except (MissingExtraError, SourceError):
            raise
        except Exception as error:
            # The library raises many kinds of errors for a name that it cannot serve; the user needs to know which.
            raise SourceError(
                f"source.path {settings.path!r}, split {self._hf_split!r}: cannot be loaded: "
                f"{type(error).__name__}: {error}; check source.path, source.subset and the names of the splits"
            ) from error
        wanted = [self._column, *filter(None, [settings.key_column])]
        for name in wanted:
            if name not in table.column_names:
                raise SourceError(
                    f"source.path {settings.path!r}: no column {name!r}; it has {', '.join(table.column_names)}"
                )
        return table.select_columns(list(dict.fromkeys(wanted)))

    def _arguments(self) -> dict[str, Any]:
        """What load_dataset is called with.

        The library knows local files by name and time, so its cache lies under the digest of their contents.
        """
        subset, path = self._settings.subset, self._path
        if path is None:
            return {"path": self._settings.path, "name": subset}
        cache_dir = Path(self._settings.data_dir).expanduser() / "datasets" / self._contents[:16]
        arguments: dict[str, Any] = {"path": str(path), "name": subset, "cache_dir": str(cache_dir.resolve())}
        files = [path] if path.is_file() else _files_in(path)
        if path.is_file():
            arguments |= {"path": self._KINDS[path.suffix], "data_files": str(path)}
        if {file.suffix for file in files} == {".txt"}:
            arguments["sample_by"] = "paragraph"
        return arguments

    @cached_property
    def _keys(self) -> Sequence[str] | None:
        """The keys of all rows where a column has them; a row's number is one anyway."""
        column = self._settings.key_column
        if column is None:
            return None
        keys = list(self._table[column][:])
        seen: set[str] = set()
        for number, key in enumerate(keys):
            trouble = None if isinstance(key, str | int) else "is neither text nor a whole number"
            if str(key) in seen:
                trouble = "comes twice"
            if trouble:
                raise SourceError(
                    f"source.path {self._settings.path!r}, row {number}: key {key!r} in column {column!r} {trouble}; "
                    "keys name samples and must differ; name another source.key_column, or none to number the rows"
                )
            seen.add(str(key))
        return [str(key) for key in keys]

    def _key(self, number: int) -> str:
        return f"{self._hf_split}/{number}" if self._keys is None else self._keys[number]

    @cached_property
    def _numbers(self) -> np.ndarray:
        return _chosen(map(self._key, range(len(self._table))), self._settings, self._split)

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Document]:
        for start in range(0, len(self._numbers), self._ROWS_READ):
            numbers = self._numbers[start : start + self._ROWS_READ].tolist()
            for number, value in zip(numbers, self._table[numbers][self._column], strict=True):
                if self._settings.messages_column:
                    yield Document(self._key(number), messages=self._checked(number, value, list))
                else:
                    yield Document(self._key(number), self._checked(number, value, str))

    def _checked(self, number: int, value: Any, kind: type) -> Any:
        if value is None:
            return kind()
        if not isinstance(value, kind):
            raise SourceError(
                f"source.path {self._settings.path!r}, row {number}: {type(value).__name__} in column "
                f"{self._column!r}; expected {kind.__name__}; name another column"
            )
        return value


def _files_in(folder: Path) -> list[Path]:
    """The files that are not hidden, in order."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(
        path for path in files if not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )


def _contents_digest(path: Path) -> str:
    """Returns the digest of a file's contents, or of all names and contents in a folder."""

    def digest(file: Path) -> str:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    try:
        if path.is_file():
            return digest_json([path.suffix, digest(path)])
        return digest_json([[file.relative_to(path).as_posix(), digest(file)] for file in _files_in(path)])
    except OSError as error:
        raise SourceError(f"source.path {path}: cannot be read: {error}; check its permissions") from error


@contextmanager
def _without_bars() -> Iterator[Any]:
    """Yields the datasets library, silenced; the user's own setting comes back afterwards."""
    datasets = text_library("datasets")
    if datasets.are_progress_bars_disabled():
        yield datasets
        return
    datasets.disable_progress_bars()
    try:
        yield datasets
    finally:
        datasets.enable_progress_bars()
