"""The score of masks: intersection over union of each class, and their mean.

Shape suffixes: `V` classes.
"""

from __future__ import annotations

import torch

__all__ = ["confusion_matrix", "mask_scores"]


def confusion_matrix(
    predicted: torch.Tensor, truth: torch.Tensor, num_classes: int, *, ignored: int
) -> torch.Tensor:
    """Returns how many pixels of class i were taken for class j, int64 [V, V].

    Args:
        predicted, truth: whole numbers of one shape.
        ignored: the truth of pixels that do not count.
    """
    counts = truth != ignored
    pairs = truth[counts].long() * num_classes + predicted[counts].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def mask_scores(confusion_VV: torch.Tensor) -> dict[str, float]:
    """Returns "miou", the mean of intersection over union of the classes that are in the truth or were predicted, and
    "accuracy", the share of pixels that are right; 0 of no pixels."""
    matrix_VV = confusion_VV.double()
    right_V = matrix_VV.diagonal()
    union_V = matrix_VV.sum(0) + matrix_VV.sum(1) - right_V
    is_there_V, total = union_V > 0, float(matrix_VV.sum())
    if not total:
        return {"miou": 0.0, "accuracy": 0.0}
    return {
        "miou": float((right_V[is_there_V] / union_V[is_there_V]).mean()),
        "accuracy": float(right_V.sum()) / total,
    }
