"""What the arrays of the records of detectors must be, alone and where records are joined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from array_api_compat import array_namespace, is_numpy_array, is_torch_array

from softcache.errors import LabelError
from softcache.labels.arrays import Array

__all__ = ["check_array", "check_compatible", "join_columns"]


def check_array(name: str, array: Array, shape: tuple[int, ...], *, like: Array, integer: bool) -> None:
    """Raises LabelError unless an array is of the kind of `like` (NumPy or torch), of a shape, and of integers or floats."""
    if not (is_numpy_array(array) or is_torch_array(array)) or is_torch_array(array) != is_torch_array(like):
        raise LabelError(
            f"{name}: expected arrays of one kind, all NumPy or all torch; found {type(array).__name__} beside "
            f"{type(like).__name__}; convert with torch.from_numpy or Tensor.numpy"
        )
    if tuple(array.shape) != shape:
        raise LabelError(
            f"{name}: expected shape {list(shape)}; found {list(array.shape)}; give one row per position"
        )
    if not array_namespace(array).isdtype(array.dtype, "integral" if integer else "real floating"):
        wanted = "an integer" if integer else "a floating-point"
        raise LabelError(f"{name}: expected {wanted} dtype; found {array.dtype}; cast it first")


def check_compatible(name: str, records: Sequence[Any], facts: Sequence[str]) -> None:
    """Raises LabelError unless there are records and all have the same `facts`."""
    if not records:
        raise LabelError(
            f"{name}.concat: expected at least one record; found none; check that the source is not empty"
        )
    for number, record in enumerate(records):
        for fact in facts:
            expected, found = getattr(records[0], fact), getattr(record, fact)
            if expected != found:
                raise LabelError(
                    f"{name}.concat, record {number}: expected {fact} {expected} as in record 0; found {found}; "
                    "join only records of one cache or one label policy"
                )


def join_columns(name: str, parts: Sequence[dict[str, Array]]) -> dict[str, Any]:
    """Returns the arrays of all parts end to end, by name; raises LabelError where a part has others."""
    for number, part in enumerate(parts):
        if part.keys() != parts[0].keys():
            raise LabelError(
                f"{name}.concat, record {number}: expected the columns {sorted(parts[0])} as in record 0; found "
                f"{sorted(part)}; join only records of one cache or one label policy"
            )
    return {
        column: array_namespace(first).concat([part[column] for part in parts], axis=0)
        for column, first in parts[0].items()
    }
