"""How far a fused record can be from the fusion of the whole distributions.

Shape suffixes: `M` teachers, `P` positions, `U` the union of the kept classes, `G` grid of temperatures.

A class that teacher m dropped has a probability in [0, u_m], u_m the least of its kept ones and of its tail's mass. With
r_m(beta) the sum of p^beta over its e estimated classes and the tail behind them together, that tail R_m(beta) is in
[r_m(beta) - e u_m^beta, r_m(beta)], beta <= 1. From there, with weights w:

    probabilities      class   [sum of w_m low_m, sum of w_m u_m]
                       tail    from (sum of w_m R_low^(1/beta))^beta (Minkowski, beta < 1)
                               to the lesser of the sum of w_m^beta R_up (subadditivity) and
                               n^(1-beta) (sum of w_m R_up(1))^beta (Hölder over the n classes outside)
    log-probabilities  class   [g_low / Z_up, g_up / Z_low], g the product of p_m^w_m, Z its sum over the classes
                       tail    [0, product of R_up^w_m / Z_low^beta] (Hölder)

They hold for every teacher that could have left these records. `best` needs none: its rows are one teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from softcache.errors import LabelError
from softcache.labels import SoftLabels
from softcache.tools.fuse.align_classes import Completed, align_on_union
from softcache.tools.fuse.weights import Rule, rule_weights

__all__ = ["FusionBounds", "fusion_bounds"]


@dataclass(frozen=True)
class FusionBounds:
    """What the fusion of the whole distributions must lie within, as probabilities at T = 1, before any cut.

    Attributes:
        ids: [P, U] int64, ascending; V in unused places.
        lower, upper: [P, U] float64, of these classes.
        tail_lower, tail_upper: [P, G] float64, of the sum of p^(1/T) over all other classes.
    """

    ids: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    tail_lower: np.ndarray
    tail_upper: np.ndarray


def fusion_bounds(
    records: Sequence[SoftLabels], rule: Rule, *, targets: np.ndarray | None = None
) -> FusionBounds:
    """Returns the bounds of a fusion; arguments as of `fused_labels`.

    Raises:
        LabelError: the rule is "best", which estimates nothing.
    """
    if rule == "best":
        raise LabelError(
            'fusion_bounds: rule "best" takes rows as they are and estimates nothing; ask for another'
        )
    completed, weights_MP = align_on_union(records, targets), rule_weights(records, rule)
    grid = np.array(records[0].temperatures)
    lower_MPU = np.where(completed.estimated, 0.0, np.exp(completed.log_probs))
    upper_MPU = np.where(completed.estimated, np.exp(completed.highest)[:, :, None], lower_MPU)
    left_MPG, right_MPG = _tail_bounds(completed, grid)
    if rule == "geometric":
        return _geometric(completed.ids, weights_MP, (lower_MPU, upper_MPU), right_MPG, grid)
    weights_MP1, outside_P = weights_MP[:, :, None], (completed.ids >= records[0].num_classes).sum(axis=1)
    outside_P = records[0].num_classes - (completed.ids.shape[1] - outside_P)
    mean_PG = (weights_MP1 * right_MPG[:, :, :1]).sum(axis=0) ** (1.0 / grid)
    return FusionBounds(
        completed.ids,
        (weights_MP1 * lower_MPU).sum(axis=0),
        (weights_MP1 * upper_MPU).sum(axis=0),
        (weights_MP1 * left_MPG**grid).sum(axis=0) ** (1.0 / grid),
        np.minimum(
            (weights_MP1 ** (1.0 / grid) * right_MPG).sum(axis=0),
            outside_P[:, None] ** (1.0 - 1.0 / grid) * mean_PG,
        ),
    )


def _tail_bounds(completed: Completed, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bounds [M, P, G] of each teacher's sum over the classes outside of the union."""
    whole_MPG = np.exp(completed.whole.log_mass)
    moved_MP = completed.estimated.sum(axis=2)
    most_MPG = moved_MP[:, :, None] * np.exp(completed.highest[:, :, None] / grid)
    exact_MPG = np.exp(completed.exact[:, :, None] / grid)
    # Where all that was dropped is in the union, a difference of sums is rounding, and its 8th root is not small.
    some_MP = completed.whole.count != moved_MP + (completed.exact > -np.inf)
    right_MPG = np.where(some_MP[:, :, None], np.maximum(whole_MPG - exact_MPG, 0.0), 0.0)
    return np.maximum(right_MPG - most_MPG, 0.0), right_MPG


def _geometric(
    ids_PU: np.ndarray,
    weights_MP: np.ndarray,
    classes_MPU: tuple[np.ndarray, np.ndarray],
    right_MPG: np.ndarray,
    grid: np.ndarray,
) -> FusionBounds:
    weights_MP1 = weights_MP[:, :, None]
    low_PU, high_PU = ((x_MPU**weights_MP1).prod(axis=0) for x_MPU in classes_MPU)
    tail_PG = (right_MPG**weights_MP1).prod(axis=0)
    least_P, most_P = low_PU.sum(axis=1), high_PU.sum(axis=1) + tail_PG[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        upper_PU = np.where(high_PU > 0, np.minimum(high_PU / least_P[:, None], 1.0), 0.0)
        upper_PG = np.where(tail_PG > 0, tail_PG / least_P[:, None] ** (1.0 / grid), 0.0)
    return FusionBounds(ids_PU, low_PU / most_P[:, None], upper_PU, np.zeros_like(tail_PG), upper_PG)
