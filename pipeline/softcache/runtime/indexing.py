"""Row numbers: of what stands in the brackets of an object, as NumPy reads it, and of many ranges at once."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

__all__ = ["concatenated_ranges", "row_numbers"]


def concatenated_ranges(starts: np.ndarray, counts: np.ndarray, step: int = 1) -> np.ndarray:
    """Returns start, start + step, … for each start, `counts` of them, one after the other, int64 [sum of counts].

    Args:
        starts, counts: [B] integers.
    """
    ends = np.cumsum(counts, dtype=np.int64)
    return step * np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - step * (ends - counts), counts)


def row_numbers(index: Any, length: int, what: str) -> np.ndarray:
    """Returns the numbers [B] int64 of the rows that an index of one axis chooses, from 0 to length - 1.

    An integer chooses one row, and keeps the axis as a slice of one row does; everything else as in NumPy: negative
    numbers count from the end, a boolean mask has one value per row, and a list or an array gives rows in its order.

    Args:
        index: an integer, a slice, or a list, array, tensor or column of integers or booleans.
        length: of the axis.
        what: has these rows, for messages, such as "cache runs/digits/cache".

    Raises:
        IndexError: a number out of range, a mask of another length, or anything that is not an index.
    """
    if isinstance(index, slice):
        return np.arange(*index.indices(length))
    if isinstance(index, tuple) or index is None or index is Ellipsis:
        raise IndexError(f"{what}: {_shown(index)} is of several axes; expected an index of one, the rows")
    if not isinstance(index, bool | np.bool_):
        try:
            index = operator.index(index)
            return _in_range(np.array([index]), length, what)
        except TypeError:
            pass  # no single integer
    given = index.detach().cpu() if hasattr(index, "detach") else index  # a tensor, also of a GPU
    try:
        array = np.asarray(given)
    except ValueError as error:  # rows of different lengths
        raise IndexError(f"{what}: {_shown(index)} is no index: {error}") from error
    if array.size == 0 and isinstance(index, list):
        array = array.astype(np.int64)  # NumPy makes floats of an empty list, and takes it
    if array.ndim != 1 or array.dtype.kind not in "iub":
        raise IndexError(
            f"{what}: {_shown(index)} is an index of {array.dtype}, of shape {list(array.shape)}; expected an integer, a "
            "slice, or integers or booleans [B]"
        )
    if array.dtype.kind == "b":
        if len(array) != length:
            raise IndexError(f"{what}: a mask of {len(array)} values; expected {length}, one per row")
        return np.flatnonzero(array)
    return _in_range(array, length, what)


def _in_range(numbers: np.ndarray, length: int, what: str) -> np.ndarray:
    wrong = (numbers >= length) | (numbers < -length)
    for number in numbers[wrong][:1]:
        raise IndexError(f"{what}: row {number} is out of range; expected {-length} to {length - 1}")
    numbers = numbers.astype(np.int64)
    return np.where(numbers < 0, numbers + length, numbers)


def _shown(index: Any) -> str:
    text = repr(index)
    return text if len(text) <= 60 else f"{text[:60]}…"
