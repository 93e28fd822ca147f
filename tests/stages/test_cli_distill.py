"""`softcache distill` and `softcache export` as a user types them."""

import json
import shutil

import pytest
from click.testing import CliRunner

from softcache.errors import ConfigError, RunError, SpecError
from softcache.runs import capture_labels
from softcache.runs.sweep import run as running
from softcache.stages.cli import softcache
from tests.support.translations import write_pairs

CONFIG = """
name = "small"

[source]
name = "digits"
max_train_samples = 300
max_eval_samples = 100

[views]
mean = [0.3]
std = [0.4]

[teacher]
model = "mlp?width=32"
weights = "runs/small/teacher/model.safetensors"

[train_teacher]
epochs = 3
batch_size = 50
device = "cpu"

[labels]
k = 4

[capture]
device = "cpu"

[student]
model = "mlp?width=8"

[train]
epochs = 2
batch_size = 50
device = "cpu"
"""


SWEEP = """
[sweep]
trials = 2
pruner = "never"
[sweep.space]
alpha = [0.9, 0.1]
k = [2, 4]
"""


def run(*arguments):
    result = CliRunner().invoke(softcache, ["distill", "--config", "small.toml", "--rounds", "2", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_one_command_makes_everything_and_a_rerun_goes_on_where_it_was_killed(in_tmp, monkeypatch):
    (in_tmp / "small.toml").write_text(CONFIG)

    def killed(*arguments, **more):
        capture_labels(*arguments, **more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("softcache.runs.capture_labels", killed)
        assert CliRunner().invoke(softcache, ["distill", "--config", "small.toml"]).exit_code == 1
    teacher = in_tmp / "runs/small/teacher/model.safetensors"
    made = teacher.stat().st_mtime_ns
    report = json.loads(run("--json", "--out", "out"))
    assert teacher.stat().st_mtime_ns == made
    assert set(report["models"]) == {"teacher", "student", "student.onnx", "student.pt2", "student.int8.onnx"}
    assert report["cost"]["teacher_passes"] == 1
    assert report["cost"]["teacher_training_seconds"] > 0
    assert report["cost"]["teacher_pass_seconds"] is None, "the killed pass wrote no time down"
    assert report["models"]["student.onnx"]["same_predictions"] == 1.0

    monkeypatch.setattr("softcache.runs.make_teacher", lambda *a: pytest.fail("a teacher was made again"))
    again = run("--out", "out")
    assert "student.int8.onnx" in again
    assert "1 teacher pass; teacher training" in again
    with pytest.raises(RunError, match=r"more than --max-drop -100"):
        run("--out", "out", "--max-drop", "-100")
    assert (in_tmp / "out/student.int8.onnx").exists()

    shutil.rmtree(in_tmp / "out")
    (student,) = (in_tmp / "runs/small/students").iterdir()
    arguments = ["export", str(student), "--out", "out", "--rounds", "2", "--json"]
    exported = CliRunner().invoke(softcache, arguments)
    assert exported.exit_code == 0, exported.output
    assert json.loads(exported.stdout)["cost"] == {}


def test_distilling_without_a_teacher_says_what_to_do(in_tmp):
    text = CONFIG[: CONFIG.index("[teacher]")] + CONFIG[CONFIG.index("[labels]") :]
    (in_tmp / "small.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"table \[teacher\] is missing; .* softcache export RUN"):
        run()


def test_what_cannot_be_exported_is_refused_before_anything_is_trained(in_tmp):
    write_pairs(in_tmp / "pairs.jsonl")
    source = (
        'modality = "translation"\nname = "files"\npath = "pairs.jsonl"\ntokenizer = "bpe?vocab_size=300"'
    )
    text = f'name = "small"\n[source]\n{source}\n[teacher]\nmodel = "t5?width=16&depth=1&heads=2"\n'
    student = '[student]\nmodel = "t5?width=16&depth=1&heads=2"\n'
    (in_tmp / "small.toml").write_text(text + student)
    with pytest.raises(
        SpecError, match=r"a translation model writes by a search, .* use the run's hf/ folder"
    ):
        run()
    assert not (in_tmp / "runs/small/teacher").exists()
    assert not (in_tmp / "runs/small/cache").exists()


def test_a_student_of_another_tokenizer_is_refused_before_anything_is_trained(in_tmp):
    source = 'modality = "text"\nname = "stdlib"\ntokenizer = "bpe?vocab_size=300"\nseq_len = 16'
    text = f'name = "small"\n[source]\n{source}\n[teacher]\nmodel = "gpt2?width=16&depth=1&heads=2"\n'
    student = '[student]\nmodel = "gpt2?width=8&depth=1&heads=2"\ntokenizer = "bytes"\n[loss]\nname = "uld"\n'
    (in_tmp / "small.toml").write_text(text + student)
    with pytest.raises(ConfigError, match=r"student.tokenizer: 'bytes': .* use softcache train-student"):
        run()
    assert not (in_tmp / "runs").exists()


def test_a_sweep_and_a_student_are_not_both_taken(in_tmp):
    (in_tmp / "small.toml").write_text(CONFIG)
    with pytest.raises(ConfigError, match="--student: --sweep chooses the student"):
        run("--sweep", "--student", "linear")


def test_a_swept_student_is_the_best_trials_own_run_and_a_killed_sweep_goes_on(in_tmp, monkeypatch):
    (in_tmp / "small.toml").write_text(CONFIG + SWEEP)
    run_trial, taken = running.run_trial, []

    def killed_after_one(bench, study, turn):
        taken.append(turn.place)
        if len(taken) == 2:
            raise KeyboardInterrupt
        run_trial(bench, study, turn)

    with monkeypatch.context() as patch:
        patch.setattr(running, "run_trial", killed_after_one)
        words = ["distill", "--config", "small.toml", "--sweep"]
        assert CliRunner().invoke(softcache, words).exit_code == 1
    sweep = in_tmp / "runs/small/sweep"
    first = (sweep / "trials/0000/metrics.json").stat().st_mtime_ns

    report = json.loads(run("--sweep", "--json"))
    trials = sorted((sweep / "trials").glob("*/metrics.json"))
    assert [path.parent.name for path in trials] == ["0000", "0001"]
    assert trials[0].stat().st_mtime_ns == first, "the finished trial was not trained again"
    scores = {path.parent.name: json.loads(path.read_text()) for path in trials}
    best = max(sorted(scores), key=lambda name: scores[name]["accuracy"])
    assert report["out"] == f"runs/small/export/mlp-width-8-sweep-{best}"
    assert report["models"]["student"]["accuracy"] == pytest.approx(scores[best]["accuracy"])
    assert not (in_tmp / "runs/small/students").exists(), "the best trial is not trained once more"
    assert report["cost"]["sweep_trials"] == 2
    assert report["cost"]["sweep_seconds"] == pytest.approx(sum(row["seconds"] for row in scores.values()))

    more = run("--sweep", "--set", "sweep.trials=3")
    assert "3 trials" in more, "the cost of a sweep that went on is shown, whatever the files hold"
