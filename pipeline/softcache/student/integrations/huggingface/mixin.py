"""What trainers of transformers and TRL share here: the student, its loss, and the mix that they log."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from softcache.data.sources.text.saved_tokenizer import save_tokenizer
from softcache.data.sources.text.source import TokenSource
from softcache.data.tokens import TokenBatch
from softcache.errors import ConfigError
from softcache.losses import LossMix
from softcache.reader.cache import Cache
from softcache.runtime.distributed import max_over_ranks
from softcache.student.integrations.huggingface.forward import Call, patched_forward
from softcache.student.integrations.huggingface.loss import mix_at
from softcache.student.integrations.huggingface.validate import check_classes, check_tokenizer
from softcache.student.integrations.huggingface.zero import register_head, whole_weights, zero_stage
from softcache.student.tasks import LossSettings, TokenStudent

__all__ = ["DistillationMixin"]


class DistillationMixin:
    """The methods of a `transformers.Trainer` whose batches have `inputs["batch"]`, a `TokenBatch`.

    Attributes:
        model, args, state, accelerator, processing_class: of the Trainer.
    """

    # `compute_loss` divides by the rows of the whole accumulated batch; the Trainer must not divide again.
    loss_is_scaled_for_ga: Any = True

    model: Any
    args: Any
    state: Any
    accelerator: Any
    _cache: Cache
    _source: TokenSource
    _loss: LossSettings
    _context: int
    _cross_documents: bool
    processing_class: Any
    _padding_free: bool | None = None
    _bound: TokenStudent | None = None
    _mix: LossMix | None = None

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Returns a fresh model, checked like one that was passed."""
        return patched_forward(super().call_model_init(trial))  # type: ignore[misc]

    def _student(self) -> TokenStudent:
        """The loss and the scores of `self.model`, which it does not own."""
        if self._bound is None or self._bound.model is not self.model:
            check_tokenizer(self._source, self.model, self.processing_class)
            with whole_weights(self):
                self._bound = TokenStudent(
                    patched_forward(self.model),
                    self._loss,
                    context=self._context,
                    cross_documents=self._cross_documents,
                    padding_free=self._padding_free,
                )
                check_classes(self._cache, self._bound.num_classes, type(self.model).__name__)
            if self._is_cut:
                self._bound.run_even_passes(partial(max_over_ranks, device=self.args.device))
        return self._bound

    @property
    def _is_cut(self) -> bool:
        """Whether processes gather weights from each other: FSDP, or ZeRO-3 of DeepSpeed."""
        return bool(getattr(self, "is_fsdp_enabled", False)) or zero_stage(self) == 3

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Saves as the Trainer does; the tokenizer so that it begins and cuts texts as it does here when it is loaded."""
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        if self.processing_class is not None:
            tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
            save_tokenizer(Path(output_dir or self.args.output_dir), tokenizer)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Returns the batch's part of the accumulated batch's mean loss, a scalar.

        Args:
            model: `self.model`, or what the Trainer wrapped around it.
            inputs: of `get_batch_samples`.
            num_items_in_batch: rows of all batches of the step; None: this batch is the step.
        """
        student = self._student()
        register_head(self, student)
        batch: TokenBatch = inputs["batch"].to(self.args.device)
        # Without a number of rows this batch is all there is, whatever step it came from.
        label_share = None if num_items_in_batch is None else inputs.get("label_share")
        self._mix = mix_at(self._loss, self.state)
        alpha = 0.0 if batch.labels is None else self._mix.alpha
        loss = model(Call(partial(student, batch, batch.labels, alpha, label_share, self._mix.temperature)))
        if num_items_in_batch is not None:
            # Ranks average their gradients, and the logged losses: times their number, the mean is a sum.
            ranks = self.accelerator.num_processes
            loss = loss * (inputs.get("num_rows", batch.num_rows) * ranks / num_items_in_batch)
        return (loss, {"loss": loss.detach()}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs as the Trainer does; with temperature and alpha of the last step, where they change."""
        if self._loss.adapts and self._mix is not None and "loss" in logs:
            logs = logs | {"temperature": float(self._mix.temperature), "alpha": self._mix.alpha}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses: predictions are [samples, positions, V] logits, which nothing here makes.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"{type(self).__name__}.predict: it would keep the logits of every position, V numbers each; use evaluate() for "
            "the loss, or trainer.model.generate() for text"
        )
