"""Distillation from a token cache inside TRL's SFTTrainer: its arguments, peft_config and callbacks, softcache's loss.

    trainer = DistillSFTTrainer(model, SFTConfig(...), cache=open_cache(URL), source=open_text(settings, split="train"),
                                temperature=1.0, alpha=0.9, processing_class=tokenizer)
    trainer.train()

Loss and gradient are those of `DistillTrainer`. Samples come from a `datasets.Dataset` (`to_hf_dataset`), so that any order
is equally cheap and rows can be filtered, or mixed with ones that have no soft labels. `DistillTrainer` reads the cache
itself, without a second copy of it on disk, and averages its held-out loss over rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from softcache.errors import ConfigError, MissingExtraError

try:
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    raise MissingExtraError(
        f"softcache.student.integrations.trl needs trl ({error}); pip install trl"
    ) from error

from softcache.data.sources.text.source import TokenSource
from softcache.data.tokens import TokenData
from softcache.reader.dataset import as_teacher_saw
from softcache.student.integrations.huggingface.dataset import SOFT_COLUMNS, SoftLabelCollator, to_hf_dataset
from softcache.student.integrations.huggingface.loss import check_loss, check_stall, loss_of
from softcache.student.integrations.huggingface.mixin import DistillationMixin
from softcache.student.integrations.huggingface.order import KeepOrder
from softcache.student.integrations.huggingface.validate import refuse_launcher, refuse_untested
from softcache.student.integrations.trl_arguments import adds_router_loss, check_answers, refuse_ignored
from softcache.student.integrations.validate import check_cache
from softcache.student.tasks import LossSettings

if TYPE_CHECKING:
    from softcache.reader.cache import Cache

__all__ = ["DistillSFTTrainer"]


class DistillSFTTrainer(DistillationMixin, SFTTrainer):  # type: ignore[misc]
    """A TRL `SFTTrainer` whose student learns from a softcache token cache.

    (1 - alpha) * CE(next token) + alpha * T^2 * soft loss, as in `DistillTrainer`. Packing is the source's
    (`source.packing = "best_fit"` is TRL's `bfd`, with attention inside a document), and so is what of a chat is learned.

    Args:
        model: a causal language model of the cache's tokenizer, or its name or folder; with `peft_config`, adapters of it.
        args: an SFTConfig. What is the source's (packing, chat_template_path, eos_token, …) or the loss's (loss_type,
            router_aux_loss_coef, …) is refused, and a max_length below `source.seq_len`, which would cut what was labeled.
            Samples are not prepared again.
        cache: of that source, complete.
        source: the training split that was labeled.
        train_dataset: rows of `to_hf_dataset(cache, source)`, chosen by the user; all of them by default.
        eval_dataset: a held-out source, its `to_hf_dataset(None, held_out_source)`, or a dict of them; eval_loss is the
            negative log-likelihood.
        temperature, alpha, loss: as for `DistillTrainer`.
        processing_class: as for `DistillTrainer`.
        trainer: what else SFTTrainer takes.

    Raises:
        AlignmentError, IdentityError, IncompleteCacheError, SpecError, ConfigError: as `DistillTrainer`.
    """

    def __init__(
        self,
        model: Any,
        args: SFTConfig | None = None,
        *,
        cache: Cache,
        source: TokenSource | TokenData,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        temperature: float | None = None,
        alpha: float | None = None,
        loss: LossSettings | None = None,
        processing_class: Any = None,
        **trainer: Any,
    ) -> None:
        if args is not None and not isinstance(args, SFTConfig):
            raise ConfigError(
                f"DistillSFTTrainer: args: expected an SFTConfig; found {type(args).__name__}; pass SFTConfig(OUTPUT_DIR, …)"
            )
        if (
            processing_class is None
            and not isinstance(model, str)
            and not getattr(model, "name_or_path", None)
        ):
            raise ConfigError(
                "DistillSFTTrainer: processing_class: missing, and the model names no tokenizer; pass "
                "load_tokenizer(config.source)"
            )
        self._loss = loss_of(loss, temperature, alpha)
        check_cache(cache, "tokens", 'DistillSFTTrainer is for language models ("tokens")')
        check_loss(self._loss, cache)
        data: Any = as_teacher_saw(source, cache)
        args = SFTConfig() if args is None else copy(args)
        rows = to_hf_dataset(cache, source) if train_dataset is None else train_dataset
        check_rows(rows, "train_dataset", "to_hf_dataset(cache, source)")
        eval_dataset = _held_out(eval_dataset)
        refuse_ignored(args, trainer, data.source)
        check_answers(args, rows, data.source)
        router_loss = adds_router_loss(model, args)
        # SFTTrainer would write the dataset anew, cut to max_length, and nothing is to be cut.
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        # The source knows what is learned; SFTTrainer would look for messages in rows that have none.
        args.assistant_only_loss = args.completion_only_loss = False
        # The loss is computed so; SFTTrainer would do it in a collator of its own.
        self._padding_free, args.padding_free = args.padding_free or None, False
        self._cache, self._source, self._cross_documents = cache, data.source, data.cross_documents
        self._context = data.source.seq_len
        super().__init__(
            model=model,
            args=args,
            train_dataset=rows,
            eval_dataset=eval_dataset,
            data_collator=SoftLabelCollator(cache),
            processing_class=processing_class,
            **trainer,
        )
        if getattr(self, "aux_loss_enabled", False):
            # SFTTrainer has a mixture of experts add the balance of their load; whether it does here its own settings say.
            self.aux_loss_enabled = False
            self.model.config.get_text_config().output_router_logits = router_loss
        refuse_launcher(self.args, "DistillSFTTrainer")
        refuse_untested(self)
        check_stall(self._loss, self.args, eval_dataset)
        self.add_callback(KeepOrder(self))
        self.model_accepts_loss_kwargs = True  # the name of loss_is_scaled_for_ga in older versions
        self._student()

    def _set_signature_columns_if_needed(self) -> None:
        """Keeps the soft columns, which are no arguments of the model's forward."""
        super()._set_signature_columns_if_needed()
        self._signature_columns: Any = list(dict.fromkeys([*(self._signature_columns or []), *SOFT_COLUMNS]))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Returns the batches of one optimizer step with their `label_share`, and the rows in all of them."""
        inputs, rows = super().get_batch_samples(epoch_iterator, num_batches, device)
        num_rows = sum(each["batch"].num_rows for each in inputs)
        num_labeled = sum(each["batch"].num_labeled for each in inputs)
        share = num_labeled / num_rows if 0 < num_labeled < num_rows else None
        return [each | {"label_share": share} for each in inputs], rows

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Returns the batch's part of the step's mean loss; in evaluation its mean negative log-likelihood, in nats."""
        if not self.model.training:
            bare = replace(inputs["batch"], labels=None, labeled=None, label_counts=None)
            inputs = inputs | {"batch": bare}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def _held_out(given: Any) -> Any:
    """Returns evaluation datasets as rows.

    Raises:
        ConfigError: they are neither sources nor rows.
    """
    if isinstance(given, dict):
        return {name: _held_out(part) for name, part in given.items()}
    if isinstance(given, TokenSource | TokenData):
        return to_hf_dataset(None, given)
    if given is not None:
        check_rows(given, "eval_dataset", 'to_hf_dataset(None, open_text(settings, split="eval"))')
    return given


def check_rows(dataset: Any, name: str, expected: str) -> None:
    """Raises ConfigError where a dataset has no tokens, such as one of texts."""
    columns = getattr(dataset, "column_names", ())
    if columns is not None and not {"input_ids", "labels"} <= set(columns):
        found = f"columns {', '.join(columns)}" if columns else type(dataset).__name__
        raise ConfigError(
            f"DistillSFTTrainer: {name} has no input_ids and labels; expected rows of {expected}, which are in the tokens "
            f"that were labeled; found {found}"
        )
