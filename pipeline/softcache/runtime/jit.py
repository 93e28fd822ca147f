"""numba's compiler, so that a function gives the same bits in the process that compiles it and in every later one.

Compiled code is kept next to the module, or in the user's cache folder. numba is imported with the first function that is
compiled, so import modules of compiled functions where they are used. With SOFTCACHE_COMPILED=0 in the environment the
compiled implementations that have another one are not used (`compiled_is_on`).
"""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

__all__ = ["compiled", "compiled_is_on", "njit_in_subprocess", "njit_inline"]


def compiled_is_on() -> bool:
    """Whether compiled implementations are used where there is another one: unless SOFTCACHE_COMPILED is 0."""
    return os.environ.get("SOFTCACHE_COMPILED", "1") != "0"


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """numba's njit, without the GIL; compiled once and kept, or once for each process where nothing can be written."""
    from numba import njit

    try:
        return njit(cache=True, nogil=True, boundscheck=False, **options)(function)
    except RuntimeError:
        return njit(nogil=True, boundscheck=False, **options)(function)


def njit_in_subprocess(function: Callable[..., Any], **options: Any) -> Any:
    """The same, but what is not kept yet is compiled by a process of its own, and run as it was kept.

    numba keeps other machine code than it runs in the process that compiled it: sums that may be taken in any order are
    taken in another one, and the last bits of a record would be those of the first run after an installation.
    """
    dispatcher = compiled(function, **options)
    here = dispatcher.compile

    def compile(signature: Any) -> Any:
        cache = dispatcher._cache  # it has no path where nothing can be kept
        keeps = _COMPILES not in os.environ and getattr(cache, "cache_path", None) is not None
        if keeps and cache.load_overload(signature, dispatcher.targetctx) is None:
            _compile_elsewhere(function, signature)
        return here(signature)

    dispatcher.compile = compile
    return dispatcher


_COMPILES = "SOFTCACHE_COMPILES"


def _compile_elsewhere(function: Callable[..., Any], signature: Any) -> None:
    """Compiles and keeps a function in another process; if that cannot, this one does."""
    program = "from softcache.runtime.jit import _compile_here; _compile_here()"
    here = {_COMPILES: "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # TypeError: an interpreter that is embedded in another program has no executable.
    with suppress(OSError, TypeError):
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | here,
            input=pickle.dumps((function.__module__, function.__name__, signature)),
            capture_output=True,
            check=False,
        )


def _compile_here() -> None:
    module, name, signature = pickle.load(sys.stdin.buffer)
    getattr(importlib.import_module(module), name).compile(signature)


def njit_inline(function: Callable[..., Any], **options: Any) -> Any:
    """A part of compiled functions, which is kept with each of them and not by itself.

    Out of a cache it would come as machine code, to be called; compiled together, it is merged into its caller, and sums
    that may be taken in any order are taken in another one there.
    """
    from numba import njit

    return njit(nogil=True, boundscheck=False, **options)(function)
