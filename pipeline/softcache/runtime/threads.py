"""How long the threads of torch's operations on the CPU keep a core without work."""

from __future__ import annotations

import os

__all__ = ["share_cores"]

_SPINS = "10000"


def share_cores() -> None:
    """Has torch's threads leave their cores half a millisecond after an operation; call it before torch is imported.

    libgomp, the OpenMP of torch's wheels for Linux, has a thread without work look for some in a loop, 300,000 times by
    default, which is 7 ms. Label records, which are made between two operations of a teacher, then share their cores with
    threads that wait. Nothing changes where `GOMP_SPINCOUNT` or `OMP_WAIT_POLICY` is set.
    """
    if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        os.environ["GOMP_SPINCOUNT"] = _SPINS
