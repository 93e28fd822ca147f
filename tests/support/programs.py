"""`python -c` within milliseconds: Python code in a process of its own, forked from a server that has imported torch.

A new interpreter takes three seconds of a core to import torch and softcache.runs. Use one only where the start itself is
tested: what is imported, the hash seed, variables that are read before the first line.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from typing import NamedTuple

from tests.support.caches import ROOT

__all__ = ["Done", "Program", "fork_interpreters", "run_program"]


class Done(NamedTuple):
    """How a program ended: its exit code (the signal's number below 0) and what it printed."""

    returncode: int
    stdout: str
    stderr: str


class Program:
    """A running program, with the names of subprocess.Popen; `stdout` is a text file that is read as it is written."""

    def __init__(self, code, *arguments, cwd=ROOT, env=None):
        context = multiprocessing.get_context("forkserver")
        reader, writer = context.Pipe(duplex=False)
        self.stdout = os.fdopen(os.dup(reader.fileno()))
        self._stderr = tempfile.NamedTemporaryFile("r")  # noqa: SIM115 (open as long as the program)
        words = ["-c", *map(str, arguments)]
        environment = dict(os.environ if env is None else env)
        self._process = context.Process(
            target=_execute, args=(code, words, str(cwd), environment, writer, self._stderr.name)
        )
        self._process.start()
        reader.close()
        writer.close()
        self.pid, self.kill = self._process.pid, self._process.kill

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        """Returns the exit code, or None while it runs."""
        return self._process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def wait(self, timeout=None):
        self._process.join(timeout)
        assert self._process.exitcode is not None, "the program still runs"
        return self._process.exitcode

    def communicate(self):
        """Waits for its end; returns the rest of its stdout, and its stderr."""
        with self.stdout, self._stderr:
            out = self.stdout.read()
            self.wait()
            return out, self._stderr.read()


def run_program(code, *arguments, cwd=ROOT, env=None):
    """Runs code to its end with these arguments in sys.argv; returns how it ended."""
    program = Program(code, *arguments, cwd=cwd, env=env)
    out, err = program.communicate()
    return Done(program.returncode, out, err)


def fork_interpreters(monkeypatch):
    """Has subprocess.run fork what it would start as `python -c` or `python -m` in the environment of this process.

    For benchmarks that measure in new processes: a test shows that they run, and its sizes mean nothing.
    """
    start = subprocess.run

    def run(command, *, cwd=None, env=None, **how):
        if command[0] != sys.executable or command[1] not in ("-c", "-m") or env not in (None, os.environ):
            return start(command, cwd=cwd, env=env, **how)
        _, kind, code, *arguments = command
        if kind == "-m":
            code = f"import runpy; runpy.run_module({code!r}, run_name='__main__')"
        done = run_program(code, *arguments, cwd=cwd or os.getcwd())
        assert done.returncode == 0, done.stderr
        return subprocess.CompletedProcess(command, 0, done.stdout, done.stderr)

    monkeypatch.setattr(subprocess, "run", run)


def _execute(code, words, folder, environment, writer, stderr):
    os.dup2(writer.fileno(), 1)
    writer.close()
    file = os.open(stderr, os.O_WRONLY)
    os.dup2(file, 2)
    os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv, sys.path[:0] = words, [""]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
