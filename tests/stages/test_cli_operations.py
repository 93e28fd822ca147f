"""What an operator sees of a run: logs as JSON, signals, and a run in progress from outside."""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from softcache import open_cache
from softcache.cache import units
from softcache.stages.cli import main
from tests.stages.test_cli import CONFIG, Result

SMALL = CONFIG.replace('model = "mlp?width=8"\n', 'model = "tests.support.fakes_students:restless"\n')


@pytest.fixture
def run(in_tmp, monkeypatch, capsys):
    """Returns a function that runs the command line in this process, in a folder with small.toml."""
    (in_tmp / "small.toml").write_text(SMALL)

    def softcache(command, *arguments):
        config = () if command == "status" else ("--config", "small.toml")
        monkeypatch.setattr(sys, "argv", ["softcache", command, *config, *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        return Result(code, *capsys.readouterr())

    yield softcache
    from softcache.runtime.logging import set_log_format

    set_log_format("text")


@pytest.fixture
def signal_in(monkeypatch):
    """Returns a function that sends this process a signal at the n-th call of something."""

    def arrange(where, name, number, signum):
        real, calls = getattr(where, name), []

        def hooked(*args, **kwargs):
            calls.append(1)
            if len(calls) == number:
                os.kill(os.getpid(), signum)
            return real(*args, **kwargs)

        monkeypatch.setattr(where, name, hooked)

    return arrange


def events(result):
    return [json.loads(line) for line in result.err.splitlines()]


# -- logs --------------------------------------------------------------------------------------------------


def test_json_logs_are_one_object_per_line_and_add_up(run):
    result = run("teacher-logits", "--log", "json")
    assert result.code == 0, result
    lines = events(result)
    assert all({"time", "event"} <= set(line) for line in lines)
    by_name = {}
    for line in lines:
        by_name.setdefault(line["event"], []).append(line)
    (started,), (finished,), done = by_name["run_started"], by_name["run_finished"], by_name["unit_done"]
    assert (started["units"], started["rows"]) == (10, 600)
    assert sorted(line["unit"] for line in done) == list(range(10))
    assert sum(line["rows"] for line in done) == finished["rows"] == 600
    cache = open_cache("runs/small/cache")
    published = sum(shard.num_bytes for marker in cache.markers.values() for shard in marker.shards)
    assert sum(line["bytes"] for line in done) == finished["num_bytes"] == published
    for line in done:
        assert 0 < line["teacher_share"] <= 1
        assert line["queue_depth"] >= 0
        assert line["rows_per_second"] == pytest.approx(line["rows"] / line["seconds"], rel=0.01)
    assert by_name["progress"][-1]["done"] == 600
    assert "teacher busy" in result.out


def test_json_logs_of_a_student_have_a_row_per_epoch(run):
    run("teacher-logits")
    result = run("train-student", "--no-baseline", "--set", "train.epochs=2", "--log", "json")
    assert result.code == 0, result
    rows = [line for line in events(result) if line["event"] == "epoch"]
    assert [row["epoch"] for row in rows] == [0, 1]
    assert all(np.isfinite(row["train_loss"]) and row["labels"] == "cache" for row in rows)
    assert events(result)[-1]["event"] == "run_finished"


def test_an_error_is_an_event_of_the_json_log(run):
    result = run("train-student", "--log", "json")
    assert result.code == 1
    last = events(result)[-1]
    assert (last["event"], last["kind"]) == ("error", "CacheNotFoundError")
    assert "runs/small/cache" in last["message"]


# -- signals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_capture_that_is_signalled_ends_resumable_and_says_how(run, signal_in, signum, code):
    signal_in(units, "_failpoint", 12, signum)  # in the middle of a unit's shards, in the writer's thread
    result = run("teacher-logits")
    assert result.code == code, result
    assert "the same command goes on: softcache teacher-logits --config small.toml" in result.err
    assert "Traceback" not in result.err
    there = open_cache("runs/small/cache")
    done = len(there.markers)
    assert 0 < done < 10
    assert not [path for path in os.listdir("runs/small/cache/units") if path.endswith(".lock")]
    again = run("teacher-logits")
    assert again.code == 0
    assert f"{10 - done} units made now, {done} found" in again.out


def test_a_student_that_is_signalled_saves_a_checkpoint_and_ends_with_the_same_weights(run, signal_in):
    run("teacher-logits")
    how = ("train-student", "--no-baseline", "--set", "train.epochs=3")
    assert run(*how, "--out", "whole").code == 0
    import softcache.student.loop as student

    signal_in(
        student.Trainer, "_update", 5, signal.SIGTERM
    )  # three steps an epoch: in the middle of the second
    result = run(*how, "--out", "stopped")
    assert result.code == 143, result
    assert "the same command goes on" in result.err
    assert not os.path.exists("stopped/metrics.json")
    assert json.loads(Path("stopped/checkpoint/progress.json").read_text())["step"] == 2
    assert run(*how, "--out", "stopped").code == 0
    one, other = load_file("whole/model.safetensors"), load_file("stopped/model.safetensors")
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


# -- a run in progress, from outside -----------------------------------------------------------------------


def test_status_shows_done_claimed_and_left_while_units_are_made(run, monkeypatch):
    """It is asked in the middle of the fifth unit, by a hook of the run itself."""
    from softcache.cache.storage.open import open_objects
    from softcache.tools.status import read_status

    seen = []

    def look(name):
        if name == "before_marker":
            seen.append(read_status(open_objects("runs/small/cache")))

    monkeypatch.setattr(units, "_failpoint", look)
    assert run("teacher-logits", "--set", "capture.queue_units=1").code == 0
    assert [status.units_done for status in seen] == list(range(10))
    for status in seen:
        assert status.state == "running"
        assert status.units_claimed >= 1
        assert status.units_done + status.units_claimed + status.units_left == status.units_total == 10
    assert (seen[5].samples_done, seen[5].samples_total) == (300, 600)
    assert seen[1].rows_per_second is None, "one unit has no rate"
    assert seen[5].rows_per_second > 0
    assert seen[5].seconds_left == pytest.approx(300 / seen[5].samples_per_second)


def test_status_measures_the_rate_by_the_times_of_markers(run):
    run("teacher-logits")
    for number in range(10):
        os.utime(f"runs/small/cache/units/{number:05d}.json", (1000 + 2 * number, 1000 + 2 * number))
    found = json.loads(run("status", "runs/small/cache", "--json").out)
    assert found["state"] == "complete"
    assert found["rows_per_second"] == pytest.approx((600 - 64) / 18)
    os.remove("runs/small/cache/units/00003.json")
    words = run("status", "runs/small/cache").out
    assert "stopped; 9 of 10 units done, 0 claimed, 1 left (89.3% of the samples)" in words


def test_status_watches_until_the_cache_is_complete(run, monkeypatch):
    run("teacher-logits")
    marker = Path("runs/small/cache/units/00003.json")
    kept = marker.read_bytes()
    marker.unlink()
    monkeypatch.setattr("softcache.stages.status.time.sleep", lambda seconds: marker.write_bytes(kept))
    lines = run("status", "runs/small/cache", "--watch", "5").out.splitlines()
    assert [line.split(": ")[1].split(";")[0] for line in lines] == ["stopped", "complete"]


def test_status_of_no_cache_is_one_message(run):
    result = run("status", "nowhere")
    assert result.code == 1
    assert "nowhere/manifest.json: missing" in result.err
