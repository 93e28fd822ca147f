"""Every command that the documentation shows: parsed by the command that it names, and, where its page asks for it, run.

A page says so in a comment that readers do not see:

    <!-- test: run with train.epochs=1 labels.num_views=2 -->

Its commands are then run in order, in a folder that holds the configs and the files that the page shows (a block after a
line that ends in `NAME.py`: or `NAME.toml`:), with these settings on top wherever a command takes `--set`. A command
that needs more than a test has is excused by the line before its block, with one of REASONS:

    <!-- test: skip bucket -->
"""

import itertools
import re
import shlex
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from stages.cli import softcache
from stages.commands import COMMANDS
from tests.caches import ROOT

REASONS = {"bucket", "cluster", "gpu", "hours"}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELLS = {"", "sh", "bash", "console", "shell"}
STARTS = ("softcache ", "make ", "python -m ")
TARGETS = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()


@dataclass(frozen=True)
class Block:
    """A block of a page, fenced or indented."""

    language: str
    text: str
    file: str | None
    skipped: str | None

    @property
    def commands(self) -> list[str]:
        lines = re.sub(r"\s*\\\n\s*", " ", self.text).splitlines()
        told = [re.split(r"\s+[#|]\s", line.strip().removeprefix("$ "))[0].strip() for line in lines]
        return [line for line in told if line.startswith(STARTS)] if self.language in SHELLS else []


def blocks(text: str) -> list[Block]:
    found: list[Block] = []
    lines, at = text.splitlines(), 0
    while at < len(lines):
        start, language = at, None
        if fence := re.fullmatch(r"```([\w-]*)", lines[at]):
            language, end = fence[1], lines.index("```", at + 1)
            body, at = lines[at + 1 : end], end + 1
        elif lines[at].startswith("    ") and (at == 0 or not lines[at - 1].strip()):
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
            language, body = "", [line.removeprefix("    ") for line in lines[start:at]]
        if language is None:
            at += 1
            continue
        before = "\n".join(lines[:start]).rstrip().rsplit("\n", 1)[-1]
        named = re.search(r"`([\w-]+\.(?:py|toml))`:$", before)
        skipped = re.fullmatch(r"<!-- test: skip (\w+) -->", before.strip())
        found.append(
            Block(language, "\n".join(body).strip() + "\n", named and named[1], skipped and skipped[1])
        )
    return found


def settings(text: str) -> list[str] | None:
    """What a page is run with; None where it is only parsed."""
    found = re.search(r"<!-- test: run(?: with (.*?))? -->", text)
    return None if found is None else shlex.split(found[1] or "")


def parsed(words: list[str]) -> click.Context:
    command = softcache.get_command(click.Context(softcache), words[0])
    assert command is not None, f"there is no softcache {words[0]}"
    return command.make_context(words[0], words[1:])


ALL = [(page, block) for page in PAGES for block in blocks(page.read_text())]
COMMANDS_SHOWN = [(page, command) for page, block in ALL for command in block.commands]


@pytest.mark.parametrize(
    ("page", "command"), COMMANDS_SHOWN, ids=[f"{page.name}: {command}" for page, command in COMMANDS_SHOWN]
)
def test_every_command_shown_is_one(page, command):
    words = [word for word in shlex.split(command) if word != "…"]
    if words[0] == "softcache":
        parsed(words[1:])
    elif words[0] == "make":
        names = [word for word in words[1:] if "=" not in word]
        assert set(names) <= set(TARGETS), f"{page.name}: {command}"
        makefile = (ROOT / "Makefile").read_text()
        for word in set(words[1:]) - set(names):
            assert re.search(rf"\$\({word.split('=')[0]}\)|^{word.split('=')[0]} ", makefile, re.M), word
    else:
        assert find_spec(words[2]) is not None, f"{page.name}: {command}"


def test_the_parser_sees_what_is_wrong():
    for wrong in (["verify", "cache", "--nothing"], ["inspect"], ["slim", "a", "b", "--codec", "zip"]):
        with pytest.raises(click.UsageError, match=r"(?i)no such option|missing parameter|is not one of"):
            parsed(wrong)


def test_blocks_are_found():
    text = "Text.\n\n    softcache gc A  # why\n    softcache thaw B \\\n        --views 1\n\nSo: `a.py`:\n\n```python\nx = 1\n```\n"
    one, two = blocks(text)
    assert one.commands == ["softcache gc A", "softcache thaw B --views 1"]
    assert (two.language, two.text, two.file, two.commands) == ("python", "x = 1\n", "a.py", [])
    assert {page.name for page, _ in COMMANDS_SHOWN} >= {"README.md", "images.md", "text.md", "recover.md"}


def test_reasons_are_few():
    assert {block.skipped for _, block in ALL} - {None} <= REASONS


RUN = [page for page in PAGES if settings(page.read_text()) is not None]


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_a_page_can_be_followed(page, tmp_path, monkeypatch):
    text = page.read_text()
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SOFTCACHE_THAW_DIR", str(tmp_path / "thaw"))
    for block in blocks(text):
        if block.file is not None:
            with Path(block.file).open("a") as file:
                file.write(block.text)
        elif block.language == "python":
            written = sorted(Path().glob("*.py"))
            assert written, f"{page.name}: a Python block that belongs to no file"
            with written[0].open("a") as file:
                file.write("\n\n" + block.text)
    for block in blocks(text):
        for command in () if block.skipped else block.commands:
            follow(command, settings(text), page)


def follow(command: str, changes: list[str], page: Path) -> None:
    words = shlex.split(command)
    assert words[0] == "softcache", f"{page.name}: {command}: a page that is run shows softcache commands"
    context = parsed(words[1:])
    if any(parameter.name == "overrides" for parameter in context.command.params):
        said = {change.split("=")[0] for option, change in itertools.pairwise(words) if option == "--set"}
        words += [
            word for change in changes if change.split("=")[0] not in said for word in ("--set", change)
        ]
    result = CliRunner().invoke(softcache, words[1:])
    assert result.exit_code == 0, f"{page.name}: {command}\n{result.output}\n{result.exception!r}"


def test_pages_run_cover_most_commands():
    run = {
        shlex.split(command)[1]
        for page in RUN
        for block in blocks(page.read_text())
        for command in block.commands
        if not block.skipped
    }
    assert run >= {
        "teacher-logits",
        "train-student",
        "inspect",
        "verify",
        "slim",
        "gc",
        "compare",
        "sweep",
        "report",
    }
    assert run <= set(COMMANDS)
