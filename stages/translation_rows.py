"""chrF and BLEU of a table's students, per language, beside those of the same students on hard labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .options import print_table

__all__ = ["print_translations", "translation_rows"]

Metrics = Mapping[str, Any]
COLUMNS = (
    "student",
    "language",
    "chrF from cache",
    "chrF hard labels",
    "BLEU from cache",
    "BLEU hard labels",
)


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


def print_translations(results: Sequence[tuple[Metrics, Metrics | None]]) -> None:
    """Prints the table of chrF and BLEU, if the students translate and were scored."""
    if rows := list(translation_rows(results)):
        print_table("what they write of the held-out texts, of 100", COLUMNS, rows)
