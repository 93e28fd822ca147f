"""Scores of independent classes: average precision of each, and F1.

Shape suffixes: `N` samples, `V` classes.
"""

from __future__ import annotations

import numpy as np

__all__ = ["multi_label_scores"]


def multi_label_scores(logits_NV: np.ndarray, targets_NV: np.ndarray) -> dict[str, float]:
    """Returns "map", the mean of the average precision of each class that a sample has, and "f1", of all decisions at 0.5.

    Average precision is sum_n (R_n - R_{n-1}) P_n over the distinct scores, as in scikit-learn's `average_precision_score`.

    Args:
        targets_NV: 0 or 1.
    """
    is_true_NV = targets_NV > 0.5
    values = [
        _average_precision(logits_NV[:, v], is_true_NV[:, v]) for v in np.flatnonzero(is_true_NV.any(0))
    ]
    chosen_NV = logits_NV > 0
    right = int((chosen_NV & is_true_NV).sum())
    total = int(chosen_NV.sum() + is_true_NV.sum())
    return {
        "map": float(np.mean(values)) if values else float("nan"),
        "f1": 2 * right / total if total else 1.0,
    }


def _average_precision(scores_N: np.ndarray, is_true_N: np.ndarray) -> float:
    order = np.argsort(-scores_N, kind="stable")
    scores_N, found_N = scores_N[order], np.cumsum(is_true_N[order])
    ends = np.append(np.flatnonzero(np.diff(scores_N)), len(scores_N) - 1)  # of equal scores, the last
    precision, recall = found_N[ends] / (ends + 1), found_N[ends] / found_N[-1]
    return float((np.diff(recall, prepend=0.0) * precision).sum())
