"""`softcache distill` and `softcache export` as a user types them."""

import json
import shutil

import pytest
from click.testing import CliRunner

from pipeline.errors import ConfigError, RunError
from pipeline.runs import capture_labels
from stages import distill as stage
from stages.cli import softcache

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
        patch.setattr(stage, "capture_labels", killed)
        assert CliRunner().invoke(softcache, ["distill", "--config", "small.toml"]).exit_code == 1
    teacher = in_tmp / "runs/small/teacher/model.safetensors"
    made = teacher.stat().st_mtime_ns
    told = json.loads(run("--json", "--out", "out"))
    assert teacher.stat().st_mtime_ns == made
    assert set(told["models"]) == {"teacher", "student", "student.onnx", "student.pt2", "student.int8.onnx"}
    assert told["cost"]["teacher_passes"] == 1
    assert told["cost"]["teacher_training_seconds"] > 0
    assert told["cost"]["teacher_pass_seconds"] is None, "the killed pass wrote no time down"
    assert told["models"]["student.onnx"]["same_predictions"] == 1.0

    monkeypatch.setattr(stage, "make_teacher", lambda *a: pytest.fail("a teacher was made again"))
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


def test_a_sweep_and_a_student_are_not_both_taken(in_tmp):
    (in_tmp / "small.toml").write_text(CONFIG)
    with pytest.raises(ConfigError, match="--student: --sweep chooses the student"):
        run("--sweep", "--student", "linear")
