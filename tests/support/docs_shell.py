"""A shell for the documentation's commands: bash, in which softcache starts at once.

Starting Python and torch takes seconds, and the pages have some two hundred commands. So in this shell `softcache`,
`python -m benchmarks.NAME`, `python FILE.py` and `pip` are a small client that sends its arguments, folder and environment to
this process, which runs the command and returns the output; FILE.py runs in a fork of a server that has imported torch. All else
is what a reader's shell would run: loops, pipes, variables, make with this repository's Makefile, torchrun. `pip install`
installs nothing; it checks that the extra exists.
"""

import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import tomllib
from importlib import import_module, invalidate_caches
from pathlib import Path
from unittest import mock

import click
import torch
from click.testing import CliRunner

from softcache.errors import SoftcacheError
from softcache.runtime.logging import set_log_format
from softcache.stages.cli import softcache
from tests.support.caches import ROOT
from tests.support.programs import run_program

LIMIT_SECONDS = 500
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
CLIENT = f"""#!{sys.executable} -IS
import json, os, socket, sys
words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
ours = words[1:2] == ["-m"] and words[2].partition(".")[0] in ("benchmarks", "softcache")
if words[0] == "python" and not ours and not "".join(words[1:2]).endswith(".py"):
    os.execv({sys.executable!r}, [{sys.executable!r}, *words[1:]])
with socket.socket(socket.AF_UNIX) as server, server.makefile("rw") as file:
    server.connect(os.environ["DOCS_SHELL"])
    file.write(json.dumps([words, os.getcwd(), dict(os.environ)]) + "\\n")
    file.flush()
    out, err, code = json.loads(file.readline())
sys.stderr.write(err)
sys.stderr.flush()
sys.stdout.write(out)
sys.stdout.flush()
sys.exit(code)
"""


class Shell:
    """Runs scripts in a folder.

    Attributes:
        added: settings (`train.epochs=1`) and options (`--rounds=1`) for every command of softcache that has them and
            does not set them itself.
        ran: the arguments of every command of softcache that was run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.added, self.ran = folder, (), []
        self._places = tempfile.TemporaryDirectory(prefix="docs-")  # a socket's path must be short
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"{self._places.name}/s")
        self._listener.listen()
        self._background: list[subprocess.Popen] = []
        bins = folder / ".venv/bin"  # where the Makefile looks
        bins.mkdir(parents=True)
        for name in ("softcache", "python", "pip"):
            (bins / name).write_text(CLIENT)
            (bins / name).chmod(0o755)
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, folder)
        (folder / ".venv/.installed").touch()
        path = [str(bins), str(Path(sys.executable).parent), os.environ["PATH"]]
        self._environment = {"PATH": os.pathsep.join(path), "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
        self._environment |= {"DOCS_SHELL": f"{self._places.name}/s", "REPOSITORY": str(ROOT)}

    def __enter__(self) -> "Shell":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._background:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._listener.close()
        self._places.cleanup()

    def start(self, script: str) -> None:
        """Starts a script in the background, until this shell is closed. It must not need softcache."""
        command = ["bash", "-c", script]
        log = (self.folder / "background.txt").open("ab")
        self._background.append(
            subprocess.Popen(
                command,
                cwd=self.folder,
                env=os.environ | self._environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        )

    def run(self, script: str) -> str:
        """Runs a script to its end and returns its stdout.

        Raises:
            AssertionError: it ended with another status than 0, or took too long.
        """
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            bash = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", script],
                cwd=self.folder,
                env=os.environ | self._environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
            code = self._serve(bash)
            for file in (out, err):
                file.seek(0)
            printed = out.read()
            assert code == 0, f"status {code} of\n{script}\nstdout:\n{printed}\nstderr:\n{err.read()}"
        return printed

    def _serve(self, bash: subprocess.Popen) -> int | str:
        waited = 0.0
        try:
            while bash.poll() is None:
                if select.select([self._listener], [], [], 0.02)[0]:
                    self._answer(self._listener.accept()[0])
                elif (waited := waited + 0.02) > LIMIT_SECONDS:
                    return f"none after {LIMIT_SECONDS} s"
            return bash.returncode
        finally:
            if bash.poll() is None:
                os.killpg(bash.pid, signal.SIGKILL)
                bash.wait()

    def _answer(self, client: socket.socket) -> None:
        with client, client.makefile("rw") as file:
            words, folder, environment = json.loads(file.readline())
            here = Path.cwd()
            os.chdir(folder)
            try:
                with mock.patch.dict(os.environ, environment):
                    answer = self._do(words)
            finally:
                os.chdir(here)
                set_log_format("text")
                torch.set_num_threads(1)
                for name, module in list(
                    sys.modules.items()
                ):  # the next command imports the reader's files again
                    if str(getattr(module, "__file__", "")).startswith(f"{self.folder}{os.sep}"):
                        del sys.modules[name]
                invalidate_caches()
            file.write(json.dumps(answer) + "\n")

    def _do(self, words: list[str]) -> tuple[str, str, int]:
        """Returns stdout, stderr and exit status of one command."""
        self.ran.append(words)
        if words[0] == "pip":
            extras = {name for word in words for name in re.findall(r"softcache\[([\w,]+)\]", word)}
            wrong = {name for names in extras for name in names.split(",")} - EXTRAS
            return "", f"there is no extra {', '.join(wrong)}\n" if wrong else "", int(bool(wrong))
        if words[0] == "python" and words[1] != "-m":
            code = f"import runpy; runpy.run_path({words[1]!r}, run_name='__main__')"
            done = run_program(code, *words[2:], cwd=os.getcwd())
            return done.stdout, done.stderr, done.returncode
        if words[0] == "softcache" or words[2] == "softcache":
            words = words[1:] if words[0] == "softcache" else words[3:]
            command = softcache.get_command(click.Context(softcache), words[0]) if words else None
            runs: click.Command = softcache
        else:
            module = "benchmarks.__main__" if words[2] == "benchmarks" else words[2]
            runs = command = import_module(module).main
            words = words[3:]
        added = [] if command is None else missing_options(command, words, self.added)
        result = CliRunner().invoke(runs, [*words, *added])
        error = result.exception
        if isinstance(error, SoftcacheError):
            return result.stdout, f"{result.stderr}softcache: {error}\n", 1
        text = "" if error is None or isinstance(error, SystemExit) else f"{error!r}\n"
        return result.stdout, result.stderr + text, result.exit_code


def missing_options(command: click.Command, words: list[str], added: tuple[str, ...]) -> list[str]:
    """Returns those of the added settings and options that a command has and that its arguments do not set."""
    options = {name for parameter in command.params for name in parameter.opts}
    takes_settings = any(parameter.name == "overrides" for parameter in command.params)
    given = {word.split("=")[0] for word in words}
    found = []
    for word in added:
        name = word.split("=")[0]
        if name in given:
            continue
        if name.startswith("--") and name in options:
            found.append(word)
        elif not name.startswith("--") and takes_settings:
            found += ["--set", word]
    return found
