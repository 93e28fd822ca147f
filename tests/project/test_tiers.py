"""Which tests `make test` and `make test-programs` run: every test is in exactly one of them."""

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import PROGRAMS, is_program, tier_of
from tests.support.caches import ROOT

TESTS = ROOT / "tests"


def functions_of(path):
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("entry", PROGRAMS)
def test_what_is_listed_exists(entry):
    file, _, name = entry.partition("::")
    assert (TESTS / file).exists()
    assert not name or name in functions_of(TESTS / file)
    assert is_program(Path(file), name or None)


def test_a_test_is_a_program_by_its_folder_its_file_or_its_name():
    assert is_program(Path("benchmarks/test_benchmarks.py"), "test_any")
    assert is_program(Path("runs/test_dask.py"))
    page = Path("docs/test_docs_commands.py")
    assert not is_program(page)
    assert is_program(page, "test_a_page_can_be_followed")
    assert not is_program(page, "test_every_command_shown_is_one")


def test_a_run_has_one_tier():
    assert tier_of(programs=False, is_narrowed=False) == "tests"
    assert tier_of(programs=False, is_narrowed=True) == "all"
    assert tier_of(programs=True, is_narrowed=False) == "programs"


def test_this_run_has_the_tests_of_its_tier(request):
    collected = {(item.path.relative_to(TESTS), item.originalname) for item in request.session.items}
    programs = {is_program(*each) for each in collected}
    assert (
        programs <= {"tests": {False}, "programs": {True}, "all": {True, False}}[request.config.option.tier]
    )


def test_make_and_ci_run_both_tiers():
    recipes = dict(re.findall(r"^(test[a-z-]*|chaos):.*\n\t(.*)$", (ROOT / "Makefile").read_text(), re.M))
    pytest_of = {name: recipe.partition("pytest")[2].split() for name, recipe in recipes.items()}
    assert pytest_of["test"] == []
    assert pytest_of["test-programs"] == ["--programs"]
    assert pytest_of["chaos"][:2] == ["-m", "chaos"], "-m chooses from both"
    ran = re.findall(r"\bmake (test\S*)(?: \|\| \{)?$", (ROOT / ".ci/run").read_text(), re.M)
    assert ran == ["test", "test-programs", "test-vllm"]
