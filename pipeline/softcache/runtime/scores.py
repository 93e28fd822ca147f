"""Headline metric of each kind of labels, and its formatting in tables."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["SCORES", "Score", "percent"]


class Score(NamedTuple):
    """The metric by which runs from a cache are compared.

    Attributes:
        metric: its name in a run's metrics.
        larger_is_better: the direction of improvement.
        title: its column title in tables.
        of_teacher: its name in the manifest's report of the teacher.
        scale: factor applied to values and standard deviations in tables.
        form: format string of a scaled value.
    """

    metric: str
    larger_is_better: bool
    title: str
    of_teacher: str
    scale: float
    form: str

    def format(self, value: float | None) -> str:
        """Returns a value as tables show it.

        >>> SCORES["image"].format(0.98765)
        '98.77%'
        """
        return "-" if value is None else self.form.format(self.scale * value)

    def format_std(self, value: float | None) -> str:
        """Returns a standard deviation as tables show it, in points where values are percentages."""
        return "-" if value is None else f"{self.scale * value:.4f}"

    @property
    def std_title(self) -> str:
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
