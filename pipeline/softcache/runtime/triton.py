"""Whether kernels in Triton are used."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, wraps
from importlib.util import find_spec
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from softcache.runtime.jit import compiled_is_on

if TYPE_CHECKING:
    from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

__all__ = ["is_triton_on", "on_its_device"]


@cache
def _is_installed() -> bool:
    return find_spec("triton") is not None


def is_triton_on(tensor: Tensor) -> bool:
    """Whether kernels in Triton take the place of torch's operations for a tensor: on CUDA or ROCm, where it is installed.

    Not with SOFTCACHE_COMPILED=0 in the environment, nor where Triton only interprets (TRITON_INTERPRET=1).
    """
    return (
        tensor.device.type == "cuda"
        and compiled_is_on()
        and os.environ.get("TRITON_INTERPRET", "0") in ("", "0")
        and _is_installed()
    )


def on_its_device(function: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """Has a function launch kernels on the device of its first argument, whichever of several is the current one."""

    @wraps(function)
    def call(tensor: Tensor, *args: P.args, **more: P.kwargs) -> R:
        import torch

        with torch.cuda.device_of(tensor):
            return function(tensor, *args, **more)

    return call
