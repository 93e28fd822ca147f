"""Whether labels are of the source's classes in another order, as far as ground truths and first guesses tell.

Shape suffixes: `P` rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["OtherOrder", "find_other_order"]

LEAST_GAIN, DEVIATIONS, LEAST_RIGHT = 16, 4.0, 0.5
FEWEST_OPEN, OPEN_SHARE = 8, 0.75
"""Of classes that are not exchanged among themselves, as where a sorted source shows a few of many: at least so many,
and this share of those that are seen. A weak teacher takes half of its classes for other ones, and few of them are seen."""


class OtherOrder(NamedTuple):
    """Classes that stand in each other's places.

    Attributes:
        outputs: for each of the classes, the one that is guessed in its place.
        num_rows: of these classes, that were looked at.
        right: share of them whose first guess is the ground truth.
        right_then: the same with `outputs`.
    """

    outputs: dict[int, int]
    num_rows: int
    right: float
    right_then: float

    def describe(self, class_names: Sequence[str], *, most: int = 3) -> str:
        """Returns the evidence in words."""

        def name(number: int) -> str:
            return f"{number} {class_names[number]!r}" if number < len(class_names) else f"{number}"

        shown = [f"{name(one)} as {name(other)}" for one, other in sorted(self.outputs.items())[:most]]
        return (
            f"of {self.num_rows:,} rows of {len(self.outputs):,} classes the first guess is right in {self.right:.1%}, and "
            f"would be in {self.right_then:.1%} if each of them were another class: {', '.join(shown)}"
            + (", …" if len(self.outputs) > most else "")
        )


def find_other_order(
    targets_P: np.ndarray, guesses_P: np.ndarray, num_classes: int, usual: Sequence[Sequence[int]] = ()
) -> OtherOrder | None:
    """Returns the classes whose places are exchanged, by the order that would be right most often; None without evidence.

    The commonest guess of each class is found on half of its rows and counts on the other half. A teacher that only mistakes
    classes does not guess each of some classes as another one of them, no two as the same; nor, of `OPEN_SHARE` of the
    classes that are seen, each as one that no other is guessed as. The difference is to be `DEVIATIONS` standard deviations
    of chance.

    Args:
        targets_P: ground truths; what is none of the classes is left out.
        guesses_P: the likeliest class of each row.
        usual: orders that teachers often have, each the output of every class (others are left out); tried on all rows, of
            which many classes have too few for an order to be found.
    """
    is_class_P = (targets_P >= 0) & (targets_P < num_classes)
    targets_P, guesses_P = np.asarray(targets_P)[is_class_P], np.asarray(guesses_P)[is_class_P]
    orders: list[OtherOrder | None] = []
    for outputs in (outputs for outputs in usual if len(outputs) == num_classes):
        seen = np.unique(targets_P).tolist()
        moved = {one: outputs[one] for one in seen if outputs[one] != one}
        orders.append(_compare(moved, targets_P, guesses_P))
    order_P = np.argsort(targets_P, kind="stable")
    targets_P, guesses_P = targets_P[order_P], guesses_P[order_P]
    found = _commonest_guesses(targets_P[::2], guesses_P[::2])
    targets_P, guesses_P = targets_P[1::2], guesses_P[1::2]
    times = np.bincount(np.array(list(found.values()), np.int64), minlength=num_classes)
    alone = {one: other for one, other in found.items() if other != one and times[other] == 1}
    closed = dict(alone)
    while any(other not in closed for other in closed.values()):
        closed = {one: other for one, other in closed.items() if other in closed}
    for moved in (closed, alone if len(alone) >= max(FEWEST_OPEN, OPEN_SHARE * len(found)) else {}):
        orders.append(_compare(moved, targets_P, guesses_P))
    return max(filter(None, orders), key=lambda order: order.right_then, default=None)


def _commonest_guesses(targets_P: np.ndarray, guesses_P: np.ndarray) -> dict[int, int]:
    """Returns the guess of each class that comes most often, the class itself where another comes as often."""
    counts: dict[int, dict[int, int]] = {}
    for target, guess in zip(targets_P.tolist(), guesses_P.tolist(), strict=True):
        of_class = counts.setdefault(target, {})
        of_class[guess] = of_class.get(guess, 0) + 1
    return {
        target: max(of_class, key=lambda guess: (of_class[guess], guess == target))
        for target, of_class in counts.items()
    }


def _compare(moved: dict[int, int], targets_P: np.ndarray, guesses_P: np.ndarray) -> OtherOrder | None:
    if len(moved) < 2:
        return None
    is_moved_P = np.isin(targets_P, list(moved))
    targets_P, guesses_P = targets_P[is_moved_P], guesses_P[is_moved_P]
    expected_P = np.array([moved[target] for target in targets_P.tolist()], np.int64)
    rows, right, then = (
        len(targets_P),
        int((guesses_P == targets_P).sum()),
        int((guesses_P == expected_P).sum()),
    )
    # A teacher that knows the classes is right at least twice as often.
    if then < max(LEAST_RIGHT * rows, 2 * right) or then - right < max(
        LEAST_GAIN, DEVIATIONS * np.sqrt(rows)
    ):
        return None
    return OtherOrder(moved, rows, right / rows, then / rows)
