"""What students of each kind of labels are compared by, and how that is told."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["SCORES", "Score", "percent"]


class Score(NamedTuple):
    """What runs from a cache are compared by.

    Attributes:
        metric: its name in a run's metrics.
        larger_is_better: whether that is so.
        title: what tables call it.
        of_teacher: its name in the manifest's report of the teacher.
        scale: tables show it and its spread times this.
        form: how they show it then.
    """

    metric: str
    larger_is_better: bool
    title: str
    of_teacher: str
    scale: float
    form: str

    def told(self, value: float | None) -> str:
        """Returns a value as tables show it.

        >>> SCORES["image"].told(0.98765)
        '98.77%'
        """
        return "-" if value is None else self.form.format(self.scale * value)

    def spread(self, value: float | None) -> str:
        """Returns a standard deviation as tables show it, in points where values are percentages."""
        return "-" if value is None else f"{self.scale * value:.4f}"

    @property
    def spread_title(self) -> str:
        return "std" if self.scale == 1 else "std (points)"


SCORES = {
    "image": Score("accuracy", True, "accuracy", "eval_accuracy", 100, "{:.2f}%"),
    "tokens": Score("eval_loss", False, "held-out loss (nats)", "eval_loss", 1, "{:.4f}"),
    "cells": Score("map", True, "mAP", "eval_map", 100, "{:.1f}"),
}
"""By a cache's kind."""


def percent(share: float | None) -> str:
    """Returns a share as tables show it.

    >>> percent(0.98765)
    '98.77%'
    """
    return "-" if share is None else f"{100 * share:.2f}%"
