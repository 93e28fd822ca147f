"""The table that a report begins with: one line for runs that differ in their seed alone, sorted by their score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from softcache.runs.report.caches import describe_policy
from softcache.runs.report.differences import (
    SEED,
    differing_settings,
    format_setting,
    settings_of,
    short_name,
)
from softcache.runs.report.load import Report, Run
from softcache.runs.report.plots import Figure, heat_of_values

__all__ = ["describe_differences", "settings_figures", "student_table"]

ALWAYS = ("loss.name", "loss.temperature", "loss.alpha")
MAX_SETTINGS, MAX_SURFACES = 6, 3


def grouped(report: Report) -> list[list[Run]]:
    """Returns the runs in groups that differ in nothing but the seed."""
    varying = [name for name in differing_settings(report.runs) if name != SEED]
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in report.runs:
        own = settings_of(run)
        key = (run.model, run.labels, run.identity.get("cache"), *(repr(own.get(name)) for name in varying))
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def describe_differences(report: Report) -> str:
    """Returns a sentence that names what differs between the runs."""
    what = []
    if len(models := {run.model for run in report.runs}) > 1:
        what.append(f"architecture ({len(models)})")
    if len(labels := {run.labels for run in report.runs}) > 1:
        what.append(f"labels ({', '.join(sorted(labels))})")
    if len(report.caches) > 1:
        what.append(f"cache ({len(report.caches)})")
    for name in differing_settings(report.runs):
        values = [own[name] for run in report.runs if (own := settings_of(run)).get(name) is not None]
        try:
            values = sorted(set(values))
        except TypeError:  # lists, or numbers and words
            values = list({repr(value): value for value in values}.values())
        shown = ", ".join(map(format_setting, values[:MAX_SETTINGS])) + (
            ", …" if len(values) > MAX_SETTINGS else ""
        )
        what.append(f"{name} ({shown})")
    if not what:
        return ""
    return f" The runs differ in {'; '.join(what)}. All other settings are the same."


def student_table(
    report: Report, latencies: Mapping[str, float], teacher: Mapping[str, float | None]
) -> Figure:
    """Returns the sortable table of students.

    Args:
        latencies: milliseconds of one sample, by run, and "teacher".
        teacher: its "score" and "parameters".
    """
    score, sign = report.score, 1 if report.score.larger_is_better else -1
    groups = grouped(report)
    varying = [name for name in differing_settings(report.runs) if name not in (*ALWAYS, SEED)][:MAX_SETTINGS]
    of_seeds = [_of_seeds(group, score.metric) for group in groups]
    means = [float(np.mean(values)) for values in of_seeds]
    hard: dict[str, list[float]] = {}
    for group, mean in zip(groups, means, strict=True):
        if group[0].labels == "hard":
            hard.setdefault(group[0].model, []).append(mean)
    # Where hard labels were tried with several settings, the best of them is what a cache has to beat.
    best = {model: (max if sign > 0 else min)(values) for model, values in hard.items()}
    rows: list[Any] = []
    for place in sorted(range(len(groups)), key=lambda place: score.order(means[place])):
        group, mean = groups[place], means[place]
        run, own = group[0], settings_of(group[0])
        cache = report.cache_of(run)
        spread = float(np.std(of_seeds[place], ddof=1)) if len(of_seeds[place]) > 1 else None
        gap = None if teacher["score"] is None else sign * (mean - teacher["score"])
        gain = None if run.labels == "hard" or run.model not in best else sign * (mean - best[run.model])
        cells = (
            run.model,
            run.labels,
            f"{int(run.metrics['num_parameters']):,}",
            f"{np.mean([latencies[one.name] for one in group]):.3g}",
            *(format_setting(own.get(name)) if run.labels != "hard" else "–" for name in ALWAYS),
            "–" if cache is None else str(cache.manifest.identity["labels"]["k"]),
            *(format_setting(own.get(name)) for name in varying),
            str(len(group)),
            score.format(mean) + ("" if spread is None else f" ± {score.scale * spread:.2g}"),
            _points(report, gap),
            _points(report, gain),
        )
        rows.append((tuple(one.name for one in group), cells))
    if teacher["score"] is not None:
        size = teacher["parameters"]
        dashes = ["–"] * (len(ALWAYS) + 1 + len(varying))
        cells = (
            "teacher",
            "–",
            "–" if size is None else f"{int(size):,}",
            f"{latencies['teacher']:.3g}" if "teacher" in latencies else "–",
            *dashes,
            "–",
            score.format(teacher["score"]),
            "–",
            "–",
        )
        rows.insert(0, (None, cells))
    unit = "points" if score.scale == 100 else "nats"
    columns = (
        "student",
        "labels",
        "parameters",
        "ms",
        "loss",
        "T",
        "alpha",
        "K",
        *map(short_name, varying),
        "runs",
        score.title,
    )
    return Figure(
        "glance-table",
        "All students",
        "One line for runs that differ in their seed alone; ± is the standard deviation over seeds. Gap is to the teacher, "
        f"gain over the best run of the same architecture on hard labels, both in {unit}: above zero is better. ms: one "
        "sample on this CPU. A column's name sorts by it.",
        None,
        (*columns, "gap", "gain"),
        rows,
        width="whole",
        sortable=True,
    )


def _of_seeds(group: list[Run], metric: str) -> list[float]:
    """Returns the score of each seed of a group; a run that was made again, or copied, is no further seed."""
    found: dict[Any, list[float]] = {}
    for run in group:
        found.setdefault(settings_of(run).get(SEED), []).append(_number(run.metrics[metric]))
    return [float(np.mean(values)) for values in found.values()]


def _number(value: float | None) -> float:
    """A score; NaN where there is none, as of a split without a box."""
    return float("nan") if value is None else float(value)


def _points(report: Report, value: float | None) -> str:
    digits = 4 if report.score.scale == 1 else 2
    return "–" if value is None or value != value else f"{report.score.scale * value:+.{digits}f}"


def settings_figures(report: Report) -> list[Figure]:
    """Returns for each architecture its score over T and alpha, where it ran with several.

    A place is the best of the runs with these two, where they differ in other settings; seeds of one are averaged.
    """
    of_model: dict[str, list[list[Run]]] = {}
    for group in grouped(report):
        if group[0].labels != "hard":
            of_model.setdefault(group[0].model, []).append(group)
    figures: list[Figure] = []
    for model, groups in of_model.items():
        places = [(group[0].config.loss.temperature, group[0].config.loss.alpha) for group in groups]
        if len(set(places)) > 1 and len(figures) < MAX_SURFACES:
            figures.append(_settings_figure(report, f"glance-settings-{len(figures)}", model, groups, places))
    return figures


def _settings_figure(
    report: Report, key: str, model: str, groups: list[list[Run]], places: list[tuple[float, float]]
) -> Figure:
    score = report.score
    means = [float(np.mean(_of_seeds(group, score.metric))) for group in groups]
    tried: dict[tuple[float, float], list[int]] = {}
    for number, place in enumerate(places):
        tried.setdefault(place, []).append(number)
    best = {
        place: min(numbers, key=lambda number: score.order(means[number])) for place, numbers in tried.items()
    }
    others = _other_settings(report, groups)
    rows: list[Any] = [
        (None, (f"{t:g}", f"{alpha:g}", *(one[best[t, alpha]] for one in others.values()), *last))
        for (t, alpha), numbers in sorted(tried.items())
        for last in [(sum(len(groups[number]) for number in numbers), score.format(means[best[t, alpha]]))]
    ]
    summary = f"{score.axis} by temperature (across) and alpha (up), the mean over seeds"
    if others:
        summary += (
            f" of the best of the runs with these two: they differ in {', '.join(others)} too, and where there are more "
            "runs, the best is luckier. The table has what the best one had."
        )
    values = {place: means[number] for place, number in best.items()}
    return Figure(
        key,
        f"T and alpha: {model}",
        summary if others else f"{summary}.",
        heat_of_values(
            {place: score.scale * value for place, value in values.items()},
            {place: score.format(value) for place, value in values.items()},
            x="temperature",
            y="alpha",
            title=score.axis,
            reverse=not score.larger_is_better,
        ),
        ("T", "alpha", *others, "runs", score.title),
        rows,
        width="half",
    )


def _other_settings(report: Report, groups: list[list[Run]]) -> dict[str, list[str]]:
    """Returns what differs between groups of runs besides T, alpha and seed: the value of each group, by name."""
    runs = [group[0] for group in groups]
    names = [name for name in differing_settings(runs) if name not in (*ALWAYS[1:], SEED)]
    found = {"labels": [run.labels for run in runs]}
    caches = [run.identity.get("cache") for run in runs]
    kept = {cache.manifest_sha256: describe_policy(cache) for cache in report.caches}
    found["cache"] = [kept.get(str(cache), "–" if cache is None else str(cache)[:12]) for cache in caches]
    found |= {
        short_name(name): [format_setting(settings_of(run).get(name)) for run in runs] for name in names
    }
    return {name: values for name, values in found.items() if len(set(values)) > 1}
