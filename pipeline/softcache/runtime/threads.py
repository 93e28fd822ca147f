"""How long the threads of torch's operations on the CPU keep a core without work."""

from __future__ import annotations

import os

__all__ = ["share_cores"]

_SPINS = "10000"


def share_cores() -> None:
    """Has torch's threads leave their cores half a millisecond after an operation; call it before torch is imported.

    libgomp, the OpenMP of torch's wheels for Linux, has a thread without work look for some in a loop, 300,000 times by
    default, which is 7 ms: longer than a small student's step. What else there is to do, such as reading the next batch and
    making label records, then shares a core with a thread that waits. Nothing changes where the environment says how to
    wait.
    """
    if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        os.environ["GOMP_SPINCOUNT"] = _SPINS
