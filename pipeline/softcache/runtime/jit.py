"""numba's compiler, so that a function gives the same bits in the process that compiles it and in every later one.

Compiled code is kept next to the module, or in the user's cache folder. numba is imported with the first function that is
compiled, so import modules of compiled functions where they are used. With SOFTCACHE_COMPILED=0 in the environment the
compiled implementations that have another one are not used (`compiled_is_on`).
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["compile_ahead", "compiled", "compiled_is_on", "njit_in_subprocess", "njit_inline"]


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
        _wait_for_ahead(dispatcher, signature)
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
        _wait_for_ahead(dispatcher, signature)
        with _COMPILER:
            if keeps and cache.load_overload(signature, dispatcher.targetctx) is None:
                _compile_elsewhere(function, signature)
            return here(signature)

    dispatcher.compile = compile
    return dispatcher


_COMPILES = "SOFTCACHE_COMPILES"
_AHEAD: list[subprocess.Popen[bytes]] = []


def compile_ahead(functions: Iterable[Sequence[str]]) -> subprocess.Popen[bytes] | None:
    """Starts a process that compiles and keeps functions; returns it, or None where there is nothing to do.

    What this process needs before it is kept waits for that process and does not compile it again. A function that is kept
    already, as far as file names tell, is left out; nothing is done where numba is not installed.

    Args:
        functions: of each its module, its name and the types of its arguments, as `_type_name` gives them.
    """
    todo = [words for words in functions if not _has_kept(words[0], words[1])]
    if not todo or find_spec("numba") is None or _COMPILES in os.environ:
        return None
    process = _start_compiler(todo)
    if process is not None:
        _AHEAD.append(process)
    return process


def _start_compiler(functions: Sequence[Sequence[str]]) -> subprocess.Popen[bytes] | None:
    """Starts a process that compiles and keeps functions, in their order; None where there can be none."""
    program = (
        "import json, sys; from softcache.runtime.jit import _compile_all; _compile_all(json.load(sys.stdin))"
    )
    here = {_COMPILES: "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            env=os.environ | here,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    except (
        OSError,
        TypeError,
    ):  # TypeError: an interpreter that is part of another program has no executable
        return None
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin as pipe:
        pipe.write(json.dumps(functions).encode())
    return process


def _has_kept(module: str, name: str) -> bool:
    """Whether numba has kept code of a function of softcache's since its module was last changed; numba is not imported."""
    source = Path(__file__).parents[2].joinpath(*module.split(".")).with_suffix(".py")
    elsewhere = os.environ.get("NUMBA_CACHE_DIR")
    if not elsewhere and not os.access(source.parent, os.W_OK):
        return True  # where numba keeps it then is its own affair
    folders = (
        list(Path(elsewhere).glob(f"{source.parent.name}_*"))
        if elsewhere
        else [source.parent / "__pycache__"]
    )
    pattern = f"{source.stem}.{name}-*.py{sys.version_info[0]}{sys.version_info[1]}.nbi"
    kept = (path.stat().st_mtime for folder in folders for path in folder.glob(pattern))
    return any(time >= source.stat().st_mtime for time in kept)


def _wait_for_ahead(dispatcher: Any, signature: Any) -> None:
    """Waits for the processes that compile ahead, until what is needed is kept or they have ended."""
    while _AHEAD:
        cache = dispatcher._cache
        if getattr(cache, "cache_path", None) is None:
            return
        with _COMPILER:
            if cache.load_overload(signature, dispatcher.targetctx) is not None:
                return
        process = next(iter(_AHEAD), None)
        with suppress(subprocess.TimeoutExpired, ValueError):
            if process is not None:
                process.wait(0.1)
                _AHEAD.remove(process)


def _compile_all(functions: list[list[str]]) -> None:
    for module, name, *types in functions:
        with suppress(Exception):  # the process that needs it compiles it, and reports why it cannot be
            getattr(importlib.import_module(module), name).compile(tuple(map(_type_of, types)))


def _compile_elsewhere(function: Callable[..., Any], signature: Any) -> None:
    """Has another process compile and keep a function; if it cannot, this one will."""
    process = _start_compiler([[function.__module__, function.__name__, *map(_type_name, signature)]])
    if process is not None:
        process.wait()


def _type_name(kind: Any) -> str:
    """Returns a number's type, or an array's: float32/2/C, with dimensions and layout; /const where it is read only."""
    from numba import types

    if isinstance(kind, types.Array):
        return f"{kind.dtype}/{kind.ndim}/{kind.layout}{'' if kind.mutable else '/const'}"
    return str(kind)


def _type_of(text: str) -> Any:
    from numba import types

    name, *array = text.split("/")
    kind: Any = types.boolean if name == "bool" else getattr(types, name)
    if not array:
        return kind
    layout: Any = array[1]
    return types.Array(kind, int(array[0]), layout, readonly=array[2:] == ["const"])


def njit_inline(function: Callable[..., Any], **options: Any) -> Any:
    """A part of compiled functions, which is kept with each of them and not by itself.

    Out of a cache it would come as machine code, to be called; compiled together, it is merged into its caller, and sums
    that may be taken in any order are taken in another one there.
    """
    from numba import njit

    return njit(nogil=True, boundscheck=False, **options)(function)
