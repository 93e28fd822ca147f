"""Sweeps: how many trials there are, whose they are, what a kill, a bad trial or a bad folder does to them."""

import json
import os
import shutil
import signal
import sys
import threading
import time
import tomllib

import pytest

from softcache.config.load import load_config
from softcache.config.sweep import Range, SpaceSettings, SweepSettings
from softcache.errors import DivergedError, IdentityError, IncompleteCacheError, RunError, SpecError
from softcache.runs.sweep import open_sweep, run_sweep
from softcache.runs.sweep.cost import Cost, measure_cost, unmeasured_reason
from softcache.runs.sweep.plots import draw_importance, draw_surface
from softcache.runs.sweep.results import ranked_trials, repeat_best, write_best, write_json
from softcache.runs.sweep.study import RETRIES, SharedStudy
from softcache.stages.cli import main
from softcache.student.settings import LATER_DEFAULTS, NON_IDENTITY_SETTINGS
from tests.support import text_caches
from tests.support.caches import digits_config, make_cache
from tests.support.programs import Program

SPACE = {
    "temperature": {"low": 1, "high": 8, "log": True},
    "alpha": {"low": 0.1, "high": 1.0},
    "k": [2, 4],
    "student": ["mlp?width=8", "linear"],
}


def config_of(space=SPACE, *, pruner="never", startup_trials=6, **tables):
    return digits_config(sweep={"space": space, "pruner": pruner, "startup_trials": startup_trials}, **tables)


def states(sweep):
    return [trial.state.name for trial in sweep.study.trials()]


def small_study(path, seed=0, first=None):
    return SharedStudy(
        path,
        identity={"what": "a test"},
        space={"alpha": Range(0.0, 1.0), "loss": ("jsd", "dkd", "nkd")},
        settings=SweepSettings(seed=seed, startup_trials=3),
        epochs=4,
        maximize=True,
        first=first,
    )


# -- whole sweeps ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(shared_cache, tmp_path_factory):
    """A sweep of five trials."""
    path = tmp_path_factory.mktemp("swept") / "sweep"
    return run_sweep(config_of(), shared_cache[2].url, path, trials=5)


def test_every_trial_is_a_student_run_of_its_own_and_the_first_is_the_config(swept):
    assert states(swept) == ["COMPLETE"] * 5
    for result in ranked_trials(swept):
        metrics = json.loads((swept.bench.path / result.place / "metrics.json").read_text())
        assert metrics["accuracy"] == result.value
        assert metrics["epochs"] == result.epochs == 2
    first = swept.study.trials()[0].params
    assert first == {"temperature": 4.0, "alpha": 0.9, "k": 4, "student": "mlp?width=8"}
    values = [result.value for result in ranked_trials(swept)]
    assert values == sorted(values, reverse=True)


def test_fewer_classes_are_shrunk_once_from_the_one_cache(swept):
    assert {result.params["k"] for result in ranked_trials(swept)} == {2, 4}
    assert [folder.name for folder in (swept.bench.path / "caches").iterdir()] == ["k-2"]


def test_a_sweep_that_is_run_again_trains_nothing_twice_and_goes_on_as_if_never_stopped(swept, tmp_path):
    path = swept.bench.path
    runs = {file: file.stat().st_mtime_ns for file in path.rglob("metrics.json")}
    run_sweep(config_of(), swept.bench.cache.url, path, trials=5)
    assert {file: file.stat().st_mtime_ns for file in path.rglob("metrics.json")} == runs
    in_two = tmp_path / "in-two"
    run_sweep(config_of(), swept.bench.cache.url, in_two, trials=2)
    halves = run_sweep(config_of(), swept.bench.cache.url, in_two, trials=5)
    assert [t.params for t in halves.study.trials()] == [t.params for t in swept.study.trials()]
    assert [t.value for t in halves.study.trials()] == [t.value for t in swept.study.trials()]


def test_a_folder_with_another_sweep_is_refused(swept):
    other = config_of(SPACE | {"alpha": [0.5]}, train={"lr": 0.1})
    with pytest.raises(RunError, match=r"holds another sweep .*space\.alpha.*train\.lr: 0\.002; 0\.1"):
        open_sweep(other, swept.bench.cache.url, swept.bench.path)


def test_the_best_trials_again_with_other_seeds_beside_the_config(swept):
    rows = repeat_best(swept, seeds=2, best=1)
    best = ranked_trials(swept)[0].number
    assert {row.number for row in rows} == ({0} if best == 0 else {best, None})
    assert all(len(row.values) == 2 and row.std is not None for row in rows)
    assert [row.mean for row in rows] == sorted((row.mean for row in rows), reverse=True)


def test_the_cost_is_measured_beside_the_live_teacher_and_multiplied(swept):
    assert unmeasured_reason(swept) is None
    cost = measure_cost(swept)
    assert (cost.trials, cost.epochs) == (5, 10)
    assert cost.cached_seconds == sum(result.seconds for result in ranked_trials(swept))
    extra = cost.online_epoch_seconds - cost.cached_epoch_seconds
    assert cost.online_seconds == pytest.approx(cost.cached_seconds + 10 * extra)
    assert cost.teacher_pass_seconds == pytest.approx(2 * extra)
    assert not list(swept.bench.path.glob(".cost*")), "nothing stays of the measurement"


def test_ratios_of_the_cost():
    cost = Cost(4, 40, 20.0, 0.5, 2.0, 10.0, 80.0)
    assert (cost.ratio, cost.ratio_with_pass) == (4.0, 80 / 30)


def test_figures_and_json_of_a_sweep(swept, tmp_path):
    figures = draw_importance(swept, tmp_path) + draw_surface(swept, tmp_path)
    assert [path.name for path in figures] == [
        "importance.png",
        "importance.svg",
        "surface.png",
        "surface.svg",
    ]
    assert all(path.stat().st_size > 2000 for path in figures)
    written = json.loads(write_json(swept, {"cost": None}).read_text())
    assert [row["number"] for row in written["trials"]] == [result.number for result in ranked_trials(swept)]


def test_the_best_trial_is_a_config_that_holds_its_settings_and_its_cache(swept):
    tables = tomllib.loads(write_best(swept).read_text())
    best = ranked_trials(swept)[0]
    assert tables["loss"]["temperature"] == best.params["temperature"]
    assert tables["student"]["model"] == best.params["student"]
    assert tables["labels"]["k"] == best.params["k"]
    assert tables["cache"] == swept.bench.cache_of(best.params).url
    assert "sweep" not in tables


def test_language_students_are_swept_by_their_held_out_loss(tmp_path):
    config, _, cache = text_caches.make_text_cache(tmp_path / "cache", tmp_path)
    space = SpaceSettings(temperature=[1.0, 2.0], k=[2, 4], lr={"low": 1e-3, "high": 1e-2, "log": True})
    config = config.model_copy(update={"sweep": SweepSettings(space=space)})
    sweep = run_sweep(config, cache.url, tmp_path / "sweep", trials=3)
    values = [result.value for result in ranked_trials(sweep)]
    assert values == sorted(values), "nats: less is better"
    assert load_config(write_best(sweep)).source == config.source


# -- trials that end otherwise -----------------------------------------------------------------------------


def test_a_bad_trial_is_pruned_and_leaves_a_run_that_can_go_on(shared_cache, tmp_path):
    space = {"lr": [0.02, 1e-6]}
    config = config_of(space, pruner="median", startup_trials=1, train={"epochs": 6, "lr": 0.02})
    sweep = run_sweep(config, shared_cache[2].url, tmp_path / "sweep", trials=6)
    bad = [result for result in ranked_trials(sweep) if result.params["lr"] == 1e-6]
    assert {result.state for result in bad} == {"pruned"}
    trained = next(result for result in bad if result.same_as is None)
    assert trained.epochs < 6
    run = tmp_path / "sweep" / trained.place
    assert (run / "checkpoint/progress.json").exists()
    assert not (run / "metrics.json").exists()
    sweep.bench.train(trained.params, run)
    assert json.loads((run / "metrics.json").read_text())["epochs"] == 6


def test_settings_that_come_twice_are_trained_once(shared_cache, tmp_path):
    sweep = run_sweep(config_of({"alpha": [0.9, 0.5]}), shared_cache[2].url, tmp_path / "sweep", trials=6)
    assert len(list((tmp_path / "sweep/trials").iterdir())) == 2
    by_alpha = {}
    for result in ranked_trials(sweep):
        by_alpha.setdefault(result.params["alpha"], set()).add(result.value)
    assert all(len(values) == 1 for values in by_alpha.values())
    assert sum(result.same_as is None for result in ranked_trials(sweep)) == 2


def test_a_trial_with_an_error_is_marked_told_and_replaced(shared_cache, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise SpecError("student x: cannot be built")

    config, url = config_of({"alpha": [0.9, 0.5]}), shared_cache[2].url
    with monkeypatch.context() as patched:
        patched.setattr("softcache.runs.sweep.trial.train_student", broken)
        with pytest.raises(SpecError, match="student x"):
            run_sweep(config, url, tmp_path / "sweep", trials=1)
    sweep = run_sweep(config, url, tmp_path / "sweep", trials=1)
    assert states(sweep) == ["FAIL", "COMPLETE"]
    assert ranked_trials(sweep)[-1].error == "student x: cannot be built"


def test_a_trial_that_diverges_before_its_first_checkpoint_is_pruned(shared_cache, tmp_path, monkeypatch):
    def diverges(*args, **kwargs):
        raise DivergedError("run x: the student diverged")

    config, url = config_of({"alpha": [0.9, 0.5]}), shared_cache[2].url
    with monkeypatch.context() as patched:
        patched.setattr("softcache.runs.sweep.trial.train_student", diverges)
        assert states(run_sweep(config, url, tmp_path / "sweep", trials=1)) == ["PRUNED"]


def test_no_finished_trial_is_an_error_not_a_config(shared_cache, tmp_path):
    sweep = open_sweep(config_of(), shared_cache[2].url, tmp_path / "sweep")
    with pytest.raises(RunError, match=r"no trial is finished; run `softcache sweep` with more --trials"):
        write_best(sweep)


def test_a_sweep_is_what_it_was_before_settings_that_it_does_not_use(shared_cache, tmp_path):
    """Folders of sweeps that are older than these keys go on."""
    open_sweep(config_of(), shared_cache[2].url, tmp_path / "sweep")
    described = json.loads((tmp_path / "sweep" / "config.json").read_text())
    assert not {*LATER_DEFAULTS, *NON_IDENTITY_SETTINGS} & set(described["train"])
    assert "lora" not in described["student"]
    with pytest.raises(RunError, match=r"train\.schedule"):
        open_sweep(config_of(train={"schedule": "linear"}), shared_cache[2].url, tmp_path / "sweep")


@pytest.mark.parametrize(
    ("name", "what"),
    [("config.json", "expected a JSON object; found damaged text"), ("study.db", "cannot be read")],
)
def test_a_damaged_folder_is_an_error_that_names_the_file(shared_cache, tmp_path, name, what):
    open_sweep(config_of(), shared_cache[2].url, tmp_path / "sweep")
    (tmp_path / "sweep" / name).write_bytes(b"no such thing" * 1000)
    with pytest.raises(RunError, match=rf"{name}:? {what}.*restore it from a copy"):
        open_sweep(config_of(), shared_cache[2].url, tmp_path / "sweep")


def test_a_cache_of_other_settings_or_half_a_cache_costs_no_trial(shared_cache, tmp_path):
    with pytest.raises(IdentityError, match=r"labels\.k: 3 in the config, 4 in the cache"):
        open_sweep(config_of(labels={"k": 3}), shared_cache[2].url, tmp_path / "sweep")
    half = tmp_path / "half"
    shutil.copytree(shared_cache[2].url, half)
    next((half / "units").iterdir()).unlink()
    with pytest.raises(IncompleteCacheError, match=r"1 of \d+ units are missing; rerun"):
        open_sweep(config_of(), str(half), tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_processes_of_a_launcher_are_refused(shared_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RunError, match=r"started as 2 processes.*--workers N"):
        open_sweep(config_of(), shared_cache[2].url, tmp_path / "sweep")


# -- who takes which trial ---------------------------------------------------------------------------------


def test_a_trial_of_a_dead_process_is_marked_and_its_settings_are_taken_by_the_next(tmp_path):
    study = small_study(tmp_path / "study")
    with study.worker():
        dead = study.take(2)
        dead.trial.report(0.25, 0)
        assert study.others_run(), "the holder of the lock is alive"
    assert not study.others_run()
    with study.worker():
        turn = study.take(2)
        assert [trial.state.name for trial in study.trials()] == ["FAIL", "RUNNING"]
        assert turn.trial.params == dead.trial.params
        assert turn.place == dead.place
        assert turn.trial.user_attrs["retry_of"] == dead.trial.number
        assert turn.trial.user_attrs["reported"] == {"0": 0.25}


def test_a_sweep_whose_processes_died_tries_the_settings_of_one_whose_did_not(tmp_path):
    def tried(path, deaths):
        found, number = [], 0
        while True:
            study = small_study(path)
            with study.worker():
                while (turn := study.take(8)) is not None:
                    number += 1
                    if number in deaths:
                        break
                    found.append(turn.trial.params)
                    study.optuna_study.tell(turn.trial, turn.trial.params["alpha"])
                else:
                    return found

    whole = tried(tmp_path / "whole", ())
    assert len(whole) == 8
    assert tried(tmp_path / "killed", (1, 2, 5, 9)) == whole


def test_a_process_that_dies_while_it_takes_the_first_trial_leaves_the_configs_settings_to_the_next(
    tmp_path, monkeypatch
):
    first = {"alpha": 0.25, "loss": "dkd"}

    def die(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("softcache.runs.sweep.study._suggest", die)
        study = small_study(tmp_path / "study", first=first)
        with study.worker(), pytest.raises(KeyboardInterrupt):
            study.take(3)
    study = small_study(tmp_path / "study", first=first)
    with study.worker():
        assert study.take(3).trial.params == first
        assert study.take(3).trial.params != first
    assert [trial.state.name for trial in study.trials()] == ["FAIL", "RUNNING", "RUNNING"]


def test_a_process_that_dies_while_it_takes_settings_again_leaves_them_whole(tmp_path, monkeypatch):
    study = small_study(tmp_path / "study")
    with study.worker():
        dead = study.take(1).trial

    def die(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("softcache.runs.sweep.study._suggest", die)
        with study.worker(), pytest.raises(KeyboardInterrupt):
            study.take(1)
    with study.worker():
        turn = study.take(1)
    assert (turn.trial.params, turn.place) == (dead.params, dead.user_attrs["place"])


def test_settings_whose_process_dies_again_and_again_are_given_up(tmp_path):
    study = small_study(tmp_path / "study")
    taken = []
    for _ in range(RETRIES + 2):
        with study.worker():
            taken.append(study.take(1).trial.params)
    assert taken[: RETRIES + 1] == [taken[0]] * (RETRIES + 1)
    assert taken[-1] != taken[0]


def test_two_at_once_on_one_study_take_no_trial_twice_and_none_too_many(tmp_path):
    small_study(tmp_path / "study")
    numbers = []

    def take_all():
        study = small_study(tmp_path / "study")
        with study.worker():
            while (turn := study.take(16)) is not None:
                numbers.append(turn.trial.number)
                study.optuna_study.tell(turn.trial, turn.trial.params["alpha"])

    threads = [threading.Thread(target=take_all) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(16))
    assert len(small_study(tmp_path / "study").trials()) == 16


def test_two_processes_share_a_sweep(shared_cache, tmp_path, monkeypatch):
    take, locks = SharedStudy.take, tmp_path / "sweep/workers"

    def take_when_both_are_there(study, total):  # this process's; the other one starts for some seconds
        while len(study.trials()) == 1 and len(list(locks.glob("*.lock"))) < 2:
            time.sleep(0.01)
        return take(study, total)

    monkeypatch.setattr(SharedStudy, "take", take_when_both_are_there)
    sweep = run_sweep(config_of(), shared_cache[2].url, tmp_path / "sweep", trials=5, workers=2)
    assert states(sweep) == ["COMPLETE"] * 5
    assert [trial.number for trial in sweep.study.trials()] == list(range(5))
    assert len({trial.user_attrs["place"] for trial in sweep.study.trials()}) == 5
    assert len({trial.user_attrs["worker"] for trial in sweep.study.trials()}) == 2
    assert not list(locks.glob("*.lock")), "no process is left"


# -- the command -------------------------------------------------------------------------------------------

CONFIG = """
name = "small"
cache = "{url}"
[source]
name = "digits"
max_train_samples = 300
max_eval_samples = 100
[views]
crop = "padded"
padding = 1
mean = [0.3]
std = [0.4]
[teacher]
model = "tests.fakes:known"
[labels]
k = 4
num_views = 2
[student]
model = "mlp?width=8"
[train]
epochs = 40
batch_size = 50
device = "cpu"
[sweep]
trials = 2
pruner = "never"
[sweep.space]
alpha = [0.9, 0.5, 0.1]
k = [2, 4]
"""


@pytest.fixture
def softcache(in_tmp, shared_cache, monkeypatch, capsys):
    """Returns a function that runs the command line in this process, in a folder with a small config."""
    (in_tmp / "small.toml").write_text(CONFIG.format(url=shared_cache[2].url))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["softcache", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        output = capsys.readouterr()
        assert ended.value.code == 0, output.err
        return output

    return run


def kill_when(condition, *arguments):
    """Starts the command as a process of its own and kills it once the condition holds."""
    code = "from softcache.stages.cli import main; main()"
    process = Program(code, *arguments, cwd=os.getcwd())
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_sweep_that_is_killed_goes_on_and_its_best_trial_is_trained_as_it_says(softcache, in_tmp):
    out = in_tmp / "runs/small/sweep"
    checkpoint = out / "trials/0000/checkpoint/progress.json"
    words = ("sweep", "--config", "small.toml", "--no-cost")
    kill_when(checkpoint.exists, *words)
    assert not (out / "trials/0000/metrics.json").exists()
    output = softcache(*words)
    assert "resumes trial 0, whose process died" in output.err
    trials = {row["number"]: row for row in json.loads((out / "sweep.json").read_text())["trials"]}
    assert [trials[number]["state"] for number in range(3)] == ["fail", "complete", "complete"]
    assert (trials[1]["place"], trials[1]["epochs"]) == ("trials/0000", 40)
    assert "softcache train-student --config runs/small/sweep/best.toml" in output.out
    best = max(row["value"] for row in trials.values() if row["value"] is not None)
    again = softcache("train-student", "--config", out / "best.toml", "--no-baseline")
    assert f"{best:.2%}" in again.out
    (metrics,) = (in_tmp / "runs/small/students").rglob("metrics.json")
    assert json.loads(metrics.read_text())["accuracy"] == best


def test_the_command_tells_trials_repeats_and_cost(softcache):
    output = softcache("sweep", "--config", "small.toml", "--set", "train.epochs=2", "--seeds", "1")
    assert "the best again, 1 other seeds" in output.out
    assert "all trials with an online teacher" in output.out
    assert "2 trials, 4 epochs, from the cache" in output.out


def test_a_config_with_fusion_is_swept_from_the_fused_cache_and_its_best_reads_it(
    softcache, shared_cache, in_tmp
):
    shutil.copytree(shared_cache[2].url, in_tmp / "one")
    make_cache(in_tmp / "two", teacher={"model": "tests.fakes:known_scaled"})
    text = CONFIG.format(url=in_tmp / "fused").replace(
        "[teacher]", '[fusion]\ncaches = ["one", "two"]\nallow_weak_teachers = true\n[teacher]'
    )
    (in_tmp / "fused.toml").write_text(text.replace('name = "small"', 'name = "fused"'))
    words = ("--set", "train.epochs=2", "--no-cost")
    softcache("sweep", "--config", "fused.toml", *words)
    tables = tomllib.loads((in_tmp / "runs/fused/sweep/best.toml").read_text())
    assert "fusion" not in tables
    again = softcache("train-student", "--config", "runs/fused/sweep/best.toml", "--no-baseline")
    best = max(
        row["value"] for row in json.loads((in_tmp / "runs/fused/sweep/sweep.json").read_text())["trials"]
    )
    assert f"{best:.2%}" in again.out


def test_settings_of_a_space_know_their_names():
    space = SpaceSettings.model_validate({"alpha": [0.5], "loss": ["jsd"]})
    assert dict(space.named()) == {"alpha": (0.5,), "loss": ("jsd",)}
