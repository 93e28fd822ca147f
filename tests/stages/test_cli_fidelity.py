"""`softcache fidelity` and `softcache shrink` as a user types them."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from softcache.errors import IdentityError, LabelError, StorageError, TemperatureError
from softcache.stages.cli import softcache

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
model = "tests.fakes:known"

[labels]
k = 8

[capture]
device = "cpu"
codec = { values = "float32" }
evaluate = false

[student]
model = "mlp?width=8"

[train]
epochs = 1
device = "cpu"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli-fidelity")
    (folder / "small.toml").write_text(CONFIG)
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
    run("teacher-logits", "--config", "small.toml", "--reuse")
    return "runs/small/cache"


def test_a_report_and_a_figure_are_written(run, cache, place):
    shown = run("fidelity", cache, "--config", "small.toml", "--rows", "64", "--temperatures", "2,1").output
    for words in (
        "T=2",
        "bucket KL",
        "log_probs",
        "V = 10",
        "64 positions",
        "top-k, K=8",
        "wrote runs/small/fidelity",
    ):
        assert words in shown
    folder = place / "runs/small/fidelity"
    report = json.loads((folder / "fidelity.json").read_text())
    assert list(report["temperatures"]) == ["2", "1"]
    assert {point["policy"] for point in report["frontier"]} == {"top_k", "top_p", "sample", "hybrid"}
    from PIL import Image

    pixels = np.asarray(Image.open(folder / "frontier.png").convert("RGB"))
    assert pixels.shape[1] > 1000
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
    drawing = (folder / "frontier.svg").read_text()
    for words in (
        "this cache: top-k, K=8, open float32",
        "bytes per position",
        "at T = 2",
        "tests.fakes:known",
        "K=4",
    ):
        assert words in drawing


def test_json_is_the_report(run, cache):
    shown = run(
        "fidelity",
        cache,
        "--config",
        "small.toml",
        "--rows",
        "16",
        "--temperatures",
        "1",
        "--out",
        "f",
        "--json",
    )
    report = json.loads(shown.stdout)
    assert report["rows"] == 16
    assert report["temperatures"]["1"]["kl_mean_nats"] > 0


def test_a_full_disk_is_one_message_and_leaves_the_report_of_before(run, cache, place, monkeypatch):
    words = ("fidelity", cache, "--config", "small.toml", "--rows", "64", "--out", "full")
    (place / "full").mkdir()
    (place / "full/fidelity.json").write_text("{}")

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(StorageError, match=r"fidelity full: cannot be written: .*No space left on device"):
        run(*words)
    assert [path.name for path in (place / "full").iterdir()] == ["fidelity.json"]
    assert (place / "full/fidelity.json").read_text() == "{}"


def test_another_teacher_is_refused(run, cache):
    with pytest.raises(IdentityError, match="made by another teacher"):
        run(
            "fidelity",
            cache,
            "--config",
            "small.toml",
            "--set",
            "teacher.model=tests.fakes:known_scaled",
        )
    with pytest.raises(TemperatureError, match="found '1,x'"):
        run("fidelity", cache, "--config", "small.toml", "--temperatures", "1,x")


def test_slim_makes_the_cache_of_another_config(run, cache):
    shown = run(
        "shrink", cache, "runs/slim", "--k", "3", "--values", "float16", "--temperatures", "1,4"
    ).output
    assert "1 of 1 units, top_k, k 3, codec open" in shown
    sets = ["labels.k=3", "labels.temperatures=[1,4]", "capture.codec.values=float16"]
    arguments = [part for pair in sets for part in ("--set", pair)]
    again = run("teacher-logits", "--config", "small.toml", "--cache", "runs/slim", *arguments).output
    assert "0 units made now, 1 found" in again
    run("train-student", "--config", "small.toml", "--cache", "runs/slim", *arguments)
    with pytest.raises(LabelError, match="9 slots asked for"):
        run("shrink", cache, "runs/no", "--k", "9")
