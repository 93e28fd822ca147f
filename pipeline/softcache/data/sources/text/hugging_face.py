"""Tables of documents: a Hugging Face dataset, a folder of `save_to_disk`, or files that its library reads.

Local files are hashed in full on every open (about 1 GB/s): size and time miss an edit in place. What the
datasets library makes of them lies under `data_dir`, in datasets/DIGEST; a folder of `save_to_disk` is read where it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import date, time, timedelta
from functools import cached_property
from typing import Any, Self

import numpy as np
import xxhash
from pydantic import Field, model_validator

from softcache.data.sources.base import SOURCES, Split
from softcache.data.sources.files import find_files
from softcache.data.sources.hub import is_saved, load_arguments, loading_error, quiet_datasets, saved_split
from softcache.data.sources.splits import choose_samples
from softcache.data.sources.text.documents import Document
from softcache.data.sources.text.settings import TextSettings
from softcache.data.sources.text.streaming import stream_documents
from softcache.data.sources.text.token_rows import read_tokens
from softcache.data.sources.text.tokenizer import is_bpe
from softcache.errors import MissingExtraError, SourceError
from softcache.hashing.digests import digest_json
from softcache.runtime.files import parse_json

__all__ = ["HfDocuments", "HuggingFaceTexts"]


@SOURCES.register("text/hf")
class HuggingFaceTexts(TextSettings):
    """A dataset of the hub, a folder of `save_to_disk`, or files: one, a glob or a folder, also in a bucket (`s3://`,
    `gs://`), of parquet, arrow, json, jsonl, csv, tsv or txt (each paragraph of which is a document), also compressed
    (gz, bz2, xz, zst).

    Chats are in `messages_column`, as messages of `role` and `content`, or of `from` and `value` (ShareGPT); the assistant's
    words are learned. `prompt_column` and `completion_column` hold texts, or messages; the completion is learned.
    `tools_column` holds the tools of each chat, as JSON schemas or their JSON text.

    Documents that are tokenized already are in `input_ids_column`, with the ids of `tokenizer`. `labels_column` holds
    for each id the same id, or -100 where it is not learned; `mask_column` 1 where it is learned, else 0.

    `streaming = true` reads a dataset that is too large for this machine: its first `max_documents`, or those until
    `max_tokens` are reached, become a local table (streaming.py). `revision` is a commit, branch or tag of the hub.

    `eval_share` of the documents, chosen by a hash of their key, are held out where the dataset has no split of
    its own (`eval_split`). Documents come in the order of another hash of their key, or with
    `shuffle_documents = false` in that of the dataset.

    Attributes:
        path: name on the hub, folder, file or glob.
        subset: the configuration of a dataset of the hub.
        train_split: name of the split that is labeled.
        text_column: column of the texts.
        key_column: column of the keys; without it keys are SPLIT/ROW.
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
    input_ids_column: str | None = None
    labels_column: str | None = None
    mask_column: str | None = None
    key_column: str | None = None
    revision: str | None = None
    streaming: bool = False
    max_documents: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    eval_share: float = Field(0.1, gt=0, lt=1)
    shuffle_documents: bool = True

    @property
    def has_prompts(self) -> bool:
        return any(
            column is not None
            for column in (self.messages_column, self.prompt_column, self.labels_column, self.mask_column)
        )

    @property
    def may_have_chats(self) -> bool:
        return self.messages_column is not None or self.prompt_column is not None

    @property
    def has_tokens(self) -> bool:
        return self.input_ids_column is not None

    @model_validator(mode="after")
    def _columns_fit(self) -> Self:
        if (self.prompt_column is None) != (self.completion_column is None):
            raise ValueError("source.prompt_column and source.completion_column: give both, or neither")
        given = {
            name: getattr(self, name) is not None
            for name in ("messages_column", "prompt_column", "input_ids_column")
        }
        if sum(given.values()) > 1:
            listed = " and ".join(f"source.{name}" for name, is_given in given.items() if is_given)
            raise ValueError(
                f"{listed}: a document is a chat, a prompt with its completion, or token ids; give one of them"
            )
        for name in ("labels_column", "mask_column"):
            if getattr(self, name) is not None and self.input_ids_column is None:
                raise ValueError(
                    f"source.{name}: of token ids, which source.input_ids_column names; give it, too"
                )
        if self.labels_column is not None and self.mask_column is not None:
            raise ValueError("source.labels_column and source.mask_column: give one of them")
        bounds = ("max_documents", "max_tokens")
        if self.streaming and all(getattr(self, name) is None for name in bounds):
            raise ValueError(
                "source.streaming: without a bound; give source.max_documents or source.max_tokens"
            )
        for name in bounds if not self.streaming else ():
            if getattr(self, name) is not None:
                raise ValueError(
                    f"source.{name}: bounds what is streamed; set source.streaming = true, or bound the samples by "
                    "source.max_train_samples"
                )
        if self.max_tokens and self.messages_column:
            raise ValueError("source.max_tokens: of texts and token ids; bound chats by source.max_documents")
        if self.max_tokens and is_bpe(self.tokenizer):
            raise ValueError(
                f"source.max_tokens: counted by source.tokenizer, and {self.tokenizer!r} is trained on what is streamed; "
                "give source.max_documents"
            )
        if self.has_prompts and self.packing == "packed":
            raise ValueError(
                'source.packing: "packed" would cut answers from their prompts; use "best_fit", or "documents"'
            )
        if self.tools_column and not self.may_have_chats:
            raise ValueError(
                "source.tools_column: for chats only; give source.messages_column or source.prompt_column, or drop it"
            )
        return self

    def documents(self, split: Split) -> HfDocuments:
        return HfDocuments(self, split)


class HfDocuments:
    """Rows of a Hugging Face dataset under their `key_column`, or SPLIT/NUMBER."""

    _KINDS: Mapping[str, str] = {
        ".parquet": "parquet",
        ".arrow": "arrow",
        ".json": "json",
        ".jsonl": "json",
        ".csv": "csv",
        ".tsv": "csv",
        ".txt": "text",
    }
    _ROWS_READ, _KEYS_READ = 256, 4096

    def __init__(self, settings: HuggingFaceTexts, split: Split) -> None:
        if settings.path is None:
            raise SourceError(
                "source.path: missing; give a hub name, a folder, or a file of one of the kinds "
                f"{', '.join(self._KINDS)}"
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
        of_one = (settings.messages_column, settings.prompt_column, settings.input_ids_column)
        self._columns = [next(filter(None, of_one), settings.text_column)]
        more = (
            settings.completion_column,
            settings.tools_column,
            settings.labels_column,
            settings.mask_column,
        )
        self._columns += filter(None, more)
        self._files = find_files(settings.path, settings, kinds=self._KINDS)
        if settings.revision is not None and self._files is not None:
            raise SourceError(
                f"source.revision: {settings.revision!r} of local files, which have none; drop it, or give a hub name as "
                "source.path"
            )

    @cached_property
    def _contents(self) -> str:
        # The fingerprint that datasets gives a table of the hub follows its commit.
        if self._settings.streaming:
            return self._streamed[1]
        return self._table._fingerprint if self._files is None else self._files.digest

    @property
    def _eval_share(self) -> float | None:
        """Of the rows, which are held out; None where the splits are apart already."""
        return self._settings.eval_share if self._settings.eval_split is None else None

    @cached_property
    def digest(self) -> str:
        settings = self._settings
        part = None if self._eval_share is None else [self._split, settings.eval_share]
        columns: list[Any] = [self._columns, settings.has_prompts, settings.key_column]
        if settings.has_tokens:
            columns.append("labels" if settings.labels_column else "tokens")
        return digest_json(
            [self._contents, settings.subset, self._hf_split, part, columns, settings.shuffle_documents]
        )

    @cached_property
    def _table(self) -> Any:
        settings = self._settings
        try:
            with quiet_datasets() as datasets:
                if self._settings.streaming:
                    table = self._streamed[0]
                elif self._files is not None and is_saved(self._files):
                    table = saved_split(
                        settings, self._files.root, self._hf_split, datasets=datasets, of="documents"
                    )
                else:
                    table = datasets.load_dataset(**self._arguments(), split=self._hf_split)
        except (MissingExtraError, SourceError):
            raise
        except Exception as error:
            raise loading_error(settings, self._hf_split, error) from error
        for name in self._wanted:
            if name not in table.column_names:
                raise SourceError(
                    f"source.path {settings.path!r}: no column {name!r}; it has {', '.join(table.column_names)}"
                )
        return table.select_columns(self._wanted)

    def _arguments(self) -> dict[str, Any]:
        digest = "" if self._files is None else self._files.digest
        arguments = load_arguments(self._settings, self._files, digest, self._KINDS)
        if "keep_default_na" in arguments and not self._settings.has_tokens:
            # Texts as they are written, not as the numbers (007, 1.10) that a part of a file may be read as.
            arguments["converters"] = dict.fromkeys(self._columns, str)
        return arguments

    @property
    def _wanted(self) -> list[str]:
        return list(dict.fromkeys([*self._columns, *filter(None, [self._settings.key_column])]))

    @cached_property
    def _streamed(self) -> tuple[Any, str]:
        """The table of a stream, and its digest."""
        if self._files is not None and is_saved(self._files):
            raise SourceError(
                f"source.streaming: {self._settings.path!r} is a folder of save_to_disk, which is memory-mapped; drop it"
            )
        contents = None if self._files is None else self._files.digest
        with quiet_datasets() as datasets:
            return stream_documents(
                self._settings,
                self._arguments(),
                datasets=datasets,
                split=self._hf_split,
                columns=self._wanted,
                contents=contents,
            )

    def _keys(self) -> Iterator[str]:
        """Yields the key of each row; those of a column are read in pieces, and checked.

        Raises:
            SourceError: a key is of another type, or comes twice.
        """
        column, num_rows = self._settings.key_column, len(self._table)
        if column is None:
            yield from (f"{self._hf_split}/{number}" for number in range(num_rows))
            return
        hashes = np.empty(num_rows, np.uint64)
        for start in range(0, num_rows, self._KEYS_READ):
            for number, key in enumerate(self._table[start : start + self._KEYS_READ][column], start):
                if not isinstance(key, str | int):
                    raise self._key_error(number, key, "is neither text nor a whole number")
                hashes[number] = xxhash.xxh3_64_intdigest(str(key).encode())
                yield str(key)
        order = np.argsort(hashes, kind="stable")
        for place in np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]]).tolist():
            first, second = order[place : place + 2].tolist()
            key = self._table[second][column]
            if str(self._table[first][column]) == str(key):
                raise self._key_error(second, key, "comes twice")

    def _key_error(self, number: int, key: Any, trouble: str) -> SourceError:
        column = self._settings.key_column
        return SourceError(
            f"source.path {self._settings.path!r}, row {number}: key {key!r} in column {column!r} {trouble}; "
            "keys name samples and must differ; name another source.key_column, or none to number the rows"
        )

    @cached_property
    def _numbers(self) -> np.ndarray:
        return choose_samples(
            self._keys(),
            self._split,
            eval_share=self._eval_share,
            shuffle=self._settings.shuffle_documents,
        )

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Document]:
        column = self._settings.key_column
        table = self._table.with_format("arrow") if self._settings.has_tokens else self._table
        for start in range(0, len(self._numbers), self._ROWS_READ):
            numbers = self._numbers[start : start + self._ROWS_READ].tolist()
            rows = table[numbers]
            if column is None:
                keys = [f"{self._hf_split}/{number}" for number in numbers]
            else:
                keys = [
                    str(key)
                    for key in (rows[column].to_pylist() if self._settings.has_tokens else rows[column])
                ]
            if self._settings.has_tokens:
                is_mask = self._settings.mask_column is not None
                found = read_tokens(rows, self._columns, numbers, is_mask=is_mask, path=self._settings.path)
                for key, (tokens, learnt) in zip(keys, found, strict=True):
                    yield Document(key, tokens=tokens, learnt=learnt)
                continue
            for place, number in enumerate(numbers):
                yield self._document(number, keys[place], [rows[name][place] for name in self._columns])

    def _document(self, number: int, key: str, values: list[Any]) -> Document:
        settings = self._settings
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
            tools = parse_json(tools or "[]") if isinstance(tools, str) else tools
        return self._checked(number, len(values) - 1, tools, list)

    def _checked(self, number: int, place: int, value: Any, kind: type) -> Any:
        if value is None:
            return kind()
        if isinstance(value, date | time | timedelta):
            raise SourceError(
                f"source.path {self._settings.path!r}, row {number}: column {self._columns[place]!r} holds dates, which the "
                "datasets library reads as times, so how they are written is lost; expected texts; write a csv file, or "
                "parquet with a column of strings"
            )
        if not isinstance(value, kind):
            raise SourceError(
                f"source.path {self._settings.path!r}, row {number}: {type(value).__name__} in column "
                f"{self._columns[place]!r}; expected {kind.__name__}; name another column"
            )
        return value
