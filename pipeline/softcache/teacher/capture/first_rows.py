"""The teacher on the first few rows, before it labels all of them: how well it predicts, and whether as its model does.

A pass takes hours. A teacher whose head is random, whose classes are in another order, or whose text lacks what it was
trained with (BOS, its chat template) is seen in a second.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from softcache.data.batch import Dataset, ranges
from softcache.teacher.base import Teacher

__all__ = ["FirstRows", "score_first_rows"]

FEWEST, MOST = 256, 2048
SHARE = 1 / 32
"""Of the rows of a view, between these bounds: the pass over a small data set is not to take twice as long for it."""


class FirstRows(NamedTuple):
    """Scores on the first rows.

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


def score_first_rows(
    teacher: Teacher, data: Dataset, *, num_classes: int, batch_size: int
) -> FirstRows | None:
    """Returns the scores on the first rows of a split's plain view, 256 to 2,048; None of a teacher without such scores.

    Raises:
        LabelError: the teacher's logits are not those of its model's own forward pass.
    """
    if not teacher.has_row_scores:
        return None
    loss, correct, rows = 0.0, 0, 0
    wanted = min(max(SHARE * len(data) * data.mean_rows, FEWEST), MOST)
    for samples in ranges(len(data), min(batch_size, max(2, math.ceil(wanted / data.mean_rows)))):
        batch: Any = data.load(samples, 0, fingerprints=False)
        if rows == 0:
            teacher.check_forward(batch)
        batch_loss, batch_correct = teacher.score(batch)
        loss, correct, rows = loss + batch_loss, correct + batch_correct, rows + batch.num_rows
        if rows >= wanted:
            break
    return FirstRows(rows, loss / max(1, rows), correct / max(1, rows), num_classes)
