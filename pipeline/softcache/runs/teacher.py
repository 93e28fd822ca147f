"""The teacher of a config: opened, or trained where it is missing."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from softcache.config.run import RunConfig
from softcache.errors import ConfigError
from softcache.modalities import Data
from softcache.runs.batches import hard_label_batches
from softcache.runs.fit import run_training
from softcache.runtime.logging import log_info
from softcache.student import StudentSettings
from softcache.student.checkpoint import RunDirectory
from softcache.teacher.base import Teacher, TeacherSettings
from softcache.teacher.capture.plan import num_slots

__all__ = [
    "format_score",
    "make_teacher",
    "open_teacher",
    "teacher_is_missing",
    "teacher_settings",
    "train_teacher",
    "untrained_teacher",
]


def teacher_settings(config: RunConfig) -> TeacherSettings:
    if config.teacher is None:
        raise ConfigError(
            f"config {config.name}: table [teacher] is missing; it names the model that labels the data"
        )
    return config.teacher


def open_teacher(config: RunConfig, data: Data) -> Teacher:
    """Returns the config's teacher with its weights, on the device and dtype of [capture]."""
    return data.teacher(config, teacher_settings(config))


def train_teacher(config: RunConfig, data: Data) -> tuple[dict[str, Any], Path]:
    """Trains the teacher of a config on hard labels; returns its metrics and its weights file.

    Raises:
        ConfigError: there is no [train_teacher] table, or teacher.weights is not where this writes.
    """
    teacher = teacher_settings(config)
    out = config.root / "teacher"
    weights = out / "model.safetensors"
    run = _training_config(config)
    if teacher.weights is None or Path(teacher.weights) != weights:
        raise ConfigError(
            f"config {config.name}: teacher.weights is {teacher.weights!r}, but train-teacher writes {str(weights)!r}; "
            "set teacher.weights to that, or keep your own weights and skip train-teacher"
        )
    task = data.task(run, teacher.model)
    metrics = run_training(run, data, task, teacher.model, out, hard_label_batches(run, data), identity={})
    return metrics, weights


def _training_config(config: RunConfig) -> RunConfig:
    """Returns the config by which its [train_teacher] trains the teacher.

    Raises:
        ConfigError: there is no [train_teacher].
    """
    if config.train_teacher is None:
        model = teacher_settings(config).model
        raise ConfigError(
            f"config {config.name}: table [train_teacher] is missing; it says how to train {model}"
        )
    settings = config.train_teacher.model_copy(update={"labels": "ground_truth"})
    return _as_teacher(config).model_copy(update={"train": settings})


@contextmanager
def untrained_teacher(config: RunConfig, data: Data) -> Iterator[RunConfig]:
    """Yields the config with weights for its teacher, as [train_teacher] would begin with them, in a temporary folder."""
    teacher = teacher_settings(config)
    with tempfile.TemporaryDirectory(prefix="softcache-untrained-") as folder:
        directory = RunDirectory(Path(folder), {}, {})
        task = data.task(_training_config(config), teacher.model)
        directory.save_weights(task.weights(task.build()), "model")
        settings = teacher.model_copy(update={"weights": str(directory.path / "model.safetensors")})
        yield config.model_copy(update={"teacher": settings})


def _as_teacher(config: RunConfig) -> RunConfig:
    """Returns the config without what [student] and [loss] say of another reader than the teacher is."""
    plain = StudentSettings(model=config.student.model, models=config.student.models)
    loss = (
        config.loss.model_copy(update={"name": "forward_kl"}) if config.loss.compares_ranks else config.loss
    )
    return config.model_copy(update={"student": plain, "loss": loss})


def teacher_is_missing(config: RunConfig) -> bool:
    """Returns whether the teacher's weights file is missing and the config can make it."""
    weights = teacher_settings(config).weights
    return config.train_teacher is not None and weights is not None and not Path(weights).exists()


def format_score(metrics: dict[str, Any]) -> str:
    """Returns the score of a run: its accuracy, of detections the mean average precision, of masks the mean IoU."""
    if "miou" in metrics:
        return f"mIoU {metrics['miou']:.4f} (pixel accuracy {metrics['accuracy']:.4f})"
    if "map50" in metrics:
        return f"mAP {metrics['map']:.4f} (mAP50 {metrics['map50']:.4f})"
    if "map" in metrics:
        return f"mAP {metrics['map']:.4f} (F1 {metrics['f1']:.4f})"
    return f"accuracy {metrics['accuracy']:.4f}"


def make_teacher(config: RunConfig, data: Data) -> None:
    """Trains the teacher if its weights file is missing and the config has [train_teacher].

    Raises:
        LabelError: [labels] keeps more classes than there are, which only its labels would tell after the training.
    """
    teacher = teacher_settings(config)
    if teacher_is_missing(config):
        num_slots(config.labels, data.num_classes, data.train.source.name)
        log_info(f"teacher {teacher.model}: no weights at {teacher.weights} yet; training it once")
        metrics, _ = train_teacher(config, data)
        log_info(
            f"teacher {teacher.model}: {metrics['num_parameters']:,} parameters, {format_score(metrics)}, "
            f"loss {metrics['eval_loss']:.4f}"
        )
