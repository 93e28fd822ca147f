"""`softcache completion`: lines that are typed in real shells, with Tab, and what becomes of them."""

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time

import pytest

from softcache.stages.completing import SHELLS, script
from softcache.stages.completion_table import PATH, make_table, table_as_text
from tests.support.caches import ROOT

# What is typed behind `softcache ` (\t is Tab), and the words that are then there.
TYPED = {
    "verif\t": ["verify"],
    "train-student --no-b\t": ["train-student", "--no-baseline"],
    "train-student --set lo\tna\tforw\t": ["train-student", "--set", "loss.name=forward_kl"],
    "train-student --set train.lab\tonl\t --set reader.ver\tfa\t": [
        "train-student",
        "--set",
        "train.labels=online",
        "--set",
        "reader.verify=false",
    ],
    "compare --student timm\tresnet18": ["compare", "--student", "timm:resnet18"],
    "compare --student torchv\tresnet18": ["compare", "--student", "torchvision:resnet18"],
    "shrink one --codec pac\t": ["shrink", "one", "--codec", "packed"],
    "completion z\t": ["completion", "zsh"],
    "verify \t --config some/da\t": ["verify", "runs/small/cache", "--config", "some/data.toml"],
    "verify some/c\t": ["verify", "some/caches/"],
    # Nothing to say: the line stays as it is, and nobody sees a traceback.
    "no-such-command x\t": ["no-such-command", "x"],
    "train-student --set no.such.key=\t": ["train-student", "--set", "no.such.key="],
}


@pytest.fixture
def place(in_tmp):
    """A folder with a cache, some files, and the `softcache` that the shells' scripts call."""
    for path in ("runs/small/cache/manifest.json", "some/data.toml", "some/caches/here", "bin/softcache"):
        (in_tmp / path).parent.mkdir(parents=True, exist_ok=True)
        (in_tmp / path).touch()
    program = in_tmp / "bin/softcache"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m softcache "$@"\n')
    program.chmod(0o755)
    return in_tmp


def environment(place):
    kept = {name: os.environ[name] for name in ("HOME", "LD_LIBRARY_PATH") if name in os.environ}
    path = f"{place / 'bin'}:{os.environ['PATH']}"
    return kept | {"PATH": path, "PYTHONPATH": str(ROOT), "TERM": "dumb", "LC_ALL": "C.UTF-8"}


def type_into(command, lines, place):
    """Returns all that an interactive shell shows for lines typed into it."""
    here, there = pty.openpty()
    shell = subprocess.Popen(
        command, stdin=there, stdout=there, stderr=there, cwd=place, env=environment(place), close_fds=True
    )
    os.close(there)
    shown = b""
    try:
        os.write(here, "".join(f"{line}\n" for line in [*lines, "echo E''ND"]).encode())
        deadline = time.monotonic() + 120
        while b"END" not in shown:
            assert select.select([here], [], [], max(0, deadline - time.monotonic()))[0], shown.decode()
            shown += os.read(here, 65536)
    finally:
        shell.kill()
        shell.wait()
        os.close(here)
    return shown.decode()


def test_bash_completes_what_is_typed(place):
    """`softcache` is also a function here, which shows its words; the script calls the program."""
    (place / "script").write_text(script("bash"))
    start = ["bind 'set bell-style none'", "source ./script", """softcache() { printf '[%s]' "$@"; echo; }"""]
    shown = type_into(
        ["bash", "--norc", "--noprofile", "-i"], [*start, *(f"softcache {t}" for t in TYPED)], place
    )
    found = [
        re.findall(r"\[([^]]*)\]", line) for line in shown.splitlines() if re.match(r"\r?\[.*\]\r?$", line)
    ]
    assert found == list(TYPED.values()), shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_parse_their_script(place, shell):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    (place / "script").write_text(script(shell))
    done = subprocess.run([shell, "--no-execute", "script"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def complete(line, place, *, shell="zsh", table=None):
    """Returns what the program prints for a line whose last word is not finished."""
    code = (
        "import sys; from softcache.stages.completing import answer; code = answer(sys.argv[1]);"
        "print({'torch', 'numpy', 'pydantic'} & sys.modules.keys(), file=sys.stderr); sys.exit(code)"
    )
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    return subprocess.run(
        [sys.executable, "-c", code, f"{shell}_complete"],
        env=environment(place) | words,
        capture_output=True,
        text=True,
    )


def test_completing_imports_nothing_heavy(place):
    done = complete("softcache train-student --set loss.temp", place)
    assert done.stdout.splitlines()[1::3] == ["loss.temperature=", "loss.temperature_schedule."]
    assert done.stderr == "set()\n"


def test_words_that_cannot_be_read_complete_to_nothing(place):
    done = complete("softcache 'train-student --set", place, shell="none")
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_the_command_prints_the_script(shell, place):
    done = subprocess.run(
        ["softcache", "completion", shell], env=environment(place), capture_output=True, text=True
    )
    assert done.stdout == script(shell) + "\n"
    assert "nospace" in done.stdout or "-S ''" in done.stdout or shell == "fish"


def test_the_table_is_of_the_commands_and_keys_that_there_are():
    assert PATH.read_text() == table_as_text(make_table()), (
        "a command's options or a config key changed: run `python -m softcache.stages.completion_table` and commit completion.json"
    )
    assert json.loads(PATH.read_text())["config"]["capture.store"] == ["zarr", "parquet"]
