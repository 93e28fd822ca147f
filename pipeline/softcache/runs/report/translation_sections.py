"""What students of translation write: chrF and BLEU by language."""

from __future__ import annotations

from typing import Any

from softcache.runs.report.load import Report
from softcache.runs.report.plots import Figure, Styles, bars

__all__ = ["translations_figure"]


def translations_figure(report: Report, styles: Styles) -> Figure:
    """Returns chrF of what the students wrote, by language; BLEU in the table."""
    languages = sorted({key[5:] for run in report.runs for key in run.metrics if key.startswith("chrf_")})
    scores = {run.name: [run.metrics.get(f"chrf_{one}") for one in languages] for run in report.runs}
    rows: list[Any] = []
    for run in report.runs:
        told = [run.metrics.get(f"{score}_{one}") for score in ("chrf", "bleu") for one in languages]
        rows.append((run.name, (run.name, *("–" if value is None else f"{value:.1f}" for value in told))))
    return Figure(
        "glance-translations",
        "Translations",
        "chrF of what the students wrote for the held-out sources, by language, against the references; more is better.",
        bars(styles, languages, scores, x="language", y="chrF"),
        ("model", *(f"chrF {one}" for one in languages), *(f"BLEU {one}" for one in languages)),
        rows,
        width="whole",
    )
