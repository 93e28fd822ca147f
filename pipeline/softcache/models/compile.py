"""Students through `torch.compile`, which needs a compiler on the machine and does not take every model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from softcache.errors import SpecError

__all__ = ["compile_in_place", "explain_compile_errors"]


def compile_in_place(model: nn.Module, device: torch.device) -> None:
    """Has a model's calls compiled from the first on; its class, its parameters' names and its pickles stay.

    Raises:
        SpecError: torch.compile does not work on this machine.
    """
    with explain_compile_errors():
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    model.compile()


@contextmanager
def explain_compile_errors() -> Iterator[None]:
    """Raises errors of torch.compile as SpecError.

    Raises:
        SpecError: torch.compile does not work on this machine, or not for what is called inside.
    """
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    try:
        yield
    except (TorchDynamoException, InductorError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise SpecError(
            f"train.compile: torch.compile does not take this student here: {type(error).__name__}: "
            f"{' '.join(lines)[:300]}; set train.compile = false, or install what it needs (a C++ compiler "
            "on a CPU, Triton on a GPU)"
        ) from error
