"""Dask's warnings as lines of ours, in the driver and in local workers, so that a log of JSON objects stays one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from softcache.runtime.logging import say

__all__ = ["dask_as_lines"]


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "CancelledError" not in text:  # of a unit that the driver abandons: it knows
            say(f"dask: {text}")


@contextmanager
def dask_as_lines() -> Iterator[None]:
    """Within, what Dask logs from warnings on goes through `say`."""
    logger = logging.getLogger("distributed")
    handlers, propagate, level = logger.handlers[:], logger.propagate, logger.level
    logger.handlers, logger.propagate = [_Lines(logging.WARNING)], False
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
