"""One run of a student, from its directory's state to its metrics; see `softcache.student`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, GradientAccumulationPlugin, set_seed

from softcache.errors import DivergedError, RunError
from softcache.losses import LossSettings
from softcache.models.weights import count_parameters, is_adapted
from softcache.runtime.distributed import broadcast_from_rank0, check_same, join, on_cpu, translate_errors
from softcache.runtime.launcher import check_launcher
from softcache.runtime.logging import count_found
from softcache.runtime.signals import Interrupted, defer_signals
from softcache.student.bucket_sync import BucketSync
from softcache.student.checkpoint import RunDirectory, hold_run, store_unwrapped
from softcache.student.loop import TrainBatches, Trainer
from softcache.student.settings import TrainSettings
from softcache.student.tasks import Task

__all__ = ["train"]

FINITE_CHECK_STEPS = 50
"""Steps after which the losses since are looked at: asking waits for the device."""


def train(
    task: Task,
    feed: TrainBatches,
    *,
    settings: TrainSettings,
    out: str | Path,
    config: dict[str, Any],
    resolved: dict[str, Any] | None = None,
    mirror: BucketSync | None = None,
    loss: LossSettings | None = None,
    on_step: Callable[[int], None] = lambda samples: None,
    on_log: Callable[[str, dict[str, Any]], None] = lambda name, row: None,
    on_epoch: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Trains to the end, or from the last checkpoint to the end; returns the run's metrics.

    A directory with a finished run of the same config is not trained again: its metrics are returned.

    Args:
        config: what identifies the run; written to OUT/config.json and compared on a rerun.
        resolved: every setting, written to OUT/resolved.json for who reads it later.
        mirror: where in a bucket `out` is fetched from, and sent to after every checkpoint and at the end.
        loss: [loss], where its temperature and alpha may change over the run; `task.loss` is then given a step's `mix`.
        on_log: called with "step" and its loss, learning rate and throughput every `log_every_steps`, and with "evaluation"
            and its scores every `eval_every_steps`.

    Raises:
        RunError: `out` holds another run, another process works on it, or the processes of this one disagree about
            what it is.
        SpecError: the student's output is not what the labels need.
        DivergedError: the loss or the weights are not finite any more; the last checkpoint is from before that.
        LostProcessError: another process of the run is gone or silent.
    """
    _check_launcher(settings)
    join(cpu=on_cpu(settings.device), timeout_seconds=settings.ddp_timeout_seconds)
    with translate_errors():
        check_same("the run", config)
        with hold_run(out, mirror):
            directory = RunDirectory(out, config, resolved, mirror=mirror)
            if (finished := directory.metrics) is not None:
                return finished
            accelerator = _accelerator(settings)
            with _group(accelerator, settings):
                return _trained(
                    *(accelerator, task, feed, settings, loss, directory),
                    *(on_step, on_log, on_epoch),
                )


def _trained(
    accelerator: Accelerator,
    task: Task,
    feed: TrainBatches,
    settings: TrainSettings,
    loss: LossSettings | None,
    directory: RunDirectory,
    on_step: Callable[[int], None],
    on_log: Callable[[str, dict[str, Any]], None],
    on_epoch: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Trains from the last checkpoint to the end, writes what a finished run leaves; returns its metrics."""
    set_seed(settings.seed)
    loop = Trainer(accelerator, task, feed, settings, loss)
    loop.seed_process(epoch=0, step=0)
    progress = directory.load_checkpoint(accelerator, loop.resume_random_state, loop.load_shards) or {
        "epoch": 0,
        "step": 0,
        "history": [],
        "seconds": 0.0,
    }
    with defer_signals():
        metrics = _run(loop, directory, progress, on_step, on_log, on_epoch)
    metrics |= broadcast_from_rank0(loop.finish())
    loop.save_weights(directory, "model")
    if accelerator.is_main_process:
        is_last = metrics["best_epoch"] == metrics["history"][-1]["epoch"]
        task.export(loop.model_with(directory, "model" if is_last else "best"), directory.path)
        directory.write_metrics(metrics)
    return broadcast_from_rank0(metrics)  # type: ignore[no-any-return]


def _group(accelerator: Accelerator, settings: TrainSettings) -> AbstractContextManager[None]:
    if settings.parallel == "ddp":
        return nullcontext()
    from softcache.student.sharding import one_process_group  # takes a second to import

    return one_process_group(accelerator)


def _check_launcher(settings: TrainSettings) -> None:
    is_cpu = settings.device == "cpu" or not torch.accelerator.is_available()
    cut = 'set train.parallel = "fsdp" for a student that is cut over the processes'
    check_launcher(
        "train",
        {
            "mixed_precision": (settings.precision, "set train.precision"),
            "dynamo_backend": ("no", "set train.compile = true"),
            "gradient_accumulation_steps": (
                str(settings.accumulation_steps),
                "set train.accumulation_steps, in which train.batch_size is computed",
            ),
            "cpu": ("true" if is_cpu else "no", 'set train.device = "cpu"'),
            **dict.fromkeys(
                ("use_fsdp", "use_deepspeed", "use_megatron_lm", "use_parallelism_config"), ("no", cut)
            ),
        },
    )


def _accelerator(settings: TrainSettings) -> Accelerator:
    # accelerate keeps the precision of the first run of a process; this one may have another.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=on_cpu(settings.device),
        # A student that is cut has its precision in what is gathered, not by autocast.
        mixed_precision=settings.precision if settings.parallel == "ddp" else "no",
        # The launcher's setting would divide the loss once more; a step is ours to split.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    if accelerator.distributed_type not in _DATA_PARALLEL:
        raise RunError(
            f"accelerate's configuration asks for {accelerator.distributed_type.value}; the student's run cuts it itself, "
            'by train.parallel = "fsdp": choose multi-GPU or multi-CPU in `accelerate config`, or use torchrun'
        )
    store_unwrapped(accelerator)
    return accelerator


_DATA_PARALLEL = {kind for kind in DistributedType if kind.value == "NO" or kind.value.startswith("MULTI_")}


def _run(
    loop: Trainer,
    directory: RunDirectory,
    progress: dict[str, Any],
    on_step: Callable[[int], None],
    on_log: Callable[[str, dict[str, Any]], None],
    on_epoch: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Runs the epochs that are left; `progress` is where the run stands and is saved with every checkpoint."""
    settings, order = loop.settings, loop.feed.order
    history, started, spent = progress["history"], time.monotonic(), progress["seconds"]
    evaluations = progress.get("evaluations", [])
    pace = _Pace()

    def check_finite(*, weights: bool) -> None:
        if (step := loop.diverged_step(weights=weights)) is not None:
            raise _diverged(loop, directory, "loss, or the weights after it," if weights else "loss", step)

    def save(loss: list[tuple[float, int]] | None) -> None:
        seconds = spent + time.monotonic() - started
        state = {**order.state_dict(), "history": history, "seconds": seconds, "loss": loss}
        if evaluations:
            state["evaluations"] = evaluations
        if loop.adaptation is not None:
            state["adaptation"] = loop.adaptation.state_dict()
        directory.save_checkpoint(loop.accelerator, state, loop.save_shards)

    order.load_state_dict(progress)
    done = order.epoch * len(loop.feed.dataset) + sum(map(order.num_samples, range(order.step)))
    count_found(on_step, done)
    loop.resume_loss_meter(progress.get("loss"))
    if loop.adaptation is not None:
        loop.adaptation.load_state_dict(progress.get("adaptation", {}), history)
    while order.epoch < settings.epochs and not _reached(loop.task, history, settings.target_metric):
        epoch = order.epoch  # the loader goes on to the next at its end
        for samples in loop.epoch():
            on_step(samples)
            pace.count(samples)
            place = {"epoch": epoch, "step": loop.step}
            if settings.log_every_steps and loop.step % settings.log_every_steps == 0:
                on_log("step", place | pace.rates(loop.log_row()))
            is_last = order.step == order.num_steps(epoch)
            if settings.eval_every_steps and loop.step % settings.eval_every_steps == 0 and not is_last:
                with pace.paused():
                    evaluations.append(place | broadcast_from_rank0(loop.evaluate()))
                    on_log("evaluation", evaluations[-1])
                    loop.model.train()
            if loop.step % FINITE_CHECK_STEPS == 0:
                check_finite(weights=False)
            asked = loop.stop_requested()
            if asked or (settings.checkpoint_steps and loop.step % settings.checkpoint_steps == 0):
                check_finite(weights=True)
                save(loop.loss_meters())
            if asked:
                raise Interrupted(asked)
        check_finite(weights=True)
        # Processes decide by this whether to go on: all by the same number.
        row = broadcast_from_rank0(
            {"epoch": epoch, "train_loss": loop.train_loss(), **loop.last_mix(), **loop.evaluate()}
        )
        if not math.isfinite(row.get("eval_loss", 0.0)):
            raise _diverged(loop, directory, "evaluation loss", loop.step)
        history.append(row)
        if loop.adaptation is not None:
            loop.adaptation.end_epoch(row)
        if all(_is_better(loop.task, row, past) for past in history[:-1]):
            loop.save_weights(directory, "best")
        save(None)
        on_epoch(row | {"step": loop.step})
        pace.restart()
    best = history[0]
    for row in history[1:]:
        best = row if _is_better(loop.task, row, best) else best
    return {
        "labels": settings.labels_id,
        "num_parameters": count_parameters(loop.model),
        **_trained_parameters(loop.model),
        **{name: value for name, value in history[-1].items() if name not in ("epoch", "train_loss")},
        f"best_{loop.task.metric}": best[loop.task.metric],
        "best_epoch": best["epoch"],
        "epochs": len(history),
        "steps": loop.step,
        "eval_samples": len(loop.task.evaluation),
        "seconds": round(spent + time.monotonic() - started, 3),
        "history": history,
        **({"evaluations": evaluations} if evaluations else {}),
    }


def _diverged(loop: Trainer, directory: RunDirectory, what: str, step: int) -> DivergedError:
    kept = "no checkpoint was saved before that"
    if (last := directory.checkpoint_epoch()) is not None:
        kept = f"the last good checkpoint, of epoch {last[0]}, step {last[1]}, is kept in {directory.path / 'checkpoint'}"
    return DivergedError(
        f"run {directory.path}: the student diverged: the {what} of step {step} is not finite, at learning rate "
        f"{loop.learning_rate(step):.3g}; {kept}; lower train.lr, or set train.clip_norm or a longer train.warmup_share, "
        "and choose another --out"
    )


class _Pace:
    """How many samples and rows a second were trained on since the last call of `rates`, or `restart`."""

    def __init__(self) -> None:
        self._samples, self._since = 0, time.monotonic()

    def count(self, samples: int) -> None:
        self._samples += samples

    def restart(self) -> None:
        self._samples, self._since = 0, time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time that the block takes."""
        started = time.monotonic()
        yield
        self._since += time.monotonic() - started

    def rates(self, row: dict[str, float]) -> dict[str, float]:
        """Returns the row of a log with rates in place of its number of rows."""
        seconds = max(time.monotonic() - self._since, 1e-9)
        rates = {"samples_per_second": self._samples / seconds, "rows_per_second": row.pop("rows") / seconds}
        self.restart()
        return row | {key: round(rate, 3) for key, rate in rates.items()}


def _trained_parameters(model: torch.nn.Module) -> dict[str, int]:
    """Returns how many parameters are trained, of a model with adapters."""
    if not is_adapted(model):
        return {}
    return {"num_trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)}


def _is_better(task: Task, row: dict[str, Any], other: dict[str, Any]) -> bool:
    one, two = row[task.metric], other[task.metric]
    if not _is_number(one) or not _is_number(two):  # a score of nothing, such as precision without boxes
        return _is_number(one)
    return bool(one > two if task.larger_is_better else one < two)


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _reached(task: Task, history: list[dict[str, Any]], goal: float | None) -> bool:
    if goal is None or not history:
        return False
    value = history[-1][task.metric]
    return _is_number(value) and bool(value >= goal if task.larger_is_better else value <= goal)
