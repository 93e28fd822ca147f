"""The compiled functions that a first capture and a first student of a CPU need, which are compiled while they are set up.

A fresh installation compiles for some 10 seconds of a core, half of it for `fill_records`, which has a process
of its own. `python -m softcache.runtime.kernels` waits for it, as `make setup` does.
"""

from __future__ import annotations

import os

from softcache.runtime.jit import compile_ahead, compiled_is_on

__all__ = ["FUNCTIONS", "compile_kernels"]

_TYPES = {
    "softcache.labels.sparsify.kernels:fill_records": "float32/2/C bool int64 float64/1/C int64/2/C int64/1/C float32/2/C "
    "float32/2/C float32/1/C float32/2/C",
    "softcache.data.transforms.crop_kernel:crop_and_flip": "uint8/4/C int64/1/C int64/1/C bool/1/C int64",
    "softcache.hashing.xxh3:_hashes": "uint8/1/C/const int64/1/C uint64/1/C",
    "softcache.hashing.xxh3:_fingerprints": "uint8/1/C/const int64/1/C uint8/1/C/const uint8/2/C uint64/1/C",
    "softcache.hashing.philox:_uniforms": "uint64 uint64/1/C uint64 int64 int64",
    "softcache.losses.cpu_kernel:mixed_loss": "float32/2/C float32/2/C float32/1/C uint16/2/C int64/1/C float64 float64 "
    "float32/2/C",
}
FUNCTIONS = [(*name.split(":"), *types.split()) for name, types in _TYPES.items()]
"""Module, name and the types of the arguments of each function; the slowest first, then as they are needed."""


def compile_kernels(*, wait: bool = False) -> None:
    """Has processes compile what is not kept yet while this one goes on, or waits for them."""
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"  # of the ranks of a machine
    if not (is_first and compiled_is_on()):
        return
    processes = [compile_ahead(part) for part in (FUNCTIONS[:1], FUNCTIONS[1:])]
    for process in processes if wait else ():
        if process is not None:
            process.wait()


if __name__ == "__main__":
    compile_kernels(wait=True)
