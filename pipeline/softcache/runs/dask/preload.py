"""Runs when a local worker process starts: Ctrl-C in a terminal reaches it, too, and it leaves that to the driver."""

from contextlib import ExitStack
from typing import Any

from softcache.runs.dask.cluster import redirect_dask_logs
from softcache.runtime.signals import ignore_interrupts

__all__ = ["dask_setup"]

_UNTIL_THE_END = ExitStack()


def dask_setup(worker: Any) -> None:
    """Called by Dask in the worker's main thread."""
    ignore_interrupts()
    _UNTIL_THE_END.enter_context(redirect_dask_logs())
