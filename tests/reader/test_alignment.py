"""Alignment, proven: what changes what the student would see is refused and named, what must not matter does not."""

import re

import pytest

from tests.support.alignment import Worlds, attempt
from tests.support.alignment_cases import HARMLESS, REFUSED, is_harmless, is_refused
from tests.support.alignment_elsewhere import ELSEWHERE, copies
from tests.support.caches import ROOT

KINDS = ("images", "files", "text", "chats")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    return Worlds(tmp_path_factory.mktemp("worlds"))


@pytest.fixture(scope="module")
def untouched(worlds):
    """Returns what a student sees of a world in which nothing was changed."""
    found = {}

    def of(kind):
        if kind not in found:
            with worlds.copy(kind) as world:
                found[kind] = attempt(world)
        return found[kind]

    return of


@pytest.mark.parametrize("kind", KINDS)
def test_a_world_that_nobody_changed_is_trained_on(untouched, kind):
    found = untouched(kind)
    assert found.code == 0, found.err
    assert {len(samples) for samples in found.epochs.values()} == {len(found.trained)}


@pytest.mark.parametrize("case", REFUSED, ids=[f"{case.kind}: {case.name}" for case in REFUSED])
def test_what_changes_what_the_student_would_see_is_refused_and_named(worlds, case):
    with worlds.copy(case.kind) as world:
        case.change(world)
        found = attempt(world)
    assert is_refused(case, found), found


@pytest.mark.parametrize(
    ("kind", "case"),
    [(kind, case) for case in HARMLESS for kind in case.kinds],
    ids=[f"{kind}: {case.name}" for case in HARMLESS for kind in case.kinds],
)
def test_what_must_not_matter_does_not(worlds, untouched, kind, case):
    with worlds.copy(kind) as world:
        case.change(world)
        found = attempt(world)
    assert is_harmless(case, found, untouched(kind)), found


@pytest.mark.parametrize(("name", "expected", "is_same"), ELSEWHERE, ids=[name for name, _, _ in ELSEWHERE])
def test_nor_do_codec_processes_and_environment(worlds, untouched, tmp_path, name, expected, is_same):
    seen = {kind: untouched(kind) for kind in ("images", "text")}
    assert is_same(copies(worlds, tmp_path / "copies"), tmp_path / "elsewhere", seen), expected


def test_the_documented_tables_have_every_perturbation():
    documented = (ROOT / "docs/reliability.md").read_text()
    rows = re.findall(
        r"^\| (?:images in memory|image files|packed text|chats)[^|]*\| ([^|]+) \|", documented, re.M
    )
    assert rows == [case.name for case in (*REFUSED, *HARMLESS)] + [name for name, _, _ in ELSEWHERE]
    assert "**not" not in documented.split("## Alignment")[1].split("\n## ")[0]
