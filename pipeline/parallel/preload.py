"""Runs when a local worker process starts: Ctrl-C in a terminal reaches it, too, and it leaves that to the driver."""

from typing import Any

from pipeline.stopping import ignore_interrupts

__all__ = ["dask_setup"]


def dask_setup(worker: Any) -> None:
    """Called by Dask in the worker's main thread."""
    ignore_interrupts()
