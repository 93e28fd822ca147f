"""Processes of one run, started as a launcher starts them (RANK, WORLD_SIZE and so on), but forked from a warm server.

A torchrun of two processes takes ten seconds of both cores to import what these have at hand.
"""

import itertools
import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple


class Ended(NamedTuple):
    """How a process ended: its exit code, what it printed, and what its function returned."""

    code: int
    out: str
    err: str
    value: object


def run_ranks(folder, count, function, *arguments, seconds=200.0, grace_seconds=30.0):
    """Calls `function(rank, *arguments)` in `count` processes of one run; returns how each ended.

    When one has failed, the others have `grace_seconds` to end as well; those that have not, then or after `seconds`, are
    killed, and their code is -9. What a process raised is on its stderr.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    launched = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    launched |= {"MASTER_PORT": str(port)}
    context = multiprocessing.get_context("forkserver")
    processes = []
    for rank in range(count):
        environment = dict(os.environ) | launched | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = context.Process(target=_rank, args=(folder, rank, environment, function, arguments))
        process.start()
        processes.append(process)
    deadline, failed = time.monotonic() + seconds, False
    while running := [process for process in processes if process.is_alive()]:
        wait([process.sentinel for process in running], timeout=max(0.0, deadline - time.monotonic()))
        if not failed and any(process.exitcode for process in processes):
            failed, deadline = True, min(deadline, time.monotonic() + grace_seconds)
        if time.monotonic() >= deadline:
            for process in running:
                process.kill()
                process.join()
    return [_ended(folder, rank, process.exitcode) for rank, process in enumerate(processes)]


def _free_port():
    """Returns a port that nothing listens on, below those that the system gives out: none of them is taken meanwhile."""
    for port in _PORTS:
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port
    raise OSError("no port is free")


_PORTS = itertools.count(20_000 + 1_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]))


def _rank(folder, rank, environment, function, arguments):
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    import torch

    torch.set_num_threads(1)
    code = 0
    try:
        value = function(rank, *arguments)
        (folder / f"{rank}.pickle").write_bytes(pickle.dumps(value))
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # closes the connections, as the end of any process does


def _ended(folder, rank, code):
    value = folder / f"{rank}.pickle"
    return Ended(
        code,
        (folder / f"{rank}.out").read_text(),
        (folder / f"{rank}.err").read_text(),
        pickle.loads(value.read_bytes()) if value.exists() else None,
    )
