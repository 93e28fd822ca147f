"""Dask's warnings as lines of ours, in the driver and in local workers, so that a log of JSON objects stays one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from softcache.runtime.logging import log_info

__all__ = ["redirect_dask_logs"]


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "CancelledError" not in text:  # of a unit that the driver abandons: it knows
            log_info(f"dask: {text}")


@contextmanager
def redirect_dask_logs() -> Iterator[None]:
    """Within, what Dask logs from warnings on goes through `log_info`."""
    logger = logging.getLogger("distributed")
    handlers, propagate, level = logger.handlers[:], logger.propagate, logger.level
    logger.handlers, logger.propagate = [_Lines(logging.WARNING)], False
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
