"""Advice about students that learn less from the cache than from hard labels."""

import pytest

from softcache.losses import LossSettings
from softcache.modalities import Score, modality_of
from softcache.runs.tables import advice, student_advice
from tests.support.caches import digits_config

ACCURACY = Score("accuracy", True, "accuracy", "eval_accuracy", 100, "{:.2f}%")
LOSS = Score("eval_loss", False, "loss", "eval_loss", 1, "{:.4f}")


@pytest.mark.parametrize(
    ("score", "cached", "hard", "spread", "line"),
    [
        (
            ACCURACY,
            0.72,
            0.77,
            0.01,
            "hard labels teach more than the cache by 5 points: try loss.temperature = 1 (it is 4)",
        ),
        (ACCURACY, 0.72, 0.77, 0.06, None),
        (ACCURACY, 0.77, 0.72, 0.01, None),
        (
            LOSS,
            2.5,
            2.25,
            0.0,
            "hard labels teach more than the cache by 0.25: try loss.temperature = 1 (it is 4)",
        ),
        (LOSS, 2.2, 2.25, 0.0, None),
        (ACCURACY, float("nan"), 0.5, 0.0, None),
    ],
)
def test_advice_is_given_where_hard_labels_win_by_more_than_the_spread(score, cached, hard, spread, line):
    found = advice(LossSettings(temperature=4.0), score, cached, hard, spread=spread)
    assert found == line or found.startswith(line)


def test_what_to_try_is_what_is_not_set_already():
    found = advice(LossSettings(temperature=1.0), ACCURACY, 0.5, 0.6)
    assert "temperature" not in found
    assert "longer training (train.epochs), a lower loss.alpha, or `softcache sweep`" in found


def test_a_student_without_a_baseline_has_no_advice():
    modality = modality_of(digits_config())
    assert student_advice(LossSettings(), modality, {"accuracy": 0.1}, None) is None
    for samples, lead, given in ((100, 0.05, False), (100, 0.07, True), (10_000, 0.01, True)):
        hard = {"accuracy": 0.7 + lead, "eval_samples": samples}
        assert (student_advice(LossSettings(), modality, {"accuracy": 0.7}, hard) is not None) == given
