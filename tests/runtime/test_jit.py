"""Compiled functions: threads may call them for the first time at once; those of a first run are compiled ahead."""

import importlib
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from softcache.runs import train_student
from softcache.runtime import jit, kernels
from tests.support.caches import make_cache


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


def test_what_is_compiled_ahead_is_what_a_first_capture_and_a_first_student_call(tmp_path):
    run, data, cache = make_cache(
        tmp_path / "cache", source={"max_train_samples": 40, "max_eval_samples": 10}, train={"epochs": 1}
    )
    train_student(run, data, model="linear", labels="cache", cache=cache, out=tmp_path / "student")
    for module, name, *types in kernels.FUNCTIONS:
        compiled = getattr(importlib.import_module(module), name)
        called = [tuple(map(jit._type_name, signature)) for signature in compiled.signatures]
        assert tuple(types) in called, name


def test_nothing_is_compiled_ahead_that_is_kept_or_without_a_place_to_keep_it(tmp_path, monkeypatch):
    words = ("softcache.runtime.jit", "double", "int64")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(jit.subprocess, "Popen", lambda *_, **__: pytest.fail("it compiles"))
    (tmp_path / "runtime_0").mkdir()
    kept = tmp_path / f"runtime_0/jit.double-1.py{sys.version_info[0]}{sys.version_info[1]}.nbi"
    kept.touch()
    assert jit.compile_ahead([words]) is None
    os.utime(kept, (0, 0))  # older than the module
    monkeypatch.setattr(jit.subprocess, "Popen", refuse)
    assert jit.compile_ahead([words]) is None, "the process cannot be started: compiled when it is called"


def refuse(*_, **__):
    raise OSError("no more processes")


def test_a_function_that_is_not_kept_yet_waits_for_the_process_that_compiles_ahead(monkeypatch):
    function, waited = jit.compiled(double), []
    monkeypatch.setattr(function._cache, "load_overload", lambda *_: None)

    class Ahead:
        def wait(self, seconds):
            waited.append(seconds)
            if len(waited) < 3:
                raise subprocess.TimeoutExpired("ahead", seconds)

    monkeypatch.setattr(jit, "_AHEAD", [Ahead()])
    assert function(1) == 2
    assert len(waited) == 3
    assert jit._AHEAD == []
