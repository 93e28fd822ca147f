"""Samples where a student follows its teacher against the label, and where it fails to follow: pictures, or tokens.

Of each student the `EXAMPLES` rows of which the teacher was surest, `MAX_ROWS_PER_SAMPLE` of a text at most. A picture is
the image as the source has it, a PNG inside the page; a text is the tokens before the row, each shaded by how far the
student is from its teacher there.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from softcache.runs.report.load import Report
from softcache.runs.report.metrics import agrees_with_teacher, misses_teacher
from softcache.runs.report.predictions import Observed, Predictions
from softcache.tools.browse.samples import group_tokens
from softcache.tools.page import encode_picture

__all__ = ["Example", "ExampleSet", "Names", "example_sets"]

EXAMPLES = 12
MAX_ROWS_PER_SAMPLE = 2
CONTEXT_TOKENS = 24
THUMBNAIL = 96  # pixels, of a picture's longer side


@dataclass
class Example:
    """One row that is shown.

    Attributes:
        picture: a data URI; None for text.
        tokens: (text, KL(teacher || student) in nats or None where there is no row); empty for images.
    """

    key: str
    label: str
    teacher: str
    student: str
    confidence: float
    picture: str | None
    tokens: list[tuple[str, float | None]]


@dataclass
class ExampleSet:
    """The examples of one student: it follows (`kind` "follows") or does not ("fails")."""

    student: str
    kind: str
    total: int
    examples: list[Example]


class Names:
    """The names of classes: a source's own, or the tokens of its tokenizer."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def __getitem__(self, number: int) -> str:
        return self._report.data.class_name(number)

    def unique(self, numbers: np.ndarray) -> list[str]:
        """Returns a unique name for each class: tokens with the same text get their number appended."""
        found = [self[int(number)] for number in numbers]
        return [
            name if found.count(name) == 1 else f"{name} #{number}"
            for name, number in zip(found, numbers, strict=True)
        ]


def example_sets(report: Report, observed: Observed, names: Names) -> list[ExampleSet]:
    """Returns two sets for every student that was trained on teacher labels."""
    if observed.teacher is None:
        return []
    taught = {run.name for run in report.runs if run.labels != "hard"}
    out = []
    for student in observed.students:
        if student.name not in taught:
            continue
        for kind, choose in (("follows", agrees_with_teacher), ("fails", misses_teacher)):
            rows = choose(observed.teacher.guess_P, student.guess_P, observed.targets_P)
            surest = rows[np.argsort(-observed.teacher.confidence_P[rows], kind="stable")]
            chosen = _few_of_each(surest, observed.sample_P)
            shown = [_example(report, observed, student, row, names) for row in chosen]
            out.append(ExampleSet(student.name, kind, len(rows), shown))
    return out


def _few_of_each(rows: np.ndarray, sample_P: np.ndarray) -> list[int]:
    """Returns the first rows, of one sample at most `MAX_ROWS_PER_SAMPLE`: neighbours in a text mostly share a mistake."""
    chosen: list[int] = []
    counts: Counter[int] = Counter()
    for row in rows.tolist():
        counts[int(sample_P[row])] += 1
        if counts[int(sample_P[row])] <= MAX_ROWS_PER_SAMPLE:
            chosen.append(row)
        if len(chosen) == EXAMPLES:
            break
    return chosen


def _example(report: Report, observed: Observed, student: Predictions, row: int, names: Names) -> Example:
    assert observed.teacher is not None
    data: Any = report.data.evaluation if observed.split == "held-out" else report.data.train
    sample = int(observed.sample_P[row])
    image = data.picture(sample)
    return Example(
        key=data.source.key(sample),
        label=names[int(observed.targets_P[row])],
        teacher=names[int(observed.teacher.guess_P[row])],
        student=names[int(student.guess_P[row])],
        confidence=float(observed.teacher.confidence_P[row]),
        picture=None if image is None else encode_picture(image, THUMBNAIL),
        tokens=_tokens(report, data, observed, student, row) if image is None else [],
    )


def _tokens(
    report: Report, data: Any, observed: Observed, student: Predictions, row: int
) -> list[tuple[str, float | None]]:
    sample, position = int(observed.sample_P[row]), int(observed.position_P[row])
    of_sample = np.flatnonzero(observed.sample_P == sample)
    kl_of = dict(zip(observed.position_P[of_sample].tolist(), student.kl_P[of_sample].tolist(), strict=True))
    tokens = data.source.sample(sample).tokens
    first = max(0, position + 1 - CONTEXT_TOKENS)
    shown = range(first, position + 1)
    pieces = group_tokens(
        lambda numbers: report.data.decode_tokens(*numbers),  # type: ignore[attr-defined]
        [int(tokens[at]) for at in shown],
    )
    return [
        (text, max((kl for place in places if (kl := kl_of.get(shown[place])) is not None), default=None))
        for text, places in pieces
    ]
