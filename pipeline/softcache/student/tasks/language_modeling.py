"""Next-token prediction: the student's loss per batch, held-out loss, perplexity and accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from softcache.data.tokens import TokenBatch, TokenData
from softcache.losses import LossMix, LossSettings
from softcache.models.language.lora import merge_adapters, save_adapter
from softcache.models.weights import trained_state
from softcache.student.tasks.base import OnlineTeacher, RowMeans, even_batches, is_sharded, shard_batches
from softcache.student.tasks.inference import TokenServing
from softcache.student.tasks.token_student import TokenStudent

__all__ = ["TokenTask"]


@dataclass(frozen=True)
class TokenTask:
    """Next-token prediction.

    Attributes:
        build_model: makes the student.
        context: tokens that it attends over.
        cross_documents: whether attention crosses the documents of a packed sample, by the config.
        save_tokenizer: writes the tokenizer next to an exported model.
        teacher: labels each batch during training (`labels = "online"`); None otherwise.
    """

    build_model: Callable[[], nn.Module]
    evaluation: TokenData
    loss_settings: LossSettings
    context: int
    cross_documents: bool = False
    save_tokenizer: Callable[[Path], None] = lambda folder: None
    teacher: OnlineTeacher | None = None

    metric = "eval_loss"
    larger_is_better = False
    sharded_methods = ("scores",)
    """What is called of a student that is cut over processes, besides its forward pass."""

    def build(self) -> nn.Module:
        return TokenStudent(
            self.build_model(),
            self.loss_settings,
            context=self.context,
            cross_documents=self.cross_documents,
        )

    def loss(
        self,
        model: nn.Module,
        batch: TokenBatch,
        *,
        label_share: float | None = None,
        mix: LossMix | None = None,
    ) -> torch.Tensor:
        temperature, alpha = mix or (self.loss_settings.temperature, self.loss_settings.alpha)
        if self.teacher is not None:
            return model(batch, None, alpha, temperature=temperature, teacher=self.teacher)
        alpha = alpha if batch.labels is not None else 0.0
        return model(batch, batch.labels, alpha, label_share, temperature)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, accelerator: Accelerator, batch_size: int) -> dict[str, float]:
        student = accelerator.unwrap_model(model)
        assert isinstance(student, TokenStudent)
        means = RowMeans(accelerator)
        shares = shard_batches(len(self.evaluation), batch_size, accelerator)
        batches = even_batches(shares, accelerator) if is_sharded(student) else shares
        for number, samples in enumerate(batches):
            batch = self.evaluation.load(samples, 0, fingerprints=False).to(accelerator.device)
            with accelerator.autocast():
                loss_P, correct_P = student.scores(batch)
            if number < len(shares):
                means.update(loss_P, correct_P)
        loss, accuracy = means.compute(2)
        return {
            "eval_loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "accuracy": accuracy,
        }

    def finish(self, model: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """Nothing: all that is scored is scored every epoch."""
        return {}

    def weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        assert isinstance(model, TokenStudent)
        return trained_state(model.model)

    def export(self, model: nn.Module, out: Path) -> None:
        """Writes OUT/hf, which `AutoModelForCausalLM.from_pretrained` loads, with the tokenizer; with LoRA OUT/adapter."""
        assert isinstance(model, TokenStudent)
        save_adapter(model.model, out / "adapter")
        model.model = merge_adapters(model.model)
        save: Any = getattr(model.model, "save_pretrained", None)
        if save is not None:
            from transformers.utils import logging

            logging.disable_progress_bar()
            save(out / "hf")
            self.save_tokenizer(out / "hf")

    def serve(self, model: nn.Module) -> TokenServing:
        """Returns a student or teacher of this task as a function of tokens; the model is moved to the CPU."""
        bare = model.model if isinstance(model, TokenStudent) else model
        return TokenServing(merge_adapters(bare), context=self.context, cross_documents=self.cross_documents)
