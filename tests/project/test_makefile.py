"""The Makefile: what it lists, what it runs, and what it never removes."""

import re
import shutil
import subprocess

import pytest

from tests.support.caches import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
TEXT = (ROOT / "Makefile").read_text()
TARGETS = re.search(r"^\.PHONY: (.*)$", TEXT, re.MULTILINE)[1].split()


@pytest.fixture
def make(tmp_path):
    """Returns a function that runs make in a folder that holds the Makefile and nothing else of ours."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()

    def run(*arguments):
        command = ["make", "--no-print-directory", *arguments]
        environment = {"PATH": "/usr/bin:/bin:/usr/local/bin", "HOME": str(tmp_path)}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def commands(text):
    """The lines of softcache commands that a dry run would have run."""
    return [line for line in text.splitlines() if line.startswith(".venv/bin/softcache")]


def test_help_lists_every_target(make):
    listed = re.findall(r"^  make ([a-z-]+) +\S", make("help"), re.MULTILINE)
    assert sorted(listed) == sorted(TARGETS)
    assert make() == make("help")


def test_every_target_that_is_no_file_is_phony():
    rules = re.findall(r"^([a-z-]+):.*##", TEXT, re.MULTILINE)
    assert sorted(rules) == sorted(TARGETS)


@pytest.mark.parametrize(
    ("config", "is_there", "extra"),
    [
        ("configs/digits.toml", "", "vision"),
        ("configs/stdlib-lm.toml", "", "dev"),
        ("configs/digits.toml", ".vision", None),
        ("configs/stdlib-lm.toml", ".vision", "dev"),
        ("configs/digits.toml", ".installed", None),
        ("configs/stdlib-lm.toml", ".installed", None),
    ],
)
def test_training_installs_what_its_data_need_and_nothing_twice(make, tmp_path, config, is_there, extra):
    (tmp_path / ".venv").mkdir()
    if is_there:
        (tmp_path / ".venv" / is_there).touch()
    found = re.findall(r"pip install .*'\.\[(\w+)\]'", make("-n", "train-student", f"CONFIG={config}"))
    assert found == ([extra] if extra else [])
    assert re.findall(r"'\.\[(\w+)\]'", make("-n", "setup")) == ([] if is_there == ".installed" else ["dev"])


@pytest.mark.parametrize("target", ["teacher-logits", "train-teacher"])
def test_a_target_runs_the_command_of_its_name(make, target):
    (command,) = commands(make("-n", target, "CONFIG=configs/fashion-mnist.toml"))
    assert command.startswith(f".venv/bin/softcache {target} --config configs/fashion-mnist.toml")


@pytest.mark.parametrize("target", ["train-student", "train-students", "compare", "sweep"])
def test_training_makes_the_cache_first_if_there_is_none(make, target):
    first, second = commands(make("-n", target))
    assert first == (
        ".venv/bin/softcache teacher-logits --config configs/digits.toml  --cache 'runs/digits/cache' --reuse"
    )
    assert second.startswith(f".venv/bin/softcache {target} --config configs/digits.toml")
    assert "--cache 'runs/digits/cache'" in second


def test_variables_reach_the_command_quoted(make):
    student = "timm:test_vit?img_size=8&patch_size=2"
    text = make("-n", "train-student", f"STUDENT={student}", "SET=train.epochs=2 train.lr=1e-3", "CACHE=a b")
    first, second = commands(text)
    for command in (first, second):
        assert "--set 'train.epochs=2' --set 'train.lr=1e-3'" in command
        assert "--cache 'a b'" in command
    assert second.endswith(f"--student '{student}' --baseline")
    plain = commands(make("-n", "train-student", f"STUDENT={student}", "BASELINE=0"))[1].rstrip()
    assert plain.endswith(f"--student '{student}'")
    assert "--student" not in first


def test_a_sweep_takes_its_numbers_from_variables(make):
    _, command = commands(make("-n", "sweep", "TRIALS=30", "WORKERS=2"))
    assert command.endswith("--trials '30' --workers '2'")
    assert "--trials" not in make("-n", "sweep")


def test_the_environment_is_made_once(make, tmp_path):
    assert "pip install" in make("-n", "inspect")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/.installed").touch()
    assert "pip install" not in make("-n", "inspect")


OURS = [".venv/bin/x", "runs/digits/cache/manifest.json", ".pytest_cache/x", ".ruff_cache/x", ".mypy_cache/x"]
OURS += [
    ".hypothesis/x",
    "softcache.egg-info/x",
    "pipeline/__pycache__/x.pyc",
    "pipeline/stores/__pycache__/x.pyc",
]
OURS += ["stages/__pycache__/x.pyc", "tests/__pycache__/x.pyc", "benchmarks/__pycache__/x.pyc"]
THEIRS = [
    "data/images/x.png",
    "configs/digits.toml",
    "elsewhere/cache/manifest.json",
    "pipeline/x.py",
    "README.md",
]
THEIRS += [
    "tests/golden/v1/manifest.json",
    "data/__pycache__/x.pyc",
    ".git/config",
    "runs.txt",
    "my runs/x",
    "x.egg-info/x",
]


def test_clean_removes_what_make_made_and_nothing_else(make, tmp_path):
    for name in OURS + THEIRS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("kept")
    make("clean")
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"Makefile", "pyproject.toml", "constraints.txt", *THEIRS}
    make("clean")


def test_clean_follows_no_link_out_of_the_folder(make, tmp_path, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "cache").write_text("kept")
    (tmp_path / "runs").symlink_to(outside)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/data").symlink_to(outside)
    make("clean")
    assert (outside / "cache").read_text() == "kept"


def test_clean_takes_no_name_from_a_variable(make):
    plain = make("-n", "clean")
    assert (
        make("-n", "clean", "CACHE=/data/precious", "CONFIG=/data/x.toml", "STUDENT=/data", "NAME=/data")
        == plain
    )
