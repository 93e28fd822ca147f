"""The processes that train one student: how they find each other, and how an error of one ends them all.

    torchrun --nproc-per-node 4 -m softcache train-student …

A process that fails claims the error report in the launcher's store before its connections close, and prints its message;
the others, whose next exchange then fails, find the report claimed and exit silently. So a run prints one message. For one
that is killed, the first of the others to notice prints it. A process that hangs is noticed by the timeout.

Rank and number of the processes come from the launcher's environment variables: torchrun and `accelerate launch` set RANK
and WORLD_SIZE. Those of MPI launchers and of `srun` (`_LAUNCHERS`) count where MASTER_ADDR is set, too: without an address
there is no group, and such processes are independent jobs, each of them the first of one. torch and accelerate are imported
where a process needs them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from softcache.errors import LostProcessError, RunError

if TYPE_CHECKING:
    from accelerate import PartialState

__all__ = [
    "broadcast_from_rank0",
    "check_same",
    "claim_error_report",
    "describe_independence",
    "is_rank_zero",
    "join",
    "leave",
    "max_over_ranks",
    "num_ranks",
    "on_cpu",
    "rank",
    "translate_errors",
]

STORE_SECONDS = 10.0
# What gloo and the store say when the other end is gone or silent; NCCL has an error class of its own.
_BROKEN = ("gloo", "Connection closed", "Connection reset", "Timed out waiting", "Broken pipe")
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)
"""What others than torchrun call a process's number, how many there are, and its number on its machine. Of Slurm the step's:
SLURM_NTASKS is that of the job, and a batch script, which is one process, has it."""
MASTER_PORT = "29500"


def rank() -> int:
    """Returns this process's number, from 0; 0 where a run has one process."""
    names = _launcher()
    return _number(names[0], 0) if names is not None and num_ranks() > 1 else 0


def num_ranks() -> int:
    """Returns how many processes the run was started with."""
    names = _launcher()
    return 1 if names is None else max(1, _number(names[1], 1))


def _launcher() -> tuple[str, str, str] | None:
    """Returns the names of the variables by which the launcher of this run numbers its processes; None without one."""
    known = (_TORCHRUN, *_LAUNCHERS) if os.environ.get("MASTER_ADDR") else (_TORCHRUN,)
    return next((names for names in known if os.environ.get(names[1], "").isdecimal()), None)


def describe_independence() -> str:
    """Returns why processes that a launcher started together are separate runs; nothing for any other process."""
    if os.environ.get("MASTER_ADDR") or num_ranks() > 1:
        return ""
    found = next((names[1] for names in _LAUNCHERS if _number(names[1], 1) > 1), None)
    if found is None:
        return ""
    return (
        f"; the launcher set {found}={os.environ[found]} and no MASTER_ADDR, so its processes are independent runs: for one "
        "run on all of them use torchrun or `accelerate launch`, or set MASTER_ADDR and MASTER_PORT"
    )


def _speak_as_torchrun() -> None:
    """Sets for torch and accelerate what torchrun sets, which is all that they read on GPUs."""
    names = _launcher()
    if num_ranks() > 1 and names is not None and names != _TORCHRUN:
        os.environ.update(
            zip(_TORCHRUN, (str(rank()), str(num_ranks()), str(_number(names[2], rank()))), strict=True)
        )
        os.environ.setdefault("MASTER_PORT", MASTER_PORT)


@contextmanager
def _without_mpi() -> Iterator[None]:
    """Hides the variables of an MPI launcher, which accelerate would take for those of a group."""
    names = () if os.environ.get("MASTER_ADDR") else [names[1] for names in _LAUNCHERS]
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def is_rank_zero() -> bool:
    """Returns whether this is the process that prints, writes and exports."""
    return rank() == 0


def _number(name: str, default: int) -> int:
    found = os.environ.get(name, "")
    return int(found) if found.isdecimal() else default


def on_cpu(device: str) -> bool:
    """Returns whether a run keeps to CPUs: by setting, or because it has several processes and no accelerator for them.

    accelerate looks for a group over gloo only where it is asked to; one process finds its device by itself.

    Args:
        device: `train.device`, "auto" or "cpu".
    """
    import torch

    return device == "cpu" or (num_ranks() > 1 and not torch.accelerator.is_available())


def join(*, cpu: bool, timeout_seconds: float) -> PartialState:
    """Returns accelerate's state of this process, which is in its run's group from then on.

    Args:
        cpu: leave GPUs alone, and talk through gloo.
        timeout_seconds: after so long without an answer from another process, an exchange fails.

    Raises:
        RunError: the launcher started several processes that do not form a group.
    """
    from accelerate import PartialState

    if num_ranks() > 1 and not os.environ.get("MASTER_ADDR"):
        raise RunError(
            f"the launcher set WORLD_SIZE={num_ranks()} and no MASTER_ADDR, so its processes cannot find each other; start "
            "them with torchrun or `accelerate launch`, set MASTER_ADDR and MASTER_PORT, or unset WORLD_SIZE"
        )
    _speak_as_torchrun()
    options = {"timeout": timedelta(seconds=timeout_seconds)} if num_ranks() > 1 else {}
    with translate_errors(), _without_mpi():
        state = PartialState(cpu=cpu, **options)
    if state.num_processes != num_ranks():
        raise RunError(
            f"process {rank()}: the launcher set {num_ranks()} processes (WORLD_SIZE), accelerate finds "
            f"{state.num_processes}; start them with torchrun or `accelerate launch`, which set LOCAL_RANK too"
        )
    return state


def leave() -> None:
    """Leaves the group, if this process is in one."""
    if num_ranks() > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()


@contextmanager
def translate_errors() -> Iterator[None]:
    """Turns what an exchange raises when another process is gone or silent into a `LostProcessError`."""
    try:
        yield
    except RuntimeError as error:
        if num_ranks() == 1 or not _is_broken(error):
            raise
        silent = "timed out" in str(error).lower()
        raise LostProcessError(
            f"process {rank()} of {num_ranks()}: another process of this run "
            f"{'does not answer' if silent else 'has ended without a word (killed, or out of memory)'}; all of them stop; "
            "the same command, with any number of processes, goes on from the last checkpoint"
        ) from error


def _is_broken(error: RuntimeError) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or any(part in str(error) for part in _BROKEN)


def claim_error_report() -> bool:
    """Returns whether no other process of this run has failed before; to be asked once by a process that fails.

    Where no store can be reached (no launcher's, and no group yet), each process is the first: a message that comes
    twice is better than one that is lost.
    """
    if num_ranks() == 1:
        return True
    import torch.distributed as dist

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and not dist.is_initialized():
        return True
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=STORE_SECONDS),
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return store.add(f"softcache/failed/{attempt}", 1) == 1
    except (KeyError, ValueError, RuntimeError):
        return True


def broadcast_from_rank0(value: Any) -> Any:
    """Returns the first process's value, on every process; each gives its own."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def max_over_ranks(number: int, *, device: Any) -> int:
    """Returns the largest of a number over all processes of a group, each of which calls this with its own."""
    import torch
    import torch.distributed as dist

    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def check_same(what: str, value: dict[str, Any]) -> None:
    """Raises unless every process of the run has the same value.

    Raises:
        RunError: the first process has another one; the keys that differ are named.
    """
    if num_ranks() == 1:
        return
    first = broadcast_from_rank0(value)
    differing = sorted(key for key in set(first) | set(value) if first.get(key) != value.get(key))
    if differing:
        differences = "; ".join(f"{key}: {first.get(key)!r}; {value.get(key)!r}" for key in differing)
        raise RunError(
            f"process {rank()} of {num_ranks()}: {what} differs from that of process 0 (there; here): {differences}; give "
            "all processes the same config, cache and data"
        )
