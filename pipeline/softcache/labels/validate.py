"""What the arrays of a record must be. A record is made for every batch, so what depends on a dtype or a grid alone is
looked up once for each.

Shape suffixes: `P` positions, `K` kept classes, `G` grid of temperatures.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from array_api_compat import is_numpy_array, is_torch_array

from softcache.errors import LabelError
from softcache.labels.tail import check_temperatures

if TYPE_CHECKING:
    from softcache.labels.soft_labels import SoftLabels

__all__ = ["ARRAYS", "STATS", "check_array_types", "check_grid", "check_shapes"]

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
                f"found {type(array).__name__} beside ids of {type(labels.ids).__name__}; "
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
