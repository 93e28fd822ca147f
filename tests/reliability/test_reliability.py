"""Kills and damage, the short versions; `make chaos` runs the long ones."""

import pytest

from tests.chaos import parsers
from tests.chaos.corruption import KINDS, damage, merged
from tests.support.programs import run_program


def crash(*arguments):
    """Runs the driver in a process that has never used TensorStore; returns its table, by row and column."""
    code = "import runpy; runpy.run_module('tests.chaos.crash', run_name='__main__')"
    done = run_program(code, *arguments)
    assert done.returncode == 0, done.stderr[-5000:]
    print(done.stdout)
    lines = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in done.stdout.splitlines()]
    return {
        row[0]: dict(zip(lines[0][1:], (int(cell.replace(",", "")) for cell in row[1:]), strict=True))
        for row in lines[2:]
    }


def assert_nothing_slips(table):
    for of, tally in merged([table]).items():
        assert tally["missed"] == 0, f"{of}: verify missed {tally['missed']}"
        assert tally["other numbers"] == 0, f"{of}: a student learnt from damage"


def test_whatever_writes_ends_as_if_it_was_never_killed():
    table = crash("--short", "--kills", "8")
    assert table["all"]["killed"] >= 4
    assert table["all"]["disk full"] >= 1
    assert table["all"]["reruns equal"] == 8


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_found_by_verify_and_never_learnt_from(tmp_path, kind):
    table = damage(kind, tmp_path, faults=80, seed=0)
    assert_nothing_slips(table)
    assert merged([table])["shard" if kind.endswith("zarr") else "file of a unit"]["stopped"] > 5


def test_each_parser_meets_softcache_errors_only(tmp_path):
    targets = [*parsers.cache_targets(tmp_path, "images-parquet"), *parsers.checkpoint_targets(tmp_path)]
    assert len(targets) > 10
    for target in targets:
        assert parsers.fuzz(target, number=0, files=20).total() == 20


# -- long --------------------------------------------------------------------------------------------------


@pytest.mark.chaos
@pytest.mark.parametrize("part", range(3))
def test_hundreds_of_kills(part, chaos_seed):
    """A rerun follows on one to three kills, of which some come too late."""
    table = crash("--kills", "300", "--seed", str(chaos_seed + part))
    assert table["all"]["killed"] >= 200
    assert table["all"]["reruns equal"] >= 200


@pytest.mark.chaos
def test_each_parser_for_two_minutes(tmp_path, chaos_seed):
    """An hour; at its end each file is what it was, so that the next one is changed alone."""
    for target in parsers.make_targets(tmp_path):
        tally = parsers.fuzz(target, seconds=110, number=chaos_seed)
        print(f"{target.name}: {dict(tally)}")
        assert tally.total() > 0


@pytest.mark.chaos
def test_a_kill_at_every_step():
    assert crash("--every-step")["all"]["killed"] >= 500


@pytest.mark.chaos
@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_faults(tmp_path, kind, chaos_seed):
    table = damage(kind, tmp_path, faults=2000, seed=chaos_seed)
    print({of: dict(tally) for of, tally in merged([table]).items()})
    assert_nothing_slips(table)
