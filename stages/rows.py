"""The table of students: one row each, teacher and hard-label baseline beside it; images by accuracy, text by loss."""

from collections.abc import Sequence
from typing import Any

from pipeline.cache import Cache

__all__ = [
    "cache_report",
    "headline",
    "percent",
    "score",
    "student_columns",
    "student_report",
    "student_row",
    "student_title",
]


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}%"


def _loss(nats: float | None) -> str:
    return "-" if nats is None else f"{nats:.4f}"


def headline(kind: str) -> tuple[str, bool]:
    """Returns the metric that tables compare by, and whether larger is better."""
    return ("accuracy", True) if kind == "image" else ("eval_loss", False)


def score(kind: str, value: float | None) -> str:
    """Returns the headline metric in words: an accuracy, or a held-out loss in nats per token."""
    return percent(value) if kind == "image" else _loss(value)


def student_columns(kind: str) -> tuple[str, ...]:
    if kind == "image":
        return ("student", "parameters", "of teacher", "from cache", "hard labels", "teacher", "seconds")
    return (
        "student",
        "parameters",
        "of teacher",
        "from cache",
        "perplexity",
        "hard labels",
        "teacher",
        "seconds",
    )


def student_title(cache: Cache) -> str:
    unit = "" if cache.manifest.kind == "image" else "; held-out loss in nats per token"
    return f"students from {cache.url}{unit}"


def student_row(cache: Cache, cached: dict[str, Any], hard: dict[str, Any] | None) -> tuple[str, ...]:
    teacher, kind = cache.manifest.teacher, cache.manifest.kind
    metric, _ = headline(kind)
    share = cached["num_parameters"] / teacher.num_parameters if teacher.num_parameters else None
    return (
        cached["model"],
        f"{cached['num_parameters']:,}",
        percent(share),
        score(kind, cached[metric]),
        *([f"{cached['perplexity']:.1f}"] if kind == "tokens" else []),
        score(kind, hard[metric] if hard else None),
        score(kind, teacher.eval_accuracy if kind == "image" else teacher.eval_loss),
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
