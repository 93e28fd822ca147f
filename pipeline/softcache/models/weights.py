"""Weights of a model: counted, their precision, which of them are trained, and the device that they are placed on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from softcache.errors import SpecError
from softcache.models.spec import parse_spec
from softcache.runtime.logging import log_info

__all__ = [
    "count_parameters",
    "float32_weights",
    "frozen_names",
    "is_adapted",
    "refuse_adapter",
    "select_device",
    "trained_state",
]


def float32_weights(model: nn.Module, spec: str) -> nn.Module:
    """Returns the model of a student with float32 weights, which `train.precision` may still compute with in half precision.

    An update of less than 2^-9 of a weight (bfloat16; 2^-12 float16) is lost when it is added to a half-precision weight,
    and at the learning rates of fine-tuning almost all are. Weights stay in half precision only where the spec asks for
    it by `dtype=`, and a line is printed.
    """
    half = {
        p.dtype for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)
    }
    if not half:
        return model
    if "dtype" not in parse_spec(spec).args:
        return model.float()
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in half))
    log_info(
        f"student {spec}: its weights are {names}, in which updates of less than 2^{-9 if torch.bfloat16 in half else -12} "
        'of a weight are lost; drop dtype from the spec for float32 weights (train.precision = "bf16" computes in bfloat16)'
    )
    return model


def is_adapted(model: nn.Module) -> bool:
    """Returns whether a model, or one inside, has adapters of peft."""
    return any(kind.__module__.startswith("peft.") for part in model.modules() for kind in type(part).__mro__)


def refuse_adapter(spec: str, name: str, **hub: Any) -> None:
    """Raises SpecError where a folder or repository holds an adapter of peft, alone or next to a model.

    transformers would put it onto the model that lies next to it, also where that has it already (merge_and_unload), and
    leaves out parts of it that only peft knows (DoRA).

    Args:
        name: of the folder, or on the hub.
        hub: `revision`, `subfolder` and `cache_dir` of a hub name.
    """
    from transformers.utils import find_adapter_config_file

    if find_adapter_config_file(name, **hub) is not None:
        raise SpecError(
            f"model {spec!r}: {name} has an adapter of peft (adapter_config.json), alone or beside a model that may have it "
            f"already; expected whole weights; peft.PeftModel.from_pretrained(BASE_MODEL, {name!r}).merge_and_unload()"
            ".save_pretrained(NEW_FOLDER) makes them (save the tokenizer there, too); where the adapter is merged already, "
            "remove adapter_config.json; a module:factory may return what peft wraps"
        )


def frozen_names(model: nn.Module) -> set[str]:
    """Returns the names of parameters that training leaves as they are: in a model with adapters, the frozen ones."""
    if not is_adapted(model):
        return set()
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if not parameter.requires_grad}


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns a model's state dict without its frozen names."""
    state: dict[str, torch.Tensor] = model.state_dict()
    for name in frozen_names(model):
        state.pop(name, None)
    return state


def count_parameters(model: nn.Module) -> int:
    """Returns the number of scalars in the model's parameters (buffers not counted)."""
    return sum(parameter.numel() for parameter in model.parameters())


def select_device(name: str) -> torch.device:
    """Returns the device of that name; `auto` takes CUDA, then Apple's MPS, then the CPU.

    Raises:
        SpecError: the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise SpecError(
            f"device {name!r}: not available here ({error}); use auto, cpu, cuda or mps"
        ) from error
