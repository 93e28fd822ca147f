"""A Hugging Face dataset, or local files that its library reads.

Local files are hashed in full on every open (about 1 GB/s): size and time miss an edit in place. What the
datasets library makes of them lies under `data_dir`, in datasets/DIGEST.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator

from softcache.data.sources.base import SOURCES, Split
from softcache.data.sources.text.documents import Document, choose_documents
from softcache.data.sources.text.settings import TextSettings
from softcache.errors import MissingExtraError, SourceError
from softcache.hashing.digests import digest_json
from softcache.runtime.optional import text_library

__all__ = ["HfDocuments", "HuggingFaceTexts"]


@SOURCES.register("text/hf")
class HuggingFaceTexts(TextSettings):
    """A dataset of the hub, or a local file or folder (parquet, json, jsonl, txt; of a txt file, each paragraph is a
    document).

    Chats are in `messages_column`, as messages of `role` and `content`, or of `from` and `value` (ShareGPT); the assistant's
    words are learned. `prompt_column` and `completion_column` hold texts, or messages; the completion is learned.
    `tools_column` holds the tools of each chat, as JSON schemas or their JSON text.

    `eval_share` of the documents, chosen by a hash of their key, are held out where the dataset has no split of
    its own (`eval_split`). Documents come in the order of another hash of their key, or with
    `shuffle_documents = false` in that of the dataset.
    """

    name: str = "hf"
    path: str | None = None
    subset: str | None = None
    train_split: str = "train"
    eval_split: str | None = None
    text_column: str = "text"
    messages_column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    tools_column: str | None = None
    key_column: str | None = None
    eval_share: float = Field(0.1, gt=0, lt=1)
    shuffle_documents: bool = True

    @property
    def has_prompts(self) -> bool:
        return self.messages_column is not None or self.prompt_column is not None

    @model_validator(mode="after")
    def _columns_fit(self) -> Self:
        if (self.prompt_column is None) != (self.completion_column is None):
            raise ValueError("source.prompt_column and source.completion_column: give both, or neither")
        if self.messages_column is not None and self.prompt_column is not None:
            raise ValueError(
                "source.messages_column and source.prompt_column: a document is a chat or a prompt with its completion; "
                "give one of them"
            )
        if self.has_prompts and self.packing == "packed":
            raise ValueError(
                'source.packing: "packed" would cut answers from their prompts; use "best_fit", or "documents"'
            )
        if self.tools_column and not self.has_prompts:
            raise ValueError(
                "source.tools_column: for chats only; give source.messages_column or source.prompt_column, or drop it"
            )
        return self

    def documents(self, split: Split) -> HfDocuments:
        return HfDocuments(self, split)


class HfDocuments:
    """Rows of a Hugging Face dataset under their `key_column`, or SPLIT/NUMBER."""

    _KINDS: Mapping[str, str] = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".txt": "text"}
    _ROWS_READ = 256

    def __init__(self, settings: HuggingFaceTexts, split: Split) -> None:
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
        self._columns = [settings.messages_column or settings.prompt_column or settings.text_column]
        self._columns += filter(None, [settings.completion_column, settings.tools_column])
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
        columns = [self._columns, settings.has_prompts, settings.key_column]
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
        wanted = [*self._columns, *filter(None, [settings.key_column])]
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
        return choose_documents(
            map(self._key, range(len(self._table))),
            self._split,
            eval_share=self._settings.eval_share if self._settings.eval_split is None else None,
            shuffle=self._settings.shuffle_documents,
        )

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Document]:
        for start in range(0, len(self._numbers), self._ROWS_READ):
            numbers = self._numbers[start : start + self._ROWS_READ].tolist()
            rows = self._table[numbers]
            for place, number in enumerate(numbers):
                yield self._document(number, [rows[column][place] for column in self._columns])

    def _document(self, number: int, values: list[Any]) -> Document:
        settings, key = self._settings, self._key(number)
        if settings.messages_column:
            return Document(
                key, messages=self._checked(number, 0, values[0], list), tools=self._tools(number, values)
            )
        if settings.prompt_column is None:
            return Document(key, self._checked(number, 0, values[0], str))
        if isinstance(values[0], list):
            prompt, answer = (self._checked(number, place, values[place], list) for place in (0, 1))
            tools = self._tools(number, values)
            return Document(key, messages=[*prompt, *answer], num_given=len(prompt), tools=tools)
        prompt, answer = (self._checked(number, place, values[place], str) for place in (0, 1))
        return Document(key, prompt + answer, num_given=len(prompt))

    def _tools(self, number: int, values: list[Any]) -> list[Any] | None:
        if self._settings.tools_column is None:
            return None
        tools = values[-1]
        with suppress(ValueError):  # a text that is no JSON is refused as a text
            tools = json.loads(tools or "[]") if isinstance(tools, str) else tools
        return self._checked(number, len(values) - 1, tools, list)

    def _checked(self, number: int, place: int, value: Any, kind: type) -> Any:
        if value is None:
            return kind()
        if not isinstance(value, kind):
            raise SourceError(
                f"source.path {self._settings.path!r}, row {number}: {type(value).__name__} in column "
                f"{self._columns[place]!r}; expected {kind.__name__}; name another column"
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
