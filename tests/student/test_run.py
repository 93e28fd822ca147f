"""Training: a kill changes nothing, the cache stands in for the teacher, and what is refused."""

import json
import os
import random
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from softcache.cache.storage.local import LocalObjects
from softcache.errors import (
    AlignmentError,
    ConfigError,
    DivergedError,
    IdentityError,
    IncompleteCacheError,
    RunError,
    SpecError,
    StorageError,
)
from softcache.models.image import build_model
from softcache.reader.cache import Cache
from softcache.reader.open import open_cache
from softcache.runs import open_data, open_teacher, train_student
from softcache.runtime.logging import Advance
from softcache.student.checkpoint import RunDirectory
from softcache.student.tasks.image_classification import ImageTask
from tests.support.caches import digits_config, make_cache
from tests.support.programs import Program

LABELS = ["cache", "ground_truth", "online"]
RESTLESS = "tests.support.fakes_students:restless"


@pytest.fixture(autouse=True)
def one_thread():
    """Batches are tiny here: a second thread costs more than it does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fit(cache, out, *, labels="cache", model="mlp?width=8", tables=None, **options):
    """Trains a student for three epochs of six steps; `tables` change the config."""
    tables = dict(tables or {})
    tables["train"] = {"epochs": 3, "checkpoint_steps": 2, **tables.get("train", {})}
    config = digits_config(**tables)
    data = open_data(config)
    teacher = open_teacher(config, data) if labels == "online" else None
    return train_student(
        config, data, model=model, labels=labels, cache=cache, teacher=teacher, out=out, **options
    )


def weights(out, name="model"):
    return load_file(out / f"{name}.safetensors")


def distance(one, other):
    """The largest difference between two runs' final weights."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    return max(float((a[key].double() - b[key].double()).abs().max()) for key in a)


def lasting(metrics):
    return {key: value for key, value in metrics.items() if key not in ("seconds", "out")}


def assert_same_run(one, other):
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert (one / "best.safetensors").read_bytes() == (other / "best.safetensors").read_bytes()
    first, second = (json.loads((out / "metrics.json").read_text()) for out in (one, other))
    assert lasting(first) == lasting(second)


@contextmanager
def watched(monkeypatch, on_step):
    """Calls `on_step` after every step, where the progress bar is updated."""

    class Watching(Advance):
        def __call__(self, count):
            on_step(count)

    @contextmanager
    def track(label, total, unit="samples"):
        yield Watching(label, total, unit)

    with monkeypatch.context() as patch:
        patch.setattr("softcache.runs.fit.progress_bar", track)
        yield


# -- kills -------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def dies_at(step):
    steps = iter(range(1, step))

    def on_step(samples):
        if next(steps, None) is None:
            raise Killed

    return on_step


@pytest.mark.parametrize("model", ["mlp?width=8", RESTLESS])
@pytest.mark.parametrize("labels", LABELS)
def test_interrupted_again_and_again_it_ends_with_the_same_weights(
    tmp_path, shared_cache, monkeypatch, labels, model
):
    cache = shared_cache[2]
    fit(cache, tmp_path / "whole", labels=labels, model=model)
    for step in (1, 4, 6, 3, 5, 4, 2):
        with watched(monkeypatch, dies_at(step)), pytest.raises(Killed):
            fit(cache, tmp_path / "broken", labels=labels, model=model)
        assert not (tmp_path / "broken" / "metrics.json").exists()
    fit(cache, tmp_path / "broken", labels=labels, model=model)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_who_may_read_a_run_is_what_the_umask_leaves(tmp_path, shared_cache):
    """safetensors writes for its user alone: a group could read the metrics of a run, and not its weights."""
    before = os.umask(0o027)
    try:
        fit(shared_cache[2], tmp_path / "run")
    finally:
        os.umask(before)
    modes = {
        path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*") if path.is_file()
    }
    assert {"model.safetensors", "best.safetensors", "metrics.json"} <= modes.keys()
    assert set(modes.values()) == {0o640}, modes


def test_a_rerun_starts_at_the_last_checkpoint(tmp_path, shared_cache, monkeypatch):
    with watched(monkeypatch, dies_at(12)), pytest.raises(Killed):
        fit(shared_cache[2], tmp_path)
    seen = []
    with watched(monkeypatch, seen.append):
        fit(shared_cache[2], tmp_path)
    assert len(seen) == 18 - 10, "of 18 steps, 10 were in the checkpoint"


def test_without_checkpoint_steps_an_epoch_is_what_can_be_lost(tmp_path, shared_cache, monkeypatch):
    tables = {"train": {"checkpoint_steps": None}}
    fit(shared_cache[2], tmp_path / "whole", tables=tables)
    with watched(monkeypatch, dies_at(11)), pytest.raises(Killed):
        fit(shared_cache[2], tmp_path / "broken", tables=tables)
    seen = []
    with watched(monkeypatch, seen.append):
        fit(shared_cache[2], tmp_path / "broken", tables=tables)
    assert len(seen) == 12
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize("name", ["best", "model"])
def test_killed_while_weights_are_written_it_ends_the_same(tmp_path, shared_cache, monkeypatch, name):
    fit(shared_cache[2], tmp_path / "whole")
    save = RunDirectory.save_weights

    def dies(self, state, wanted):
        if wanted == name:
            raise Killed
        save(self, state, wanted)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save_weights", dies)
        with pytest.raises(Killed):
            fit(shared_cache[2], tmp_path / "broken")
    fit(shared_cache[2], tmp_path / "broken")
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


class Disk:
    """Stands in for an accelerator: a state is one number in two files."""

    is_main_process = True

    def __init__(self, number=0):
        self.number = number

    def wait_for_everyone(self):
        pass

    def save_state(self, place, safe_serialization):
        os.makedirs(place)
        for name in ("model", "optimizer"):
            (Path(place) / name).write_text(str(self.number))

    def load_state(self, place):
        self.number = {int((Path(place) / name).read_text()) for name in ("model", "optimizer")}


def saving_dies_at(monkeypatch, directory, number, operation):
    """Saves state `number`; every rename and every removed file is an operation, and the given one is not done."""
    operations = iter(range(1, operation))

    def or_die(real):
        def wrapper(*args, **kwargs):
            if next(operations, None) is None:
                raise Killed
            return real(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.rename", or_die(Path.rename))
        patch.setattr("os.unlink", or_die(os.unlink))
        patch.setattr("os.rmdir", or_die(os.rmdir))
        try:
            directory.save_checkpoint(Disk(number), {"step": number})
        except Killed:
            return True
    return False


@pytest.mark.parametrize("first", range(1, 8))
def test_two_kills_while_a_checkpoint_is_replaced_leave_a_whole_one(tmp_path, monkeypatch, first):
    for second in range(1, 14):
        directory = RunDirectory(tmp_path / f"{second}", {})
        directory.save_checkpoint(Disk(1), {"step": 1})
        saving_dies_at(monkeypatch, directory, 2, first)
        died = saving_dies_at(monkeypatch, directory, 3, second)
        found = Disk()
        progress = directory.load_checkpoint(found)
        assert progress is not None, f"no checkpoint after a kill at operation {second}"
        assert found.number == {progress["step"]}
    assert not died, "the last of the second kills came after the save"


def test_a_student_that_diverges_ends_with_its_step_and_keeps_its_last_checkpoint(
    tmp_path, shared_cache, monkeypatch
):
    loss, steps = ImageTask.loss, []

    def poisoned(self, *args, **kwargs):
        steps.append(1)
        return loss(self, *args, **kwargs) * (float("nan") if len(steps) == 9 else 1.0)

    monkeypatch.setattr(ImageTask, "loss", poisoned)
    expected = r"diverged: the loss.* of step 9 is not finite, at learning rate .*; the last good checkpoint, of epoch 1, step 2, is kept"
    with pytest.raises(DivergedError, match=expected):
        fit(shared_cache[2], tmp_path, tables={"train": {"clip_norm": 1.0}})
    assert not (tmp_path / "metrics.json").exists()
    fit(
        shared_cache[2], tmp_path, tables={"train": {"clip_norm": 1.0}}
    )  # the fault was not the run's: it goes on
    assert len(steps) == 10 + 10


def test_a_learning_rate_that_is_far_too_large_leaves_no_result(tmp_path, shared_cache):
    with pytest.raises(
        DivergedError, match=r"learning rate .*e\+.*; no checkpoint was saved before that; lower train\.lr"
    ):
        fit(shared_cache[2], tmp_path, tables={"train": {"lr": 1e30, "epochs": 1, "checkpoint_steps": None}})
    assert not (tmp_path / "metrics.json").exists()
    assert not (tmp_path / "best.safetensors").exists()


def test_results_that_json_has_no_number_for_are_null(tmp_path):
    RunDirectory(tmp_path, {}).write_metrics(
        {"eval_map": float("nan"), "history": [{"perplexity": float("inf")}]}
    )
    text = (tmp_path / "metrics.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "eval_map": None,
        "history": [{"perplexity": None}],
    }


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff\xfe"])
@pytest.mark.parametrize("name", ["config.json", "metrics.json"])
def test_a_damaged_file_of_a_run_is_named(tmp_path, name, damage):
    RunDirectory(tmp_path, {}).write_metrics({})
    (tmp_path / name).write_bytes(damage)
    with pytest.raises(RunError, match=rf"{name}: expected a JSON object; found"):
        RunDirectory(tmp_path, {}).metrics  # noqa: B018


def test_a_second_run_in_one_directory_is_refused(tmp_path, shared_cache):
    with (
        LocalObjects(tmp_path / "run").claim(".lock"),
        pytest.raises(RunError, match=r"run: another run works on it"),
    ):
        fit(shared_cache[2], tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    fit(shared_cache[2], tmp_path / "run", tables={"train": {"epochs": 1}})
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_disk_that_does_not_keep_what_is_written_ends_the_run(tmp_path, shared_cache, monkeypatch):
    real, broken = os.fsync, []

    def failing(handle):
        if broken and broken[0] in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(5, "Input/output error")
        real(handle)

    monkeypatch.setattr("os.fsync", failing)
    for number, name in enumerate(
        ("/.config.json.", "/checkpoint.new/model.safetensors", "/.best.safetensors.")
    ):
        broken[:] = [name]
        with pytest.raises(StorageError, match=r"cannot be written: .*Input/output error"):
            fit(shared_cache[2], tmp_path / f"{number}")
    directory = RunDirectory(tmp_path / "kept", {})
    broken.clear()
    directory.save_checkpoint(Disk(1), {"step": 1})
    broken[:] = ["/kept"]
    with pytest.raises(StorageError, match="the last checkpoint is kept"):
        directory.save_checkpoint(Disk(2), {"step": 2})
    assert directory.load_checkpoint(Disk()) == {"step": 1}


def test_the_old_checkpoint_stays_if_the_new_one_is_not_whole(tmp_path, monkeypatch):
    class Losing(Disk):
        def save_state(self, place, safe_serialization):
            super().save_state(place, safe_serialization)
            (Path(place) / "optimizer.bin").write_bytes(b"zeros")

    directory = RunDirectory(tmp_path, {})
    directory.save_checkpoint(Disk(1), {"step": 1})
    with pytest.raises(StorageError, match=r"optimizer\.bin is not as it was written"):
        directory.save_checkpoint(Losing(2), {"step": 2})
    assert directory.load_checkpoint(Disk()) == {"step": 1}


LONG = {"train": {"epochs": 8, "checkpoint_steps": 1}}
KILLED = """
import sys, time
from contextlib import contextmanager
import torch
torch.set_num_threads(1)
from pathlib import Path
from softcache import open_cache
from softcache.runs import fit as fitting
from tests.student.test_run import LONG, fit

@contextmanager
def track(*_):
    def on_step(samples):
        print("step", flush=True)
        time.sleep(0.005)  # leaves the other side the time to kill

    yield on_step

fitting.progress_bar = track
fit(open_cache(sys.argv[1]), Path(sys.argv[2]), labels=sys.argv[3], tables=LONG)
"""


@pytest.mark.parametrize("labels", LABELS)
def test_killed_for_real_it_ends_with_the_same_weights(tmp_path, shared_cache, labels):
    url = shared_cache[2].url
    moments = random.Random(LABELS.index(labels))
    process = Program(KILLED, url, tmp_path / "broken", labels)
    for _ in range(moments.randint(7, 23)):
        assert process.stdout.readline() == "step\n"
    time.sleep(moments.random() * 0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "broken" / "metrics.json").exists()
    fit(open_cache(url), tmp_path / "broken", labels=labels, tables=LONG)
    fit(open_cache(url), tmp_path / "whole", labels=labels, tables=LONG)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


# -- the loop ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", LABELS)
def test_pieces_of_a_batch_add_up_to_the_batch(tmp_path, shared_cache, labels):
    for pieces in (1, 2, 3):
        tables = {"train": {"accumulation_steps": pieces}}
        fit(shared_cache[2], tmp_path / f"{pieces}", labels=labels, tables=tables)
    fit(shared_cache[2], tmp_path / "smaller", labels=labels, tables={"train": {"batch_size": 25}})
    for pieces in (2, 3):
        assert distance(tmp_path / "1", tmp_path / f"{pieces}") < 1e-5
    assert distance(tmp_path / "1", tmp_path / "smaller") > 1e-2


def test_training_stops_when_the_goal_is_reached(tmp_path, shared_cache):
    learning = {"train": {"epochs": 40, "lr": 0.01, "target_metric": 0.5}}
    metrics = fit(shared_cache[2], tmp_path, labels="ground_truth", tables=learning)
    assert metrics["epochs"] == len(metrics["history"]) < 40
    assert metrics["accuracy"] == metrics["history"][-1]["accuracy"] >= 0.5
    assert all(row["accuracy"] < 0.5 for row in metrics["history"][:-1])


def test_the_student_learns_what_the_teacher_says(tmp_path, shared_cache):
    config, data, cache = shared_cache
    fit(cache, tmp_path, tables={"train": {"epochs": 30, "lr": 0.02}, "loss": {"alpha": 1.0}})
    student = build_model("mlp?width=8", num_classes=10, input_shape=data.input_shape)
    student.load_state_dict(weights(tmp_path))
    images = data.evaluation.load(range(100), 0).images
    answers = open_teacher(config, data).logits(images).argmax(-1)
    agreement = (student(data.normalize()(images)).argmax(-1) == answers).float().mean()
    assert agreement > 0.6, "the teacher is wrong about the digits, and the student follows it"


def test_alpha_zero_is_hard_training(tmp_path, shared_cache):
    # Two epochs, so that the cache's views (e mod 2) are the fresh views of the baseline.
    tables = {"train": {"epochs": 2}, "loss": {"alpha": 0.0}}
    fit(shared_cache[2], tmp_path / "cache", tables=tables)
    fit(shared_cache[2], tmp_path / "hard", labels="ground_truth", tables=tables)
    assert distance(tmp_path / "cache", tmp_path / "hard") == 0


def test_a_cache_of_every_class_trains_as_the_live_teacher_does(tmp_path):
    dense = {"labels": {"policy": "dense", "num_views": 3}, "capture": {"codec": {"values": "float32"}}}
    _, _, cache = make_cache(tmp_path / "cache", **dense)
    for labels in LABELS:
        fit(cache, tmp_path / labels, labels=labels, tables=dense)
    assert distance(tmp_path / "cache", tmp_path / "online") < 1e-4
    assert distance(tmp_path / "ground_truth", tmp_path / "online") > 1e-2


@pytest.mark.parametrize(("num_views", "used"), [(None, [0, 1, 0]), (1, [0, 0, 0]), (2, [0, 1, 0])])
def test_an_epoch_uses_its_view(tmp_path, shared_cache, monkeypatch, num_views, used):
    read, views = Cache.read_stored, []

    def spy(self, samples, view=0):
        views.append(view)
        return read(self, samples, view)

    monkeypatch.setattr(Cache, "read_stored", spy)
    fit(shared_cache[2], tmp_path, num_views=num_views)
    assert views == [view for view in used for _ in range(6)]


def test_the_config_can_ask_for_fewer_views(tmp_path, shared_cache):
    fit(shared_cache[2], tmp_path / "argument", num_views=1)
    fit(shared_cache[2], tmp_path / "config", tables={"reader": {"num_views": 1}})
    assert distance(tmp_path / "argument", tmp_path / "config") == 0


def test_more_views_than_the_cache_holds(tmp_path, shared_cache):
    with pytest.raises(ConfigError, match=r"reader\.num_views: 3, but cache .* holds 2"):
        fit(shared_cache[2], tmp_path, tables={"reader": {"num_views": 3}})


def test_the_cache_is_enough_without_a_teacher(tmp_path, shared_cache, monkeypatch):
    def explode(*args, **kwargs):
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr("softcache.modalities.images.splits.load_image_teacher", explode)
    assert fit(shared_cache[2], tmp_path)["epochs"] == 3


def test_loader_processes_change_nothing(tmp_path, shared_cache):
    fit(shared_cache[2], tmp_path / "here")
    fit(shared_cache[2], tmp_path / "there", tables={"reader": {"workers": 1}})
    assert_same_run(tmp_path / "here", tmp_path / "there")


def test_another_seed_is_another_student(tmp_path, shared_cache):
    fit(shared_cache[2], tmp_path / "0")
    fit(shared_cache[2], tmp_path / "1", tables={"train": {"seed": 1}})
    assert distance(tmp_path / "0", tmp_path / "1") > 1e-2


def test_runs_of_two_precisions_in_one_process(tmp_path, shared_cache):
    fit(shared_cache[2], tmp_path / "full")
    half = fit(shared_cache[2], tmp_path / "half", tables={"train": {"precision": "bf16"}})
    assert half["epochs"] == 3
    assert 0 < distance(tmp_path / "full", tmp_path / "half") < 0.1


# -- what a run leaves behind ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lr", "why"), [(0.03, "the accuracy goes down again"), (1e-9, "every epoch is as good as the first")]
)
def test_best_holds_the_epoch_that_the_metrics_call_best(tmp_path, shared_cache, monkeypatch, lr, why):
    save, states = RunDirectory.save_checkpoint, []

    def keep(self, *of_checkpoint):
        save(self, *of_checkpoint)
        states.append(load_file(self.path / "checkpoint" / "model.safetensors"))

    monkeypatch.setattr(RunDirectory, "save_checkpoint", keep)
    tables = {"train": {"epochs": 6, "lr": lr, "checkpoint_steps": None}}
    metrics = fit(shared_cache[2], tmp_path, labels="ground_truth", tables=tables)
    assert metrics["best_accuracy"] == max(row["accuracy"] for row in metrics["history"])
    assert metrics["best_epoch"] < 5, why
    best = weights(tmp_path, "best")
    same = [all(torch.equal(best[key], state[key]) for key in best) for state in states]
    assert same.index(True) == metrics["best_epoch"]


def test_the_metrics_are_those_of_the_final_weights(tmp_path, shared_cache):
    _, data, cache = shared_cache
    metrics = fit(cache, tmp_path)
    student = build_model("mlp?width=8", num_classes=10, input_shape=data.input_shape)
    student.load_state_dict(weights(tmp_path))
    batch = data.evaluation.load(range(100), 0)
    logits_PV = student(data.normalize()(batch.images)).detach()
    accuracy = (logits_PV.argmax(-1) == batch.targets).float().mean()
    assert metrics["accuracy"] == pytest.approx(float(accuracy))
    assert metrics["eval_loss"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits_PV, batch.targets))
    )
    assert metrics["num_parameters"] == 64 * 8 + 8 + 8 * 10 + 10
    assert metrics["eval_samples"] == 100


def test_a_finished_run_is_reported_and_not_trained_again(tmp_path, shared_cache, monkeypatch):
    first = fit(shared_cache[2], tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    steps = []
    with watched(monkeypatch, steps.append):
        assert fit(shared_cache[2], tmp_path) == first
    assert not steps
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"tables": {"train": {"lr": 0.5}}}, r"train\.lr: 0\.002; 0\.5"),
        ({"tables": {"loss": {"temperature": 2.0}}}, r"loss\.temperature: 4\.0; 2\.0"),
        ({"model": "linear"}, "model: 'mlp"),
        ({"labels": "ground_truth"}, r"train\.labels: 'cache'; 'hard'"),
        ({"num_views": 1}, "num_views: 2; 1"),
        ({"tables": {"reader": {"window_blocks": 2}}}, r"order\.window_blocks: 16; 2"),
    ],
)
def test_a_directory_with_another_run_is_refused(tmp_path, shared_cache, change, key):
    fit(shared_cache[2], tmp_path, tables={"train": {"epochs": 1}})
    change["tables"] = {**change.get("tables", {})}
    change["tables"]["train"] = {"epochs": 1, **change["tables"].get("train", {})}
    with pytest.raises(RunError, match=key):
        fit(shared_cache[2], tmp_path, **change)


def test_another_evaluation_split_is_another_run(tmp_path, shared_cache):
    fit(shared_cache[2], tmp_path)
    with pytest.raises(RunError, match="eval"):
        fit(shared_cache[2], tmp_path, tables={"source": {"max_eval_samples": 50}})


def test_another_order_of_the_baseline_is_another_run(tmp_path, shared_cache):
    fit(shared_cache[2], tmp_path, labels="ground_truth")
    with pytest.raises(RunError, match=r"order\.block_samples"):
        fit(shared_cache[2], tmp_path, labels="ground_truth", tables={"capture": {"chunk_samples": 8}})


def test_runs_find_places_of_their_own(in_tmp, shared_cache):
    one_epoch = {"train": {"epochs": 1}}
    places = {
        fit(shared_cache[2], None, tables=one_epoch)["out"],
        fit(shared_cache[2], None, tables=one_epoch, num_views=1)["out"],
        fit(shared_cache[2], None, tables=one_epoch, labels="ground_truth")["out"],
        fit(shared_cache[2], None, tables=one_epoch, model="linear")["out"],
        fit(shared_cache[2], None, tables=one_epoch | {"loss": {"alpha": 0.5}})["out"],
    }
    assert len(places) == 5
    assert fit(shared_cache[2], None, tables=one_epoch)["out"] in places


# -- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", LABELS)
def test_a_student_with_another_number_of_classes(tmp_path, shared_cache, labels):
    with pytest.raises(SpecError, match=r"expected logits of shape \(50, 10\).*found \(50, 12\)"):
        fit(shared_cache[2], tmp_path, labels=labels, model="tests.fakes:wrong_head")


def test_a_cache_of_other_labels_than_the_config_says(tmp_path, shared_cache):
    with pytest.raises(IdentityError, match=r"labels\.k: 3 in the config, 4 in the cache"):
        fit(shared_cache[2], tmp_path, tables={"labels": {"k": 3}})


def test_a_cache_of_other_samples(tmp_path, shared_cache):
    with pytest.raises(AlignmentError, match="300 samples were labeled, the source has 200"):
        fit(shared_cache[2], tmp_path, tables={"source": {"max_train_samples": 200}})


@pytest.fixture
def partial(tmp_path, shared_cache):
    """Returns a function that opens a copy of the cache without some of its units."""

    def without(*numbers):
        shutil.copytree(shared_cache[2].url, tmp_path / "partial")
        for number in numbers:
            (tmp_path / "partial" / "units" / f"{number:05d}.json").unlink()
        return open_cache(tmp_path / "partial")

    return without


def test_a_cache_with_missing_units_is_refused(tmp_path, partial):
    with pytest.raises(IncompleteCacheError, match=r"1 of 10 units are missing; .*--allow-partial"):
        fit(partial(2), tmp_path / "out")


def test_a_cache_with_missing_units_can_be_allowed(tmp_path, partial, monkeypatch, capsys):
    steps, cache = [], partial(2, 3)
    with watched(monkeypatch, steps.append):
        fit(cache, tmp_path / "out", allow_partial=True)
    assert "2 of 10 units are missing; training on the 472 of 600 rows there" in capsys.readouterr().err
    assert [sum(steps[:4]), sum(steps[4:10]), sum(steps[10:])] == [172, 300, 172]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["missing_units"] == [2, 3]


def test_a_view_without_any_unit_is_refused_even_then(tmp_path, partial):
    cache = partial(5, 6, 7, 8, 9)
    with pytest.raises(
        IncompleteCacheError, match="every view that is used needs at least one finished unit"
    ):
        fit(cache, tmp_path / "out", allow_partial=True)
    assert fit(cache, tmp_path / "out", allow_partial=True, num_views=1)["epochs"] == 3
