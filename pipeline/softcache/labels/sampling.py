"""How classes of a record were drawn at random, and what that makes each of them weigh.

Shape suffixes: `P` positions, `K` slots.

The slots behind the exact ones are a random part of all the other classes. A class j that was drawn stands for
exp(log_weight) classes like it: its weight is chosen so that its mean over the draws, those counted in which j is not
drawn, is 1. So for any numbers x_j the sum of weight_j x_j over the drawn classes has the sum of x_j over all of
them for its mean; with x_j = p_j^(1/T) / Z(T) that is the softened distribution, at every T, because Z(T) is not
estimated but known (`SoftLabels.log_tail`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from array_api_compat import array_namespace

from softcache.errors import LabelError, TemperatureError

if TYPE_CHECKING:
    from softcache.labels.soft_labels import SoftLabels

__all__ = ["Sampling", "estimate_mass"]

Array = Any  # a NumPy array or a torch tensor


@dataclass(frozen=True)
class Sampling:
    """How the classes of a record were drawn.

    Attributes:
        exact: slots, from the first, that were not drawn and weigh 1.
        draws: N, made from all other classes; at most 65,535.
        exponent: a class is drawn in proportion to p^exponent; in (0, 1].
        replacement: whether a class could be drawn again (`counts` is how often) or once only (priority sampling,
            `log_threshold`).

    Raises:
        LabelError: a number out of range.
    """

    exact: int
    draws: int
    exponent: float
    replacement: bool

    def __post_init__(self) -> None:
        if self.exact < 0 or not 1 <= self.draws <= 65535 or (self.replacement and self.exact):
            raise LabelError(
                f"sampling: expected 1 to 65535 draws and no exact classes with draws with replacement; "
                f"found draws = {self.draws}, exact = {self.exact}; set labels.num_samples and labels.k"
            )
        if not 0.0 < self.exponent <= 1.0:
            raise LabelError(
                f"sampling.exponent: expected a number in (0, 1]; found {self.exponent}; 1 draws classes in proportion to "
                "their probability"
            )

    def proposal_index(self, temperatures: tuple[float, ...]) -> int:
        """Where on the grid the normaliser of the proposal p^exponent stands: at T = 1 / exponent.

        Raises:
            TemperatureError: it is not on the grid, and is needed there (draws with replacement).
        """
        wanted = 1.0 / self.exponent
        for index, t in enumerate(temperatures):
            if abs(t - wanted) <= 1e-9 * wanted:
                return index
        if not self.replacement:
            return 0
        raise TemperatureError(
            f"labels.proposal_temperature {wanted:g}: expected it among the temperatures; found {list(temperatures)}; "
            "add it to labels.temperatures"
        )

    def log_weights(
        self,
        log_probs_PK: Array,
        log_tail_PG: Array,
        temperatures: tuple[float, ...],
        counts_PK: Array | None,
        log_threshold_P: Array | None,
    ) -> Array:
        """Logs of the slots' weights, [P, K]: 0 in exact and in unused slots.

        Args:
            log_probs_PK: [P, K] float32 or float64, -inf in unused slots.
            log_tail_PG: [P, G], of all classes but the exact ones.
            temperatures: the grid.
            counts_PK: [P, K] integer, with replacement.
            log_threshold_P: [P], without.
        """
        xp = array_namespace(log_probs_PK)
        used_PK = log_probs_PK > -xp.inf
        log_q_PK = self.exponent * xp.where(used_PK, log_probs_PK, 0.0)
        if self.replacement:
            log_z_P1 = log_tail_PG[:, self.proposal_index(temperatures)][:, None]
            counts_PK = xp.astype(counts_PK, log_probs_PK.dtype)
            log_share_PK = xp.log(xp.clip(counts_PK, min=1.0) / self.draws)
            log_weights_PK = log_share_PK - log_q_PK + xp.astype(log_z_P1, log_probs_PK.dtype)
        else:
            threshold_P1 = xp.astype(log_threshold_P, log_probs_PK.dtype)[:, None]
            log_weights_PK = xp.clip(threshold_P1 - log_q_PK, min=0.0)
        slot_K = xp.arange(log_probs_PK.shape[1], device=log_probs_PK.device)
        return xp.where(used_PK & (slot_K >= self.exact), log_weights_PK, 0.0)


def estimate_mass(labels: SoftLabels, T: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns how well the drawn classes stand for all classes at temperature T.

    Args:
        labels: drawn ones, of NumPy.

    Returns:
        mass: [P] float64, the exact classes' mass and what the drawn ones stand for: on average over the draws 1, and how
            far from it is the error of one row.
        effective: [P] float64, the number of draws of equal weight that would do as well (Kish): (sum w)^2 / sum w^2 over
            the draws; NaN where nothing was drawn.

    References:
        Kish 1965, Survey Sampling.
    """
    assert labels.sampling is not None
    softened = labels.at_temperature(T)
    probs_PK = np.exp(softened.log_probs.astype(np.float64))
    log_weights_PK: np.ndarray = softened.log_weights  # type: ignore[assignment]
    weighted_PK = probs_PK * np.exp(log_weights_PK)
    drawn_PK = weighted_PK[:, labels.sampling.exact :]
    counts_PK = np.ones_like(drawn_PK)
    if labels.counts is not None:  # a class that was drawn n times is n draws of an n-th each
        counts_PK = np.maximum(labels.counts[:, labels.sampling.exact :], 1).astype(np.float64)
    squares_P = (drawn_PK**2 / counts_PK).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return weighted_PK.sum(1), drawn_PK.sum(1) ** 2 / squares_P
