"""Which of a student's own samples is which that the teacher saw, where a student reads something else."""

from __future__ import annotations

from typing import Any

import numpy as np

from softcache.data.pairing import pair_sources
from softcache.errors import AlignmentError, RunError
from softcache.modalities.images.student import StudentImages
from softcache.runs.report.load import Report, Run

__all__ = ["partners"]


def partners(report: Report, run: Run, split: str) -> np.ndarray | None:
    """Returns of each of the teacher's samples of a split the run's student's own; -1: it has none. None: they see the same.

    Args:
        split: "training" or "held-out". The pairing of the training split is that of the run; held-out samples are paired
            by the same rule, and those without a partner are left out.

    Raises:
        RunError: the student's held-out samples are not the teacher's.
    """
    student: Any = report.data_of(run)
    if not isinstance(student, StudentImages):
        return None
    if split == "training":
        return student.pairing.student_of
    rule = run.config.student.pairing.model_copy(update={"subset": True})
    try:
        return pair_sources(report.data.evaluation.source, student.evaluation.source, rule).student_of
    except AlignmentError as error:
        raise RunError(
            f"run {run.path}: its student's held-out samples cannot be laid beside the teacher's: {error}"
        ) from error
