"""Sections on the transfer: agreement of students with the teacher, and the accuracy they lose."""

from __future__ import annotations

from typing import Any

import numpy as np

from softcache.runs.report.caches import describe_policy
from softcache.runs.report.examples import Names, example_sets
from softcache.runs.report.load import Report
from softcache.runs.report.metrics import by_class, by_decile, deciles, kept_masses
from softcache.runs.report.plots import Figure, Section, Styles, bars, heat, lines, points
from softcache.runs.report.predictions import Observed, Predictions
from softcache.runs.report.student_sections import format_metric
from softcache.tools.fidelity.report import bytes_per_position

__all__ = ["compression_section", "knowledge_section"]

TENTHS = [f"{n}" for n in range(1, 11)]


def _where(observed: Observed) -> str:
    return f"{len(observed.targets_P):,} rows of the {observed.split} split"


def knowledge_section(
    report: Report, styles: Styles, observed: Observed | None, names: Names, why: str | None
) -> Section:
    """Class similarity, agreement by the teacher's confidence, and examples."""
    section = Section("knowledge", "What knowledge moved", "")
    if observed is None or observed.teacher is None:
        section.lead = "How students and teacher agree."
        section.missing.append(f"All of it needs the teacher: {why}.")
        return section
    section.lead = f"Teacher and students on the same {_where(observed)}."
    if why:
        section.missing.append(
            f"The held-out split: {why}. Here the teacher's probabilities come from the cache."
        )
    decile_P = deciles(observed.teacher.confidence_P)
    teacher = observed.teacher
    agreement = {s.name: by_decile(s.guess_P == teacher.guess_P, decile_P) for s in observed.students}
    section.figures.append(
        _by_tenth(
            styles,
            agreement,
            "agreement",
            "Agreement with the teacher",
            "share that agrees",
        )
    )
    divergence = {s.name: by_decile(s.kl_P, decile_P) for s in observed.students}
    section.figures.append(
        _by_tenth(
            styles, divergence, "divergence", "Distance from the teacher", "KL(teacher || student), nats"
        )
    )
    shown = names.unique(observed.classes_C)
    section.figures += [_similarity(one, shown) for one in _compared_models(report, observed)]
    section.galleries = example_sets(report, observed, names)
    return section


def _compared_models(report: Report, observed: Observed) -> list[Predictions]:
    """The teacher, the student nearest to it, and the same architecture on hard labels."""
    assert observed.teacher is not None
    labels = {run.name: (run.model, run.labels) for run in report.runs}
    taught = [s for s in observed.students if labels[s.name][1] != "hard"] or observed.students
    nearest = min(taught, key=lambda s: float(s.kl_P.mean()))
    twin = [s for s in observed.students if labels[s.name] == (labels[nearest.name][0], "hard")]
    return [observed.teacher, nearest, *[t for t in twin[:1] if t is not nearest]]


def _by_tenth(styles: Styles, values: dict[str, list[float | None]], key: str, title: str, y: str) -> Figure:
    rows: list[Any] = [(name, (name, *map(_format_number, found))) for name, found in values.items()]
    return Figure(
        f"knowledge-{key}",
        title,
        f"{y}, by tenth of the rows in order of the teacher's confidence: 1 is where it was least sure.",
        lines(
            styles, {name: (TENTHS, ys) for name, ys in values.items()}, x="tenth of teacher confidence", y=y
        ),
        ("student", *TENTHS),
        rows,
        width="half",
    )


def _format_number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _similarity(one: Predictions, shown: list[str]) -> Figure:
    rows: list[Any] = [
        (None, (name, *(f"{p:.4f}" for p in row))) for name, row in zip(shown, one.similarity_CC, strict=True)
    ]
    return Figure(
        f"similarity-{_slug(one.name)}",
        f"Class similarity: {one.name}",
        "Mean probability of each class (across) over the rows of each true class (down), on a logarithmic scale.",
        heat(shown, one.similarity_CC, x="predicted", y="true class", meta=one.name),
        ("true class", *shown),
        rows,
        student=None if one.name == "teacher" else one.name,
    )


def _slug(name: str) -> str:
    import re

    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")


def compression_section(
    report: Report, styles: Styles, observed: Observed | None, names: Names, why: str | None
) -> Section:
    """Accuracy that students have less than the teacher, by class and by its confidence."""
    section = Section("compression", "What compression cost", "")
    if len(report.caches) > 1:
        section.figures.append(_by_bytes(report, styles))
    if observed is None or observed.teacher is None:
        section.lead = "Where students lose against the teacher."
        section.missing.append(f"All of it needs the teacher: {why}.")
        return section
    section.lead = (
        f"Accuracy of students less the teacher's, in points: below zero is lost. {_where(observed)}."
    )
    right_P = (observed.teacher.guess_P == observed.targets_P).astype(float)
    shown = names.unique(observed.classes_C)
    decile_P = deciles(observed.teacher.confidence_P)
    lost = {s.name: 100 * ((s.guess_P == observed.targets_P) - right_P) for s in observed.students}
    classes: Any = {n: by_class(x, observed.targets_P, observed.classes_C) for n, x in lost.items()}
    tenths: Any = {n: by_decile(x, decile_P) for n, x in lost.items()}
    frequent = ", the most frequent" if len(shown) < report.data.num_classes else ""
    for key, title, groups, found in (
        ("class", f"By class{frequent}", shown, classes),
        ("decile", "By tenth of the teacher's confidence", TENTHS, tenths),
    ):
        section.figures.append(
            Figure(
                f"compression-{key}",
                title,
                f"Accuracy of each student less the teacher's, in points, {title.lower()}.",
                bars(
                    styles, groups, found, x="class" if key == "class" else "tenth, 1 least sure", y="points"
                ),
                ("student", *groups),
                [(name, (name, *map(_format_points, values))) for name, values in found.items()],
                width="whole",
            )
        )
    return section


def _by_bytes(report: Report, styles: Styles) -> Figure:
    """Each student's score against the bytes of a row of its cache: what keeping less costs."""
    metric, words = report.score.metric, report.score.axis
    caches = [(run, cache) for run in report.runs if (cache := report.cache_of(run)) is not None]
    sizes = {run.name: sum(bytes_per_position(cache).values()) for run, cache in caches}
    scores = {run.name: float(run.metrics[metric]) for run, _ in caches}
    masses = {cache.url: float(kept_masses(cache)[1.0].mean()) for cache in report.caches}
    rows: list[Any] = []
    for run, cache in sorted(caches, key=lambda pair: (sizes[pair[0].name], pair[0].name)):
        shown = (
            f"{sizes[run.name]:.1f}",
            f"{100 * masses[cache.url]:.2f}%",
            format_metric(report, scores[run.name]),
        )
        rows.append((run.name, (run.name, describe_policy(cache), *shown)))
    return Figure(
        "compression-bytes",
        "By what a cache keeps",
        f"{words} of each cache's students against the stored bytes of a row. One run each does not show the spread.",
        points(styles, sizes, scores, x="bytes a row", y=words, log=False),
        ("student", "the cache keeps", "bytes a row", "mass kept at T = 1", words),
        rows,
        width="whole",
    )


def _format_points(value: float | None) -> str:
    return "–" if value is None or np.isnan(value) else f"{value:+.1f}"
