"""Where a pretrained model lies: on several devices, the CPU and a disk (`device_map`), or cut over processes (`tp_plan`).

Weights that lie elsewhere are brought by accelerate's hooks when a module runs; those of tensor parallelism are DTensors. A
model in parts reads the head's weight without running the head, and its digest reads all: both are made whole here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from softcache.errors import SpecError
from softcache.runtime.distributed import num_ranks

__all__ = ["Placement", "WholeState", "input_device", "is_placed", "whole_head"]

KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")
"""Ends of names of layers whose output holds the attention keys."""


@dataclass(frozen=True)
class Placement:
    """Arguments of `from_pretrained` for more than one device.

    Attributes:
        device_map: "auto", "balanced", "sequential", or a device for each part of the model: a number, "cpu" or "disk".
        max_memory: of each device, "0" and so on or "cpu", the most that it may hold, as in "20GiB".
        offload_folder: where weights lie that are on the disk.
        tp_plan: "auto" cuts the layers over the processes of a launch, by the model's plan.
    """

    device_map: str | dict[str, int | str] | None = None
    max_memory: dict[str, str] | None = None
    offload_folder: str | None = None
    tp_plan: Literal["auto"] | None = None

    def arguments(self, config: Any, spec: str) -> dict[str, Any]:
        """Returns the arguments of `from_pretrained` for a model of that configuration.

        Raises:
            SpecError: tensor parallelism is wanted of an architecture without a plan, or over processes that do not divide
                its heads.
        """
        if self.tp_plan is not None:
            text = config.get_text_config()
            if not getattr(text, "base_model_tp_plan", None):
                raise SpecError(
                    f"model {spec!r}: teacher.engine.tp_plan needs an architecture with a plan for tensor parallelism; "
                    f"transformers has none for {type(config).__name__}; use teacher.engine.device_map"
                )
            heads: int = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
            by_heads = any(
                key.endswith(KEY_PROJECTIONS) and how == "colwise"
                for key, how in text.base_model_tp_plan.items()
            )
            if by_heads and heads % num_ranks():
                raise SpecError(
                    f"model {spec!r}: teacher.engine.tp_plan cuts its {heads} key-value heads over {num_ranks()} processes; "
                    "expected a number of processes that divides them; start as many, or use teacher.engine.device_map"
                )
            from transformers.distributed import DistributedConfig

            return {"distributed_config": DistributedConfig(tp_plan=self.tp_plan)}
        found: dict[str, Any] = {"device_map": self.device_map}
        if self.max_memory is not None:
            found["max_memory"] = {
                int(name) if name.isdecimal() else name: most for name, most in self.max_memory.items()
            }
        if self.offload_folder is not None:
            found["offload_folder"] = self.offload_folder
        return found


def is_placed(model: Any) -> bool:
    """Whether a model's parts lie where they are to run, so that it must not be moved."""
    return bool(getattr(model, "hf_device_map", None)) or any(map(_is_cut, model.parameters()))


def _is_cut(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor, without importing that


def input_device(module: Any) -> Any:
    """Returns the device that accelerate's hooks run a model's embeddings on; None without such hooks."""
    if not any(hasattr(part, "_hf_hook") for part in module.modules()):
        return None
    try:
        embeddings = module.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # a module of the user's own, or a wrapper of transformers
        return None
    return getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)


def whole_head(head: Any) -> Any:
    """Returns a linear head with its whole weight, on the device that it runs on; one that is whole as it is."""
    weight, hook = getattr(head, "weight", None), getattr(head, "_hf_hook", None)
    if weight is None or not (_is_cut(weight) or (weight.is_meta and hook is not None)):
        return head
    state, device = WholeState(head), getattr(hook, "execution_device", None)
    whole = nn.Linear(head.in_features, head.out_features, bias="bias" in state, device="meta")
    for name in state:
        value = state[name].to(device if device is not None else state[name].device)
        setattr(whole, name, nn.Parameter(value, requires_grad=False))
    return whole


class WholeState(Mapping[str, torch.Tensor]):
    """A model's state dict, whole: one tensor at a time is read from the disk or gathered from all processes.

    Of a model that is cut, all processes read the same names in the same order.
    """

    def __init__(self, model: nn.Module) -> None:
        self._state = model.state_dict()
        self._elsewhere: dict[str, tuple[Any, str]] = {}
        for prefix, module in model.named_modules():
            hook = getattr(module, "_hf_hook", None)
            for part in getattr(hook, "hooks", (hook,)):
                if (weights := getattr(part, "weights_map", None)) is None:
                    continue
                names = dict(module.named_parameters()) | dict(module.named_buffers())
                self._elsewhere |= {f"{prefix}.{name}" if prefix else name: (weights, name) for name in names}

    def __len__(self) -> int:
        return len(self._state)

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._state[name]
        if tensor.is_meta:
            weights, local = self._elsewhere[name]
            tensor = weights[local]
        return tensor.full_tensor() if _is_cut(tensor) else tensor  # type: ignore[no-any-return]
