"""The top classes of a row, as another program kept them, to soft labels at T = 1.

Probabilities are over all classes, so at T = 1 the dropped ones have what is missing to 1. Of rounded probabilities the
sum may be above 1, or fall short of it by rounding alone. Two facts bound what is stored as the tail:

    from above    no dropped class is likelier than the last kept one, where a format keeps the largest
    from below    2^-24, as of a server's log-probabilities (`softcache.tools.import_logprobs.labels`)

The probabilities stay as they are, so a row's mass may be off by up to 10^-3, as `policy` = `imported` allows; softening
divides by the sum. A row whose approximated probabilities sum to more than that (`max_mass` of the format) is scaled to 1.

Shapes: R rows, K slots.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from softcache.cache.codecs import Codec
from softcache.errors import LabelError
from softcache.labels import SoftLabels

__all__ = ["TopRows", "from_probabilities", "soft_labels"]

MASS = 1e-3
"""How far from 1 a row's probabilities may sum, as `policy` = `imported`: invariant I33."""
LEAST_TAIL = 2.0**-24
RELATIVE, ABSOLUTE = 2.0**-11, 2.0**-25
"""Of the rounding of a number to float16."""


class TopRows(NamedTuple):
    """Some rows.

    Attributes:
        ids: [R, K] int64; V in a slot that holds nothing.
        log_probs: [R, K] float64, log p at T = 1 over all classes; -inf in a slot that holds nothing.
    """

    ids: np.ndarray
    log_probs: np.ndarray


def from_probabilities(ids_RK: np.ndarray, probs_RK: np.ndarray, num_classes: int) -> TopRows:
    """Returns rows of probabilities; one that was rounded to 0 counts as dropped: how likely it was is not known.

    Raises:
        LabelError: a probability is negative or no number, or an id is no class; `position` is the row's.
    """
    probs_RK = np.asarray(probs_RK, np.float64)
    for row, slot in np.argwhere(~(probs_RK >= 0))[:1].tolist():
        raise LabelError(
            f"slot {slot} has the probability {probs_RK[row, slot]:g}; expected 0 to 1; are these probabilities?",
            position=row,
        )
    is_used_RK = probs_RK > 0
    _check_classes(ids_RK, is_used_RK, num_classes)
    with np.errstate(divide="ignore"):
        return TopRows(np.where(is_used_RK, ids_RK, num_classes).astype(np.int64), np.log(probs_RK))


def soft_labels(
    top: TopRows, targets_R: np.ndarray, codec: Codec, *, max_mass: float, bounds_tail: bool
) -> tuple[SoftLabels, int]:
    """Returns the labels of rows, most likely class first, ties by lower id; and how many rows were scaled to a sum of 1.

    The ground truth's probability is known where it has a slot, else NaN.

    Args:
        targets_R: [R] the ground truth.
        codec: of the cache; it may have fewer slots than the rows.
        max_mass, bounds_tail: as of `Original`.

    Raises:
        LabelError: an id is not a class or comes twice, or log-probabilities are none; `position` is the row's.
    """
    num_classes = codec.num_classes
    _check_ids(top.ids, num_classes)
    log_probs_RK = np.where(top.ids < num_classes, top.log_probs, -np.inf)
    ids_RK = np.where(log_probs_RK > -np.inf, top.ids, num_classes)
    for row, slot in np.argwhere(~(log_probs_RK <= max_mass))[:1].tolist():  # NaN is neither above nor below
        raise LabelError(
            f"class {top.ids[row, slot]} has log-probability {top.log_probs[row, slot]:g}; expected at most 0",
            position=row,
        )
    mass_R = np.exp(log_probs_RK).sum(1)
    for row in np.flatnonzero(mass_R > 1 + max_mass)[:1].tolist():
        raise LabelError(
            f"its probabilities sum to {mass_R[row]:.4f}; expected at most {1 + max_mass:g}: are they at T = 1, over all "
            "classes?",
            position=row,
        )
    for row in np.flatnonzero(mass_R == 0)[:1].tolist():
        raise LabelError("no class has a probability above 0; the record is damaged", position=row)
    is_scaled_R = mass_R > 1 + MASS
    log_probs_RK = np.minimum(log_probs_RK - np.log(np.where(is_scaled_R, mass_R, 1.0))[:, None], 0.0)
    target_R = np.where(ids_RK == targets_R[:, None], log_probs_RK, -np.inf).max(1)
    target_R = np.where((ids_RK == targets_R[:, None]).any(1), target_R, np.nan)
    order_RK = np.lexsort((ids_RK, -log_probs_RK), axis=1)
    ids_RK, log_probs_RK = (np.take_along_axis(x, order_RK, 1) for x in (ids_RK, log_probs_RK))
    tail_R = _tail(ids_RK, log_probs_RK, num_classes, bounds_tail)
    tail_R += np.exp(log_probs_RK[:, codec.k :]).sum(1)
    with np.errstate(divide="ignore"):
        log_tail_R = np.log(tail_R)
    labels = SoftLabels(
        ids=ids_RK[:, : codec.k],
        log_probs=log_probs_RK[:, : codec.k].astype(np.float32),
        log_tail=log_tail_R.astype(np.float32)[:, None],
        num_classes=num_classes,
        temperatures=codec.temperatures,
        target_log_prob=target_R.astype(np.float32),
        max_temperature=codec.max_temperature,
    )
    return labels, int(is_scaled_R.sum())


def _check_classes(ids_RK: np.ndarray, is_used_RK: np.ndarray, num_classes: int) -> None:
    wrong_RK = is_used_RK & ((ids_RK < 0) | (ids_RK >= num_classes))
    for row, slot in np.argwhere(wrong_RK)[:1].tolist():
        raise LabelError(
            f"class {ids_RK[row, slot]} in slot {slot}; expected 0 to {num_classes - 1}, the classes of the source; give "
            "the source and the classes that were labeled",
            position=row,
        )


def _check_ids(ids_RK: np.ndarray, num_classes: int) -> None:
    _check_classes(ids_RK, ids_RK != num_classes, num_classes)
    order_RK = np.sort(ids_RK, axis=1)
    is_twice_R = ((order_RK[:, 1:] == order_RK[:, :-1]) & (order_RK[:, 1:] < num_classes)).any(1)
    for row in np.flatnonzero(is_twice_R)[:1].tolist():
        found, counts = np.unique(ids_RK[row][ids_RK[row] < num_classes], return_counts=True)
        raise LabelError(
            f"class {found[counts > 1][0]} comes twice; expected each once: ids that the original could not hold were "
            "changed as it was written",
            position=row,
        )


def _tail(ids_RK: np.ndarray, log_probs_RK: np.ndarray, num_classes: int, bounds_tail: bool) -> np.ndarray:
    """Returns the mass [R] of the classes without a slot; 0 where every class has one."""
    num_dropped_R = num_classes - (ids_RK < num_classes).sum(1)
    tail_R = np.maximum(1.0 - np.exp(log_probs_RK).sum(1), LEAST_TAIL)
    if bounds_tail:
        last_R = np.exp(np.where(log_probs_RK > -np.inf, log_probs_RK, np.inf).min(1))
        most_R = num_dropped_R * (last_R + np.maximum(last_R * RELATIVE, ABSOLUTE))
        tail_R = np.minimum(tail_R, most_R)
    return np.where(num_dropped_R > 0, tail_R, 0.0)
