"""The commands as a user types them: what they print, what they leave, and their exit codes."""

import json
import os
import re
import shutil
import subprocess
import sys

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from softcache import open_cache
from softcache.stages import cli
from softcache.stages.cli import main
from softcache.stages.cli import softcache as group
from softcache.stages.commands import COMMANDS, GROUPS
from tests.support.caches import ROOT
from tests.support.programs import run_program

CONFIG = """
name = "small"

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
model = "tests.support.fakes_students:parametric"

[labels]
k = 4
num_views = 2

[capture]
unit_samples = 64
chunk_samples = 32
device = "cpu"

[student]
model = "mlp?width=8"
models = ["linear", "mlp?width=8"]

[train]
epochs = 1
batch_size = 100
device = "cpu"
"""
COLUMNS = ("ids", "log_probs", "log_tail", "target_log_prob", "stats")


class Result:
    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    def __repr__(self):
        return f"exit {self.code}\n{self.out}\n{self.err}"


@pytest.fixture
def place(in_tmp):
    (in_tmp / "small.toml").write_text(CONFIG)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield in_tmp
    torch.set_num_threads(threads)


@pytest.fixture
def run(place, monkeypatch, capsys):
    """Returns a function that runs the command line in this process."""

    def softcache(*arguments):
        monkeypatch.setattr(sys, "argv", ["softcache", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        return Result(code, *capsys.readouterr())

    return softcache


@pytest.fixture(scope="session")
def labeled(tmp_path_factory):
    """A folder in which `softcache teacher-logits` has run; it is copied, never changed."""
    folder = tmp_path_factory.mktemp("labeled")
    (folder / "small.toml").write_text(CONFIG)
    code = "from softcache.stages.cli import main; main()"
    done = run_program(code, "teacher-logits", "--config", "small.toml", cwd=folder)
    result = Result(done.returncode, done.stdout, done.stderr)
    assert result.code == 0, result
    return folder, result


@pytest.fixture
def cache(place, labeled):
    """The finished cache, where the config expects it."""
    shutil.copytree(labeled[0] / "runs", place / "runs")
    return place / "runs/small/cache"


@pytest.fixture
def no_teacher(monkeypatch):
    def explode(*args, **kwargs):
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr("softcache.modalities.images.splits.load_image_teacher", explode)


def shell(*arguments, cwd):
    done = subprocess.run(
        [sys.executable, "-m", "softcache", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def assert_one_message(result, *parts):
    """The run failed with a readable message on stderr, and nothing else."""
    assert result.code == 1, result
    assert result.out == ""
    messages = [line for line in result.err.splitlines() if line.startswith("softcache: ")]
    assert len(messages) == 1, result
    assert "Traceback" not in result.err
    for part in parts:
        assert part in result.err


def contents(path):
    return {file: file.stat().st_mtime_ns for file in sorted(path.rglob("*")) if file.is_file()}


def flip(cache):
    """Flips one bit of the labels."""
    shards = (p for p in (cache / "labels.zarr").rglob("*") if p.is_file() and p.name != "zarr.json")
    path = max(shards, key=lambda p: p.stat().st_size)
    good = bytearray(path.read_bytes())
    good[len(good) // 2] ^= 4
    path.write_bytes(good)


# -- teacher-logits ----------------------------------------------------------------------------------------


def test_teacher_logits_says_what_it_made(labeled):
    folder, result = labeled
    assert "cache runs/small/cache: 300 samples x 2 views, 600 rows, K=4 of 10 classes" in result.out
    assert "10 units made now, 0 found" in result.out
    assert "teacher: label: 600/600 rows" in result.err
    assert not open_cache(folder / "runs/small/cache").missing_units


def test_a_second_pass_finds_everything(run, cache):
    before = contents(cache)
    result = run("teacher-logits", "--config", "small.toml")
    assert result.code == 0
    assert "0 units made now, 10 found" in result.out
    assert contents(cache) == before


def test_reuse_does_not_load_the_teacher(run, cache, no_teacher):
    result = run("teacher-logits", "--config", "small.toml", "--reuse")
    assert result.code == 0
    assert "complete; the teacher is not loaded" in result.err


def test_reuse_finishes_what_is_missing(run, cache):
    (cache / "units/00003.json").unlink()
    result = run("teacher-logits", "--config", "small.toml", "--reuse")
    assert "1 units made now, 9 found" in result.out
    assert not open_cache(cache).missing_units


@pytest.mark.parametrize("reuse", [(), ("--reuse",)])
def test_a_cache_of_another_identity_is_named_by_its_field(run, cache, reuse):
    before = contents(cache)
    result = run("teacher-logits", "--config", "small.toml", "--set", "labels.k=3", *reuse)
    assert_one_message(result, "labels.k", "3", "4", "--cache")
    assert contents(cache) == before


def test_set_and_cache_make_another_cache(run, place):
    result = run("teacher-logits", "--config", "small.toml", "--set", "labels.k=2", "--cache", "elsewhere")
    assert result.code == 0
    assert "cache elsewhere: 300 samples x 2 views, 600 rows, K=2 of 10 classes" in result.out
    assert not (place / "runs").exists()


def test_a_missing_teacher_is_trained_first(run, place):
    with (place / "small.toml").open("a") as config:
        config.write("\n[train_teacher]\nepochs = 1\ndevice = 'cpu'\n")
    sets = ("--set", "teacher.model=linear", "--set", "teacher.weights=runs/small/teacher/model.safetensors")
    result = run("teacher-logits", "--config", "small.toml", *sets)
    assert result.code == 0
    assert "no weights at runs/small/teacher/model.safetensors yet; training it once" in result.err
    weights = (place / "runs/small/teacher/model.safetensors").stat().st_mtime_ns
    assert run("teacher-logits", "--config", "small.toml", *sets).code == 0
    assert (place / "runs/small/teacher/model.safetensors").stat().st_mtime_ns == weights


def test_train_teacher_writes_the_weights_that_the_config_names(run, place):
    with (place / "small.toml").open("a") as config:
        config.write("\n[train_teacher]\nepochs = 1\ndevice = 'cpu'\n")
    sets = ("--set", "teacher.model=linear", "--set", "teacher.weights=runs/small/teacher/model.safetensors")
    result = run("train-teacher", "--config", "small.toml", *sets)
    assert result.code == 0
    assert result.out.startswith("teacher linear: 650 parameters, accuracy 0.")
    assert "on 100 samples; weights in runs/small/teacher/model.safetensors" in result.out
    assert (place / "runs/small/teacher/model.safetensors").exists()


def test_train_teacher_without_its_table(run):
    assert_one_message(run("train-teacher", "--config", "small.toml"), "[train_teacher] is missing")


def test_a_teacher_writes_into_one_place_and_no_pattern(run):
    assert_one_message(
        run("teacher-logits", "--config", "small.toml", "--cache", "parts/part-*"),
        "cache: parts/part-*, a pattern of places, which students read as one; expected one here",
    )


# -- students ----------------------------------------------------------------------------------------------


def test_train_student_prints_the_student_the_baseline_and_the_teacher(run, cache, no_teacher):
    result = run("train-student", "--config", "small.toml", "--baseline")
    assert result.code == 0, result
    for column in ("student", "parameters", "of teacher", "from cache", "hard labels", "teacher", "seconds"):
        assert column in result.out
    (row,) = (line for line in result.out.splitlines() if "mlp?width=8" in line)
    cells = [cell.strip() for cell in row.strip("│┃ ").split("│")]
    folder = result.out.splitlines()[-1].removeprefix("weights, metrics and config: ")
    with open(os.path.join(folder, "metrics.json")) as file:
        metrics = json.load(file)
    teacher = open_cache(cache).manifest.teacher
    assert cells[:4] == ["mlp?width=8", "610", "95.31%", f"{100 * metrics['accuracy']:.2f}%"]
    assert cells[5] == f"{100 * teacher.eval_accuracy:.2f}%"


def test_train_student_learns_from_what_train_labels_has(run, cache):
    folders = {}
    for labels in ("cache", "online", "ground_truth"):
        result = run("train-student", "--config", "small.toml", "--set", f"train.labels={labels}")
        assert result.code == 0, result
        folders[labels] = result.out.splitlines()[-1].removeprefix("weights, metrics and config: ")
        with open(os.path.join(folders[labels], "config.json")) as file:
            made = json.load(file)
        assert made["train"]["labels"] == {"ground_truth": "hard"}.get(labels, labels)
        assert ("teacher" in made, "cache" in made) == (labels == "online", labels == "cache")
    assert len(set(folders.values())) == 3
    online = ("--config", "small.toml", "--set", "train.labels=online")
    both = json.loads(run("train-student", *online, "--baseline", "--json").out)
    assert both["students"].keys() == {"online", "ground_truth"}
    assert_one_message(
        run("train-student", *online, "--cache", cache), "--cache: train.labels = 'online'", "reads no cache"
    )
    for command in ("train-students", "distill", "sweep"):
        options = online if command != "distill" else (*online, "--out", "made")
        assert_one_message(run(command, *options), "train.labels: 'online' in the config; expected 'cache'")


def test_students_share_a_cache_that_they_do_not_touch(run, cache, no_teacher):
    before = contents(cache)
    first = run("train-student", "--config", "small.toml", "--no-baseline", "--out", "one")
    second = run(
        "train-student", "--config", "small.toml", "--no-baseline", "--student", "linear", "--out", "two"
    )
    assert (first.code, second.code) == (0, 0)
    assert "650" in second.out
    assert contents(cache) == before


def test_a_finished_student_is_reported_again(run, cache):
    one = run("train-student", "--config", "small.toml", "--no-baseline", "--out", "one")
    before = contents(cache.parent.parent.parent / "one")
    assert run("train-student", "--config", "small.toml", "--no-baseline", "--out", "one").out == one.out
    assert contents(cache.parent.parent.parent / "one") == before


def test_a_run_directory_of_another_student(run, cache):
    run("train-student", "--config", "small.toml", "--no-baseline", "--out", "one")
    result = run(
        "train-student", "--config", "small.toml", "--no-baseline", "--out", "one", "--student", "linear"
    )
    assert_one_message(result, "run one: holds another run", "model: 'mlp?width=8'; 'linear'", "--out")


def test_a_student_of_a_teacher_without_parameters(run, place):
    own = ("--config", "small.toml", "--set", "teacher.model=tests.fakes:known")
    assert run("teacher-logits", *own).code == 0
    result = run("train-student", *own, "--no-baseline")
    assert result.code == 0
    assert "610" in result.out


def test_students_are_sorted_best_first(run, cache, no_teacher):
    result = run(
        "train-students", "--config", "small.toml", "--student", "linear", "--student", "mlp?width=8&depth=6"
    )
    assert result.code == 0
    rows = [line.split("│") for line in result.out.splitlines() if "│" in line]
    assert {row[1].strip() for row in rows} == {"linear", "mlp?width=8&depth=6"}
    accuracies = [float(row[4].strip(" %")) for row in rows]
    assert accuracies == sorted(accuracies, reverse=True)


def test_students_of_the_config(run, cache):
    result = run("train-students", "--config", "small.toml")
    assert result.code == 0
    assert "linear" in result.out
    assert "mlp?width=8" in result.out


def test_compare_shows_every_kind_of_label(run, cache):
    result = run("compare", "--config", "small.toml", "--seeds", "1")
    assert result.code == 0
    for kind in ("teacher", "hard labels", "cache, 1 view", "cache, 2 views", "online teacher"):
        assert kind in result.out
    again = run("compare", "--config", "small.toml", "--seeds", "1", "--json")
    figures = json.loads(again.out)
    assert figures["config"] == "small"
    assert figures["student"] == "mlp?width=8"
    assert list(figures["students"]) == ["hard labels", "cache, 1 view", "cache, 2 views", "online teacher"]
    for row in figures["students"].values():
        assert row["mean"] == row["accuracy"][0]
        assert f"{100 * row['mean']:.2f}%" in result.out


def test_missing_units_stop_a_student_unless_they_are_allowed(run, cache):
    (cache / "units/00002.json").unlink()
    refused = run("train-student", "--config", "small.toml", "--no-baseline")
    assert_one_message(refused, "1 of 10 units are missing", "--allow-partial")
    allowed = run("train-student", "--config", "small.toml", "--no-baseline", "--allow-partial")
    assert allowed.code == 0
    assert "training on the 536 of 600 rows there" in allowed.err
    assert "mlp?width=8" in allowed.out


@pytest.mark.parametrize("command", ["train-student", "train-students", "compare"])
def test_students_need_a_cache(run, command):
    assert_one_message(run(command, "--config", "small.toml"), "runs/small/cache", "softcache teacher-logits")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("labels.k=3", ("labels.k: 3 in the config, 4 in the cache",)),
        ("teacher.model=linear", ("teacher.model: 'linear' in the config", "parametric")),
        ("views.padding=2", ("its views were made by another transform",)),
        (
            "source.max_train_samples=200",
            ("300 samples were labeled, the source has 200", "set source.max_train_samples = 300"),
        ),
    ],
)
def test_a_cache_of_something_else_is_refused(run, cache, change, parts):
    assert_one_message(run("train-student", "--config", "small.toml", "--set", change), *parts)


# -- inspect, verify, convert ------------------------------------------------------------------------------


def test_inspect_shows_identity_bytes_and_mass(run, cache):
    result = run("inspect", cache)
    assert result.code == 0
    for part in (
        "spec tests.support.fakes_students:parametric",
        "k 4",
        "10 of 10 units",
        "bytes per row",
        "T=4.0",
    ):
        assert part in result.out
    report = json.loads(run("inspect", cache, "--json").out)
    assert (report["rows"], report["units"], report["units_done"], report["store"]) == (600, 10, 10, "zarr")
    labels = open_cache(cache).read(range(300), 1)
    mass = [open_cache(cache).read(range(300), view).kept_mass(1.0).mean() for view in range(2)]
    assert report["kept_mass"]["1.0"]["mean"] == pytest.approx(np.mean(mass), rel=1e-5)
    assert report["identity"]["labels"]["k"] == labels.k
    parts = {name: size for name, size in report["bytes_per_row"].items() if name != "total"}
    assert report["bytes_per_row"]["total"] == pytest.approx(sum(parts.values()))


def test_inspect_of_drawn_labels_shows_what_they_stand_for(run):
    drawn = ROOT / "tests/golden/v1-drawn/zarr"
    printed = run("inspect", drawn).out
    assert "12 draws a row of 4.8 classes behind 0 exact ones" in printed
    assert "kept mass" not in printed
    report = json.loads(run("inspect", drawn, "--json").out)
    found = report["drawn"]
    assert "kept_mass" not in report
    assert found["effective_samples"]["1.0"]["mean"] == pytest.approx(12)
    assert found["mass_error"]["1.0"] == pytest.approx(0, abs=1e-5)
    assert found["mass_error"]["4.0"] > found["mass_error"]["2.0"] > 0.1


def test_inspect_of_a_cache_that_was_only_begun(run, cache):
    for marker in (cache / "units").glob("*.json"):
        marker.unlink()
    result = run("inspect", cache)
    assert result.code == 0
    assert "0 of 10 units" in result.out
    assert "extension" not in result.out
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest["extensions"] = {"softcache.class_order": "not checked\x1b[2J"}
    (cache / "manifest.json").write_text(json.dumps(manifest))
    assert "extension softcache.class_order: not checked" in (shown := run("inspect", cache).out)
    assert "\x1b" not in shown
    assert json.loads(run("inspect", cache, "--json").out)["rows"] == 0


@pytest.mark.parametrize(
    "arguments",
    [("inspect", "nothing"), ("verify", "nothing"), ("convert", "nothing", "copy", "--store", "parquet")],
)
def test_no_cache_there(run, place, arguments):
    assert_one_message(run(*arguments), "cache nothing", "softcache teacher-logits")
    assert not (place / "copy").exists()


def test_verify_confirms_a_good_cache(run, cache):
    assert run("verify", cache).out == f"cache {cache}: 10 units; 0 faults\n"
    result = run("verify", cache, "--config", "small.toml", "--rows", "50")
    assert result.code == 0
    assert "10 units, 50 rows against the teacher; 0 faults" in result.out


def test_verify_names_the_unit_of_a_flipped_bit(run, cache):
    flip(cache)
    result = run("verify", cache)
    assert result.code == 1
    (fault,) = (line for line in result.err.splitlines() if line.startswith("FAULT"))
    assert "unit " in fault
    assert "1 faults" in result.out


def test_verify_names_missing_units(run, cache):
    (cache / "units/00004.json").unlink()
    result = run("verify", cache)
    assert result.code == 1
    assert "FAULT unit 4 (view 0, samples 256 to 299): not finished" in result.err


def test_verify_finds_another_teacher_by_its_rows(run, cache):
    other = ("--set", "teacher.model=tests.support.fakes_students:parametric?scale=1.5")
    result = run("verify", cache, "--config", "small.toml", "--rows", "20", *other)
    assert result.code == 1
    faults = [line for line in result.err.splitlines() if line.startswith("FAULT")]
    assert len(faults) == 20
    assert all("the teacher disagrees with its record: KL" in fault for fault in faults)
    assert all("unit " in fault and ", row " in fault for fault in faults)


@pytest.mark.parametrize("change", ["views.seed=3", "source.max_train_samples=200"])
def test_verify_with_the_data_of_another_config(run, cache, change):
    result = run("verify", cache, "--config", "small.toml", "--set", change)
    assert result.code == 1
    assert "Traceback" not in result.err
    assert "FAULT" in result.err or "softcache: " in result.err


def test_convert_goes_there_and_back(run, cache):
    assert "10 of 10 units, store parquet" in run("convert", cache, "flat", "--store", "parquet").out
    assert "10 of 10 units, store zarr" in run("convert", "flat", "back", "--store", "zarr").out
    original = open_cache(cache)
    for url in ("flat", "back"):
        copy = open_cache(url)
        for view in range(2):
            (a, prints_a), (b, prints_b) = (c.read_rows(range(300), view) for c in (original, copy))
            assert np.array_equal(prints_a, prints_b)
            for name in COLUMNS:
                assert getattr(a, name).tobytes() == getattr(b, name).tobytes(), name
        result = run("verify", url, "--config", "small.toml")
        assert (result.code, "0 faults" in result.out) == (0, True)
    assert run("train-student", "--config", "small.toml", "--cache", "flat", "--no-baseline").code == 0


def test_convert_does_not_copy_damage(run, cache):
    flip(cache)
    assert_one_message(run("convert", cache, "flat", "--store", "parquet"), "unit ")


def test_convert_does_not_write_over_another_cache(run, cache):
    before = contents(cache)
    assert_one_message(run("convert", cache, cache, "--store", "parquet"), "store: 'parquet'; 'zarr'")
    assert contents(cache) == before


# -- errors and help ---------------------------------------------------------------------------------------


def test_a_bad_config_is_one_readable_message(run, place):
    (place / "bad.toml").write_text("source.name = 'digits'\nloss.temprature = 2\n")
    result = run("teacher-logits", "--config", "bad.toml")
    assert_one_message(
        result,
        "config bad.toml",
        "loss.temprature: unknown key with name = 'forward_kl'; did you mean temperature",
    )
    assert_one_message(run("compare", "--config", "none.toml"), "config none.toml: cannot be read")
    assert_one_message(
        run("train-students", "--config", "small.toml", "--set", "train.lr=fast"), "train.lr", "'fast'"
    )


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("timm:resnet1800", ("'timm:resnet1800'", "did you mean ", "resnet18")),
        ("mpl", ("'mpl'", "did you mean mlp?")),
        ("tests.fakes:wrong_head", ("expected logits of shape (100, 10)", "found (100, 12)")),
    ],
)
def test_a_model_that_cannot_be_used_says_why(run, cache, spec, parts):
    assert_one_message(run("train-student", "--config", "small.toml", "--student", spec), *parts)


@pytest.mark.parametrize(
    "arguments",
    [
        ("teacher-logits", "--nope"),
        ("compare", "--seeds", "0"),
        ("convert", "here", "there"),
        ("convert", "here", "there", "--store", "hdf5"),
        ("train-student", "--track", "paper"),
        ("inspect",),
        ("nope",),
    ],
)
def test_wrong_usage_is_exit_2(run, arguments):
    result = run(*arguments)
    assert result.code == 2
    assert "Usage: " in result.err
    assert "Error: " in result.err


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help_with_an_example(name):
    result = CliRunner().invoke(group, [name, "--help"])
    assert result.exit_code == 0
    assert f"Example:\n    softcache {name} " in result.output
    assert not re.findall(r"INTEGER|FLOAT|TEXT|BOOLEAN|RANGE", result.output), "names of click's types"
    for parameter in group.get_command(click.Context(group), name).params:
        if parameter.param_type_name == "option":
            assert parameter.help, f"{name} {parameter.opts[0]} has no help"


def test_the_commands_are_listed_with_one_line_each():
    result = CliRunner().invoke(group, ["--help"])
    for name, (_, line) in COMMANDS.items():
        listed = next(row for row in result.output.splitlines() if row.startswith(f"  {name} "))
        assert listed.endswith(f"  {line}"), "in full"


def test_every_command_is_in_one_group():
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [
        ("report", "runs", "--out", "URL"),
        ("export", "runs/x", "--out", "URL"),
        ("fidelity", "runs/test/cache", "--out", "URL"),
        ("browse", "runs/test/cache", "--out", "URL"),
        ("query", "http://127.0.0.1:9/v1", "--out", "URL"),
        ("import", "URL"),
        ("init", "--out", "URL"),
        ("sweep", "--out", "URL"),
        ("distill", "--out", "URL"),
        ("teacher-generate", "--out", "URL"),
        ("materialize", "runs/test/cache", "--folder", "URL"),
        ("train-student", "--config", "URL"),
    ],
)
def test_a_url_is_no_local_path(place, arguments):
    """It was taken as a folder `s3:`, and reported as written to the bucket."""
    before = sorted(place.rglob("*"))
    result = CliRunner().invoke(group, ["s3://bucket/x" if one == "URL" else one for one in arguments])
    assert (result.exit_code, "s3://bucket/x: expected a path of this machine" in result.stderr) == (2, True)
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    ("error", "to_do"),
    [
        (
            FileNotFoundError(2, "No usable temporary directory found in ['/tmp', '/']"),
            "set TMPDIR to one that can",
        ),
        (
            ImportError("libtorch_cuda.so: failed to map segment from shared object"),
            "for lack of memory; raise the limit",
        ),
    ],
)
def test_what_a_container_lacks_is_one_message(monkeypatch, capsys, error, to_do):
    def fails(**options):
        raise error

    monkeypatch.setattr(cli, "softcache", fails)
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("softcache: ")
    assert to_do in lines[0]
    assert str(error) in lines[0]


@pytest.mark.parametrize("url", ["file:///tmp/run", "http://host/run", "s4://bucket/run"])
def test_a_student_goes_to_a_folder_or_a_bucket(run, cache, url):
    result = run("train-student", "--config", "small.toml", "--out", url)
    assert result.code == 1
    assert f"run {url}: expected a folder, or s3://, gs:// or az:// of a bucket" in result.err
    assert not os.path.exists(url.split("//")[0])


def test_as_a_process_errors_go_to_stderr_with_exit_1(place):
    result = shell("inspect", "nothing", cwd=place)
    assert_one_message(result, "cache nothing")
    assert result.err.count("\n") == 1
