"""--json: every command that prints a result gives it as one JSON object, and nothing else on stdout."""

import json
import sys

import click
import pytest

from softcache.stages.cli import softcache as group
from softcache.stages.commands import COMMANDS
from softcache.stages.options import print_table
from tests.stages.test_cli import cache, labeled, place, run  # noqa: F401

CONFIG = ("--config", "small.toml")
CACHE = "runs/small/cache"
# compare, fidelity and import have theirs in other files of tests, with their output.
CALLS = {
    "teacher-logits": (CONFIG, {"cache", "rows", "num_bytes", "made_now"}),
    "train-student": ((*CONFIG, "--no-baseline"), {"cache", "kind", "teacher", "students"}),
    "train-students": ((*CONFIG, "--student", "linear"), {"cache", "kind", "teacher", "students"}),
    "sweep": ((*CONFIG, "--trials", "1", "--no-cost"), {"trials", "metric", "best", "figures"}),
    "inspect": ((CACHE,), {"identity", "units", "kept_mass"}),
    "verify": ((CACHE, *CONFIG, "--rows", "8"), {"units", "teacher_rows", "faults"}),
    "status": ((CACHE,), {"state", "units_done", "units_total"}),
    "convert": ((CACHE, "copy", "--store", "parquet"), {"units", "num_bytes", "store"}),
    "shrink": ((CACHE, "small", "--k", "2"), {"num_bytes", "num_bytes_before", "labels"}),
    "materialize": (("--list", "--clear"), {"folder", "memmaps", "removed"}),
    "gc": ((CACHE,), {"stray", "foreign", "held", "deleted"}),
}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_that_prints_a_table_has_json(name):
    """A command prints a table if its module has `print_table`."""
    command = group.get_command(click.Context(group), name)
    module = sys.modules[command.callback.__module__]
    if hasattr(module, "print_table"):
        assert "--json" in {o for p in command.params for o in p.opts}, (
            f"{name} prints a table and lacks --json"
        )


@pytest.mark.parametrize("name", CALLS)
def test_json_is_one_object_and_all_of_stdout(run, cache, monkeypatch, name):  # noqa: F811
    monkeypatch.setenv("SOFTCACHE_MEMMAP_DIR", str(cache.parent / "thawed"))
    arguments, keys = CALLS[name]
    result = run(name, *arguments, "--json")
    assert result.code == 0, result
    found = json.loads(result.out, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    assert keys <= found.keys()


def test_fuse_reports_the_fused_cache(run, cache):  # noqa: F811
    assert run("shrink", cache, "small", "--k", "2").code == 0
    result = run(
        "fuse", cache, "small", "--rule", "mean", "--out", "fused", "--json", "--allow-weak-teachers"
    )
    assert result.code == 0, result
    assert json.loads(result.out)["teachers"] == [str(cache), "small"]


def test_verify_reports_faults_as_json_and_fails(run, cache):  # noqa: F811
    (cache / "units/00001.json").unlink()
    result = run("verify", cache, "--json")
    assert result.code == 1
    assert "unit 1 (view 0" in json.loads(result.out)["faults"][0]


def test_numbers_that_json_lacks_become_null(capsys):
    from softcache.stages.options import print_json

    print_json({"loss": float("nan"), "rows": [float("inf"), 1.5]})
    assert json.loads(capsys.readouterr().out) == {"loss": None, "rows": [None, 1.5]}


def test_a_table_in_a_file_keeps_every_word_whole(capsys):
    name = "teacher, gpt2?width=256&depth=4&heads=4"
    columns = (
        "model",
        "bytes",
        "parameters",
        "FLOPs",
        "held-out loss",
        "largest difference",
        "same predictions",
    )
    row = ("21,294,152", "4,273,664", "2,139,095,040", "5.8858", "2.9e-06", "100.00%")
    print_table("models", columns, [(name, *row), ("x " * 50, *row)])
    printed = capsys.readouterr().out
    assert set(row) <= set(printed.split())
    assert name in printed
    print_table("few", ("a", "b"), [("1", "two words " * 30)])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 120, "text is wrapped as before"


def test_numbers_stay_whole_on_a_terminal_that_has_no_room_for_a_frame(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    columns = ("student", "parameters", "of teacher", "from cache", "hard labels", "teacher", "seconds")
    row = ("timm:test_efficientnet", "101,334", "38.87%", "93.24%", "90.88%", "99.32%", "56.2")
    print_table("students", columns, [row])
    assert any(line.split() == list(row) for line in capsys.readouterr().out.splitlines())


def test_a_terminal_that_is_too_narrow_for_the_table_has_a_line_for_each_row(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    columns = ("trial", "accuracy", "temperature", "loss", "student", "seconds")
    print_table(
        "sweep [x]", columns, [("2", "90.88%", "3.226", "forward_kl", "cnn?width=8", "")], note="the best"
    )
    printed = capsys.readouterr().out
    assert "trial 2: accuracy 90.88%, temperature 3.226, loss forward_kl, student cnn?width=8" in " ".join(
        printed.split()
    )
    assert printed.startswith("sweep [x]")
    assert printed.rstrip().endswith("the best")
