"""The same commands on text: what they print, and that the teacher is loaded only where it must be."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from softcache.errors import ConfigError
from softcache.stages.cli import softcache
from tests.support.text_caches import write_texts

CONFIG = """
name = "small-lm"

[source]
modality = "text"
name = "hf"
path = "{folder}/texts.jsonl"
key_column = "id"
tokenizer = "bpe?vocab_size=300"
seq_len = 32
eval_share = 0.2
data_dir = "{folder}/data"

[teacher]
model = "gpt2?width=16&depth=1&heads=2"
weights = "runs/small-lm/teacher/model.safetensors"

[train_teacher]
epochs = 1
batch_size = 8
device = "cpu"

[labels]
k = 6

[capture]
batch_size = 8
unit_samples = 8
chunk_samples = 4

[student]
model = "llama?width=8&depth=1&heads=2"
models = ["llama?width=8&depth=1&heads=2", "gpt2?width=8&depth=1&heads=2"]

[train]
epochs = 1
batch_size = 8
device = "cpu"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli-text")
    write_texts(folder / "texts.jsonl")
    (folder / "lm.toml").write_text(CONFIG.format(folder=folder))
    return folder


@pytest.fixture
def run(place, monkeypatch):
    monkeypatch.chdir(place)

    def invoke(*arguments):
        result = CliRunner().invoke(softcache, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result

    return invoke


@pytest.fixture
def cache(run):
    run("teacher-logits", "--config", "lm.toml", "--reuse")
    return "runs/small-lm/cache"


def test_a_pass_trains_tokenizer_and_teacher_and_says_what_it_made(run, cache):
    again = run("teacher-logits", "--config", "lm.toml")
    assert "0 units made now" in again.output
    assert "rows, K=6 of 300 classes" in again.output


def test_a_student_is_shown_by_its_held_out_loss(run, cache, monkeypatch):
    def explode(*args, **kwargs):
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr("softcache.modalities.text.data.load_language_teacher", explode)
    shown = run("train-student", "--config", "lm.toml").output
    for column in (
        "held-out loss in nats per token",
        "perplexity",
        "hard labels",
        "llama?width=8&depth=1&heads=2",
    ):
        assert column in shown
    assert "train_loss" in json.loads((next(iter(_runs())) / "metrics.json").read_text())["history"][0]
    assert "reporting it" in run("train-student", "--config", "lm.toml").output


def _runs():
    return Path("runs/small-lm/students").iterdir()


def test_students_are_sorted_by_loss(run, cache):
    shown = run("train-students", "--config", "lm.toml").stdout
    rows = [line.split("│")[4].strip() for line in shown.splitlines() if line.startswith("│")]
    assert rows == sorted(rows)
    assert len(rows) == 2


def test_compare_has_one_kind_of_cache(run, cache):
    figures = json.loads(run("compare", "--config", "lm.toml", "--seeds", "2", "--json").stdout)
    assert list(figures["students"]) == ["hard labels", "cache", "online teacher"]
    assert all(len(row["eval_loss"]) == 2 for row in figures["students"].values())
    assert figures["teacher"] > 0


def test_inspect_verify_and_convert(run, cache):
    shown = run("inspect", cache).output
    for words in ("tokenizer", "inside a document", "position", "teacher agrees with the ground truth on"):
        assert words in shown
    assert "0 faults" in run("verify", cache, "--config", "lm.toml", "--rows", "16").output
    run("convert", cache, "there", "--store", "parquet")
    assert "0 faults" in run("verify", "there", "--config", "lm.toml").output


def test_compare_refuses_a_student_that_no_live_teacher_can_teach_before_any_is_trained(run, cache):
    students = Path("runs/small-lm/students")
    before = sorted(students.glob("*"))
    other = ("--set", "loss.name=uld", "--set", "student.tokenizer=bpe?vocab_size=280")
    with pytest.raises(ConfigError, match=r"cannot label .* student\.tokenizer .*; train from a cache"):
        run("compare", "--config", "lm.toml", *other)
    assert sorted(students.glob("*")) == before
