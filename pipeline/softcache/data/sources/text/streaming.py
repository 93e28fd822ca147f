"""The first documents of a dataset that is too large for this machine, streamed once into a local table (`stream_table`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from softcache.data.sources.hub import stream_table
from softcache.data.sources.text.chat import tokenize
from softcache.data.sources.text.tokenizer import digest_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from softcache.data.sources.text.hugging_face import HuggingFaceTexts

__all__ = ["stream_documents"]

STREAM_VERSION = 1


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
    left_documents, left_tokens = settings.max_documents, settings.max_tokens

    def keep(table: pa.Table) -> tuple[pa.Table, int, bool]:
        nonlocal left_documents, left_tokens
        amount = 0
        if left_documents is not None:
            table = table.slice(0, left_documents)
            left_documents -= len(table)
            amount = len(table)
        if left_tokens is not None:
            totals = list(accumulate(_counts(table, columns, tokenizer)))
            fits = sum(total < left_tokens for total in totals)
            # The document that reaches the bound is the last one.
            table, is_full = table.slice(0, fits + 1), fits < len(totals)
            left = 0 if is_full else left_tokens - (totals or [0])[-1]
            amount = amount if settings.max_documents else left_tokens - left
            left_tokens = left
        return table, amount, left_documents == 0 or left_tokens == 0

    return stream_table(
        settings,
        arguments,
        datasets=datasets,
        split=split,
        columns=columns,
        made_from=made_from,
        keep=keep,
        bound=settings.max_documents or settings.max_tokens or 0,
        unit="documents" if settings.max_documents else "tokens",
    )


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
