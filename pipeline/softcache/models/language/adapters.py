"""Models with adapters of the peft library: the model inside, and the head that adapters are on.

LoRA puts layers in place of a model's own, so that its backbone runs as before. On the head it adds a product of two thin
matrices to the weight; softcache's losses multiply by the weight themselves, so they take the sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from softcache.errors import SpecError

__all__ = ["AdaptedHead", "adapted_head", "without_wrapper"]


def without_wrapper(model: nn.Module) -> nn.Module:
    """Returns the model that `get_peft_model` wrapped, or the model itself.

    Raises:
        SpecError: its adapter puts tokens before the text (prompt and prefix tuning), so that rows would shift.
    """
    if not _is_of_peft(model) or not hasattr(model, "get_base_model"):
        return model
    config = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise SpecError(
            f"model {type(model).__name__}: {type(config).__name__} puts tokens of its own before the text, which have no "
            "labels; use an adapter of the weights (LoraConfig)"
        )
    found: nn.Module = model.get_base_model()  # type: ignore[operator]
    return found


class AdaptedHead:
    """A linear head with LoRA: the weight is that of the layer plus its adapters', differentiable in both."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    @property
    def weight(self) -> torch.Tensor:
        layer, weight = self._layer, self._layer.base_layer.weight
        if layer.disable_adapters or layer.merged:
            return weight
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A:
                weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self._layer.base_layer.bias


def adapted_head(head: Any, *, of: str) -> Any:
    """Returns a head that adapters wrap, as a module or an `AdaptedHead` with `weight` and `bias`; others as they are.

    Raises:
        SpecError: the adapter does more than add to the weight.
    """
    if not _is_of_peft(head):
        return head
    if hasattr(head, "modules_to_save"):  # trained whole, as a copy
        active = head.active_adapters[0]
        return head.original_module if head.disable_adapters else head.modules_to_save[active]
    has_base = isinstance(getattr(head, "base_layer", None), nn.Linear) and hasattr(head, "lora_A")
    variants = getattr(head, "lora_variant", {})
    dropout = any(getattr(x, "p", 0.0) > 0 for x in getattr(head, "lora_dropout", {}).values())
    if not has_base or variants or dropout:
        what = (
            "has dropout" if dropout else f"is a {type(head).__name__} that does more than add to the weight"
        )
        raise SpecError(
            f"model {of}: the adapter of its head {what}; expected plain LoRA with lora_dropout = 0 there; leave "
            "the head out of target_modules, or put it into modules_to_save"
        )
    return AdaptedHead(head)


def _is_of_peft(module: Any) -> bool:
    return any(kind.__module__.startswith("peft.") for kind in type(module).__mro__)
