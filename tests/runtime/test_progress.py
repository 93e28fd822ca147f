"""Progress: on a terminal a bar that fits its width; elsewhere one line for each interval, and one at the end."""

import io
import logging

import pytest
from rich.console import Console

from softcache.runtime import logging as progress
from softcache.runtime.display import format_duration


@pytest.fixture
def clock(monkeypatch):
    """Sets the time that progress sees."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines(caplog):
    return [record.getMessage() for record in caplog.records]


def test_the_last_line_is_shown_once(monkeypatch, caplog):
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, logger="softcache"), progress.progress_bar("train", 3) as advance:
        for _ in range(3):
            advance(1)
    shown = [line.partition(" samples")[0] for line in lines(caplog)]
    assert shown == ["train: 1/3", "train: 2/3", "train: 3/3"]


def test_a_log_has_one_line_for_each_interval(clock, caplog):
    with caplog.at_level(logging.INFO, logger="softcache"), progress.progress_bar("train", 600) as advance:
        for step in range(1, 7):
            clock[0] += 9.0
            advance(100)
            advance.note(f"loss {step}", f"step {step}")
    assert lines(caplog) == [
        *(
            f"train: step {step}, {left} left"
            for step, left in enumerate(("45 s", "36 s", "27 s", "18 s", "9 s"), 1)
        ),
        "train: step 6, in 54 s",
        "train: 600/600 samples, 11/s in 54 s (loss 6)",
    ]


def test_what_was_done_before_is_no_part_of_the_rate(clock, caplog):
    with caplog.at_level(logging.INFO, logger="softcache"), progress.progress_bar("train", 1000) as advance:
        progress.count_found(advance, 800)
        clock[0] += 10.0
        advance(100)
        clock[0] += 10.0
        advance(100)
    assert lines(caplog) == [
        "train: 900/1,000 samples, 10/s, 10 s left",
        "train: 1,000/1,000 samples, 10/s in 20 s",
    ]


def drawn(width, label, note):
    """Returns the lines of a bar of 300 of 1,200 samples, after 25 seconds, on a terminal of a width."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    bar = progress._Bar(label, 1200, "samples", console)
    bar(300)
    bar.note(note)
    bar._started -= 25.0
    console.print(bar._render())
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 120, 200])
def test_a_bar_fits_the_terminal_with_all_its_figures(clock, width):
    label, note = "train cnn?width=64&stages=2 (ground_truth)", "loss 0.01 █▅▂▁ lr 0.001, 12 samples/s"
    shown = drawn(width, label, note)
    assert all(len(line.rstrip()) <= width for line in shown)
    assert len(shown) == (1 if width == 200 else 3)
    words = " ".join(shown)
    for figure in (label, " 25%", "300/1,200 samples", "12/s", "1 min 15 s left", note):
        assert figure in words
    assert "━━━━━━━╸" in words


def test_a_step_that_ends_early_has_no_time_left(clock, caplog):
    with caplog.at_level(logging.INFO, logger="softcache"), progress.progress_bar("train", 600) as advance:
        clock[0] += 2.0
        advance(100)
    assert lines(caplog) == ["train: 100/600 samples, 50/s in 2 s"]


def test_a_short_bar_is_one_line_from_its_start(clock):
    (line,) = drawn(80, "train (cache)", "")
    assert line.rstrip().endswith("1 min 15 s left")


def test_a_label_that_is_too_long_is_cut_and_its_figures_are_not(clock):
    label, figures = drawn(60, "train " + "x" * 100, "")
    assert label == "train " + "x" * 53 + "…"
    assert figures.endswith("1 min 15 s left")


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.0412, "0.04 s"),
        (9.0, "9 s"),
        (12.34, "12.3 s"),
        (59.96, "1 min"),
        (200, "3 min 20 s"),
        (3599.6, "1 h"),
        (4213, "1 h 10 min"),
        (86_399, "1 d"),
        (97_200, "1 d 3 h"),
        (1e8, "1,157 d 10 h"),
    ],
)
def test_a_duration_is_read_in_its_two_largest_units(seconds, expected):
    assert format_duration(seconds) == expected
