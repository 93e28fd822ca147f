"""How far numbers that a codec stores may be from those that were computed; docs/format.md states the same bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

__all__ = ["ARITHMETIC", "END", "EXACT", "HALF", "Error", "Precision"]

END = 65504.0 * (1 - 2.0**-10)
"""Numbers whose size is above it may have been put at the end of a codec's range, 65504, and are not compared."""


class Error(NamedTuple):
    """A bound on |stored - computed|: the larger of `absolute` and `relative` times the number's size."""

    absolute: float
    relative: float

    def of(self, values: np.ndarray) -> np.ndarray:
        """Returns the bound for each of the values, which are finite."""
        if not self.relative:
            return np.full(values.shape, self.absolute, values.dtype)
        return np.maximum(self.relative * np.abs(values), self.absolute)

    def __add__(self, other: Error) -> Error:  # type: ignore[override]
        return Error(self.absolute + other.absolute, self.relative + other.relative)


ARITHMETIC = Error(2.0**-16, 2.0**-20)
"""What the float32 arithmetic of a writer may add to a number in nats: the sum of both."""
EXACT = Error(0.0, 0.0)
HALF = Error(2.0**-25, 2.0**-11)
"""Of numbers that are rounded to float16."""


@dataclass(frozen=True)
class Precision:
    """The bounds of a codec's columns.

    Attributes:
        log_probs: of log-probabilities, or logits.
        tail: of `log_tail` at all temperatures but 1, where it is `tail_at_one`.
        target: of `target_log_prob`.
        moments: of entropy, mean and deviation.
    """

    log_probs: Error = EXACT
    tail_at_one: Error = EXACT
    tail: Error = EXACT
    target: Error = EXACT
    moments: Error = EXACT
