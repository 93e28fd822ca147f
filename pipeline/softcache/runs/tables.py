"""Tables of trained students: one row each, with the teacher and the hard-label baseline."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from softcache.losses import LossSettings
from softcache.modalities import Modality, Score, percent
from softcache.reader.cache import Cache

__all__ = [
    "ResultTable",
    "advice",
    "student_advice",
    "student_report",
    "student_tables",
    "translation_rows",
    "without_history",
]

Metrics = Mapping[str, Any]
Results = Sequence[tuple[Metrics, Metrics | None]]
"""Metrics of a student from the cache and, where it was trained, of the same student on hard labels."""

TRANSLATION_COLUMNS = (
    "student",
    "language",
    "chrF from cache",
    "chrF hard labels",
    "BLEU from cache",
    "BLEU hard labels",
)


def student_advice(
    loss: LossSettings, modality: Modality, cached: Metrics, hard: Metrics | None
) -> str | None:
    """Returns `advice` about one student; None where it was not trained on hard labels.

    There is one run of each: of accuracies, the spread is the standard error of their difference on so many samples.
    """
    if hard is None:
        return None
    metric, spread = modality.score.metric, 0.0
    if metric == "accuracy":
        spread = math.sqrt(2 * hard[metric] * (1 - hard[metric]) / hard["eval_samples"])
    return advice(loss, modality.score, cached[metric], hard[metric], spread=spread)


class ResultTable(NamedTuple):
    """A table of text: a title, the columns' names and one tuple of cells per row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def student_tables(cache: Cache, results: Results, modality: Modality) -> list[ResultTable]:
    """Returns the table of students, and for students that translate a table of chrF and BLEU per language."""
    more = (score.title for score in modality.more_scores)
    columns = (
        "student",
        "parameters",
        "of teacher",
        "from cache",
        *more,
        "hard labels",
        "teacher",
        "seconds",
    )
    title = f"students from {cache.url}{modality.unit}"
    tables = [ResultTable(title, columns, [_student_row(cache, modality, *pair) for pair in results])]
    if rows := list(translation_rows(results)):
        tables.append(ResultTable("translations of the held-out texts, of 100", TRANSLATION_COLUMNS, rows))
    return tables


def _student_row(cache: Cache, modality: Modality, cached: Metrics, hard: Metrics | None) -> tuple[str, ...]:
    teacher, score = cache.manifest.teacher, modality.score
    extra = [other.format(cached[other.metric]) for other in modality.more_scores]
    share = cached["num_parameters"] / teacher.num_parameters if teacher.num_parameters else None
    return (
        cached["model"],
        f"{cached['num_parameters']:,}",
        percent(share),
        score.format(cached[score.metric]),
        *extra,
        score.format(hard[score.metric] if hard else None),
        score.format(getattr(teacher, score.of_teacher)),
        f"{cached['seconds']:.1f}",
    )


def translation_rows(results: Results) -> Iterator[tuple[str, ...]]:
    """Yields a row for each student and language, and the means where there are several; none for runs without chrF."""
    for cached, hard in results:
        languages = [name.removeprefix("chrf_") for name in cached if name.startswith("chrf_")]
        means = [("mean", "")] if len(languages) > 1 else []
        for language, suffix in [*((language, f"_{language}") for language in languages), *means]:
            scores = [
                "-" if run is None else f"{run[score + suffix]:.1f}"
                for score in ("chrf", "bleu")
                for run in (cached, hard)
            ]
            yield (cached["model"], language, *scores)


def advice(
    loss: LossSettings, score: Score, cached: float, hard: float, *, spread: float = 0.0
) -> str | None:
    """Returns what to try where hard labels teach more than the cache does, by more than a spread; None elsewhere.

    Args:
        cached: the score of students from the cache.
        hard: that of the same students on hard labels.
        spread: standard deviation over seeds; 0 where there is one.
    """
    lead = hard - cached if score.larger_is_better else cached - hard
    if not lead > spread:
        return None
    tries = ["longer training (train.epochs)", "a lower loss.alpha"]
    if loss.temperature > 1:
        tries.insert(0, f"loss.temperature = 1 (it is {loss.temperature:g})")
    points = "" if score.scale == 1 else " points"
    return (
        f"hard labels teach more than the cache by {score.scale * lead:.4g}{points}: try {', '.join(tries)}, or "
        "`softcache sweep`"
    )


def without_history(run: Metrics) -> Metrics:
    """Returns the metrics of a run without the history of its epochs."""
    return {key: value for key, value in run.items() if key != "history"}


def student_report(cache: Cache, results: Results, loss: LossSettings, modality: Modality) -> dict[str, Any]:
    """Returns the table of students as JSON: every run's metrics without the history of its epochs."""

    return {
        "cache": cache.url,
        "kind": cache.manifest.kind,
        "teacher": cache.manifest.teacher.model_dump(mode="json"),
        "students": [
            {
                "model": cached["model"],
                "cache": without_history(cached),
                "hard": hard and without_history(hard),
                "advice": student_advice(loss, modality, cached, hard),
            }
            for cached, hard in results
        ],
    }
