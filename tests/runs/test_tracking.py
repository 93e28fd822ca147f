"""Trackers: what TensorBoard reads is what the runs computed; the others get project, run and settings by their own names."""

import sys

import pytest
from accelerate import tracking as accelerate_tracking
from accelerate.utils import LoggerType

from softcache.errors import MissingExtraError, RunError, SpecError
from softcache.runs import capture_labels, open_data, open_teacher, train_student
from softcache.runs.tracking import TRACKERS, tracking
from softcache.runtime.logging import event, sparkline
from tests.support.caches import digits_config


def test_the_trackers_are_those_of_accelerate():
    assert set(TRACKERS) == set(LoggerType.list()) - {"all"}


def test_tensorboard_has_the_curves_of_a_capture_and_a_student(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def curves(folder):
        (found,) = (path for path in folder.glob("softcache/events.out.tfevents*"))
        read = accumulator.EventAccumulator(str(found)).Reload()
        return {name: [(at.step, at.value) for at in read.Scalars(name)] for name in read.Tags()["scalars"]}

    config = digits_config(train={"epochs": 2, "log_every_steps": 4})
    data = open_data(config)
    with tracking("tensorboard"):
        cache, report = capture_labels(config, data, open_teacher(config, data), str(tmp_path / "cache"))
        out = tmp_path / "student"
        metrics = train_student(config, data, model="linear", labels="cache", cache=cache, out=out)
        again = train_student(config, data, model="linear", labels="cache", cache=cache, out=out)
    assert again["history"] == metrics["history"]
    captured = curves(tmp_path / "track" / "cache")
    assert captured["capture/rows"][-1] == (report.units_done, report.rows)
    trained = curves(out)
    for name in ("accuracy", "eval_loss", "train_loss"):
        expected = [row[name] for row in metrics["history"]]
        assert [value for _, value in trained[name]] == pytest.approx(expected)
    per_epoch = metrics["steps"] // 2
    assert [step for step, _ in trained["accuracy"]] == [per_epoch, 2 * per_epoch]
    assert [step for step, _ in trained["train/loss"]] == list(range(4, metrics["steps"] + 1, 4))
    settings = next((out / "softcache").rglob("hparams.yml")).read_text()
    assert f"loss.temperature: {config.loss.temperature}" in settings
    assert "student.model: linear" in settings


@pytest.mark.parametrize(
    ("name", "first", "others"),
    [
        ("wandb", "mine", {"name": "cnn-1", "dir": "runs/students/cnn-1"}),
        ("mlflow", "mine", {"run_name": "cnn-1"}),
        ("aim", "cnn-1", {"experiment": "mine"}),
        ("clearml", "mine", {"project_name": "mine", "task_name": "cnn-1"}),
    ],
)
def test_a_tracker_gets_project_run_settings_and_numbers(in_tmp, monkeypatch, name, first, others):
    calls = []

    class Recorder(accelerate_tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "recorder", False, None

        def __init__(self, *args, **options):
            calls.append(("init", args, options))

        def store_init_configuration(self, values):
            calls.append(("config", values))

        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finish")

    monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, name, Recorder)
    monkeypatch.setattr("softcache.runs.tracking._is_installed", lambda name: True)
    with tracking(f"{name}:mine"):
        event(
            "run_started",
            run="train",
            out="runs/students/cnn-1",
            config={"loss": {"alpha": 0.5, "mix": None}},
        )
        event("step", run="train", epoch=0, step=7, loss=0.5, lr=1e-3)
        event("evaluation", run="train", epoch=0, step=8, accuracy=0.75, note="text")
        event("run_started", run="next", out="runs/students/done", config={})
    assert calls == [
        ("init", (first,), others),
        ("config", {"loss.alpha": 0.5, "loss.mix": "None"}),
        (7, {"train/loss": 0.5, "train/lr": 1e-3}),
        (8, {"evaluation/accuracy": 0.75}),
        "finish",
    ]


def test_a_tracker_that_fails_is_one_message(monkeypatch):
    class Failing(accelerate_tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "failing", False, None

        def __init__(self, *args, **options):
            raise ConnectionError("no route to host")

    monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, "mlflow", Failing)
    monkeypatch.setattr("softcache.runs.tracking._is_installed", lambda name: True)
    with tracking("mlflow"):
        event("run_started", run="train", out="runs/x", config={})
        with pytest.raises(
            RunError, match=r"--track mlflow: ConnectionError: no route to host; .* run again"
        ):
            event("step", run="train", epoch=0, step=7, loss=0.5)


def test_what_cannot_track_is_refused_before_anything_runs(monkeypatch):
    with pytest.raises(SpecError, match="tracker 'tensorbord': unknown"), tracking("tensorbord"):
        raise AssertionError("it runs")
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with (
        pytest.raises(MissingExtraError, match="pip install 'softcache\\[track\\]'"),
        tracking("tensorboard"),
    ):
        raise AssertionError("it runs")


def test_a_sparkline_has_means_of_neighbours():
    assert sparkline([]) == ""
    assert sparkline([2.0]) == "▁"
    assert sparkline([8.0, 4.0, 0.0]) == "█▄▁"
    assert len(sparkline([float(n) for n in range(1000)])) <= 16
    assert sparkline([1.0, float("nan")]) == sparkline([float("inf")]) == ""
