"""Aligns several teachers on the union of their kept classes, with estimates where a class was dropped.

Shape suffixes: `M` teachers, `P` positions, `U` the union of the kept classes, `G` grid of temperatures.

Where a teacher dropped a class that another one kept, its probability is not stored; it lies between 0 and the least of
that teacher's kept probabilities and its tail's mass. The estimate is the tail's typical class,

    q = exp((F(1) - F(b)) / (1 - b)),   F(beta) = log of the sum of p^beta over its n dropped classes,

with b = 1/T of the grid's second temperature (0 for a grid of one): the mean of log p over the tail, each class
weighted by about p. By convexity of F it is at least the even share, e^F(1) / n, and at most the largest dropped one. Of the
classes that are left the mass stays above 0: q counts as one of at least e + 1, where e are estimated. The ground truth,
where it is known, is exact, from `target_log_prob`.

What moves out of a tail F is a share of it, e/n of the classes (beta = 0) and s of the mass (beta = 1). In between

    F'(beta) = F(beta) + (1 - beta) log(1 - e/n) + beta log(1 - s),

exact at beta = 0, consistent with the estimates at beta = 1, and convex as F is; then brought within what is certain: at
least the sum of p^beta over what was dropped less u^beta for each estimated class (u: the largest it can be), at most as
much as the classes left can have when all are alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from softcache.labels import SoftLabels

__all__ = ["Completed", "Tail", "align_on_union"]

MAX_TARGET_SHARE = 1.0 - 1e-6
"""Of a tail's mass, the most that the ground truth may be where other classes are left: rounding may exceed it."""


@dataclass(frozen=True)
class Tail:
    """The classes without a slot, as sums over them: all [..., P] float64, F(beta) = log of the sum of p^beta.

    Attributes:
        log_mass: [..., P, G] F at the grid; -inf where there are no such classes.
        count: how many they are, F(0) = log(count).
        mean: of log p over them, F'(0).
        variance: of log p over them, F''(0).
        slope: mean of log p weighted by p, F'(1).
    """

    log_mass: np.ndarray
    count: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    slope: np.ndarray


@dataclass(frozen=True)
class Completed:
    """M teachers on one set of classes.

    Attributes:
        ids: [P, U] int64, ascending; V in unused places.
        log_probs: [M, P, U] float64, stored, exact or estimated; -inf in unused places.
        estimated: [M, P, U] bool, where it is an estimate.
        highest: [M, P] float64, log of what no estimated class is above.
        exact: [M, P] float64, log p of the ground truth where the teacher dropped it and it is known; else -inf.
        tails: [M] of the classes outside of the union.
        whole: [M] of all that the teacher dropped.
    """

    ids: np.ndarray
    log_probs: np.ndarray
    estimated: np.ndarray
    highest: np.ndarray
    exact: np.ndarray
    tails: Tail
    whole: Tail


def align_on_union(records: Sequence[SoftLabels], targets: np.ndarray | None = None) -> Completed:
    """Returns M records on the union of their kept classes.

    Args:
        records: NumPy records [P] of one V and one grid, with `target_log_prob` and `stats`, no class drawn.
        targets: [P] the ground-truth classes; None where they are not known (its estimate is then as any other's).
    """
    num_classes = records[0].num_classes
    ids_PU, places = _union([record.ids for record in records], num_classes)
    used_PU = ids_PU < num_classes
    is_target_PU = np.zeros_like(used_PU) if targets is None else ids_PU == targets[:, None]
    parts = [
        _complete(record, place, used_PU, is_target_PU) for record, place in zip(records, places, strict=True)
    ]
    log_probs, estimated, highest, exact, tails, whole = zip(*parts, strict=True)
    return Completed(
        ids_PU,
        np.stack(log_probs),
        np.stack(estimated),
        np.stack(highest),
        np.stack(exact),
        _stack_tails(tails),
        _stack_tails(whole),
    )


def _stack_tails(tails: Sequence[Tail]) -> Tail:
    names = Tail.__dataclass_fields__
    return Tail(**{name: np.stack([getattr(tail, name) for tail in tails]) for name in names})


def _union(ids: Sequence[np.ndarray], num_classes: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns the classes [P, U] of all, ascending, V at the end, and the place in them of each slot of each record."""
    joined_PN = np.concatenate([x.astype(np.int64) for x in ids], axis=1)
    order_PN = joined_PN.argsort(axis=1, kind="stable")
    sorted_PN = np.take_along_axis(joined_PN, order_PN, axis=1)
    rank_PN = np.zeros_like(sorted_PN)
    rank_PN[:, 1:] = np.cumsum(sorted_PN[:, 1:] != sorted_PN[:, :-1], axis=1)
    size = int(rank_PN.max(initial=0)) + 1
    ids_PU = np.full((len(joined_PN), size), num_classes)
    np.put_along_axis(ids_PU, rank_PN, sorted_PN, axis=1)
    place_PN = np.empty_like(rank_PN)
    np.put_along_axis(place_PN, order_PN, rank_PN, axis=1)
    return ids_PU, np.split(place_PN, np.cumsum([x.shape[1] for x in ids])[:-1], axis=1)


def _complete(
    record: SoftLabels, place_PK: np.ndarray, used_PU: np.ndarray, is_target_PU: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Tail, Tail]:
    kept_PK, whole = _normalize(record)
    log_probs_PU = np.full(used_PU.shape, -np.inf)
    there_PU = np.zeros(used_PU.shape, bool)
    rows_P1 = np.arange(len(record))[:, None]
    log_probs_PU[rows_P1, place_PK] = kept_PK  # unused slots share the place of id V, and -inf
    there_PU[rows_P1, place_PK] = True
    alive_P = whole.log_mass[:, 0] > -np.inf
    guessed_PU = used_PU & ~there_PU & alive_P[:, None]
    exact_PU = guessed_PU & is_target_PU
    guessed_PU &= ~is_target_PU
    lowest_P = np.where(kept_PK > -np.inf, kept_PK, 0.0).min(axis=1)
    highest_P = np.minimum(lowest_P, whole.log_mass[:, 0])
    target_P = _target_share(record, whole, exact_PU.any(axis=1))
    log_q_P, share_P = _shares(record, whole, guessed_PU.sum(axis=1), target_P, highest_P)
    log_probs_PU = np.where(guessed_PU, log_q_P[:, None], log_probs_PU)
    with np.errstate(divide="ignore"):
        log_target_P = whole.log_mass[:, 0] + np.log(target_P)
    log_probs_PU = np.where(exact_PU, log_target_P[:, None], log_probs_PU)
    moved_P = guessed_PU.sum(axis=1) + (target_P > 0)  # a ground truth of probability 0 was not in the tail
    log_target_P = np.where(target_P > 0, log_target_P, -np.inf)
    left = _without(record, whole, moved_P, share_P)
    within = _within(record, whole, left, guessed_PU.sum(axis=1), highest_P, log_target_P)
    return log_probs_PU, guessed_PU, highest_P, log_target_P, replace(left, log_mass=within), whole


def _normalize(record: SoftLabels) -> tuple[np.ndarray, Tail]:
    """The kept log-probabilities [P, K] and the tail, in float64, of a distribution whose sum is 1."""
    kept_PK, tail_PG = record.log_probs.astype(np.float64), record.log_tail.astype(np.float64)
    log_z_P = np.logaddexp.reduce(np.concatenate([kept_PK, tail_PG[:, :1]], axis=1), axis=1)
    kept_PK = kept_PK - log_z_P[:, None]
    tail_PG = tail_PG - log_z_P[:, None] / np.array(record.temperatures)
    assert record.stats is not None
    entropy_P, mean_P, std_P, support_P = record.stats.astype(np.float64).T
    alive_PK, dropped_P = kept_PK > -np.inf, tail_PG[:, 0] > -np.inf
    finite_PK = np.where(alive_PK, kept_PK, 0.0)
    count_P = np.where(dropped_P, np.maximum(support_P - alive_PK.sum(axis=1), 1.0), 0.0)
    safe_P = np.maximum(count_P, 1.0)
    tail_mean_P = (mean_P * support_P - finite_PK.sum(axis=1)) / safe_P
    spread_P = support_P * (std_P**2 + (mean_P - tail_mean_P) ** 2)
    kept_spread_P = np.where(alive_PK, (finite_PK - tail_mean_P[:, None]) ** 2, 0.0).sum(axis=1)
    mass_P = np.where(dropped_P, tail_PG[:, 0], 0.0)
    slope_P = (-entropy_P - (np.exp(kept_PK) * finite_PK).sum(axis=1)) / np.exp(mass_P)
    # Where the tail is small the entropy does not determine it; the chord is a lower bound.
    chord_P = _chord(tail_PG, record.temperatures, safe_P)
    highest_P = np.minimum(finite_PK.min(axis=1), mass_P)
    slope_P = np.maximum(np.minimum(slope_P, highest_P), np.minimum(chord_P, highest_P))
    variance_P = np.maximum((spread_P - kept_spread_P) / safe_P, 0.0)
    return kept_PK, Tail(tail_PG, count_P, np.minimum(tail_mean_P, mass_P), variance_P, slope_P)


def _chord(tail_PG: np.ndarray, temperatures: tuple[float, ...], count_P: np.ndarray) -> np.ndarray:
    """Slope [P] of F between the grid's second temperature, or beta = 0, and 1; not read where the tail is -inf."""
    finite_PG = np.where(tail_PG > -np.inf, tail_PG, 0.0)
    even_P = finite_PG[:, 0] - np.log(count_P)
    if len(temperatures) == 1:
        return even_P
    chord_P = (finite_PG[:, 0] - finite_PG[:, 1]) / (1.0 - 1.0 / temperatures[1])
    return np.maximum(chord_P, even_P)


def _target_share(record: SoftLabels, whole: Tail, dropped_P: np.ndarray) -> np.ndarray:
    """The share [P] of a tail's mass that is the ground truth; 0 where it was kept."""
    assert record.target_log_prob is not None
    log_mass_P = np.where(dropped_P, whole.log_mass[:, 0], 0.0)
    share_P = np.exp(np.minimum(record.target_log_prob.astype(np.float64) - log_mass_P, 0.0))
    share_P = np.where(whole.count > 1, np.minimum(share_P, MAX_TARGET_SHARE), 1.0)
    return np.where(dropped_P & (record.target_log_prob > -np.inf), share_P, 0.0)


def _shares(
    record: SoftLabels, whole: Tail, guessed_P: np.ndarray, target_P: np.ndarray, highest_P: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The log of an estimated class's probability, and the share of the tail's mass that moves out of it, [P] each."""
    mass_P = np.where(whole.count > 0, whole.log_mass[:, 0], 0.0)
    count_P = np.maximum(whole.count - (target_P > 0), 1.0)
    typical_P = np.exp(mass_P - _chord(whole.log_mass, record.temperatures, np.maximum(whole.count, 1.0)))
    # As many classes as the tail seems to have, but more than are asked for, if there are more.
    size_P = np.minimum(np.maximum(typical_P, guessed_P + 1.0), count_P)
    size_P = np.maximum(size_P, guessed_P)
    log_q_P = mass_P + np.log1p(-np.minimum(target_P, MAX_TARGET_SHARE)) - np.log(np.maximum(size_P, 1.0))
    some_left_P = guessed_P < count_P
    log_q_P = np.where(some_left_P, np.minimum(log_q_P, highest_P), log_q_P)
    share_P = target_P + guessed_P * np.exp(log_q_P - mass_P)
    return log_q_P, np.where(guessed_P > 0, share_P, target_P)


def _without(record: SoftLabels, whole: Tail, moved_P: np.ndarray, share_P: np.ndarray) -> Tail:
    """The tail that is left when so many classes and such a share of the mass have moved out."""
    left_P = np.maximum(whole.count - moved_P, 0.0)
    some_P = left_P > 0
    beta_G = 1.0 / np.array(record.temperatures)
    classes_P = np.where(some_P, np.log(np.maximum(left_P, 1.0) / np.maximum(whole.count, 1.0)), 0.0)
    mass_P = np.where(some_P, np.log1p(-np.where(some_P, share_P, 0.0)), 0.0)
    log_mass_PG = whole.log_mass + classes_P[:, None] * (1.0 - beta_G) + mass_P[:, None] * beta_G
    return Tail(
        np.where(some_P[:, None], log_mass_PG, -np.inf),
        left_P,
        whole.mean + mass_P - classes_P,
        whole.variance,
        whole.slope + mass_P - classes_P,
    )


def _within(
    record: SoftLabels,
    whole: Tail,
    left: Tail,
    guessed_P: np.ndarray,
    highest_P: np.ndarray,
    log_target_P: np.ndarray,
) -> np.ndarray:
    """F [P, G] of the classes that are left, where it can be."""
    beta_G = 1.0 / np.array(record.temperatures)
    some_P = left.count > 0
    at_one_P = np.where(some_P, left.log_mass[:, 0], 0.0)[:, None]
    rest_PG = np.exp(whole.log_mass) - np.exp(log_target_P[:, None] * beta_G)
    with np.errstate(divide="ignore"):
        most_PG = np.log(np.maximum(rest_PG, 0.0))
        moved_PG = guessed_P[:, None] * np.exp(highest_P[:, None] * beta_G)
        least_PG = np.log(np.maximum(rest_PG - moved_PG, 0.0))
    alike_PG = (1.0 - beta_G) * np.log(np.maximum(left.count, 1.0))[:, None] + beta_G * at_one_P
    log_mass_PG = np.maximum(left.log_mass, np.maximum(least_PG, beta_G * at_one_P))
    log_mass_PG = np.minimum(log_mass_PG, np.minimum(alike_PG, np.maximum(most_PG, beta_G * at_one_P)))
    log_mass_PG[:, 0] = left.log_mass[:, 0]
    return np.where(some_P[:, None], log_mass_PG, -np.inf)
