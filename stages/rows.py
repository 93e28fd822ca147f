"""The table of students: one row each, teacher and hard-label baseline beside it, by what their kind is compared by."""

from collections.abc import Sequence
from typing import Any

from softcache.reader.cache import Cache
from softcache.runtime.scores import SCORES

__all__ = [
    "cache_report",
    "percent",
    "student_columns",
    "student_report",
    "student_row",
    "student_title",
]


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}%"


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


def cache_report(cache: Cache) -> dict[str, Any]:
    """Returns what commands that write a cache tell of it: units, rows, bytes, and how it is kept."""
    markers = cache.markers.values()
    return {
        "cache": cache.url,
        "units": cache.manifest.plan.num_units,
        "units_done": len(markers),
        "rows": sum(marker.num_rows for marker in markers),
        "num_bytes": sum(shard.num_bytes for marker in markers for shard in marker.shards),
        "num_classes": cache.num_classes,
        "store": cache.manifest.store,
        "codec": cache.manifest.codec,
    }
