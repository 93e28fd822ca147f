"""From a causal language model to its backbone and head, and what its configuration has of both.

Architectures name the same things differently: a scale, a soft cap and a limit are looked for under each of their names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from softcache.errors import SpecError
from softcache.models.language.adapters import AdaptedHead, adapted_head, without_wrapper
from softcache.models.language.backbone_head import BackboneHead, CausalParts
from softcache.models.language.encoder_decoder_parts import is_encoder_decoder, split_pairs
from softcache.models.language.placement import whole_head
from softcache.models.language.probes import isolates_documents

__all__ = ["context_of", "head_of", "split"]

SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "output_multiplier": 1, "logits_scaling": -1}
"""What the head's output is multiplied by (1) or divided by (-1)."""
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def split(model: nn.Module) -> BackboneHead:
    """Returns the backbone and the head of a language model, causal or of encoder and decoder, without copying anything.

    Call it where the model will run (its device, its dtype): two passes over 8 tokens show how documents
    in one row can be kept apart. A module of your own needs `base_model` (tokens -> hidden states after
    the final norm) and `get_output_embeddings()`; with `config.max_position_embeddings`,
    `config.final_logit_softcapping` and `config.logit_scale` where it has them (other names: `SCALES`, `SOFT_CAPS`). A
    wrapper of peft and its LoRA layers are seen through.

    Raises:
        SpecError: there is no backbone, no head, or a head that is not a plain linear layer.
    """
    name = type(model).__name__
    model = without_wrapper(model)
    head = adapted_head(head_of(model), of=name)
    if head is None:
        raise SpecError(
            f"model {name}: no head: expected get_output_embeddings() to return a torch.nn.Linear; found "
            "none; take a causal language model (AutoModelForCausalLM), or add the method to your own"
        )
    is_plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    head = whole_head(head) if is_plain else head
    if not is_plain and not isinstance(head, AdaptedHead):
        raise SpecError(
            f"model {name}: its head is a {type(head).__module__}.{type(head).__name__}; expected a plain "
            "torch.nn.Linear; keep the head out of quantization"
        )
    if is_encoder_decoder(model):
        config: Any = model.config
        return split_pairs(model, head, _softcap_of(getattr(config, "decoder", config)))
    backbone = _backbone_of(model)
    if not isinstance(backbone, nn.Module) or backbone is model:
        raise SpecError(
            f"model {name}: no backbone: expected `base_model` to be the module under the head; found "
            f"{'the model itself' if backbone is model else type(backbone).__name__}"
        )
    config = _config_of(model)
    scale, divisor = _scaling_of(config)
    parts = CausalParts(
        backbone,
        head,
        "rows",
        context_of(model),
        logit_scale=scale,
        softcap=_softcap_of(config),
        length_threshold=length_threshold_of(config),
        hidden_divisor=divisor,
    )
    restarted = replace(parts, packing="positions")
    return restarted if isolates_documents(restarted) else parts


def _backbone_of(model: Any) -> Any:
    """Returns the module under the head; Llama 4's text model names another as its base than it has."""
    backbone = getattr(model, "base_model", None)
    return getattr(model, "model", backbone) if backbone is model else backbone


def _number(config: Any, name: str) -> float | None:
    """Returns a number of the configuration, None where it is absent, null, zero, or a word (MPT)."""
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) and value else None


def _scaling_of(config: Any) -> tuple[float, float]:
    """Returns what the logits are multiplied by, and what the hidden state is divided by before the head (MiniCPM3)."""
    before_head = ["logits_mup_width_multiplier"]
    if _number(config, "dim_model_base"):
        before_head.append("logits_scaling")
    numbers = {name: _number(config, name) or 1.0 for name in (*SCALES, *before_head)}
    divisor = math.prod(numbers[name] for name in before_head)
    return math.prod(numbers[name] ** SCALES[name] for name in SCALES if name not in before_head), divisor


def _softcap_of(config: Any) -> float | None:
    return next(filter(None, (_number(config, name) for name in SOFT_CAPS)), None)


def head_of(model: Any) -> Any:
    """Returns the model's declared head, of any kind, or None."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _config_of(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def length_threshold_of(config: Any) -> int | None:
    """Returns the length above which LongRoPE uses its long factors, or None where the model has no such embedding."""
    tables = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if not isinstance(tables, Mapping):
        return None
    each = [tables] if "rope_type" in tables else [x for x in tables.values() if isinstance(x, Mapping)]
    lengths = [
        table.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        for table in each
        if table.get("rope_type", table.get("type")) == "longrope"
    ]
    return min(filter(None, lengths), default=None)


def context_of(model: nn.Module) -> int | None:
    """Returns the longest row that the configuration allows, or None where it names no limit."""
    config = _config_of(model)
    for name in ("max_position_embeddings", "n_positions"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
