"""Train a student: on cached soft labels, on hard labels, or beside the live teacher, by one and the same loop.

    build the model from its seed, restore the checkpoint if there is one
    for every epoch: for every batch: split it, sum the weighted gradients, step
    evaluate on the plain view, keep the best, save a checkpoint, stop early if the goal is reached

The step's learning rate, the order of the samples and the view of an epoch are pure functions of the step,
and everything else is in the checkpoint: a run that is killed and run again ends with the same weights.
SIGINT and SIGTERM (`pipeline.stopping`) save a checkpoint after the step and end the run.
A batch belongs to the optimizer's step; `accumulation_steps` only says into how many pieces it is split,
so it never changes which samples meet which labels. So do processes: `batch_size` counts the samples of all of them,
each takes its slice of every batch, and its gradient weighs as much as its rows.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, GradientAccumulationPlugin, broadcast, gather_object, set_seed
from pydantic import Discriminator, Field, Tag, model_validator

from pipeline.adaptation import Adaptation
from pipeline.checkpoints import RunDirectory, store_unwrapped
from pipeline.errors import MissingExtraError, RunError
from pipeline.loader import SoftLabelLoader
from pipeline.losses import LossSettings
from pipeline.mirror import RunMirror
from pipeline.models import count_parameters
from pipeline.pairing import PairingSettings
from pipeline.process_group import check_same, explained, from_first, join
from pipeline.settings import Settings
from pipeline.shuffle import BlockShuffle
from pipeline.sources.encoded import BytesSettings
from pipeline.sources.image_source import SourceSettings
from pipeline.stopping import Interrupted, asked_signal, at_boundaries
from pipeline.student_views import StudentViewSettings
from pipeline.tasks import Task

__all__ = ["Feed", "StudentSettings", "TrainSettings", "train"]

AGREE_STEPS = 8


def _modality(source: Any) -> str:
    return str(source.get("modality", "image") if isinstance(source, dict) else source.modality)


StudentSource = Annotated[
    Annotated[SourceSettings, Tag("image")] | Annotated[BytesSettings, Tag("bytes")], Discriminator(_modality)
]


class StudentSettings(Settings):
    """[student]: the architecture, and the ones that `softcache students` trains side by side.

    Text: `context` is what the student attends over, where that is less than source.seq_len; `tokenizer` is its own,
    where it has another one than the teacher (with loss.name = "uld").

    Images: `source` is what it reads where that is not what the teacher saw, `views` how it reduces the teacher's views,
    `pairing` which of its samples are the teacher's (`pipeline.pairing`).
    """

    model: str = "mlp"
    context: int | None = Field(None, ge=2)
    tokenizer: str | None = None
    models: tuple[str, ...] = Field(("linear", "mlp", "cnn"), strict=False)
    source: StudentSource | None = None
    views: StudentViewSettings | None = None
    pairing: PairingSettings = PairingSettings()

    @property
    def reads_otherwise(self) -> bool:
        """Whether the student reads something else than the teacher saw."""
        return self.source is not None or self.views is not None

    @model_validator(mode="after")
    def _check_reads(self) -> StudentSettings:
        if self.views is not None and isinstance(self.source, BytesSettings):
            raise ValueError(
                "views reduce images; a student of bytes reads files as they are; drop one of them"
            )
        if self.source is None and self.pairing != PairingSettings():
            raise ValueError("pairing joins a student.source with the source; there is none; drop it")
        return self


class TrainSettings(Settings):
    """[train]: the loop. `labels` says what the student learns from.

    `stop_at` ends the run when the accuracy (images) is at least, or the held-out loss (text, nats) at most, so much.
    With many processes `batch_size` counts the samples of all of them, and a process that does not answer for
    `process_timeout_seconds` ends the run.
    """

    labels: Literal["cache", "hard", "online"] = "cache"
    epochs: int = Field(20, ge=1)
    batch_size: int = Field(128, ge=1)
    eval_batch_size: int = Field(1024, ge=1)
    lr: float = Field(2e-3, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    warmup_share: float = Field(0.05, ge=0, le=1)
    seed: int = Field(0, ge=0)
    device: Literal["auto", "cpu"] = "auto"
    precision: Literal["no", "bf16", "fp16"] = "no"
    accumulation_steps: int = Field(1, ge=1)
    clip_norm: float | None = Field(None, gt=0)
    checkpoint_steps: int | None = Field(None, ge=1)
    stop_at: float | None = Field(None, ge=0)
    process_timeout_seconds: float = Field(600, ge=1)


@dataclass(frozen=True)
class Feed:
    """Where training batches come from.

    Attributes:
        dataset: of `pipeline.reader`, or one like it; see `pipeline.loader.JoinedDataset`.
        order: which samples make a batch.
        workers: loader processes.
    """

    dataset: Any
    order: BlockShuffle
    workers: int = 0


def train(
    task: Task,
    feed: Feed,
    *,
    settings: TrainSettings,
    out: str | Path,
    config: dict[str, Any],
    resolved: dict[str, Any] | None = None,
    mirror: RunMirror | None = None,
    loss: LossSettings | None = None,
    track: str | None = None,
    on_step: Callable[[int], None] = lambda samples: None,
    on_epoch: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Trains to the end, or from the last checkpoint to the end; returns the run's metrics.

    A directory with a finished run of the same config is not trained again: its metrics are returned.

    Args:
        config: what identifies the run; written to OUT/config.json and compared on a rerun.
        resolved: every setting, written to OUT/resolved.json for who reads it later.
        mirror: where in a bucket `out` is sent to, after every checkpoint and at the end.
        loss: [loss], where its temperature and alpha may change over the run; `task.loss` is then given a step's `mix`.
        track: an accelerate tracker's name, e.g. "tensorboard".

    Raises:
        RunError: `out` holds another run, or the processes of this one disagree about what it is.
        SpecError: the student's output is not what the labels need.
        LostProcessError: another process of the run is gone or silent.
    """
    if track:
        _need_tracker(track)
    join(cpu=settings.device == "cpu", timeout_seconds=settings.process_timeout_seconds)
    with explained():
        check_same("the run", config)
        directory = RunDirectory(out, config, resolved, mirror=mirror)
        if (finished := directory.metrics) is not None:
            return finished
        accelerator = _accelerator(settings, track, out)
        set_seed(settings.seed)
        loop = _Loop(accelerator, task, feed, settings, loss)
        loop.seed_process(epoch=0, step=0)
        progress = directory.load_checkpoint(accelerator, loop.resume_random_state) or {
            "epoch": 0,
            "step": 0,
            "history": [],
            "seconds": 0.0,
        }
        with at_boundaries():
            metrics = _run(loop, directory, progress, on_step, on_epoch)
        metrics |= from_first(loop.finish())
        loop.save_weights(directory, "model")
        if accelerator.is_main_process:
            task.export(accelerator.unwrap_model(loop.model), directory.path)
            directory.write_metrics(metrics)
        if track:
            accelerator.end_training()
        return from_first(metrics)


def _accelerator(settings: TrainSettings, track: str | None, out: str | Path) -> Accelerator:
    # accelerate keeps the precision of the first run of a process; this one may have another.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=settings.device == "cpu",
        mixed_precision=settings.precision,
        # `accelerate launch` has a setting of its own, which would divide the loss; a step is ours to split.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=track,
        project_dir=str(out) if track else None,
    )
    if accelerator.distributed_type not in _DATA_PARALLEL:
        raise RunError(
            f"accelerate's configuration asks for {accelerator.distributed_type.value}; each process holds the whole "
            "student here: choose multi-GPU or multi-CPU in `accelerate config`, or use torchrun"
        )
    store_unwrapped(accelerator)
    if track:
        accelerator.init_trackers("softcache")
    return accelerator


_DATA_PARALLEL = {kind for kind in DistributedType if kind.value == "NO" or kind.value.startswith("MULTI_")}


def _need_tracker(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(
            f"--track {name}: {name} is not installed; pip install 'softcache[track]'"
        ) from error


def _run(
    loop: _Loop,
    directory: RunDirectory,
    progress: dict[str, Any],
    on_step: Callable[[int], None],
    on_epoch: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Runs the epochs that are left; `progress` is where the run stands and is saved with every checkpoint."""
    settings, order = loop.settings, loop.feed.order
    history, started, spent = progress["history"], time.monotonic(), progress["seconds"]

    def save(loss: list[tuple[float, int]] | None) -> None:
        seconds = spent + time.monotonic() - started
        state = {**order.state_dict(), "history": history, "seconds": seconds, "loss": loss}
        if loop.adaptation is not None:
            state["adaptation"] = loop.adaptation.state_dict()
        directory.save_checkpoint(loop.accelerator, state)

    order.load_state_dict(progress)
    loop.resume_loss_meter(progress.get("loss"))
    if loop.adaptation is not None:
        loop.adaptation.load_state_dict(progress.get("adaptation", {}), history)
    while order.epoch < settings.epochs and not _reached(loop.task, history, settings.stop_at):
        epoch = order.epoch  # the loader goes on to the next at its end
        for samples in loop.epoch():
            on_step(samples)
            asked = loop.asked_to_stop()
            if asked or (settings.checkpoint_steps and loop.step % settings.checkpoint_steps == 0):
                save(loop.loss_meters())
            if asked:
                raise Interrupted(asked)
        # Processes decide by this whether to go on: all by the same number.
        row = from_first(
            {"epoch": epoch, "train_loss": loop.train_loss(), **loop.last_mix(), **loop.evaluate()}
        )
        history.append(row)
        if loop.adaptation is not None:
            loop.adaptation.end_epoch(row)
        loop.accelerator.log(row, step=order.epoch)
        if all(_is_better(loop.task, row, past) for past in history[:-1]):
            loop.save_weights(directory, "best")
        save(None)
        on_epoch(row)
    best = history[0]
    for row in history[1:]:
        best = row if _is_better(loop.task, row, best) else best
    return {
        "labels": settings.labels,
        "num_parameters": count_parameters(loop.model),
        **{name: value for name, value in history[-1].items() if name not in ("epoch", "train_loss")},
        f"best_{loop.task.metric}": best[loop.task.metric],
        "best_epoch": best["epoch"],
        "epochs": len(history),
        "steps": loop.step,
        "eval_samples": len(loop.task.evaluation),
        "seconds": round(spent + time.monotonic() - started, 3),
        "history": history,
    }


def _is_better(task: Task, row: dict[str, Any], other: dict[str, Any]) -> bool:
    one, two = row[task.metric], other[task.metric]
    return bool(one > two if task.larger_is_better else one < two)


def _reached(task: Task, history: list[dict[str, Any]], goal: float | None) -> bool:
    if goal is None or not history:
        return False
    value = history[-1][task.metric]
    return bool(value >= goal if task.larger_is_better else value <= goal)


class _Loop:
    """The moving parts of one run: model, optimizer, batches, meters."""

    def __init__(
        self,
        accelerator: Accelerator,
        task: Task,
        feed: Feed,
        settings: TrainSettings,
        loss: LossSettings | None = None,
    ) -> None:
        self.accelerator, self.task, self.feed, self.settings = accelerator, task, feed, settings
        model = task.build()
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
        self.model, self._optimizer = accelerator.prepare(model, optimizer)
        self._loss_sum, self._loss_rows = torch.zeros((), device=accelerator.device), 0
        self._steps = [feed.order.num_steps(epoch) for epoch in range(settings.epochs)]
        self.adaptation: Adaptation | None = None
        if loss is not None and loss.adapts:
            self.adaptation = Adaptation(loss, accelerator, num_steps=sum(self._steps))
        self._loader = SoftLabelLoader(
            feed.dataset, feed.order, workers=feed.workers, pin_memory=accelerator.device.type == "cuda"
        )

    @property
    def step(self) -> int:
        """Optimizer steps done since the start of the run."""
        return sum(self._steps[: self.feed.order.epoch]) + self.feed.order.step

    def epoch(self) -> Iterator[int]:
        """Trains on the rest of the current epoch; yields after every step how many samples it had, over all ranks."""
        self.model.train()
        for batch in self._loader:
            num_samples = self.feed.order.num_samples(self.feed.order.step - 1)
            factor = self._schedule(self.step - 1)  # the loader has counted the batch
            for group in self._optimizer.param_groups:
                group["lr"] = self.settings.lr * factor
            self._update(batch.to(self.accelerator.device))
            if self.adaptation is not None:
                self.adaptation.update(factor)
            yield num_samples

    def asked_to_stop(self) -> int | None:
        """Returns the signal that asked the run to end, None without one; the same on every rank.

        Ranks are signalled at different steps, and a checkpoint is of one step: they agree now and then, because asking
        each other waits for the device.
        """
        asked = asked_signal()
        if self.accelerator.num_processes == 1:
            return asked
        if self.step % AGREE_STEPS:
            return None
        told = torch.tensor([float(asked or 0)], device=self.accelerator.device)
        return int(self.accelerator.gather(told).max()) or None

    def _schedule(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to zero; a factor of the learning rate in (0, 1]."""
        total = sum(self._steps)
        warmup = max(1, round(self.settings.warmup_share * total))
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    def _update(self, batch: Any) -> None:
        """One optimizer step on one batch, in `accumulation_steps` pieces of exact weight."""
        order = self.feed.order
        local, total = order.share(order.step - 1)
        label_share = order.label_share(order.step - 1)
        pieces = batch.split(self.settings.accumulation_steps)
        for number, piece in enumerate(pieces):
            last = number == len(pieces) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = self.task.loss(self.model, piece, label_share=label_share, **self._mix())
                # Ranks average their gradients: the weight makes that the mean over the rows of the whole batch.
                weight = piece.num_rows / total * self.accelerator.num_processes if local else 0.0
                self.accelerator.backward(loss * weight)
            if local:
                self._loss_sum += loss.detach() * piece.num_rows
                self._loss_rows += piece.num_rows
        if self.settings.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _mix(self) -> dict[str, Any]:
        """This step's temperature and alpha, for a task's loss; nothing where they never change."""
        if self.adaptation is None:
            return {}
        return {"mix": self.adaptation.mix(step=self.step - 1, epoch=self.feed.order.epoch)}

    def last_mix(self) -> dict[str, float]:
        """Temperature and alpha of the last step, for the epoch's row; nothing where they never change."""
        return {} if self.adaptation is None else self.adaptation.last

    def save_weights(self, directory: RunDirectory, name: str) -> None:
        if self.accelerator.is_main_process:
            directory.save_weights(self.task.weights(self.accelerator.unwrap_model(self.model)), name)

    def seed_process(self, *, epoch: int, step: int) -> None:
        """Gives every rank but the first random numbers of its own from here on; the first goes on with the run's."""
        if rank := self.accelerator.process_index:
            entropy = [self.settings.seed, epoch, step, rank]
            set_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))

    def resume_random_state(self, progress: dict[str, Any]) -> None:
        """For a rank that was not there when the checkpoint was saved; the others' states are in it."""
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

    def train_loss(self) -> float:
        """Returns the epoch's mean loss over all ranks, and starts the next epoch's."""
        rows = torch.tensor(float(self._loss_rows), device=self._loss_sum.device)
        total = self.accelerator.reduce(torch.stack([self._loss_sum, rows]), reduction="sum")
        self.resume_loss_meter(None)
        return float(total[0] / total[1])

    def finish(self) -> dict[str, float]:
        """Returns what the task scores once, of the weights that the run ends with."""
        self.model.eval()
        return self.task.finish(self.model, self.accelerator)

    def evaluate(self) -> dict[str, float]:
        """Returns the task's figures on the plain view of the evaluation split, of the weights that are saved."""
        self.model.eval()
        for (
            buffer
        ) in self.model.buffers():  # running statistics are of each rank's own samples until the next step
            broadcast(buffer)
        return self.task.evaluate(self.model, self.accelerator, self.settings.eval_batch_size)
