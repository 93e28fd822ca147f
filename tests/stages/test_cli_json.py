"""--json: every command that prints a result gives it as one JSON object, and nothing else on stdout."""

import json
import sys

import click
import pytest

from stages.cli import softcache as group
from stages.commands import COMMANDS
from stages.options import print_table
from tests.stages.test_cli import cache, labelled, place, run  # noqa: F401

CONFIG = ("--config", "small.toml")
CACHE = "runs/small/cache"
# compare, fidelity and import have theirs in other files of tests, beside what they print.
CALLS = {
    "teacher-logits": (CONFIG, {"cache", "rows", "num_bytes", "made_now"}),
    "train-student": ((*CONFIG, "--no-baseline"), {"cache", "kind", "teacher", "students"}),
    "students": ((*CONFIG, "--student", "linear"), {"cache", "kind", "teacher", "students"}),
    "sweep": ((*CONFIG, "--trials", "1", "--no-cost"), {"trials", "metric", "best", "figures"}),
    "inspect": ((CACHE,), {"identity", "units", "kept_mass"}),
    "verify": ((CACHE, *CONFIG, "--rows", "8"), {"units", "teacher_rows", "faults"}),
    "status": ((CACHE,), {"state", "units_done", "units_total"}),
    "convert": ((CACHE, "copy", "--store", "parquet"), {"units", "num_bytes", "store"}),
    "slim": ((CACHE, "slim", "--k", "2"), {"num_bytes", "num_bytes_before", "labels"}),
    "thaw": (("--list", "--clear"), {"folder", "thawed", "removed"}),
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
    monkeypatch.setenv("SOFTCACHE_THAW_DIR", str(cache.parent / "thawed"))
    arguments, keys = CALLS[name]
    result = run(name, *arguments, "--json")
    assert result.code == 0, result
    found = json.loads(result.out, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    assert keys <= found.keys()


def test_fuse_tells_the_fused_cache(run, cache):  # noqa: F811
    assert run("slim", cache, "slim", "--k", "2").code == 0
    result = run("fuse", cache, "slim", "--rule", "mean", "--out", "fused", "--json")
    assert result.code == 0, result
    assert json.loads(result.out)["teachers"] == [str(cache), "slim"]


def test_verify_tells_faults_as_json_and_fails(run, cache):  # noqa: F811
    (cache / "units/00001.json").unlink()
    result = run("verify", cache, "--json")
    assert result.code == 1
    assert "unit 1 (view 0" in json.loads(result.out)["faults"][0]


def test_numbers_that_json_lacks_become_null(capsys):
    from stages.options import print_json

    print_json({"loss": float("nan"), "rows": [float("inf"), 1.5]})
    assert json.loads(capsys.readouterr().out) == {"loss": None, "rows": [None, 1.5]}


def test_a_table_in_a_file_keeps_every_digit(capsys):
    long = "timm:test_vit?img_size=8&patch_size=2 " * 3
    print_table("models", ("model", "parameters", "FLOPs"), [(long, "1,234,567,890", "9,876,543,210 a row")])
    printed = capsys.readouterr().out
    assert long in printed
    assert "1,234,567,890" in printed
    assert "…" not in printed
