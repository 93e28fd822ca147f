"""Scores as tables order and show them."""

from softcache.modalities.base import Score

NAN = float("nan")


def test_the_best_come_first_and_what_has_no_score_last_with_a_dash():
    accuracy = Score("accuracy", True, "accuracy", "eval_accuracy", 100, "{:.2f}%")
    loss = Score("loss", False, "loss", "eval_loss", 1, "{:.4f}")
    assert [accuracy.format(x) for x in sorted([0.2, NAN, 0.7, None, 0.5], key=accuracy.order)] == [
        *("70.00%", "50.00%", "20.00%", "-", "-")
    ]
    assert [loss.format(x) for x in sorted([None, 0.7, NAN, 0.2], key=loss.order)] == [
        *("0.2000", "0.7000", "-", "-")
    ]
