"""The teacher on a few rows, before it labels all: how well it predicts, whether as its model does, and which classes.

Log-probabilities are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from softcache.data.batch import Dataset
from softcache.data.sources.images.classes import sorted_places
from softcache.errors import ConfigError
from softcache.labels.class_order import find_other_order
from softcache.runtime.logging import log_info
from softcache.teacher.base import ClassVotes, Teacher

__all__ = ["TrialScores", "try_teacher"]

CHECKED, FEWEST, MOST = 512, 256, 2048
SHARE = 1 / 32
"""Of the rows of a view, between these bounds: the pass over a small data set is not to take twice as long for it."""

LARGEST_LOSS = 0.6
"""Mean negative log-likelihood of a teacher's own guesses, in log V, above which they are no evidence of another order: a
teacher that was hardly trained takes classes for others as consistently, and each guess is hardly likelier than chance."""


class TrialScores(NamedTuple):
    """Scores on a few rows.

    Attributes:
        rows: their number.
        loss: mean negative log-likelihood of the ground truth, nats.
        accuracy: share of rows whose likeliest class is the ground truth.
        num_classes: V; guessing gives a loss of log V, and an accuracy of 1 / V.
    """

    rows: int
    loss: float
    accuracy: float
    num_classes: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def is_guessing(self) -> bool:
        """Whether the loss is at least that of a guess, and the accuracy hardly above it: by 0.05, or three deviations.

        One of them alone is not enough: a good classifier may be too sure, and a frequent token is often right.
        """
        chance = 1 / self.num_classes
        spread = 3 * math.sqrt(chance * (1 - chance) / max(1, self.rows))
        is_wrong = self.accuracy <= chance + max(spread, 0.05)
        return is_wrong and self.loss >= 0.95 * math.log(self.num_classes)


def try_teacher(
    teacher: Teacher, data: Dataset, *, num_classes: int, batch_size: int, check_order: bool = True
) -> TrialScores | None:
    """Returns the scores on 256 to 2,048 rows of a split's plain view, in batches from all over it; None where there are no
    such scores.

    Args:
        check_order: whether evidence of another order of classes is an error; else it is logged.

    Raises:
        LabelError: the teacher's logits are not those of its model's own forward pass.
        ConfigError: its outputs, of which it is sure, are the source's classes in another order.
    """
    if not teacher.has_row_scores and not teacher.has_named_outputs:
        return None
    loss, correct, rows = 0.0, 0, 0
    votes: list[ClassVotes] = []
    for samples in _spread(data, batch_size, teacher.fewest_samples):
        batch: Any = data.load(samples, 0, fingerprints=False)
        scored = None
        if teacher.has_row_scores:
            if rows == 0:
                teacher.check_forward(batch.split(max(1, batch.num_rows // CHECKED))[0])
            scored = teacher.score(batch)
            loss, correct = loss + scored.loss, correct + scored.correct
        rows += batch.num_rows
        if teacher.has_named_outputs:
            votes.append(teacher.votes(batch, scored))
    number = sum(len(part.guesses_P) for part in votes)
    guess_loss = sum(part.loss * len(part.guesses_P) for part in votes)
    if number and guess_loss <= LARGEST_LOSS * number * math.log(num_classes):
        targets_P = torch.cat([part.targets_P for part in votes]).numpy()
        guesses_P = torch.cat([part.guesses_P for part in votes]).numpy()
        _check_class_order(teacher, data, targets_P, guesses_P, num_classes, is_error=check_order)
    if not teacher.has_row_scores:
        return None
    return TrialScores(rows, loss / max(1, rows), correct / max(1, rows), num_classes)


def _spread(data: Dataset, batch_size: int, fewest_samples: int) -> Iterator[range]:
    """Yields ranges of samples, alike far from each other: sources are often sorted by class."""
    wanted = min(max(SHARE * len(data) * data.mean_rows, FEWEST), MOST)
    wanted = max(wanted, fewest_samples * data.mean_rows)
    size = min(batch_size, max(2, math.ceil(wanted / data.mean_rows)), len(data))
    number = min(math.ceil(wanted / (size * data.mean_rows)), len(data) // size)
    for place in range(number):
        start = place * (len(data) - size) // max(1, number - 1)
        yield range(start, start + size)


def _check_class_order(
    teacher: Teacher,
    data: Dataset,
    targets_P: np.ndarray,
    guesses_P: np.ndarray,
    num_classes: int,
    *,
    is_error: bool,
) -> None:
    found = find_other_order(targets_P, guesses_P, num_classes, sorted_places(data.class_names))
    if found is None:
        return
    evidence = f"the source's classes in another order: {found.describe(data.class_names)}"
    if not is_error:
        log_info(f"teacher {teacher.spec}: its outputs may be {evidence} (teacher.check_class_order = false)")
        return
    raise ConfigError(
        f"teacher.model {teacher.spec}: its outputs are {evidence}; give the order of its outputs as source.class_names or "
        'source.class_order, or the output of each class as teacher.class_map, "auto" (by names) or a JSON file; where it '
        "does take these classes for each other, set teacher.check_class_order = false"
    )
