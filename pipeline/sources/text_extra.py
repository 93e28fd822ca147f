"""Libraries of the extra `text`, imported when they are needed: a run on images goes without."""

from __future__ import annotations

import importlib
from typing import Any

from pipeline.errors import MissingExtraError

__all__ = ["text_library"]


def text_library(module: str) -> Any:
    """Returns a module of a library that only texts need.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"text source: it needs the package {module} ({error}); pip install 'softcache[text]'"
        ) from error
