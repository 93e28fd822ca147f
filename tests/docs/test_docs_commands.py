"""Every command that the documentation shows: parsed by the command that it names, and run, or excused by name.

tests/support/docs_pages.py lists the comments that control it; tests/support/docs_shell.py runs the commands of a page in order, in a
folder that holds the configs, the examples and the files that the page shows.
"""

import ast
import os
import re
import runpy
import shlex
import shutil
import socket
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import click
import pytest

from softcache.stages.cli import softcache
from softcache.stages.commands import COMMANDS
from tests.support.caches import ROOT
from tests.support.docs_pages import PAGES, REASONS, Block, blocks, name_of
from tests.support.docs_shell import Shell, missing_options

TARGETS = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
BLOCKS = [(page, block) for page in PAGES for block in blocks(page.read_text())]
SHOWN = [(page, command) for page, block in BLOCKS for command in block.commands]
OURS = ("softcache ", "make ", "python ", "torchrun ", "accelerate ")
NOT_HERE = {"dask_jobqueue", "dask_kubernetes"}
"""Packages of examples that are marked as untested on their page."""


def ids(pairs):
    return [f"{name_of(page)}: {text}" for page, text in pairs]


# -- what is shown is there --------------------------------------------------------------------------------


def parsed(words: list[str]) -> click.Context:
    command = softcache.get_command(click.Context(softcache), words[0])
    assert command is not None, f"there is no softcache {words[0]}"
    with pytest.MonkeyPatch.context() as patch:  # --track opens trackers, which need not be installed
        patch.setattr("softcache.runs.tracking.tracking", lambda names: nullcontext())
        return command.make_context(words[0], words[1:])


@pytest.mark.parametrize(("page", "command"), SHOWN, ids=ids(SHOWN))
def test_every_command_shown_is_one(page, command):
    command = re.sub(r"^([A-Z_]+=\S* )+", "", command)
    words = [
        word for word in (shlex.split(command) if command.startswith(OURS) else [command]) if word != "…"
    ]
    if words[0] == "softcache":
        parsed(words[1:])
    elif "softcache" in words:
        parsed(words[words.index("softcache") + 1 :])
    elif words[0] == "make":
        names = [word for word in words[1:] if "=" not in word]
        assert set(names) <= set(TARGETS), f"{page.name}: {command}"
        makefile = (ROOT / "Makefile").read_text()
        for word in set(words[1:]) - set(names):
            assert re.search(rf"\$\({word.split('=')[0]}\)|^{word.split('=')[0]} ", makefile, re.M), word
    elif words[:2] == ["python", "-m"]:
        assert find_spec(words[2]) is not None, f"{page.name}: {command}"
    elif words[0] == "python":
        shown = {block.file for block in blocks(page.read_text())}
        assert words[1] in shown or (ROOT / words[1]).is_file(), f"{page.name}: {command}"


def examples_of_help():
    """The commands of the examples in every --help."""
    for name in COMMANDS:
        text = softcache.get_command(click.Context(softcache), name).help
        yield from re.findall(r"^ *(softcache .*?)(?:  .*)?$", text.partition("Example:")[2], re.M)


@pytest.mark.parametrize("command", sorted(set(examples_of_help())))
def test_the_examples_of_help_are_commands(command):
    parsed(shlex.split(command)[1:])


INLINE = [
    (page, command.replace("\n", " "))
    for page in PAGES
    for command in re.findall(r"(?<!`)`(softcache [a-z-]+ [^`]*)`(?!`)", page.read_text())
    if "…" not in command and command.replace("\n", " ") not in dict.fromkeys(c for _, c in SHOWN)
]


@pytest.mark.parametrize(("page", "command"), INLINE, ids=ids(INLINE))
def test_options_named_in_a_sentence_exist(page, command):
    name, *words = shlex.split(command)[1:]
    real = {option for p in softcache.get_command(click.Context(softcache), name).params for option in p.opts}
    assert {word.partition("=")[0] for word in words if word.startswith("-")} <= real | {"--help"}


FRAGMENTS = [(page, block.text) for page, block in BLOCKS if block.language == "python"]


@pytest.mark.parametrize(("page", "text"), FRAGMENTS, ids=ids((p, t[:40]) for p, t in FRAGMENTS))
def test_what_python_blocks_import_is_there(page, text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for name in node.names:
                import_module(name.name)
        elif isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] not in NOT_HERE:
            for name in node.names:
                assert hasattr(import_module(node.module), name.name), (
                    f"{page.name}: {node.module}.{name.name}"
                )


# -- what is shown is run ----------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_is_run_or_excused_by_name(page):
    for block in blocks(page.read_text()):
        for command in block.commands:
            reason = block.reason(command)
            assert reason is None or reason in REASONS, f"{reason} is none of {', '.join(REASONS)}"
            assert reason or block.added is not None, (
                f"{name_of(page)}: {command}: nothing runs it; give the page a <!-- test: run … -->, or the block "
                "a <!-- test: skip REASON --> (tests/support/docs_pages.py)"
            )


FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
TUTORIALS = [page for page in PAGES if page.parent.name == "tutorial"]


def pages_run():
    for page in PAGES:
        run = page not in TUTORIALS and [block for block in blocks(page.read_text()) if block.is_run]
        if run:
            long = any(block.at_length for block in run)
            yield pytest.param(page, marks=[pytest.mark.pages] if long else [], id=name_of(page))


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    """A folder of the tokenizers that the pages train, shared by all processes of this run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tokenizers"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def shell(tmp_path, tokenizers, monkeypatch):
    for name in ("configs", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "runs/data").mkdir(parents=True)
    (tmp_path / "runs/data/tokenizers").symlink_to(tokenizers)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SOFTCACHE_MEMMAP_DIR", str(tmp_path / "thaw"))
    monkeypatch.setenv("SOFTCACHE_RUNS_DIR", str(tmp_path / "local-runs"))
    with Shell(tmp_path) as shell:
        yield shell


@pytest.mark.parametrize("page", list(pages_run()))
def test_a_page_can_be_followed(page, shell, request):
    found = blocks(page.read_text())
    if any("fashion" in block.text for block in found if block.is_run) and not FASHION_MNIST.is_dir():
        pytest.skip(f"{FASHION_MNIST} is missing; `apt install dataset-fashion-mnist` brings it")
    always = {"$PORT": free_port()}
    if any("s3://bucket/" in block.text for block in found if block.is_run):
        always["s3://bucket/"] = request.getfixturevalue("bucket") + "/"
    for block in found:
        follow(replace(block, replacements=(*block.replacements, *always.items())), shell)


def test_the_tutorials_follow_on_from_one_another(shell, monkeypatch):
    """In the order of the site, in one folder, their commands and their Python; each names the next one."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    sections = runpy.run_path(str(ROOT / "docs/pages.py"))["on_config"](SimpleNamespace()).nav
    (shown,) = [section["Tutorials"] for section in sections if "Tutorials" in section]
    pages = [ROOT / "docs" / page for page in shown]
    assert sorted(pages) == TUTORIALS
    names: dict = {}
    for page, following in zip(pages, [*pages[1:], None], strict=True):
        text = page.read_text()
        assert following is None or f"]({following.name})" in text.partition("\nNext: ")[2], page.name
        for block in blocks(text):
            if block.language == "python" and block.file is None:
                exec(compile(block.substitute(block.text), page.name, "exec"), names)
            else:
                follow(block, shell)
    assert names["texts"].manifest.kind == "tokens"


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def follow(block: Block, shell: Shell) -> None:
    """Writes the file that a block shows, or runs its commands and compares their output with that of a console block."""
    if block.file is not None:
        with Path(block.file).open("a") as file:
            file.write("\n\n" * (file.tell() > 0) + block.substitute(block.text))
    if not block.is_run:
        return
    shell.added = block.added
    for command in block.before:
        shell.run(block.substitute(command))
    if block.background:
        for command in block.substitute(block.text).splitlines():
            shell.start(command)
    elif "$ " not in (line[:2] for line in block.lines):
        shell.run(block.substitute(block.text))
    else:
        for command, expected in re.findall(
            r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block.substitute("\n".join(block.lines)), re.M
        ):
            printed = shell.run(command)
            assert re.fullmatch(re.escape(expected.strip()).replace("…", ".*"), printed.strip(), re.S), (
                f"{command} prints\n{printed}\nand not\n{expected}"
            )


def test_every_command_is_run_on_some_page():
    run = {
        name
        for _, block in BLOCKS
        for command in block.commands
        if block.added is not None and block.reason(command) is None
        for name in re.findall(r"softcache ([a-z-]+)", command)
    }
    assert run == set(COMMANDS)


# -- the reading of pages, and the shell -------------------------------------------------------------------

TEXT = """
Text.

    softcache gc A  # why
    softcache materialize B \\
        --views 1

<!-- test: run with train.epochs=1 --rounds=1 -->
<!-- test: where A is b/c -->

So: `a.py`:

```python
x = 1
```

<!-- test: before softcache train-teacher -->
<!-- test: skip gpu vllm -->

    vllm serve A
    for n in 1 2; do
      softcache gc A/$n | cat
    done

```console
$ softcache gc A
nothing
```

<!-- test: run at length -->

    {"a": 1}
"""


def test_blocks_are_found_with_their_comments():
    one, two, three, four, five = blocks(TEXT)
    assert one.commands == ["softcache gc A", "softcache materialize B --views 1"]
    assert (one.added, one.is_run) == (None, False)
    assert (two.language, two.text, two.file, two.commands) == ("python", "x = 1\n", "a.py", [])
    assert three.commands == ["vllm serve A", "softcache gc A/$n"]
    assert [three.reason(command) for command in three.commands] == ["gpu", None]
    assert three.substitute(three.text) == "for n in 1 2; do\n  softcache gc b/c/$n | cat\ndone\n"
    assert (three.added, three.before) == (("train.epochs=1", "--rounds=1"), ("softcache train-teacher",))
    assert (four.before, four.skipped, four.commands) == ((), (), ["softcache gc A"])
    assert (five.added, five.at_length, five.is_shell) == ((), True, False)
    with pytest.raises(ValueError, match=r"runn -->: expected run, where"):
        blocks("<!-- test: runn -->\n")


def test_the_parser_sees_what_is_wrong():
    for wrong in (["verify", "cache", "--nothing"], ["inspect"], ["shrink", "a", "b", "--codec", "zip"]):
        with pytest.raises(click.UsageError, match=r"(?i)no such option|missing parameter|is not one of"):
            parsed(wrong)


def test_options_that_a_command_sets_itself_stay():
    command = softcache.get_command(click.Context(softcache), "compare")
    added = ("train.epochs=1", "labels.k=2", "--seeds=1", "--rounds=1")
    words = ["--config", "c.toml", "--set", "labels.k=5"]
    assert missing_options(command, words, added) == ["--set", "train.epochs=1", "--seeds=1"]
    assert missing_options(command, ["--seeds", "3"], added[2:]) == []


def test_the_shell_runs_loops_and_pipes_and_fails_as_a_command_fails(shell):
    assert shell.run("for n in 1 2; do softcache doctor --json; done | wc -l").strip() == "2"
    with pytest.raises(AssertionError, match=r"(?s)status 1 of.*softcache gc nothing.*softcache: .*nothing"):
        shell.run("softcache gc nothing")
    with pytest.raises(AssertionError, match=r"(?s)status 2.*No such option"):
        shell.run("softcache gc --nothing")
    with pytest.raises(AssertionError, match=r"there is no extra clouds"):
        shell.run("pip install 'softcache[clouds]'")


def test_what_a_console_block_prints_is_compared(shell):
    follow(Block("console", "$ echo one two\none …\n$ echo a\na\n", added=()), shell)
    with pytest.raises(AssertionError, match=r"(?s)echo one prints\s+one\s+and not\s+two"):
        follow(Block("console", "$ echo one\ntwo\n", added=()), shell)
