"""One record of several teachers' records.

Shape suffixes: `M` teachers, `P` positions, `U` the union of the kept classes, `K` kept classes, `G` temperatures.

The teachers are put on the union of their kept classes (`softcache.tools.fuse.align_classes`), fused class by class, and
cut to the K most likely; what is cut moves into the tail. Of the classes outside of the union only each teacher's sums
F_m(beta) = log of the sum of p^beta are known. They are fused as if the tails were of one shape (p_m proportional to each
other):

    probabilities        beta log(sum of w_m exp(F_m(beta) / beta)),  a lower bound (Minkowski, beta < 1)
    log-probabilities    sum of w_m F_m(beta), an upper bound (Hölder), then normalised

For probabilities that is exact at T = 1, and at beta = 0 for both, and a convex function of beta, as the interpolation
between the grid's temperatures needs. Bounds and measurements: docs/fusion.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from softcache.errors import LabelError
from softcache.labels import SoftLabels, truncate_labels
from softcache.tools.fuse.align_classes import Completed, Tail, align_on_union
from softcache.tools.fuse.weights import Rule, rule_weights

__all__ = ["fused_labels"]


def fused_labels(
    records: Sequence[SoftLabels], rule: Rule, k: int, *, targets: np.ndarray | None = None
) -> SoftLabels:
    """Returns the record of the fused distribution.

    Args:
        records: at least 2 NumPy records of the same P positions, V and grid, with `stats` and `target_log_prob`; none
            with drawn classes or a `max_temperature`.
        rule: one of `RULES`.
        k: slots of the result; where the teachers kept fewer classes together, the rest is unused.
        targets: [P] the ground-truth classes, where they are known.

    Returns:
        A NumPy record [P, k], float32. Of "best" each row is the chosen teacher's own, cut to k.

    Raises:
        LabelError: records that cannot be fused.

    Example:
        >>> from softcache.labels.sparsify import dense
        >>> import torch
        >>> logits = torch.tensor([[[2.0, 1.0, 0.0]], [[0.0, 1.0, 2.0]]])
        >>> rows = [dense(x, targets_P=torch.tensor([0])).to_numpy() for x in logits]
        >>> np.exp(fused_labels(rows, "mean", 3).log_probs).round(3)
        array([[0.378, 0.378, 0.245]], dtype=float32)
    """
    _check(records, k)
    weights_MP = rule_weights(records, rule)
    if rule == "best":
        return _chosen(records, weights_MP.argmax(axis=0), k)
    completed = align_on_union(records, targets)
    target_MP = np.stack([record.target_log_prob.astype(np.float64) for record in records])  # type: ignore[union-attr]
    grid = np.array(records[0].temperatures)
    fuse = _geometric if rule == "geometric" else _arithmetic
    log_probs_PU, tail, target_P = fuse(completed, weights_MP, target_MP, grid)
    stats = _stats(log_probs_PU, tail)
    ids_PK, log_probs_PK, log_tail_PG = _cut(completed.ids, log_probs_PU, tail.log_mass, k, grid, records[0])
    return SoftLabels(
        ids=ids_PK,
        log_probs=log_probs_PK.astype(np.float32),
        log_tail=log_tail_PG.astype(np.float32),
        num_classes=records[0].num_classes,
        temperatures=records[0].temperatures,
        target_log_prob=target_P.astype(np.float32),
        stats=stats.astype(np.float32),
    )


def _check(records: Sequence[SoftLabels], k: int) -> None:
    if len(records) < 2:
        raise LabelError(f"fused_labels: expected at least 2 records; found {len(records)}; give more")
    first = records[0]
    for number, record in enumerate(records):
        where = f"fused_labels: record {number}"
        for name in ("num_classes", "temperatures"):
            found, expected = getattr(record, name), getattr(first, name)
            if found != expected:
                raise LabelError(
                    f"{where}: expected {name} {expected}; found {found}; fuse records of one kind"
                )
        if len(record) != len(first):
            raise LabelError(
                f"{where}: expected {len(first)} positions; found {len(record)}; give the same ones"
            )
        if record.sampling is not None or record.max_temperature is not None:
            raise LabelError(
                f"{where}: expected the most likely classes and a tail at every temperature; found sampling "
                f'{record.sampling}, max_temperature {record.max_temperature}; capture with labels.policy = "top_k"'
            )
        if record.stats is None or record.target_log_prob is None:
            raise LabelError(
                f"{where}: expected stats and target_log_prob; found none; pass targets to sparsify"
            )
    if not 1 <= k <= first.num_classes:
        raise LabelError(f"fused_labels: expected k from 1 to {first.num_classes}; found {k}; change k")


def _chosen(records: Sequence[SoftLabels], choice_P: np.ndarray, k: int) -> SoftLabels:
    """Row by row the record of one teacher, bit for bit but for what the cut moves into the tail."""
    wide = max(k, *(record.k for record in records))
    padded = [truncate_labels(_padded(record, wide), k) for record in records]
    rows_P = np.arange(len(choice_P))

    def pick(name: str) -> np.ndarray:
        return np.stack([getattr(record, name).astype(_dtype(name)) for record in padded])[choice_P, rows_P]

    names = ("ids", "log_probs", "log_tail", "target_log_prob", "stats")
    arrays: dict[str, Any] = {name: pick(name) for name in names}
    return replace(padded[0], **arrays)


def _dtype(name: str) -> type:
    return np.int64 if name == "ids" else np.float32


def _padded(record: SoftLabels, k: int) -> SoftLabels:
    width = ((0, 0), (0, k - record.k))
    ids_PK = np.pad(record.ids.astype(np.int64), width, constant_values=record.num_classes)
    log_probs_PK = np.pad(record.log_probs.astype(np.float32), width, constant_values=-np.inf)
    return replace(record, ids=ids_PK, log_probs=log_probs_PK)


# -- the two means -----------------------------------------------------------------------------------------


def _log_sum(x: np.ndarray, axis: int = 0) -> np.ndarray:
    return np.logaddexp.reduce(x, axis=axis)


def _arithmetic(
    completed: Completed, weights_MP: np.ndarray, target_MP: np.ndarray, grid: np.ndarray
) -> tuple[np.ndarray, Tail, np.ndarray]:
    """Log p [P, U], the tail, and log p of the ground truth [P], of the mean of probabilities."""
    with np.errstate(divide="ignore"):
        log_w_MP = np.log(weights_MP)
    tails, log_w_MP1 = completed.tails, log_w_MP[:, :, None]
    log_mass_PG = _log_sum(log_w_MP1 + tails.log_mass * grid) / grid
    any_P = log_mass_PG[:, 0] > -np.inf
    some_MP = (tails.count > 0) & (weights_MP > 0)
    inside_MP = np.where(some_MP, log_w_MP + tails.log_mass[:, :, 0], -np.inf)
    by_mass_MP = np.exp(inside_MP - np.where(any_P, log_mass_PG[:, 0], 0.0))
    at_zero_MP = np.where(some_MP, log_w_MP + tails.mean, -np.inf)
    mean_P = np.where(any_P, _log_sum(at_zero_MP), 0.0)
    by_mean_MP = np.exp(at_zero_MP - mean_P)
    change_MP = np.where(some_MP, tails.slope - np.where(some_MP, tails.log_mass[:, :, 0], 0.0), 0.0)
    tail = Tail(
        log_mass_PG,
        np.where(some_MP, tails.count, 0.0).max(axis=0),
        mean_P,
        (by_mean_MP * tails.variance).sum(axis=0),
        np.where(any_P, log_mass_PG[:, 0] + (by_mass_MP * change_MP).sum(axis=0), 0.0),
    )
    return _log_sum(log_w_MP1 + completed.log_probs), tail, _log_sum(log_w_MP + target_MP)


def _geometric(
    completed: Completed, weights_MP: np.ndarray, target_MP: np.ndarray, grid: np.ndarray
) -> tuple[np.ndarray, Tail, np.ndarray]:
    """As `_arithmetic`, of the mean of log-probabilities."""
    tails, weights_MP1 = completed.tails, weights_MP[:, :, None]
    log_mass_PG = (weights_MP1 * tails.log_mass).sum(axis=0)
    log_probs_PU = (weights_MP1 * completed.log_probs).sum(axis=0)
    log_z_P = np.logaddexp(_log_sum(log_probs_PU, axis=1), log_mass_PG[:, 0])
    if not np.isfinite(log_z_P).all():
        row = int(np.flatnonzero(~np.isfinite(log_z_P))[0])
        raise LabelError(
            f"fused_labels: row {row}: no class has a probability above 0 with every teacher, so there is no "
            'geometric mean; choose rule "mean"',
            position=row,
        )
    tail = Tail(
        log_mass_PG - log_z_P[:, None] / grid,
        tails.count.min(axis=0),
        (weights_MP * tails.mean).sum(axis=0) - log_z_P,
        (weights_MP * tails.variance).sum(axis=0),
        (weights_MP * tails.slope).sum(axis=0) - log_z_P,
    )
    # Of a text the ground truth's class is not known, so its exact mean may exceed the normaliser of estimates.
    target_P = np.minimum((weights_MP * target_MP).sum(axis=0) - log_z_P, 0.0)
    return log_probs_PU - log_z_P[:, None], tail, target_P


# -- the record --------------------------------------------------------------------------------------------


def _stats(log_probs_PU: np.ndarray, tail: Tail) -> np.ndarray:
    """`SoftLabels.stats` [P, 4] of the classes with a place and the tail together."""
    alive_PU, some_P = log_probs_PU > -np.inf, tail.log_mass[:, 0] > -np.inf
    finite_PU, count_P = np.where(alive_PU, log_probs_PU, 0.0), np.where(some_P, tail.count, 0.0)
    support_P = alive_PU.sum(axis=1) + count_P
    mass_P = np.exp(tail.log_mass[:, 0])
    entropy_P = -(np.exp(log_probs_PU) * finite_PU).sum(axis=1) - np.where(some_P, mass_P * tail.slope, 0.0)
    mean_P = (finite_PU.sum(axis=1) + count_P * tail.mean) / support_P
    spread_P = np.where(alive_PU, (finite_PU - mean_P[:, None]) ** 2, 0.0).sum(axis=1)
    spread_P = spread_P + count_P * (tail.variance + (tail.mean - mean_P) ** 2)
    return np.stack([np.maximum(entropy_P, 0.0), mean_P, np.sqrt(spread_P / support_P), support_P], axis=1)


def _cut(
    ids_PU: np.ndarray,
    log_probs_PU: np.ndarray,
    log_mass_PG: np.ndarray,
    k: int,
    grid: np.ndarray,
    like: SoftLabels,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The k most likely classes, of equals the lower id first, and the tail with the others in it."""
    order_PU = np.argsort(-log_probs_PU, axis=1, kind="stable")
    ids_PU = np.take_along_axis(ids_PU, order_PU, axis=1)
    log_probs_PU = np.take_along_axis(log_probs_PU, order_PU, axis=1)
    moved_PU = log_probs_PU[:, k:]
    if moved_PU.shape[1]:
        moved_PG = np.stack([_log_sum(moved_PU / t, axis=1) for t in grid], axis=1)
        log_mass_PG = np.logaddexp(log_mass_PG, moved_PG)
    width = ((0, 0), (0, max(0, k - ids_PU.shape[1])))
    ids_PK = np.pad(ids_PU[:, :k], width, constant_values=like.num_classes)
    return ids_PK, np.pad(log_probs_PU[:, :k], width, constant_values=-np.inf), log_mass_PG
