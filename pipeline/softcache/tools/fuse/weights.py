"""How much each teacher counts in a row: the weights of every rule.

Shape suffixes: `M` teachers, `P` positions.

    mean         1/M each, of the probabilities
    geometric    1/M each, of the log-probabilities, then normalised
    entropy      softmax over the teachers of minus their entropy (nats), of the probabilities: the surer, the more (EBKD,
                 Kwon et al. 2020)
    entropy_share   (1 - H_m / sum of H over the teachers) / (M - 1), of the probabilities: how public code weighs EBKD's
                 teachers; 1/M each where all entropies are 0
    confidence   (1 - softmax over the teachers of their cross-entropy with the ground truth) / (M - 1), of the
                 probabilities (CA-MKD, Zhang et al. 2022, eq. 4)
    best         1 for the teacher of the lowest cross-entropy with the ground truth (the first of equals), 0 for the others

All are functions of numbers that every record holds exactly (`stats`, `target_log_prob`), so no weight is an estimate.

References:
    Kwon, Na, Lee, Kim 2020, "Adaptive Knowledge Distillation Based on Entropy", ICASSP.
    Zhang, Chen, Wang 2022, "Confidence-Aware Multi-Teacher Knowledge Distillation", arXiv 2201.00007.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from softcache.errors import LabelError
from softcache.labels import STATS, SoftLabels

__all__ = ["RULES", "Rule", "rule_weights"]

Rule = Literal["mean", "geometric", "entropy", "entropy_share", "confidence", "best"]
RULES: tuple[str, ...] = get_args(Rule)

MAX_CROSS_ENTROPY_NATS = 1e4
"""Cross-entropy of a teacher that gives the ground truth no probability: larger than any that is stored."""


def rule_weights(records: Sequence[SoftLabels], rule: Rule) -> np.ndarray:
    """Returns the weights [M, P] float64 of the teachers in each row; they add up to 1.

    Args:
        records: [P] NumPy records of M teachers, M at least 2.
        rule: one of `RULES`.

    Raises:
        LabelError: a record lacks `stats` or `target_log_prob`, and the rule needs it.

    Example:
        >>> rows = [
        ...     SoftLabels(np.array([[0]]), np.log([[p]]), np.log([[1 - p]]), 2, (1.0,), np.log([p]))
        ...     for p in (0.8, 0.2)
        ... ]
        >>> rule_weights(rows, "confidence").round(3).tolist()  # 1/0.8 and 1/0.2, of 6.25 together
        [[0.8], [0.2]]
    """
    shape = len(records), len(records[0])
    if rule in ("mean", "geometric"):
        return np.full(shape, 1.0 / len(records))
    if rule == "entropy":
        return _softmax(-np.stack([_column(record, "stats") for record in records]))
    if rule == "entropy_share":
        entropy_MP = np.stack([_column(record, "stats") for record in records])
        total_P = entropy_MP.sum(axis=0)
        shares_MP = np.where(
            total_P > 0, entropy_MP / np.where(total_P > 0, total_P, 1.0), 1.0 / len(records)
        )
        return (1.0 - shares_MP) / (len(records) - 1)
    loss_MP = np.minimum(
        -np.stack([_column(record, "target_log_prob") for record in records]), MAX_CROSS_ENTROPY_NATS
    )
    if rule == "confidence":
        return (1.0 - _softmax(loss_MP)) / (len(records) - 1)
    return (np.arange(len(records))[:, None] == loss_MP.argmin(axis=0)).astype(np.float64)


def _column(record: SoftLabels, name: str) -> np.ndarray:
    values = getattr(record, name)
    if values is None:
        raise LabelError(
            f"rule_weights: expected records with {name}, from which the rule weighs the teachers; found one without; "
            'choose rule "mean" or "geometric"'
        )
    return (values[:, STATS.index("entropy")] if name == "stats" else values).astype(np.float64)


def _softmax(x_MP: np.ndarray) -> np.ndarray:
    shares_MP = np.exp(x_MP - x_MP.max(axis=0))
    return shares_MP / shares_MP.sum(axis=0)
