"""A frozen causal language model or encoder-decoder as a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from softcache.data.tokens import TokenBatch
from softcache.errors import ConfigError
from softcache.models.language import build_language_model, check_split, split
from softcache.models.weights import load_weights
from softcache.teacher.base import Dtype, Teacher, TeacherSettings

__all__ = ["LanguageTeacher", "load_language_teacher"]

CHUNK_ELEMENTS = 2**23  # of one chunk of a language model's logits: 32 MiB in float32


class LanguageTeacher(Teacher):
    """A causal language model: its backbone runs once per batch, its head on a chunk of positions at a time.

    Memory besides the weights: the backbone's own for B x L tokens, hidden states of 4 B L D bytes, and for one chunk
    about 4 * 6 * chunk_positions * V bytes (the logits, their log-softmax, and what top-k and the tail's sums need).
    At the default chunk that is 200 MB, whatever B, L and V.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        chunk_positions: int | None = None,
        cross_documents: bool = False,
        **common: Any,
    ) -> None:
        self.parts = split(model.to(common["device"]).eval())
        check_split(model, self.parts)
        super().__init__(model, num_classes=self.parts.vocab_size, **common)
        self._chunk_positions = chunk_positions or max(1, CHUNK_ELEMENTS // self.num_classes)
        self._cross_documents = cross_documents

    @torch.inference_mode()
    def chunks(self, batch: TokenBatch) -> Iterator[torch.Tensor]:
        batch = batch.to(self.device)
        with self.autocast():
            hidden_BLD = self.parts.hidden(
                batch.tokens, batch.segments, cross_documents=self._cross_documents
            )
        hidden_PD = hidden_BLD.flatten(0, 1)[batch.rows]
        for start in range(0, max(1, len(hidden_PD)), self._chunk_positions):
            with self.autocast():
                logits_PV = self.parts.logits(hidden_PD[start : start + self._chunk_positions])
            yield logits_PV


def load_language_teacher(
    settings: TeacherSettings,
    *,
    vocab_size: int,
    seq_len: int,
    chunk_positions: int | None,
    cross_documents: bool,
    device: torch.device,
    dtype: Dtype,
    build: Callable[..., nn.Module] = build_language_model,
) -> LanguageTeacher:
    """Returns the language model of a config, its weights loaded.

    Raises:
        ConfigError: no weights are named, for a model that would otherwise be random.
        SpecError: the model or its weights cannot be loaded, its context is shorter than `seq_len`, its head has fewer
            classes than the tokenizer has tokens, or it cannot be split into backbone and head.
    """
    if settings.weights is None and not (settings.model.startswith("hf:") or ":" in settings.model):
        raise ConfigError(
            f"teacher.weights: missing, and {settings.model} would be random; give a weights file "
            "(safetensors or a state dict), or a pretrained model: hf:NAME_OR_PATH"
        )
    model = build(settings.model, vocab_size=vocab_size, context=seq_len)
    if settings.weights is not None:
        load_weights(model, settings.weights)
    return LanguageTeacher(
        model,
        spec=settings.model,
        chunk_positions=chunk_positions,
        cross_documents=cross_documents,
        device=device,
        dtype=dtype,
    )
