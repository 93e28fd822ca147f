"""The table of students: one row each, teacher and hard-label baseline beside it, by what their kind is compared by."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from softcache.reader.cache import Cache
from softcache.runtime.scores import SCORES, percent

__all__ = [
    "student_columns",
    "student_report",
    "student_row",
    "student_title",
    "translation_rows",
]

Metrics = Mapping[str, Any]
TRANSLATION_COLUMNS = (
    "student",
    "language",
    "chrF from cache",
    "chrF hard labels",
    "BLEU from cache",
    "BLEU hard labels",
)


def student_columns(kind: str) -> tuple[str, ...]:
    beside = {"tokens": ("perplexity",), "cells": ("mAP50",)}.get(kind, ())
    return ("student", "parameters", "of teacher", "from cache", *beside, "hard labels", "teacher", "seconds")


def student_title(cache: Cache) -> str:
    unit = {"tokens": "; held-out loss in nats per token", "cells": "; mean average precision, x 100"}
    return f"students from {cache.url}{unit.get(cache.manifest.kind, '')}"


def student_row(cache: Cache, cached: dict[str, Any], hard: dict[str, Any] | None) -> tuple[str, ...]:
    teacher, kind = cache.manifest.teacher, cache.manifest.kind
    score, beside = SCORES[kind], []
    if kind == "tokens":
        beside = [f"{cached['perplexity']:.1f}"]
    elif kind == "cells":
        beside = [score.told(cached["map50"])]
    share = cached["num_parameters"] / teacher.num_parameters if teacher.num_parameters else None
    return (
        cached["model"],
        f"{cached['num_parameters']:,}",
        percent(share),
        score.told(cached[score.metric]),
        *beside,
        score.told(hard[score.metric] if hard else None),
        score.told(getattr(teacher, score.of_teacher)),
        f"{cached['seconds']:.1f}",
    )


def student_report(
    cache: Cache, results: Sequence[tuple[dict[str, Any], dict[str, Any] | None]]
) -> dict[str, Any]:
    """Returns what the table of students tells, as numbers: every run's metrics without the history of its epochs."""

    def figures(run: dict[str, Any] | None) -> dict[str, Any] | None:
        return run and {key: value for key, value in run.items() if key != "history"}

    teacher = cache.manifest.teacher
    return {
        "cache": cache.url,
        "kind": cache.manifest.kind,
        "teacher": teacher.model_dump(mode="json"),
        "students": [
            {"model": cached["model"], "cache": figures(cached), "hard": figures(hard)}
            for cached, hard in results
        ],
    }


def translation_rows(results: Sequence[tuple[Metrics, Metrics | None]]) -> Iterator[tuple[str, ...]]:
    """Yields a row for each student and language, and the means where there are several; none for runs without chrF.

    Args:
        results: metrics of a student from the cache and, where it was trained, of the same on hard labels.
    """
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
