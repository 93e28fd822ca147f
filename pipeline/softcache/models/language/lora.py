"""Students that are trained by LoRA, through the peft library: adapters added, merged, saved."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from softcache.errors import MissingExtraError, SpecError
from softcache.models.language.encoder_decoder_parts import is_encoder_decoder
from softcache.models.language.splitting import head_of
from softcache.models.spec import parse_spec
from softcache.models.weights import float32_weights, is_adapted
from softcache.settings import Settings

__all__ = ["LoraSettings", "add_lora", "merge_adapters", "save_adapter", "trainable"]

Names = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]


class LoraSettings(Settings):
    """[student.lora]: the student's weights are frozen, and low-rank updates of some of them are trained.

    Weights of `target_modules` get an update of rank `rank`, times `alpha / rank`; "all-linear" are all linear layers but
    the head. `modules_to_save` are trained whole. Both hold names, or the ends of names, of the student's modules.

    Attributes:
        dropout: probability, of what goes into an adapter.
    """

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | Names = "all-linear"
    modules_to_save: tuple[str, ...] = Field((), strict=False)


def add_lora(model: Any, settings: LoraSettings, spec: str) -> nn.Module:
    """Returns the pretrained model with its weights frozen and LoRA adapters that are trained, as peft wraps it.

    Adapters have float32 weights. The frozen weights, which lose no update, keep the dtype of the checkpoint, unless modules
    of them are trained whole: then all are float32.

    Raises:
        SpecError: the model has fresh weights, peft finds none of the modules, or the adapter of a tied head could not be
            merged.
        MissingExtraError: peft is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError(
            f"student.lora: it needs the package peft ({error}); pip install 'softcache[lora]'"
        ) from error
    parsed = parse_spec(spec)
    if parsed.family == "builtin" or parsed.name.startswith("hf-config:"):
        raise SpecError(
            f"student.lora: student.model {spec!r} has fresh weights, which would stay random; expected a pretrained model "
            "(hf:NAME_OR_PATH, or a module:factory of yours); drop the table"
        )
    saved, targets = list(settings.modules_to_save), settings.target_modules
    if saved:
        model = model.float()
    task = "SEQ_2_SEQ_LM" if is_encoder_decoder(model) else "CAUSAL_LM"
    try:
        adapted: nn.Module = peft.get_peft_model(
            model,
            peft.LoraConfig(
                task_type=task if hasattr(model, "prepare_inputs_for_generation") else None,
                r=settings.rank,
                lora_alpha=settings.alpha,  # type: ignore[arg-type]
                lora_dropout=settings.dropout,
                target_modules=targets if isinstance(targets, str) else list(targets),
                modules_to_save=saved or None,
            ),
        )
    except Exception as error:  # peft raises errors of many classes
        raise SpecError(
            f"student.lora: peft cannot adapt student.model {spec!r}: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:400]}; check target_modules and modules_to_save"
        ) from error
    head = head_of(model)
    if hasattr(head, "lora_A") and _is_tied(model, head.base_layer):
        raise SpecError(
            f"student.lora: the head of student.model {spec!r} is tied to its embeddings, which merging an adapter of the "
            "head would change, too; leave the head out of target_modules, or put it into modules_to_save"
        )
    return adapted


def trainable(model: nn.Module, spec: str, lora: LoraSettings | None) -> nn.Module:
    """Returns a student in training mode: with float32 weights, or with adapters of `lora`.

    Raises:
        SpecError: its weights are quantized.
    """
    if getattr(model, "is_quantized", False):
        raise SpecError(
            f"student {spec}: its weights are quantized, which take no updates and cannot be merged with adapters; expected "
            "weights of float32 or bfloat16; leave load_in_4bit and load_in_8bit to the teacher"
        )
    return (float32_weights(model, spec) if lora is None else add_lora(model, lora, spec)).train()


def merge_adapters(model: nn.Module) -> nn.Module:
    """Returns the model with its adapters added to its weights, in float32; a model without adapters as it is.

    In float32 because of the same rounding that float32 weights avoid in training: an update of less than 2^-9 of a bfloat16
    weight would be lost. The adapted model is consumed.
    """
    if not is_adapted(model):
        return model
    merged: Any = model.float().merge_and_unload()  # type: ignore[operator]
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    if hasattr(merged, "config"):
        merged.config.dtype = torch.float32
        if not _is_tied(merged, head_of(merged)):
            merged.config.tie_word_embeddings = False  # a head that was trained whole is tied no longer
    found: nn.Module = merged
    return found


def _is_tied(model: Any, head: Any) -> bool:
    """Returns whether a head has the weight of the model's embeddings."""
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return embeddings is not None and head is not None and head.weight is getattr(embeddings, "weight", None)


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Writes the adapter alone, which `peft.PeftModel.from_pretrained(base, folder)` loads; nothing of other models."""
    if is_adapted(model):
        # Embeddings that are trained are in modules_to_save; "auto" would ask the hub for the model's configuration.
        model.save_pretrained(str(folder), save_embedding_layers=False)  # type: ignore[operator]
