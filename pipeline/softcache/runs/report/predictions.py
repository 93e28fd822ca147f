"""Predictions of teacher and students on the same rows: a few numbers per row, never all logits at once.

Where the teacher's weights are there, the rows are those of the held-out split. Where they are not,
its probabilities come from the cache, on rows of the training split: kept classes as stored, and the tail spread evenly
over the rest.

Shape suffixes: `P` rows, `V` classes, `C` classes shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from softcache.errors import RunError
from softcache.labels.base import dense_log_probs
from softcache.runs.report.load import Report, Run, match_samples
from softcache.student.tasks import TokenStudent

__all__ = ["Observed", "Predictions", "observe"]

MAX_ELEMENTS = 2**24  # of logits that are held at once
MAX_CLASSES_SHOWN = 20
TRAIN_SAMPLES = 2048  # of the training split, where the teacher's probabilities come from the cache


@dataclass
class Predictions:
    """One model's predictions on P rows.

    Attributes:
        name: of the run, or "teacher".
        guess_P: int64, the likeliest class.
        confidence_P: float32, its probability.
        target_log_prob_P: float32, of the ground truth, nats.
        kl_P: float32, KL(teacher || this), nats; zeros where there is no teacher.
        similarity_CC: mean probability of class j over the rows whose ground truth is class i.
    """

    name: str
    guess_P: np.ndarray
    confidence_P: np.ndarray
    target_log_prob_P: np.ndarray
    kl_P: np.ndarray
    similarity_CC: np.ndarray


@dataclass
class Observed:
    """Predictions of several models on the rows of one split.

    Attributes:
        split: "held-out" or "training".
        targets_P: int64, the ground truth.
        sample_P: int64, of which sample of the split a row is.
        position_P: int64, where in the sample (0 of an image).
        classes_C: int64, the classes shown in `similarity_CC`: all, or the most frequent.
    """

    split: str
    targets_P: np.ndarray
    sample_P: np.ndarray
    position_P: np.ndarray
    classes_C: np.ndarray
    teacher: Predictions | None
    students: list[Predictions]


def observe(report: Report, *, split: str) -> Observed:
    """Returns the predictions of the students, and on the held-out split the teacher's, on a split's rows.

    Args:
        split: "held-out", or "training": the first rows, with the teacher as the cache has it.

    Raises:
        RunError: students without a sample in common, or one whose logits are no numbers.
    """
    data = report.data.evaluation if split == "held-out" else report.data.train
    students = [_Student(report, run, split) for run in report.runs]
    samples = _samples(data, split, students)
    parts: dict[str, list[tuple]] = {}
    about: list[tuple] = []
    classes_C = _shown(data.targets(samples), report.data.num_classes)
    for part in _batches(samples, report):
        batch: Any = data.load(part, 0, fingerprints=False)
        sample_P = np.repeat(part, batch.row_counts)
        about.append((batch.targets.numpy(), sample_P, np.asarray(batch.positions)))
        with torch.inference_mode():
            teacher_PV = _teacher_log_probs(report, batch, part, split)
            models = [("teacher", teacher_PV)] if teacher_PV is not None else []
            models += [(student.name, student.log_probs(batch, part)) for student in students]
            for name, log_p_PV in models:
                parts.setdefault(name, []).append(_facts(log_p_PV, teacher_PV, batch.targets, classes_C))
    targets_P, sample_P, position_P = (np.concatenate(column) for column in zip(*about, strict=True))
    found = {name: _merged(name, rows) for name, rows in parts.items()}
    teacher = found.pop("teacher", None)
    return Observed(split, targets_P, sample_P, position_P, classes_C, teacher, list(found.values()))


class _Student:
    """A run's student, and what it reads of the teacher's samples."""

    def __init__(self, report: Report, run: Run, split: str) -> None:
        self.name = run.name
        self._task: Any
        self._task, self._model = report.student(run)
        own = report.data_of(run)
        self._own = own.evaluation if split == "held-out" else own.train
        self.matches = match_samples(report, run, "eval" if split == "held-out" else "train")

    def log_probs(self, batch: Any, samples: np.ndarray) -> torch.Tensor:
        """Returns log-probabilities of the rows of `samples`, of which `batch` is what the teacher sees."""
        if isinstance(self._model, TokenStudent):
            return self._model.logits(batch).log_softmax(1)
        if self.matches is not None:
            batch = self._own.load(self.matches[samples], 0, fingerprints=False)
        found: torch.Tensor = self._task.logits(self._model, batch.images).log_softmax(1)
        return found


def _samples(data: Any, split: str, students: list[_Student]) -> np.ndarray:
    """Returns the samples that every student has.

    Raises:
        RunError: there are none.
    """
    asked = np.ones(len(data), bool)
    for student in students:
        if student.matches is not None:
            asked &= student.matches >= 0
    if not asked.any():
        raise RunError(
            f"{split} split: no sample of the teacher's is one of every student; report the runs apart"
        )
    return np.flatnonzero(asked)[: None if split == "held-out" else TRAIN_SAMPLES]


def _batches(samples: np.ndarray, report: Report) -> Iterator[np.ndarray]:
    size = max(1, min(256, MAX_ELEMENTS // (report.data.train.max_rows * report.data.num_classes)))
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


def _shown(targets: np.ndarray, num_classes: int) -> np.ndarray:
    if num_classes <= MAX_CLASSES_SHOWN:
        return np.arange(num_classes)
    counts = np.bincount(targets, minlength=num_classes)
    return np.sort(np.argsort(-counts, kind="stable")[:MAX_CLASSES_SHOWN])


def _teacher_log_probs(report: Report, batch: Any, samples: np.ndarray, split: str) -> torch.Tensor | None:
    if split == "held-out":
        if report.teacher is None:
            return None
        return torch.cat([chunk.float().cpu() for chunk in report.teacher.chunks(batch)]).log_softmax(1)
    assert report.cache is not None
    return torch.from_numpy(dense_log_probs(report.cache.read(samples, 0)))


def _facts(
    log_p_PV: torch.Tensor, teacher_PV: torch.Tensor | None, targets: torch.Tensor, classes_C: np.ndarray
) -> tuple:
    if teacher_PV is not None and teacher_PV.shape[1] != log_p_PV.shape[1]:  # heads padded differently
        width = min(teacher_PV.shape[1], log_p_PV.shape[1])
        teacher_PV, log_p_PV = teacher_PV[:, :width].log_softmax(1), log_p_PV[:, :width].log_softmax(1)
    best = log_p_PV.max(1)
    kl_P = torch.zeros(len(log_p_PV))
    if teacher_PV is not None:
        # A class that the teacher excludes adds nothing, whatever the student's probability.
        kl_P = torch.where(teacher_PV > -torch.inf, teacher_PV.exp() * (teacher_PV - log_p_PV), 0.0).sum(1)
    own_P = log_p_PV.gather(1, targets[:, None])[:, 0]
    p_PC = log_p_PV[:, torch.from_numpy(classes_C)].exp()
    is_class_PC = (targets[:, None] == torch.from_numpy(classes_C)).float()
    columns = (best.indices, best.values.exp(), own_P, kl_P)
    return (*(x.numpy() for x in columns), (is_class_PC.T @ p_PC).numpy(), is_class_PC.sum(0).numpy())


def _merged(name: str, rows: list[tuple]) -> Predictions:
    *columns, sums, counts = zip(*rows, strict=True)
    if not all(np.isfinite(confidence).all() for confidence in columns[1]):
        raise RunError(
            f"run {name}: its student gives non-finite logits on the held-out split; train it again with a lower "
            "train.lr, or leave it out of the report"
        )
    similarity = np.sum(sums, axis=0) / np.maximum(np.sum(counts, axis=0), 1)[:, None]
    guess, confidence, own, kl = (np.concatenate(column) for column in columns)
    return Predictions(name, guess, confidence, own, kl, similarity)
