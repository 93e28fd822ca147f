"""The Trainer itself: what it overrides of transformers' own, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from softcache.data.sources.text.source import TokenSource
from softcache.data.tokens import TokenBatch, TokenData
from softcache.errors import AlignmentError, ConfigError
from softcache.reader.dataset import HardLabelDataset, SoftLabelDataset, as_teacher_saw
from softcache.reader.sampler import BlockSampler
from softcache.student.integrations.huggingface.forward import Call
from softcache.student.integrations.huggingface.loss import check_loss, check_stall, loss_of
from softcache.student.integrations.huggingface.mixin import DistillationMixin
from softcache.student.integrations.huggingface.order import KeepOrder
from softcache.student.integrations.huggingface.validate import (
    named_sources,
    refuse_ignored,
    refuse_launcher,
    refuse_parallel,
    tokenizer_digest,
)
from softcache.student.integrations.validate import check_cache
from softcache.student.tasks import LossSettings, RowMeans, TokenStudent, even_batches, shard_batches

if TYPE_CHECKING:
    from softcache.reader.cache import Cache

__all__ = ["DistillTrainer"]


class DistillTrainer(DistillationMixin, Trainer):
    """A `transformers.Trainer` whose student learns from a softcache token cache.

    (1 - alpha) * CE(next token) + alpha * T^2 * soft loss, each a mean: CE over all rows, the soft loss (forward KL, unless
    `loss` names another) over those that the cache labels (all, unless it was made with labels.positions). Where T or
    alpha change over the run, both are logged with the loss.

    Args:
        model: a causal language model of the cache's tokenizer; or `model_init` instead.
        args: as for Trainer. `dataloader_multiprocessing_context` defaults to "forkserver" here: with workers, a script
            needs its `if __name__ == "__main__":`.
        cache: of that source, complete.
        source: the training split that was labeled, `open_text(settings, split="train")`.
        temperature: T, at least 1; 1 by default.
        alpha: weight of the soft part, in [0, 1]; 0.9 by default.
        loss: a whole `[loss]` in place of the two: another divergence, what becomes of the tail, weights of rows, schedules.
            "stall" needs eval_strategy "epoch". No curriculum, no uld.
        eval_dataset: a held-out source, or a dict of them.
        processing_class: the student's tokenizer; compared with the cache's, and saved with the model. Without it, the
            one next to the model in its folder or on the hub is compared.
        context: tokens that the student attends over, if fewer than the source's `seq_len`.
        padding_free: runs a batch as one row without padding; None: with flash_attention_*. The loss is the same.
        trainer: what else Trainer takes: model_init, callbacks, optimizers, optimizer_cls_and_kwargs.

    Raises:
        AlignmentError: the source is not what was labeled; also from `train()`, where a sample's contents changed.
        IdentityError: the student's tokenizer is another one.
        IncompleteCacheError: the cache is not finished.
        SpecError: the student has no backbone and linear head, too few classes, or too short a context.
        ConfigError: an argument that would be ignored, or that does not fit; what to use instead is named.
    """

    _num_eval_batches = 0

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        cache: Cache,
        source: TokenSource | TokenData,
        temperature: float | None = None,
        alpha: float | None = None,
        loss: LossSettings | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        context: int | None = None,
        padding_free: bool | None = None,
        **trainer: Any,
    ) -> None:
        if isinstance(model, str):
            raise ConfigError(
                f"DistillTrainer: model: expected a module; found {model!r}; pass "
                f"AutoModelForCausalLM.from_pretrained({model!r})"
            )
        refuse_ignored(args, trainer)
        self._padding_free = padding_free
        self._loss = loss_of(loss, temperature, alpha)
        check_cache(
            cache,
            "tokens",
            'DistillTrainer is for language models ("tokens"); for images use softcache.SoftLabelDataset, or '
            "`softcache train-student`",
        )
        check_loss(self._loss, cache)
        self._cache, self._dataset = cache, SoftLabelDataset(source, cache)
        data = as_teacher_saw(source, cache)
        self._source = data.source  # type: ignore[assignment]
        self._cross_documents = data.cross_documents  # type: ignore[attr-defined]
        self._context = context or data.source.seq_len
        for name, held_out in named_sources(eval_dataset):
            self._eval_data(held_out, name)
        super().__init__(
            model=model,
            args=args,
            train_dataset=self._dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **trainer,
        )
        refuse_launcher(self.args, "DistillTrainer")
        refuse_parallel(self)
        check_stall(self._loss, self.args, eval_dataset)
        self.model_accepts_loss_kwargs = True  # the name of loss_is_scaled_for_ga in older versions
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._order = BlockSampler(cache, seed=seed)
        self.add_callback(KeepOrder(self, self._order))
        self._student()

    # -- training ------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Returns this rank's share of the batches, each a `TokenBatch` with labels; see `RankBatches`."""
        args, accelerator = self.args, self.accelerator
        order = (
            SequentialSampler(self._dataset) if args.train_sampling_strategy == "sequential" else self._order
        )
        ranks = accelerator.num_processes
        of_all = args.accelerator_config.split_batches  # type: ignore[union-attr]
        batches = RankBatches(
            order,
            self._train_batch_size * (1 if of_all else ranks),
            rank=accelerator.process_index,
            num_ranks=ranks,
            drop_last=args.dataloader_drop_last,
        )
        loader: DataLoader = DataLoader(
            _RankSamples(self._dataset),  # type: ignore[arg-type]
            batch_sampler=batches,
            collate_fn=SoftLabelDataset.collate,
            persistent_workers=args.dataloader_persistent_workers,
            **self._loading(),
        )
        # What accelerate knows of a loader, without its way of cutting it: it repeats samples to fill the last batch.
        shard = prepare_data_loader(loader, num_processes=1, process_index=0)
        accelerator._dataloaders.append(shard)
        return shard

    def _loading(self) -> dict[str, Any]:
        args = self.args
        workers: dict[str, Any] = {}
        if args.dataloader_num_workers:
            # Stores keep threads, which do not survive a fork.
            context = args.dataloader_multiprocessing_context or "forkserver"
            workers = {"multiprocessing_context": context, "prefetch_factor": args.dataloader_prefetch_factor}
        return {
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory and args.device.type == "cuda",
            # A loader draws a number whenever it starts; from torch's own stream, evaluation would change dropout.
            "generator": torch.Generator(),
            **workers,
        }

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | None]:
        """Returns the batches of one optimizer step, and the rows in all of them, over all ranks.

        A batch is {"batch": TokenBatch, "num_rows": that count, "label_share": of the step's rows, "input_ids": [B, L],
        "attention_mask": [B, L]}; by the last two the Trainer counts tokens and operations.
        """
        batches: list[TokenBatch] = [
            batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)
        ]
        # Below 0: the sample of another rank, in place of none.
        counts = [(b.num_rows, b.num_labeled) if b.samples[0] >= 0 else (0, 0) for b in batches]
        rows, labeled = torch.tensor(counts, dtype=torch.int64, device=device).reshape(-1, 2).sum(0)
        if self.args.world_size > 1:
            rows, labeled = self.accelerator.reduce(torch.stack([rows, labeled]), reduction="sum")
        label_share = float(labeled / rows) if self._cache.skips_positions else None
        return [
            {
                "batch": batch,
                "num_rows": num_rows,
                "label_share": label_share,
                "input_ids": batch.tokens,
                "attention_mask": is_token(batch),
            }
            for batch, (num_rows, _) in zip(batches, counts, strict=True)
        ], rows

    # -- evaluation ----------------------------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Returns this rank's share of a held-out source's batches, each sample once over all ranks.

        Args:
            eval_dataset: a source, or a name in the dict that was passed; None: the one that was passed.
        """
        given: Any = self.eval_dataset
        if eval_dataset is not None:
            given = given[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        data = self._eval_data(given, "eval_dataset")
        shares = shard_batches(len(data), self.args.eval_batch_size, self.accelerator)
        self._num_eval_batches = len(shares)  # what follows those is for the other processes
        batches = even_batches(shares, self.accelerator) if self._is_cut else shares
        return DataLoader(
            HardLabelDataset(data),  # type: ignore[arg-type]
            batch_sampler=[[(sample, 0) for sample in share] for share in batches],  # type: ignore[arg-type]
            collate_fn=HardLabelDataset.collate,
            **self._loading(),
        )

    def _eval_data(self, source: Any, name: str) -> TokenData:
        if not isinstance(source, TokenSource | TokenData):
            raise ConfigError(
                f"{name}: expected a source of tokens; found {type(source).__name__}; pass open_text(settings, "
                'split="eval") of the settings that the cache was made with'
            )
        data = (
            source
            if isinstance(source, TokenData)
            else TokenData(source, cross_documents=self._cross_documents)
        )
        expected = tokenizer_digest(self._cache)
        if data.source.tokenizer_digest != expected:
            raise AlignmentError(
                f"{name}: source {data.source.name} has tokens of another tokenizer than cache {self._cache.url} "
                f"({data.source.tokenizer_digest[:12]}… here, {expected[:12]}… there); open it with the same settings"
            )
        return data

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Returns the mean negative log-likelihood per label row (nats), its perplexity, and the accuracy.

        Over all rows of the source and all ranks. Logits are made a chunk of rows at a time and never kept.
        """
        args, device, student = self.args, self.args.device, self._student()
        if not self.is_in_train and (args.fp16_full_eval or args.bf16_full_eval):
            student.to(device, torch.float16 if args.fp16_full_eval else torch.bfloat16)
        student.eval()
        optimizer: Any = self.optimizer
        if callable(getattr(optimizer, "eval", None)):  # schedule-free ones
            optimizer.eval()
        self.callback_handler.eval_dataloader = dataloader
        means = RowMeans(self.accelerator)
        for number, loaded in enumerate(dataloader):
            batch = loaded.to(device)
            with self.accelerator.autocast():
                nats_P, correct_P = self._scores(student, batch)
            if number >= self._num_eval_batches:
                continue  # for the other processes, which gather weights from this one
            means.update(nats_P, correct_P)
            self.control = self.callback_handler.on_prediction_step(args, self.state, self.control)
        loss, accuracy = means.compute(2)
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_perplexity": math.exp(min(loss, 700.0)),
            f"{metric_key_prefix}_accuracy": accuracy,
        }
        num_samples = len(dataloader.dataset)  # type: ignore[arg-type]
        nothing: Any = None  # in place of predictions
        return EvalLoopOutput(nothing, label_ids=None, metrics=metrics, num_samples=num_samples)

    def _scores(self, student: TokenStudent, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """As `TokenStudent.scores`; where processes gather weights, within the forward pass of what they wrapped."""
        if not self._is_cut:
            return student.scores(batch)
        if not self.accelerator._models:
            raise ConfigError(
                "DistillTrainer.evaluate: accelerate cuts a model together with its optimizer, in train(); expected a model "
                "that is cut; train first, or evaluate in one process per device without FSDP or DeepSpeed"
            )
        found: tuple[torch.Tensor, torch.Tensor] = self.model_wrapped(Call(partial(student.scores, batch)))
        return found


def is_token(batch: TokenBatch) -> torch.Tensor:
    """[B, L] bool, False where a sample is padded."""
    lengths_B = torch.from_numpy(batch.lengths).to(batch.tokens.device)
    return torch.arange(batch.tokens.shape[1], device=batch.tokens.device) < lengths_B[:, None]


class RankBatches(Sampler[list[int]]):
    """A rank's part of each batch of an order: every sample once over all ranks, and as many batches for each of them.

    A rank without a sample in the last batch has the first of that batch, written as its complement (below 0), which does
    not count.

    Args:
        order: sample numbers, the same on all ranks.
        batch_size: of all ranks.
        drop_last: leaves out a batch of fewer.
    """

    def __init__(
        self, order: Sampler[int], batch_size: int, *, rank: int, num_ranks: int, drop_last: bool = False
    ) -> None:
        self.sampler, self.batch_size, self.drop_last = order, batch_size, drop_last
        self._rank, self._num_ranks = rank, num_ranks

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        num_samples = len(self.sampler)  # type: ignore[arg-type]
        return num_samples // self.batch_size if self.drop_last else -(-num_samples // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = iter(self.sampler)
        while batch := list(islice(order, self.batch_size)):
            if len(batch) < self.batch_size and self.drop_last:
                return
            first, last = (len(batch) * rank // self._num_ranks for rank in (self._rank, self._rank + 1))
            yield batch[first:last] or [~batch[0]]


class _RankSamples:
    """A dataset that also takes the complement of a sample number, and gives its batch the same number."""

    def __init__(self, dataset: SoftLabelDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, indices: list[int]) -> list[TokenBatch]:
        if indices[0] >= 0:
            return [self._dataset.fetch(indices)]
        batch = self._dataset.fetch([~indices[0]])
        return [replace(batch, samples=~batch.samples)]
