"""The first documents of a dataset that is too large for this machine, streamed once into a local table.

    documents.arrow     an Arrow stream of the columns that are read, memory-mapped afterwards
    stream.json         its size, digest and number of documents; written last

It lies under `data_dir`, in streams/DIGEST, and is used until it is removed: the hub is not asked again. Memory stays flat:
a batch of documents is written before the next one is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from softcache.data.sources.build_cache import build_dir_path, build_folder
from softcache.data.sources.files import file_digest
from softcache.data.sources.text.chat import tokenize
from softcache.data.sources.text.tokenizer import digest_tokenizer, load_tokenizer
from softcache.errors import SourceError
from softcache.runtime.logging import progress_bar

if TYPE_CHECKING:
    from softcache.data.sources.text.hugging_face import HuggingFaceTexts

__all__ = ["stream_documents"]

STREAM_VERSION = 1
BATCH_DOCUMENTS = 512


def stream_documents(
    settings: HuggingFaceTexts,
    arguments: Mapping[str, Any],
    *,
    datasets: Any,
    split: str,
    columns: Sequence[str],
    contents: str | None,
) -> tuple[Any, str]:
    """Returns a table of the first documents of a split, streamed now if it was not before, and what names its contents.

    Args:
        arguments: what `load_dataset` is called with.
        contents: names local files; None of the hub.

    Raises:
        SourceError: there is no such column, or documents differ in their type.
        StorageError: `data_dir` cannot be written.
    """
    tokenizer = load_tokenizer(settings) if settings.max_tokens and not settings.has_tokens else None
    made_from = {
        "version": STREAM_VERSION,
        "path": [settings.path, settings.subset, settings.revision] if contents is None else contents,
        "split": split,
        "columns": list(columns),
        "bounds": [settings.max_documents, settings.max_tokens],
        "tokenizer": None if tokenizer is None else digest_tokenizer(tokenizer),
    }
    folder = build_dir_path(settings, "streams", made_from)
    described = _described(folder)
    if described is None:
        with build_folder(folder, lambda made: _described(made) is not None) as staged:
            stream = datasets.load_dataset(**arguments, split=split, streaming=True)
            num_documents = _write(stream, staged / "documents.arrow", settings, columns, tokenizer)
            described = {
                "num_documents": num_documents,
                "num_bytes": (staged / "documents.arrow").stat().st_size,
                "digest": file_digest(staged / "documents.arrow"),
                "made_from": made_from,
            }
            (staged / "stream.json").write_text(json.dumps(described, indent=2) + "\n")
    return datasets.Dataset.from_file(str(folder / "documents.arrow")), described["digest"]


def _described(folder: Path) -> dict[str, Any] | None:
    """Returns stream.json, or None where the table is not whole."""
    try:
        described: dict[str, Any] = json.loads((folder / "stream.json").read_text())
        is_whole = (folder / "documents.arrow").stat().st_size == described["num_bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return described if is_whole else None


def _write(
    stream: Any, path: Path, settings: HuggingFaceTexts, columns: Sequence[str], tokenizer: Any
) -> int:
    """Writes documents until a bound is reached; returns how many."""
    left_documents, left_tokens = settings.max_documents, settings.max_tokens
    num_documents, writer, schema = 0, None, None
    try:
        bound = left_documents or left_tokens or 0
        unit = "documents" if left_documents else "tokens"
        with progress_bar(f"stream {settings.path}", bound, unit) as advance:
            for batch in stream.with_format("arrow").iter(batch_size=BATCH_DOCUMENTS):
                table = _selected(batch, columns, settings)
                if left_documents is not None:
                    table = table.slice(0, left_documents)
                    left_documents -= len(table)
                if left_tokens is not None:
                    totals = list(accumulate(_counts(table, columns, tokenizer)))
                    fits = sum(total < left_tokens for total in totals)
                    # The document that reaches the bound is the last one.
                    table, is_full = table.slice(0, fits + 1), fits < len(totals)
                    left = 0 if is_full else left_tokens - (totals or [0])[-1]
                    advance(left_tokens - left if unit == "tokens" else 0)
                    left_tokens = left
                schema = table.schema if schema is None else schema
                writer = writer or pa.ipc.new_stream(str(path), schema)
                writer.write_table(_cast(table, schema, num_documents, settings))
                num_documents += len(table)
                advance(len(table) if unit == "documents" else 0)
                if left_documents == 0 or left_tokens == 0:
                    break
    finally:
        if writer is not None:
            writer.close()
    if not num_documents:
        raise SourceError(f"source.path {settings.path!r}: no documents in the stream; check the split")
    return num_documents


def _selected(batch: pa.Table, columns: Sequence[str], settings: HuggingFaceTexts) -> pa.Table:
    for name in columns:
        if name not in batch.column_names:
            raise SourceError(
                f"source.path {settings.path!r}: no column {name!r}; it has {', '.join(batch.column_names)}"
            )
    return batch.select(list(columns))


def _counts(table: pa.Table, columns: Sequence[str], tokenizer: Any) -> list[int]:
    """Returns how many tokens each document has, without those that are put around it."""
    if tokenizer is None:
        return [len(row or ()) for row in table.column(columns[0]).to_pylist()]
    counts = [0] * len(table)
    for column in columns:
        texts = [text if isinstance(text, str) else "" for text in table.column(column).to_pylist()]
        if texts:
            counts = [
                n + len(ids) for n, ids in zip(counts, tokenize(tokenizer, texts)["input_ids"], strict=True)
            ]
    return counts


def _cast(table: pa.Table, schema: pa.Schema, number: int, settings: HuggingFaceTexts) -> pa.Table:
    try:
        return table.cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise SourceError(
            f"source.path {settings.path!r}, documents from {number:,} on: {error}; expected the type of those before"
        ) from error
