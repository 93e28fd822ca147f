"""The teacher for comparison with a student: on the student's inputs, or on its own where the two have different inputs.

A student of another source (bytes, a reduced view) has other inputs; the teacher is then scored and timed on its own
inputs, and their agreement is computed on the matched held-out samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from softcache.data.batch import Dataset
from softcache.errors import RunError
from softcache.runs.export.benchmark import Agreement, Model, compare_models, in_batches, run_module
from softcache.runs.report.load import Report, Run, match_samples
from softcache.student.tasks.inference import Serving

__all__ = ["TeacherComparison", "load_teacher_for_comparison"]


@dataclass(frozen=True)
class TeacherComparison:
    """A served teacher and its held-out data.

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
        """Returns its scores on its own held-out split, and the student's agreement with it on the matched samples."""
        asked = in_batches(self.serving, self.data, self.num_classes)
        found = compare_models({"teacher": self.model}, asked, reference="teacher")["teacher"]
        found.same_predictions = None
        if self.student_of is not None and (self.student_of >= 0).any():
            mine = self._predictions(self.model, self.serving, self.data)
            theirs = self._predictions(student, serving, data)
            kept = self.student_of >= 0
            found.same_predictions = float((mine[kept] == theirs[self.student_of[kept]]).mean())
        return found

    def _predictions(self, model: Model, serving: Serving, data: Dataset) -> np.ndarray:
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
        student_of = match_samples(report, run, "eval")
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
