"""Libraries of the extra `text`, imported when they are needed: a run on images goes without."""

from __future__ import annotations

import importlib
from typing import Any

from softcache.errors import MissingExtraError

__all__ = ["auto_tokenizer", "text_library"]


def text_library(module: str) -> Any:
    """Returns a module of a library that only texts need.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"source: it needs the package {module} ({error}); pip install 'softcache[text]'"
        ) from error


def auto_tokenizer(name: str, *, of: str, **hub: Any) -> Any:
    """Returns the tokenizer that transformers loads from a folder or a hub name.

    Args:
        name: of the folder, or on the hub.
        of: what the tokenizer is of, for messages.
        hub: `revision` and `subfolder` of a hub name.

    Raises:
        MissingExtraError: it needs a package that is not installed, as Marian's needs sentencepiece.
        Exception: of any kind that transformers raises where there is none.
    """
    try:
        library = text_library("transformers")
        return library.AutoTokenizer.from_pretrained(name, trust_remote_code=False, **hub)
    except MissingExtraError:
        raise
    except ImportError as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise MissingExtraError(
            f"{of}: its tokenizer cannot be loaded: {reason}; pip install 'softcache[translation]'"
        ) from error
