"""The rank of this process and their number, from the launcher's environment variables; imports no torch.

torchrun and `accelerate launch` set RANK and WORLD_SIZE, MPI launchers have names of their own. Only the first
process of a run speaks and writes; see `softcache.runtime.distributed` for how the processes find each other.
"""

from __future__ import annotations

import os

__all__ = ["is_rank_zero", "num_ranks", "rank"]

# In the order in which accelerate looks for them.
_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_SIZE = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def rank() -> int:
    """Returns this process's number, from 0; 0 where a run has one process."""
    return _first_number(_RANK, 0) if num_ranks() > 1 else 0


def num_ranks() -> int:
    """Returns how many processes the run was started with."""
    return max(1, _first_number(_SIZE, 1))


def is_rank_zero() -> bool:
    """Returns whether this is the process that prints, writes and exports."""
    return rank() == 0


def _first_number(names: tuple[str, ...], default: int) -> int:
    for name in names:
        if (found := os.environ.get(name, "")).isdecimal():
            return int(found)
    return default
