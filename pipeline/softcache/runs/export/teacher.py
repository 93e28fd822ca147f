"""The teacher beside a student: on the student's inputs where both read the same, on its own where they do not.

A student of another source (bytes, a reduced view) has other inputs; the teacher is then scored and timed on what it reads
itself, and whether both predict the same is told of the held-out samples that are partners.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from softcache.data.batch import Dataset
from softcache.errors import RunError
from softcache.runs.export.benchmark import Agreement, Model, compare, in_batches, run_module
from softcache.runs.report.load import Report, Run, partners
from softcache.student.tasks.inference import Serving

__all__ = ["TeacherComparison", "load_teacher_for_comparison"]


@dataclass(frozen=True)
class TeacherComparison:
    """A teacher as its users call it.

    Attributes:
        is_apart: whether it reads something else than the student.
        student_of: [N] int64, of each of its held-out samples the student's, -1: none; None where that is not known.
    """

    model: Model
    serving: Serving
    data: Dataset
    num_classes: int
    is_apart: bool
    student_of: np.ndarray | None

    def scores(self, student: Model, serving: Serving, data: Dataset) -> Agreement:
        """Returns what it says of its own held-out split, and how often the student predicts the same of the partners."""
        asked = in_batches(self.serving, self.data, self.num_classes)
        found = compare({"teacher": self.model}, asked, reference="teacher")["teacher"]
        found.same_predictions = None
        if self.student_of is not None and (self.student_of >= 0).any():
            mine = self._guesses(self.model, self.serving, self.data)
            theirs = self._guesses(student, serving, data)
            kept = self.student_of >= 0
            found.same_predictions = float((mine[kept] == theirs[self.student_of[kept]]).mean())
        return found

    def _guesses(self, model: Model, serving: Serving, data: Dataset) -> np.ndarray:
        asked: Any = in_batches(serving, data, self.num_classes)
        return np.concatenate([one.logits_of(model(one.inputs)).argmax(1).numpy() for one in asked])


def load_teacher_for_comparison(report: Report, run: Run) -> TeacherComparison | None:
    """Returns a run's teacher; None where its weights are not there."""
    if report.teacher is None:
        return None
    reads = {"context": None, "source": None, "views": None}
    task = report.data.task(
        run.config.model_copy(update={"student": run.config.student.model_copy(update=reads)}),
        report.teacher.spec,
    )
    serving = task.serve(report.teacher.model)
    try:
        student_of = partners(report, run, "held-out")
    except RunError:  # the report refuses these; here it costs one number
        student_of = None
    return TeacherComparison(
        run_module(serving.module),
        serving,
        report.data.evaluation,
        report.data.num_classes,
        run.config.student.has_own_input,
        student_of,
    )
