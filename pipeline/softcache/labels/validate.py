"""What the arrays of a record must be. A record is made for every batch, so what depends on a dtype or a grid alone is
looked up once for each.

Shape suffixes: `P` positions, `K` kept classes, `G` grid of temperatures.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from array_api_compat import array_namespace, is_numpy_array, is_torch_array

from softcache.errors import LabelError
from softcache.labels.arrays import Array
from softcache.labels.tail import check_temperatures

if TYPE_CHECKING:
    from softcache.labels.soft_labels import SoftLabels

__all__ = [
    "ARRAYS",
    "STATS",
    "check_array",
    "check_array_types",
    "check_compatible",
    "check_grid",
    "check_shapes",
    "join_columns",
]

STATS = ("entropy", "logit_mean", "logit_std", "support")
"""Columns of `SoftLabels.stats`: entropy of p at T=1 (nats); mean and population standard deviation, over the
classes with p > 0, of the logits shifted so that their logsumexp is 0; support, the number of classes with p
> 0."""

ARRAYS = ("ids", "log_probs", "log_tail", "target_log_prob", "stats", "counts", "log_threshold")


def check_array_types(labels: SoftLabels) -> None:
    """Raises LabelError unless the arrays are all NumPy or all torch, and integers or floats as they should be."""
    is_kind = is_torch_array if labels.is_torch else is_numpy_array
    for name in ARRAYS:
        array = getattr(labels, name)
        if array is None:
            continue
        if not is_kind(array):
            raise LabelError(
                f"SoftLabels.{name}: expected arrays of one kind, all NumPy or all torch; "
                f"found {type(array).__name__} with ids of {type(labels.ids).__name__}; "
                "convert with torch.from_numpy or Tensor.numpy"
            )
        is_integer = _is_integer(array.dtype)
        if is_integer != (name in ("ids", "counts")):
            wanted = "a floating-point" if is_integer else "an integer"
            raise LabelError(
                f"SoftLabels.{name}: expected {wanted} dtype; found {array.dtype}; cast it first"
            )


@cache
def _is_integer(dtype: Any) -> bool:
    """Of NumPy or torch; looked up once for each, because a record is made for every batch."""
    if isinstance(dtype, np.dtype):
        return dtype.kind in "iu"
    import torch

    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


check_grid = cache(check_temperatures)
"""`tail.check_temperatures`, once for each grid."""


def check_shapes(labels: SoftLabels) -> None:
    """Raises LabelError unless the arrays have a row for each position, and are there as the sampling needs them."""
    shape = tuple(labels.ids.shape)
    if len(shape) != 2 or shape[1] < 1:
        raise LabelError(
            f"SoftLabels.ids: expected shape [P, K] with K >= 1; found {list(shape)}; reshape it"
        )
    num_positions, num_kept = shape
    if labels.num_classes < num_kept:
        raise LabelError(
            f"SoftLabels: expected at most num_classes ({labels.num_classes}) kept classes; "
            f"found K = {num_kept}; lower k or use the dense policy"
        )
    _check_sampling(labels)
    grid = len(labels.temperatures)
    wanted = {
        "log_probs": (num_positions, num_kept),
        "log_tail": (num_positions, grid),
        "target_log_prob": (num_positions,),
        "stats": (num_positions, len(STATS)),
        "counts": (num_positions, num_kept),
        "log_threshold": (num_positions,),
    }
    for name, expected in wanted.items():
        array = getattr(labels, name)
        if array is not None and tuple(array.shape) != expected:
            raise LabelError(
                f"SoftLabels.{name}: expected shape {list(expected)} (ids {list(shape)}, {grid} temperatures)"
                f"; found {list(array.shape)}; give one row per position"
            )


def _check_sampling(labels: SoftLabels) -> None:
    sampling = labels.sampling
    wanted = {
        "counts": sampling is not None and sampling.replacement,
        "log_threshold": sampling is not None and not sampling.replacement,
    }
    for name, needed in wanted.items():
        if (getattr(labels, name) is not None) != needed:
            raise LabelError(
                f"SoftLabels.{name}: expected {'an array' if needed else 'None'} with sampling = {sampling}; "
                f"found {'None' if needed else 'an array'}; give both as the policy made them"
            )
    if sampling is not None and sampling.exact > labels.k:
        raise LabelError(
            f"SoftLabels.sampling: expected at most K = {labels.k} exact slots; found {sampling.exact}; "
            "give it as the policy made it"
        )


def check_array(name: str, array: Array, shape: tuple[int, ...], *, like: Array, integer: bool) -> None:
    """Raises LabelError unless an array is of the kind of `like` (NumPy or torch), of a shape, and of integers or floats."""
    if not (is_numpy_array(array) or is_torch_array(array)) or is_torch_array(array) != is_torch_array(like):
        raise LabelError(
            f"{name}: expected arrays of one kind, all NumPy or all torch; found {type(array).__name__} with "
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
