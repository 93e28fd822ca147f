"""Compiled functions: threads may call them for the first time at once."""

import threading

import numpy as np

from softcache.runtime import jit


def double(values):
    return values * 2


def test_one_thread_compiles_at_a_time(monkeypatch):
    """numba's registries are generators, which break when two threads load compiled code at once."""
    function = jit.compiled(double)
    inside, most, lock = 0, 0, threading.Lock()
    load = function._cache.load_overload

    def counted(*arguments):
        nonlocal inside, most
        with lock:
            inside, most = inside + 1, max(most, inside + 1)
        try:
            return load(*arguments)
        finally:
            with lock:
                inside -= 1

    monkeypatch.setattr(function._cache, "load_overload", counted)
    kinds = [np.int8, np.int16, np.int32, np.int64, np.float32, np.float64]
    threads = [threading.Thread(target=function, args=(np.ones(3, kind),)) for kind in kinds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, len(function.signatures)) == (1, len(kinds))
    assert function(np.ones(3, np.int8)).tolist() == [2, 2, 2]
