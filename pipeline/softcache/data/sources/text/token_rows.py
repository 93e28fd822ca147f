"""Rows of a table that hold token ids, and which of them are learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from softcache.errors import SourceError

__all__ = ["read_tokens"]

IGNORED = -100
"""The label of a token that is not learned, in PyTorch and transformers."""


def read_tokens(
    rows: pa.Table, columns: Sequence[str], numbers: Sequence[int], *, is_mask: bool, path: str | None
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Yields the ids of each row, and which of them are learned; None: all of them.

    Args:
        columns: of the ids, and of labels or a mask where there is one.
        numbers: of the rows, for messages.
        is_mask: whether the second column is a mask.

    Raises:
        SourceError: a column does not hold lists of whole numbers, or labels or mask do not fit the ids.
    """
    ids, *more = (_lists(rows, column, of=path) for column in columns)
    for place, tokens in enumerate(ids):
        if not more:
            yield tokens, None
            continue
        where = f"source.path {path!r}, row {numbers[place]}, column {columns[1]!r}"
        given = more[0][place]
        if len(given) != len(tokens):
            raise SourceError(
                f"{where}: {len(given)} values; expected {len(tokens)}, one for each of {columns[0]!r}; "
                "name another column"
            )
        yield tokens, _by_mask(given, where) if is_mask else _by_labels(given, tokens, where)


def _by_mask(mask: np.ndarray, where: str) -> np.ndarray:
    if len(mask) and not np.isin(mask, (0, 1)).all():
        raise SourceError(f"{where}: {mask.max()} in a mask; expected 0 and 1; name another column")
    return mask.astype(bool)


def _by_labels(labels: np.ndarray, tokens: np.ndarray, where: str) -> np.ndarray:
    learnt = labels != IGNORED
    if wrong := np.flatnonzero(learnt & (labels != tokens)).tolist():
        place = wrong[0]
        raise SourceError(
            f"{where}: label {labels[place]} of token {place}, whose id is {tokens[place]}; expected the same id, or "
            "-100 where it is not learned; labels that are shifted by one have to be shifted back"
        )
    return learnt


def _lists(rows: pa.Table, column: str, *, of: str | None) -> list[np.ndarray]:
    """Returns a column of lists of whole numbers, each as an array; null is an empty one."""
    found = rows.column(column)
    value = getattr(found.type, "value_type", None)
    is_whole = value is not None and any(
        test(value) for test in (pa.types.is_integer, pa.types.is_boolean, pa.types.is_null)
    )
    if not is_whole:
        raise SourceError(
            f"source.path {of!r}: column {column!r} is of {found.type}; expected lists of whole numbers; name another column"
        )
    lists = []
    for row in found:
        values = row.values if row.is_valid else pa.array([], pa.int32())
        if values.null_count:
            raise SourceError(
                f"source.path {of!r}: column {column!r} has null inside of a list; expected whole numbers"
            )
        lists.append(values.to_numpy(zero_copy_only=False) if len(values) else np.zeros(0, np.int32))
    return lists
