"""[train] log_every_steps and eval_every_steps: what is reported within an epoch, and that the run stays the same."""

import json

import pytest
from accelerate import Accelerator

from softcache.models.weight_files import load_weights
from softcache.student import TrainSettings
from tests.student.test_run import (
    Killed,
    assert_same_run,
    dies_at,
    fit,
    lasting,
    one_thread,
    watched,
    weights,
)

__all__ = ["one_thread"]  # a fixture

EVERY = {"train": {"log_every_steps": 2, "eval_every_steps": 4}}


@pytest.fixture
def logged(monkeypatch):
    """The events of a run, (name, fields)."""
    events = []
    monkeypatch.setattr("softcache.runs.fit.event", lambda name, **fields: events.append((name, fields)))
    return events


def test_losses_and_scores_are_reported_between_epochs(tmp_path, shared_cache, logged, capfd):
    """Three epochs of six steps."""
    metrics = fit(shared_cache[2], tmp_path, tables=EVERY)
    steps = [fields for name, fields in logged if name == "step"]
    assert [(row["epoch"], row["step"]) for row in steps] == [
        (e, 6 * e + s) for e in range(3) for s in (2, 4, 6)
    ]
    settings = TrainSettings(epochs=3)
    assert [row["lr"] for row in steps] == pytest.approx(
        [settings.lr * settings.lr_factor(row["step"] - 1, 18) for row in steps]
    )
    assert all(row["samples_per_second"] > 0 for row in steps)
    # Mean losses of two steps each; all batches of an epoch but the last have one size.
    first = metrics["history"][0]["train_loss"]
    assert min(row["loss"] for row in steps[:3]) < first < max(row["loss"] for row in steps[:3])
    assert metrics["evaluations"] == [
        {key: value for key, value in fields.items() if key not in ("run", "labels", "out")}
        for name, fields in logged
        if name == "evaluation"
    ]
    # Steps 12 and 18 end an epoch, which is evaluated anyway.
    assert [(row["epoch"], row["step"]) for row in metrics["evaluations"]] == [(0, 4), (1, 8), (2, 16)]
    assert all({"accuracy", "eval_loss"} <= row.keys() for row in metrics["evaluations"])
    lines = capfd.readouterr().err
    assert f"step 2, loss {steps[0]['loss']:.4f}, lr {steps[0]['lr']:.3g}, " in lines
    assert f"step 4, accuracy {metrics['evaluations'][0]['accuracy']:.4f}, eval_loss" in lines
    assert json.loads((tmp_path / "metrics.json").read_text())["evaluations"] == metrics["evaluations"]


def test_an_evaluation_is_of_the_weights_at_its_step(tmp_path, shared_cache, monkeypatch):
    train = {"eval_every_steps": 4, "checkpoint_steps": 4}
    with watched(monkeypatch, dies_at(5)), pytest.raises(Killed):
        fit(shared_cache[2], tmp_path, tables={"train": train})
    config, data, _ = shared_cache
    task = data.task(config, "mlp?width=8")
    student = task.build()
    load_weights(student, tmp_path / "checkpoint" / "model.safetensors")
    expected = task.evaluate(student.eval(), Accelerator(cpu=True), 1024)
    (found,) = json.loads((tmp_path / "checkpoint" / "progress.json").read_text())["evaluations"]
    assert found == {"epoch": 0, "step": 4} | expected


def test_reporting_changes_nothing_and_goes_on_after_a_kill(tmp_path, shared_cache, monkeypatch):
    fit(shared_cache[2], tmp_path / "whole", tables=EVERY)
    for step in (3, 5, 9):
        with watched(monkeypatch, dies_at(step)), pytest.raises(Killed):
            fit(shared_cache[2], tmp_path / "broken", tables=EVERY)
    metrics = fit(shared_cache[2], tmp_path / "broken", tables=EVERY)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    assert [row["step"] for row in metrics["evaluations"]] == [4, 8, 16]
    plain = fit(shared_cache[2], tmp_path / "plain", tables={"train": {"log_every_steps": None}})
    assert all((weights(tmp_path / "plain")[k] == v).all() for k, v in weights(tmp_path / "whole").items())
    assert lasting(plain) == {key: value for key, value in lasting(metrics).items() if key != "evaluations"}
    assert TrainSettings(**EVERY["train"]).identity() == TrainSettings().identity()


def test_steps_of_before_a_kill_are_no_part_of_the_rate(tmp_path, shared_cache, monkeypatch):
    with watched(monkeypatch, dies_at(9)), pytest.raises(Killed):
        fit(shared_cache[2], tmp_path)
    at = json.loads((tmp_path / "checkpoint" / "progress.json").read_text())
    counts = {"found": [], "now": []}
    monkeypatch.setattr("softcache.runtime.logging.Advance.found", lambda self, n: counts["found"].append(n))
    monkeypatch.setattr("softcache.runtime.logging.Advance.__call__", lambda self, n: counts["now"].append(n))
    fit(shared_cache[2], tmp_path)
    num_samples = len(shared_cache[1].train)
    (found,) = counts["found"]
    assert found >= at["epoch"] * num_samples > 0
    assert found + sum(counts["now"]) == 3 * num_samples


def test_without_asking_every_hundredth_step_is_reported(tmp_path, shared_cache, logged):
    fit(shared_cache[2], tmp_path, tables={"train": {"epochs": 17, "checkpoint_steps": None}})
    assert [fields["step"] for name, fields in logged if name == "step"] == [100]
