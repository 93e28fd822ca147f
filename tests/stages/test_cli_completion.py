"""Completion with Tab: lines typed in real shells, and what the shells show."""

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from softcache.runs.export import ExportSettings
from softcache.stages import export
from softcache.stages.cli import softcache
from softcache.stages.commands import COMMANDS
from tests.support.caches import ROOT

# What is typed behind `softcache ` (\t is Tab), and the words that are then there.
TYPED = {
    "verif\t": ["verify"],
    "train-student --no-b\t": ["train-student", "--no-baseline"],
    "shrink one --codec pac\t": ["shrink", "one", "--codec", "packed"],
    "completion z\t": ["completion", "zsh"],
    "verify \t --config some/da\t": ["verify", "runs/small/cache", "--config", "some/data.toml"],
    "verify some/c\t": ["verify", "some/caches/"],
    # Without a completion the line stays as it is, without a traceback.
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


@pytest.fixture
def script(place):
    def write(shell):
        done = CliRunner().invoke(softcache, ["completion", shell])
        assert done.exit_code == 0, done.output
        (place / "script").write_text(done.output)

    return write


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


def test_bash_completes_what_is_typed(place, script):
    """`softcache` is also a function here, which shows its words; the script calls the program."""
    script("bash")
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
def test_other_shells_parse_their_script(place, script, shell):
    script(shell)
    assert "_SOFTCACHE_COMPLETE" in (place / "script").read_text()
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    done = subprocess.run([shell, "--no-execute", "script"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def complete(line, place, *, shell="zsh"):
    """Returns what the program prints for a line whose last word is not finished."""
    code = (
        "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr));"
        "sys.argv = ['softcache']; from softcache.stages.cli import main; main()"
    )
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment(place) | words | {"_SOFTCACHE_COMPLETE": f"{shell}_complete"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "completion"])
def test_completing_a_command_imports_no_torch(place, name):
    done = complete(f"softcache {name} --", place)
    assert "--help" in done.stdout.splitlines()[1::3]
    assert done.stderr == "False\n"


def test_an_unknown_shell_completes_to_nothing(place):
    done = complete("softcache train-student --set", place, shell="none")
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr


def test_defaults_that_are_written_twice_agree():
    settings = ExportSettings(export.TOLERANCE, export.ROUNDS, export.CALIBRATION_SAMPLES)
    assert settings == ExportSettings()
