"""numba's compiler, so that a function gives the same bits in the process that compiles it and in every later one.

Compiled code is kept next to the module, or in the user's cache folder. numba is imported with the first function that is
compiled, so import modules of compiled functions where they are used. With SOFTCACHE_COMPILED=0 in the environment the
compiled implementations that have another one are not used (`compiled_is_on`).
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

__all__ = ["compiled", "compiled_is_on", "njit_in_subprocess", "njit_inline"]


_COMPILER = threading.RLock()


def compiled_is_on() -> bool:
    """Whether compiled implementations are used where there is another one: unless SOFTCACHE_COMPILED is 0."""
    return os.environ.get("SOFTCACHE_COMPILED", "1") != "0"


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """numba's njit, without the GIL; compiled once and kept, or once for each process where nothing can be written."""
    from numba import njit

    try:
        dispatcher = njit(cache=True, nogil=True, boundscheck=False, **options)(function)
    except RuntimeError:
        dispatcher = njit(nogil=True, boundscheck=False, **options)(function)
    here = dispatcher.compile

    def compile(signature: Any) -> Any:
        # numba loads what it has kept without a lock of its own: two threads at their first calls break its registries.
        with _COMPILER:
            return here(signature)

    dispatcher.compile = compile
    return dispatcher


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
        with _COMPILER:
            if keeps and cache.load_overload(signature, dispatcher.targetctx) is None:
                _compile_elsewhere(function, signature)
            return here(signature)

    dispatcher.compile = compile
    return dispatcher


_COMPILES = "SOFTCACHE_COMPILES"


def _compile_elsewhere(function: Callable[..., Any], signature: Any) -> None:
    """Has another process compile and keep a function; if it cannot, this one will."""
    program = "import sys; from softcache.runtime.jit import _compile_here; _compile_here(*sys.argv[1:])"
    words = [function.__module__, function.__name__, *map(_in_words, signature)]
    here = {_COMPILES: "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with suppress(
        OSError, TypeError
    ):  # TypeError: an interpreter that is part of another program has no executable
        subprocess.run(
            [sys.executable, "-c", program, *words],
            env=os.environ | here,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )


def _compile_here(module: str, name: str, *words: str) -> None:
    getattr(importlib.import_module(module), name).compile(tuple(map(_of_words, words)))


def _in_words(kind: Any) -> str:
    """A number's type, or an array's: float32/2/C/True, with dimensions, layout, and whether it may be written to."""
    from numba import types

    if isinstance(kind, types.Array):
        return f"{kind.dtype}/{kind.ndim}/{kind.layout}/{kind.mutable}"
    return str(kind)


def _of_words(text: str) -> Any:
    from numba import types

    name, *array = text.split("/")
    kind: Any = types.boolean if name == "bool" else getattr(types, name)
    if not array:
        return kind
    layout: Any = array[1]
    return types.Array(kind, int(array[0]), layout, readonly=array[2] == "False")


def njit_inline(function: Callable[..., Any], **options: Any) -> Any:
    """A part of compiled functions, which is kept with each of them and not by itself.

    Out of a cache it would come as machine code, to be called; compiled together, it is merged into its caller, and sums
    that may be taken in any order are taken in another one there.
    """
    from numba import njit

    return njit(nogil=True, boundscheck=False, **options)(function)
