"""The moving parts of one run: model, optimizer, batches, meters; one step and one epoch of it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object, set_seed

from softcache.losses import LossSettings
from softcache.models.compile import compile_in_place, explain_compile_errors
from softcache.reader.loader import SoftLabelLoader
from softcache.reader.order import BlockShuffle
from softcache.runtime.signals import pending_signal
from softcache.student.averaging import WeightAverage
from softcache.student.checkpoint import RunDirectory
from softcache.student.loss_schedule import LossScheduler
from softcache.student.optimizers import build_optimizer
from softcache.student.settings import TrainSettings
from softcache.student.tasks import Task

__all__ = ["TrainBatches", "Trainer"]

SIGNAL_SYNC_INTERVAL_STEPS = 8


@dataclass(frozen=True)
class TrainBatches:
    """Where training batches come from.

    Attributes:
        dataset: of `softcache.reader.dataset`, or one like it; see `softcache.reader.loader.JoinedDataset`.
        order: which samples make a batch.
        workers: loader processes.
    """

    dataset: Any
    order: BlockShuffle
    workers: int = 0


class Trainer:
    """The moving parts of one run: model, optimizer, batches, meters."""

    def __init__(
        self,
        accelerator: Accelerator,
        task: Task,
        feed: TrainBatches,
        settings: TrainSettings,
        loss: LossSettings | None = None,
    ) -> None:
        self.accelerator, self.task, self.feed, self.settings = accelerator, task, feed, settings
        self.is_sharded = settings.parallel == "fsdp"
        model = self._sharding.build_sharded(task, settings, accelerator) if self.is_sharded else task.build()
        self.average: WeightAverage | None = None
        if settings.ema_decay is not None:
            self.average = WeightAverage(model.to(accelerator.device), settings.ema_decay)
            accelerator.register_for_checkpointing(self.average)
        if settings.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if settings.compile:
            compile_in_place(model, accelerator.device)
        optimizer = build_optimizer(
            settings.optimizer,
            model,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            exempt=bool(settings.weight_decay_exempt),
            layer_decay=settings.layer_decay,
            arguments=settings.optimizer_args,
        )
        self._base_lrs = [group["lr"] for group in optimizer.param_groups]
        self.model: Any = model
        self._optimizer: Any = optimizer
        if not self.is_sharded:
            self.model, self._optimizer = accelerator.prepare(model, optimizer)
        self._loss_sum, self._loss_rows = torch.zeros((), device=accelerator.device), 0
        self._diverged_step = torch.zeros((), dtype=torch.long, device=accelerator.device)
        self._logged, self._factor = (torch.zeros_like(self._loss_sum), 0), 0.0
        self._steps = [feed.order.num_steps(epoch) for epoch in range(settings.epochs)]
        self.adaptation: LossScheduler | None = None
        if loss is not None and loss.adapts:
            self.adaptation = LossScheduler(loss, accelerator, num_steps=sum(self._steps))
        self._loader = SoftLabelLoader(
            feed.dataset, feed.order, workers=feed.workers, pin_memory=accelerator.device.type == "cuda"
        )

    @property
    def _sharding(self) -> Any:
        """The module of sharding, which takes a second to import."""
        return importlib.import_module("softcache.student.sharding")

    @property
    def step(self) -> int:
        """Optimizer steps done since the start of the run."""
        return sum(self._steps[: self.feed.order.epoch]) + self.feed.order.step

    def epoch(self) -> Iterator[int]:
        """Trains on the rest of the current epoch; yields after every step how many samples it had, over all ranks."""
        self.model.train()
        for batch in self._loader:
            num_samples = self.feed.order.num_samples(self.feed.order.step - 1)
            factor = self.settings.lr_factor(
                self.step - 1, sum(self._steps)
            )  # the loader has counted the batch
            for group, lr in zip(self._optimizer.param_groups, self._base_lrs, strict=True):
                group["lr"] = lr * factor
            self._factor = factor
            self._update(batch.to(self.accelerator.device))
            if self.adaptation is not None:
                self.adaptation.update(factor)
            yield num_samples

    def stop_requested(self) -> int | None:
        """Returns the signal that asked the run to end, None without one; the same on every rank.

        Ranks are signalled at different steps, and a checkpoint is of one step: they agree now and then, because asking
        each other waits for the device.
        """
        asked = pending_signal()
        if self.accelerator.num_processes == 1:
            return asked
        if self.step % SIGNAL_SYNC_INTERVAL_STEPS:
            return None
        signal_number = torch.tensor([float(asked or 0)], device=self.accelerator.device)
        return int(self.accelerator.gather(signal_number).max()) or None

    def diverged_step(self, *, weights: bool = False) -> int | None:
        """Returns the first step whose loss was not finite, on any rank; None without one; all ranks call this.

        Args:
            weights: look at the trained weights, too; it is this step where only they are not finite.
        """
        found = self._diverged_step
        trained = [p for p in self.model.parameters() if p.requires_grad] if weights else []
        if trained:
            # Of a student that is cut, this rank's share.
            parts = [p.detach().to_local() if hasattr(p, "to_local") else p.detach() for p in trained]
            is_finite = torch.stack([torch.isfinite(part).all().to(found.device) for part in parts]).all()
            found = torch.where((found == 0) & ~is_finite, self.step, found)
        steps = self.accelerator.gather(found.reshape(1)).tolist()
        return min((step for step in steps if step), default=None)

    def learning_rate(self, step: int) -> float:
        """Returns `lr` as the schedule has it at a step, counted from 1."""
        return self.settings.lr * self.settings.lr_factor(step - 1, sum(self._steps))

    def _update(self, batch: Any) -> None:
        """One optimizer step on one batch, in `accumulation_steps` pieces of exact weight."""
        order = self.feed.order
        local, total = order.share(order.step - 1)
        label_share = order.label_share(order.step - 1)
        pieces = batch.split(self.settings.accumulation_steps)
        num_passes = self._num_passes(len(pieces))
        for number in range(num_passes):
            counts, piece = local and number < len(pieces), pieces[min(number, len(pieces) - 1)]
            # Cut over processes, gradients are summed after every piece: whole ones would have to be kept until the last.
            syncs = self.is_sharded or number == num_passes - 1
            with nullcontext() if syncs else self.accelerator.no_sync(self.model):
                with explain_compile_errors() if self.settings.compile else nullcontext():
                    loss = self.task.loss(
                        self.model, piece, label_share=label_share, **self._mix(), **self._size()
                    )
                # Ranks average their gradients: the weight makes that the mean over the rows of the whole batch.
                weight = piece.num_rows / total * self.accelerator.num_processes if counts else 0.0
                self.accelerator.backward(loss * weight)
            if counts:
                is_first = (self._diverged_step == 0) & ~torch.isfinite(loss.detach())
                self._diverged_step = torch.where(is_first, self.step, self._diverged_step)
                self._loss_sum += loss.detach() * piece.num_rows
                self._loss_rows += piece.num_rows
        if self.settings.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self._optimizer.step()
        if self.average is not None:
            self.average.update(self.accelerator.unwrap_model(self.model))
        self._optimizer.zero_grad(set_to_none=True)

    def _num_passes(self, num_pieces: int) -> int:
        """Returns how many passes this step has: its pieces, or where processes gather weights the most of any."""
        if not self.is_sharded:
            return num_pieces
        least, rest = divmod(
            self.feed.order.num_samples(self.feed.order.step - 1), self.accelerator.num_processes
        )
        sizes, pieces = {max(1, least), least + (rest > 0)}, self.settings.accumulation_steps
        return max(-(-size // -(-size // pieces)) for size in sizes)

    def _mix(self) -> dict[str, Any]:
        """This step's temperature and alpha, for a task's loss; nothing where they never change."""
        if self.adaptation is None:
            return {}
        return {"mix": self.adaptation.mix(step=self.step - 1, epoch=self.feed.order.epoch)}

    def _size(self) -> dict[str, Any]:
        """The height of this step's images, for a task's loss; nothing where it never changes."""
        sizes = self.settings.image_sizes
        return {"size": sizes[(self.step - 1) * len(sizes) // sum(self._steps)]} if sizes else {}

    @property
    def scored(self) -> Any:
        """The model that is scored and saved: the average of the weights, where there is one."""
        return self.model if self.average is None else self.average.module

    def last_mix(self) -> dict[str, float]:
        """Temperature and alpha of the last step, for the epoch's row; nothing where they never change."""
        return {} if self.adaptation is None else self.adaptation.last

    def save_weights(self, directory: RunDirectory, name: str) -> None:
        """Writes the weights as the first process; all of them call this."""
        first = self.accelerator.is_main_process
        if not first and not self.is_sharded:
            return
        weights = self.task.weights(self.accelerator.unwrap_model(self.scored))
        if self.is_sharded:
            weights = self._sharding.gather_state(weights, keep=first)
        if first:
            directory.save_weights(weights, name)

    def model_with(self, directory: RunDirectory, name: str) -> torch.nn.Module:
        """Returns the student with the saved weights of that name, whole; the first process calls this, last of all."""
        if self.is_sharded:
            model = self.task.build().to("cpu")
        elif name == "model":
            return self.accelerator.unwrap_model(self.scored)  # type: ignore[no-any-return]
        else:
            model = self.accelerator.unwrap_model(self.scored)
        directory.load_weights(self.task.weights(model), name)
        return model

    def save_shards(self, folder: Path) -> None:
        """Writes what accelerate does not: the shares of a student that is cut."""
        if self.is_sharded:
            self._sharding.save_shards(self.model, self._optimizer, folder)

    def load_shards(self, folder: Path) -> None:
        """Reads what `save_shards` wrote."""
        if self.is_sharded:
            self._sharding.load_shards(self.model, self._optimizer, folder)

    def seed_process(self, *, epoch: int, step: int) -> None:
        """Gives every rank but the first random numbers of its own from here on; the first goes on with the run's."""
        if rank := self.accelerator.process_index:
            entropy = [self.settings.seed, epoch, step, rank]
            set_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))

    def resume_random_state(self, progress: dict[str, Any]) -> None:
        """For a rank that was not there when the checkpoint was saved; the others' states are in it.

        Raises:
            ValueError: the progress is not what a checkpoint holds.
        """
        kinds = {"epoch": int, "step": int, "history": list, "seconds": int | float}
        for name, kind in kinds.items():
            if not isinstance(progress.get(name), kind):
                raise ValueError(f"progress.json: {name}: expected {kind}; found {progress.get(name)!r}")
        self.seed_process(epoch=progress["epoch"], step=progress["step"])

    def loss_meters(self) -> list[tuple[float, int]]:
        """Every rank's running sum of the epoch's loss, and the number of rows in it."""
        return gather_object([(float(self._loss_sum), self._loss_rows)])

    def resume_loss_meter(self, meters: list[Any] | None) -> None:
        """Goes on with this rank's meter; with another number of ranks the first has what all had."""
        meters = meters or [(0.0, 0)]
        if not isinstance(meters[0], Sequence):  # one process's, as it was stored before there were many
            meters = [meters]
        if len(meters) != self.accelerator.num_processes:
            meters = [tuple(map(sum, zip(*meters, strict=True)))] + [
                (0.0, 0)
            ] * self.accelerator.num_processes
        loss_sum, self._loss_rows = meters[self.accelerator.process_index]
        self._loss_sum = torch.full_like(self._loss_sum, loss_sum)
        self._logged = self._loss_sum.clone(), self._loss_rows

    def train_loss(self) -> float:
        """Returns the epoch's mean loss over all ranks, and starts the next epoch's."""
        rows = torch.tensor(float(self._loss_rows), device=self._loss_sum.device)
        total = self.accelerator.reduce(torch.stack([self._loss_sum, rows]), reduction="sum")
        self.resume_loss_meter(None)
        return float(total[0] / total[1])

    def log_row(self) -> dict[str, float]:
        """Returns the mean loss since the last call or the epoch's start, over all ranks, its rows and the learning rate."""
        loss_sum, rows = self._logged
        since = torch.tensor(float(self._loss_rows - rows), device=self._loss_sum.device)
        total = self.accelerator.reduce(torch.stack([self._loss_sum - loss_sum, since]), reduction="sum")
        self._logged = self._loss_sum.clone(), self._loss_rows
        return {
            "loss": float(total[0] / total[1]),
            "lr": self.settings.lr * self._factor,
            "rows": float(total[1]),
        }

    def finish(self) -> dict[str, float]:
        """Returns what the task scores once, of the weights that the run ends with."""
        self.model.eval()
        return self.task.finish(self.scored, self.accelerator)

    def evaluate(self) -> dict[str, float]:
        """Returns the task's figures on the plain view of the evaluation split, of the weights that are saved."""
        self.model.eval()
        for (
            buffer
        ) in self.scored.buffers():  # running statistics are of each rank's own samples until the next step
            broadcast(buffer)
        return self.task.evaluate(self.scored, self.accelerator, self.settings.eval_batch_size)
