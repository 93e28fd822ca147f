"""Sections on the students: overview, learning curves, calibration, teacher passes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softcache.errors import RunError
from softcache.models.weights import count_parameters
from softcache.runs.report.load import Report
from softcache.runs.report.metrics import break_even, calibration_error, reliability
from softcache.runs.report.plots import TEACHER, Figure, Section, Styles, bars, lines, points
from softcache.runs.report.predictions import Observed
from softcache.runs.report.student_table import describe_differences, settings_figures, student_table
from softcache.runtime.files import read_json
from softcache.student.tasks import TokenStudent

__all__ = [
    "calibration_section",
    "cost_section",
    "curves_section",
    "format_metric",
    "glance_section",
]

TIMED_RUNS, WARM_RUNS = 20, 3
TIMED_SAMPLES, TIMED_PASSES = 64, 5
TIME_UNITS = (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))


def _latency_seconds(forward: Callable[[], Any]) -> float:
    """Returns the median time of a call; of one sample through a model, on the device of the model."""
    spent = []
    with torch.inference_mode():
        for _ in range(WARM_RUNS + TIMED_RUNS):
            start = time.perf_counter()
            forward()
            spent.append(time.perf_counter() - start)
    return float(np.median(spent[WARM_RUNS:]))


def _latencies(report: Report) -> dict[str, float]:
    """Returns the milliseconds of every student, and of the teacher where it is there."""
    out = {}
    for run in report.runs:
        task: Any
        task, model = report.student(run)
        batch: Any = report.data_of(run).evaluation.load([0], 0, fingerprints=False)
        if isinstance(model, TokenStudent):
            out[run.name] = _latency_seconds(partial(model.logits, batch))
        else:
            out[run.name] = _latency_seconds(partial(task.logits, model, batch.images))
    if (teacher := report.teacher) is not None and teacher.device.type == "cpu":
        seen: Any = report.data.evaluation.load([0], 0, fingerprints=False)
        out["teacher"] = _latency_seconds(lambda: list(teacher.chunks(seen)))
    return {name: 1000 * seconds for name, seconds in out.items()}


def _teacher_score(report: Report, held_out: Observed) -> float | None:
    if held_out.teacher is not None:
        teacher = held_out.teacher
        return {
            "eval_loss": -float(teacher.target_log_prob_P.mean()),
            "eval_accuracy": float((teacher.guess_P == held_out.targets_P).mean()),
        }[report.score.of_teacher]
    if report.cache is None:
        return None
    score: float | None = getattr(report.cache.manifest.teacher, report.score.of_teacher)
    return score


def _teacher_size(report: Report) -> int | None:
    if report.teacher is not None:
        return count_parameters(report.teacher.model)
    return report.cache.manifest.teacher.num_parameters if report.cache is not None else None


def _teacher_seconds(report: Report) -> float | None:
    """Of training it, where this machine did."""
    teacher = report.config.teacher
    weights = Path(teacher.weights) if teacher is not None and teacher.weights else None
    path = weights.parent / "metrics.json" if weights is not None else None
    if path is None or not path.is_file() or report.teacher is None:
        return None
    return float(read_json(path, "train the teacher again", error=RunError)["seconds"])


def format_metric(report: Report, value: float | None) -> str:
    """Returns the score as the tables show it."""
    return "–" if value is None else report.score.format(value)


def glance_section(report: Report, styles: Styles, held_out: Observed) -> Section:
    """Students by score against size, latency and training time, with the teacher."""
    metric, words = report.score.metric, report.score.axis
    scores = {run.name: float(run.metrics[metric]) for run in report.runs}
    sizes = {run.name: float(run.metrics["num_parameters"]) for run in report.runs}
    latencies = _latencies(report)
    seconds = {run.name: float(run.metrics["seconds"]) for run in report.runs}
    section = Section("glance", "Students at a glance", _lead(report, scores) + describe_differences(report))
    teacher, size = _teacher_score(report, held_out), _teacher_size(report)
    section.figures.append(student_table(report, latencies, {"score": teacher, "parameters": size}))
    trained = _teacher_seconds(report)
    what: list[tuple[str, str, dict[str, float], float | None]] = [
        ("size", "parameters", sizes, float(size) if size else None),
        ("latency", "milliseconds for one sample, this CPU", latencies, latencies.pop("teacher", None)),
        ("training", "seconds of training", seconds, trained),
    ]
    for key, x, xs, of_teacher in what:
        marked = {"teacher": of_teacher} if of_teacher is not None and teacher is not None else {}
        ys = scores | ({"teacher": teacher} if teacher is not None else {})
        rows: Any = [
            (
                None if name == "teacher" else name,
                (
                    name,
                    f"{value:,.4g}" if key != "size" else f"{value:,.0f}",
                    format_metric(report, ys[name]),
                ),
            )
            for name, value in (xs | marked).items()
        ]
        section.figures.append(
            Figure(
                f"glance-{key}",
                f"{words.split(',')[0].capitalize()} against {key}",
                f"One mark per model: {words} against {x}. Full discs learnt from the cache, rings did not; the star is "
                "the teacher.",
                points(styles, xs | marked, ys, x=x, y=words, log=True),
                ("model", x, words),
                rows,
            )
        )
    section.figures += settings_figures(report)
    if any("chrf" in run.metrics for run in report.runs):
        section.figures.append(_translations_figure(report, styles))
    if teacher is None:
        section.missing.append("The teacher's score: it needs the teacher's weights or the cache.")
    if report.unfinished:
        section.missing.append(
            "runs that are not finished: "
            + ", ".join(str(place).rsplit("/", 1)[-1] for place in report.unfinished)
            + "."
        )
    return section


def _lead(report: Report, scores: dict[str, float]) -> str:
    best = (max if report.score.larger_is_better else min)(scores, key=lambda name: scores[name])
    lead = f"Best: {best}, {format_metric(report, scores[best])}."
    of: dict[tuple[str, str], list[float]] = {}
    for run in report.runs:
        of.setdefault((run.model, run.labels), []).append(scores[run.name])
    models = [model for model, labels in of if labels == "cache" and (model, "hard") in of]
    if models:
        sign = 1 if report.score.larger_is_better else -1
        better = sum(sign * (np.mean(of[m, "cache"]) - np.mean(of[m, "hard"])) > 0 for m in models)
        lead += f" From the cache {better} of {len(models)} architectures do better than on hard labels."
    if max(map(len, of.values())) > 1:
        return (
            lead if not models else lead + " Where an architecture ran several times, its mean is compared."
        )
    return lead + " One run each does not show the spread between seeds."


def curves_section(report: Report, styles: Styles) -> Section:
    """The metric by epoch, and the training loss."""
    metric, words = report.score.metric, report.score.axis
    kinds = {
        "cache": "full lines learn from the cache",
        "hard": "dotted ones on hard labels",
        "online": "broken ones from an online teacher",
    }
    legend = ", ".join(kinds[labels] for labels in kinds if any(run.labels == labels for run in report.runs))
    lead = f"{legend[0].upper()}{legend[1:]}."
    section = Section("curves", "Learning curves", lead)
    for key, name, title in (("metric", metric, words), ("loss", "train_loss", "training loss, nats")):
        series = {
            run.name: (
                [row["epoch"] + 1 for row in run.metrics["history"]],
                [row[name] for row in run.metrics["history"]],
            )
            for run in report.runs
        }
        rows: list[Any] = [
            (run, (run, len(ys), f"{ys[0]:.4f}", f"{ys[len(ys) // 2]:.4f}", f"{ys[-1]:.4f}"))
            for run, (_, ys) in series.items()
        ]
        section.figures.append(
            Figure(
                f"curves-{key}",
                title.split(",")[0].capitalize(),
                f"{title} after every epoch, a line per student."
                + " Students that learn from different labels have losses of different scale."
                * (key == "loss"),
                # One or two points make no line that is seen.
                lines(
                    styles, series, x="epoch", y=title, marks=min(len(ys) for _, ys in series.values()) < 3
                ),
                ("student", "epochs", "first", "middle", "last"),
                rows,
                width="half",
            )
        )
    return section


def calibration_section(report: Report, styles: Styles, held_out: Observed) -> Section:
    """Reliability diagrams and expected calibration error."""
    models = ([held_out.teacher] if held_out.teacher is not None else []) + held_out.students
    series, weights, errors, rows = {}, {}, {}, []
    for one in models:
        correct = one.guess_P == held_out.targets_P
        found = reliability(one.confidence_P, correct)
        series[one.name] = [b.confidence for b in found], [b.accuracy for b in found]
        weights[one.name] = [b.rows / len(correct) for b in found]
        errors[one.name] = calibration_error(one.confidence_P, correct)
        rows.append(
            (
                None if one is held_out.teacher else one.name,
                (
                    one.name,
                    f"{errors[one.name]:.4f}",
                    f"{one.confidence_P.mean():.4f}",
                    f"{correct.mean():.4f}",
                ),
            )
        )
    best = min(errors, key=lambda name: errors[name])
    section = Section(
        "calibration",
        "Calibration",
        f"Of the guesses made with 80% confidence, 80% should be right. Smallest error: {best}, {errors[best]:.4f}.",
    )
    section.figures.append(
        Figure(
            "calibration-reliability",
            "Reliability",
            "Share of right guesses against confidence, in ten bins; below the diagonal a model is surer than it is right. "
            "The larger a mark, the more rows; small ones are chance.",
            lines(styles, series, x="confidence", y="share that is right", diagonal=True, weights=weights),
            ("model", "expected calibration error", "mean confidence", "accuracy"),
            rows,
            width="whole",
        )
    )
    if held_out.teacher is None:
        section.missing.append(f"The teacher's calibration: {report.missing['teacher']}.")
    return section


def cost_section(report: Report) -> Section:
    """Teacher passes with and without a cache, by number of students."""
    section = Section("cost", "What it cost", "")
    cached = [run for run in report.runs if run.labels == "cache"]
    if report.cache is None or not cached:
        section.lead = "Teacher passes saved by the cache."
        section.missing.append(
            f"All of it: {report.missing.get('cache', 'none of these runs learnt from the cache')}."
        )
        return section
    views, epochs = report.cache.num_views, [int(run.metrics["epochs"]) for run in cached]
    each = sum(epochs) / len(epochs)
    start = break_even(views, each)
    section.lead = (
        f"The teacher went over the data {views} time{'s' * (views > 1)}; with an online teacher these "
        f"{len(cached)} students would have asked for {sum(epochs)} passes. The cache pays from student {start} on."
    )
    xs = list(range(max(10, 2 * len(cached), 2 * start) + 1))
    online, stored = [round(each * x, 3) for x in xs], [views] * len(xs)
    styles = Styles(cached)
    plot = lines(
        styles,
        {"online teacher": (xs, online), "cache": (xs, stored)},
        x="students",
        y="teacher passes over the data",
        marks=False,
    )
    plot["layout"]["showlegend"] = True
    for trace, color in zip(plot["data"], ("#D55E00", "#0072B2"), strict=True):
        trace["line"]["color"] = color
        trace.pop("meta")
    section.figures.append(
        Figure(
            "cost-passes",
            "Teacher passes by number of students",
            f"With an online teacher every student asks for {each:g} passes; the cache asked for {views}, once.",
            plot,
            ("students", "online teacher", "cache"),
            [(None, (x, f"{y:g}", views)) for x, y in zip(xs, online, strict=True)],
            width="half",
        )
    )
    if (saved := _saved_figure(report, views, each, xs)) is not None:
        section.figures.append(saved)
    else:
        section.missing.append(f"Teacher time saved: {report.missing['teacher']}.")
    return section


def _teacher_pass_seconds(report: Report) -> float | None:
    """Returns the seconds of one teacher pass over the training split, from those of one batch here; None without it."""
    if (teacher := report.teacher) is None:
        return None
    samples = list(range(min(TIMED_SAMPLES, len(report.data.train))))
    batch: Any = report.data.train.load(samples, 0, fingerprints=False)
    spent = []
    with torch.inference_mode():
        for _ in range(TIMED_PASSES):
            start = time.perf_counter()
            for chunk in teacher.chunks(batch):
                chunk.float().cpu()
            spent.append(time.perf_counter() - start)
    return min(spent) / len(samples) * len(report.data.train)


def _saved_figure(report: Report, views: int, each: float, xs: list[int]) -> Figure | None:
    """Returns the teacher time that the cache saves, by number of students; None without the teacher."""
    if (seconds := _teacher_pass_seconds(report)) is None:
        return None
    saved = [seconds * (each * x - views) for x in xs]
    unit, size = next((u, s) for u, s in TIME_UNITS if max(map(abs, saved)) >= s or s == TIME_UNITS[-1][1])
    ys = [round(value / size, 4) for value in saved]
    plot = lines(Styles([]), {"saved": (xs, ys)}, x="students", y=f"teacher {unit} saved", marks=False)
    plot["data"][0]["line"]["color"] = "#0072B2"
    plot["data"][0].pop("meta")
    plot["layout"]["shapes"] = [
        {
            "type": "line",
            "xref": "paper",
            "x0": 0,
            "x1": 1,
            "y0": 0,
            "y1": 0,
            "line": {"color": TEACHER, "width": 1},
        }
    ]
    return Figure(
        "cost-saved",
        "Teacher time saved by number of students",
        f"Against an online teacher that takes {seconds / size:.3g} {unit} a pass (estimated from one batch here); "
        "below zero the cache has not paid yet.",
        plot,
        ("students", f"{unit} saved"),
        [(None, (x, f"{y:+.3g}")) for x, y in zip(xs, ys, strict=True)],
        width="half",
    )


def _translations_figure(report: Report, styles: Styles) -> Figure:
    """Returns chrF of what the students wrote, by language; BLEU in the table."""
    languages = sorted({key[5:] for run in report.runs for key in run.metrics if key.startswith("chrf_")})
    scores = {run.name: [run.metrics.get(f"chrf_{one}") for one in languages] for run in report.runs}
    rows: list[Any] = []
    for run in report.runs:
        values = [run.metrics.get(f"{score}_{one}") for score in ("chrf", "bleu") for one in languages]
        rows.append((run.name, (run.name, *("–" if value is None else f"{value:.1f}" for value in values))))
    return Figure(
        "glance-translations",
        "Translations",
        "chrF of what the students wrote for the held-out sources, by language, against the references; more is better.",
        bars(styles, languages, scores, x="language", y="chrF"),
        ("model", *(f"chrF {one}" for one in languages), *(f"BLEU {one}" for one in languages)),
        rows,
        width="whole",
    )
