"""A model's own forward, taught to run a loss: so that DDP and mixed precision, which wrap it, see the loss too."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


__all__ = ["Call", "patched_forward"]


@dataclass(frozen=True)
class Call:
    """What a taught forward runs in place of its own."""

    run: Callable[[], Any]


def patched_forward(model: Any) -> Any:
    """Returns the model, its forward able to run a `Call`.

    It knows neither trainer nor loss, so that one model may see several trainers, and a copy of a model runs on its own
    weights.
    """
    original = model.forward
    if hasattr(original, "_runs_calls"):
        return model
    is_method = getattr(original, "__self__", None) is model
    function = original.__func__ if is_method else None

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], Call):
            return args[0].run()
        return function(self, *args, **kwargs) if function is not None else original(*args, **kwargs)

    # Trainer, generate() and peft read what a forward takes. (No __wrapped__: accelerate would unwrap it.)
    taken = inspect.signature(function or original)
    if not is_method:
        me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        rest = [
            p.replace(kind=max(p.kind, inspect.Parameter.POSITIONAL_OR_KEYWORD))
            for p in taken.parameters.values()
        ]
        taken = taken.replace(parameters=[me, *rest])
    forward.__signature__ = taken  # type: ignore[attr-defined]
    forward.__doc__ = original.__doc__
    forward._runs_calls = True  # type: ignore[attr-defined]
    model.forward = MethodType(forward, model)
    return model
