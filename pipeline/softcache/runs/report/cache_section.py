"""What the cache holds, and the fidelity frontier that `softcache fidelity` measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from softcache.errors import RunError
from softcache.reader.cache import Cache
from softcache.runs.report.load import Report
from softcache.runs.report.metrics import entropies, kept_by_k, kept_masses
from softcache.runs.report.plots import TEACHER, Figure, Section, escaped, framed, heat_of_values, load_plotly
from softcache.runtime.files import parse_json
from softcache.tools.fidelity.report import bytes_per_position

__all__ = ["cache_section"]

BINS = 20
SMALLEST = 1e-7  # errors below are rounding
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7")


def cache_section(report: Report, fidelity: Path | None) -> Section:
    """Bytes per column, histograms of kept mass and entropy, the frontier."""
    section = Section("cache", "The cache", "")
    cache = report.cache
    if cache is None:
        section.lead = "What the labels hold, and in how many bytes."
        section.missing.append(f"All of it needs the cache: {report.missing['cache']}.")
        return section
    sizes = bytes_per_position(cache)
    rows = cache.num_rows_done
    labels = cache.manifest.identity["labels"]
    first = f"The first of {len(report.caches)}, which keeps most: " if len(report.caches) > 1 else ""
    section.lead = (
        f"{first}{cache.url}: {rows:,} rows of {cache.num_classes:,} classes, policy {labels['policy']}, "
        f"{sum(sizes.values()):.1f} bytes a row."
    )
    section.figures.append(_bytes(sizes, cache.num_classes))
    section.figures.append(_masses(kept_masses(cache)))
    if by_k := kept_by_k(cache):
        section.figures.append(_masses_by_k(by_k))
    else:
        section.missing.append(
            "Kept mass over K and T: the classes of this cache were drawn, and have no order."
        )
    if (entropy := entropies(cache)) is not None:
        section.figures.append(_entropy(entropy))
    else:
        section.missing.append("The entropy: this cache holds no statistics.")
    path = fidelity or report.config.root / "fidelity" / "fidelity.json"
    if path.is_file():
        section.figures.append(_frontier(cache, path))
    else:
        section.missing.append(
            f"The fidelity frontier: there is no {path}; `softcache fidelity {cache.url} --config FILE` makes it."
        )
    return section


def _bytes(sizes: dict[str, float], num_classes: int) -> Figure:
    go = load_plotly()
    total, dense = sum(sizes.values()), 2.0 * num_classes
    shown = sizes | {"all of it": total, "dense float16": dense}
    colors = [COLORS[0]] * len(sizes) + [COLORS[2], TEACHER]
    trace = go.Bar(x=list(shown.values()), y=list(shown), orientation="h", marker={"color": colors})
    plot = framed([trace], "bytes per row", "", x_type="log", y_type="category")
    rows: list[Any] = [(None, (name, f"{size:.2f}", f"{size / dense:.1%}")) for name, size in shown.items()]
    ratio = (
        f"{dense / total:,.1f} times fewer than"
        if total < dense
        else f"{total / dense:,.1f} times as many as"
    )
    return Figure(
        "cache-bytes",
        "Bytes per column",
        f"Stored bytes of a row, by column, as compressed: {ratio} all {num_classes:,} logits in float16.",
        plot,
        ("column", "bytes", "of dense"),
        rows,
        width="half",
    )


def _masses_by_k(by_k: dict[tuple[float, float], float]) -> Figure:
    rows: list[Any] = [(None, (k, f"{t:g}", f"{mass:.4f}")) for (k, t), mass in by_k.items()]
    return Figure(
        "cache-mass-k",
        "Kept mass over K and T",
        "Mean mass of the K likeliest classes (across), softened by T (up): what a smaller cache would keep.",
        heat_of_values(
            by_k,
            {place: f"{mass:.3f}" for place, mass in by_k.items()},
            x="K",
            y="temperature",
            title="kept mass",
        ),
        ("K", "T", "mass"),
        rows,
        width="half",
    )


def _masses(masses: dict[float, np.ndarray]) -> Figure:
    go = load_plotly()
    edges = np.linspace(0, 1, BINS + 1)
    traces, rows = [], []
    for (t, mass_P), color in zip(masses.items(), COLORS, strict=False):
        counts = np.histogram(np.clip(mass_P, 0, 1), edges)[0] / max(len(mass_P), 1)
        traces.append(
            go.Scatter(
                x=((edges[1:] + edges[:-1]) / 2).round(4).tolist(),
                y=counts.round(5).tolist(),
                name=f"T = {t:g}",
                mode="lines",
                line={"shape": "hvh", "color": color},
            )
        )
        low, middle = np.percentile(mass_P, [1, 50])
        rows.append((None, (f"{t:g}", f"{mass_P.mean():.4f}", f"{low:.4f}", f"{middle:.4f}")))
    plot = framed(traces, "mass of the kept classes", "share of rows")
    plot["layout"]["showlegend"] = True
    return Figure(
        "cache-mass",
        "Kept mass",
        "How much of the teacher's softened distribution the kept classes hold, a line per temperature; the rest is tail.",
        plot,
        ("T", "mean", "1st percentile", "median"),
        rows,
        width="half",
    )


def _entropy(entropy_P: np.ndarray) -> Figure:
    go = load_plotly()
    counts, edges = np.histogram(entropy_P, BINS)
    trace = go.Bar(
        x=((edges[1:] + edges[:-1]) / 2).round(4).tolist(), y=counts.tolist(), marker={"color": COLORS[0]}
    )
    rows: list[Any] = [
        (None, (f"{low:.3f} to {high:.3f}", int(n)))
        for low, high, n in zip(edges, edges[1:], counts, strict=False)
    ]
    plot = framed([trace], "entropy at T = 1, nats", "rows")
    plot["layout"]["bargap"] = 0.02
    return Figure(
        "cache-entropy",
        "Entropy of the teacher",
        f"Rows by the entropy of the teacher's distribution; mean {entropy_P.mean():.3f} nats.",
        plot,
        ("nats", "rows"),
        rows,
        width="half",
    )


def _read_fidelity(cache: Cache, path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
        digest = str(found["manifest_sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"fidelity report {path}: cannot be read: {type(error).__name__}: {error}; run `softcache fidelity` again"
        ) from error
    if digest != cache.manifest_sha256:
        raise RunError(
            f"fidelity report {path}: of another cache (manifest {digest[:12]}… there, {cache.manifest_sha256[:12]}… of "
            f"{cache.url}); run `softcache fidelity {cache.url}` again, or give --fidelity its own"
        )
    return found


def _frontier(cache: Cache, path: Path) -> Figure:
    go, found = load_plotly(), _read_fidelity(cache, path)
    first = next(iter(found["temperatures"]))
    kinds: dict[str, list[dict[str, Any]]] = {}
    for point in found["frontier"]:
        if point["temperatures"][first]["gradient_error"] > SMALLEST:
            kinds.setdefault(f"{point['policy']}, {point['codec']}", []).append(point)
    traces, rows = [], []
    for number, (kind, points) in enumerate(kinds.items()):
        xs = [point["bytes_per_position"]["total"] for point in points]
        ys = [point["temperatures"][first]["gradient_error"] for point in points]
        traces.append(
            go.Scatter(
                x=xs,
                y=ys,
                name=escaped(kind),
                mode="lines+markers",
                marker={"symbol": number},
                line={"color": COLORS[number % 5], "width": 1},
            )
        )
        rows += [(None, (kind, f"{x:.1f}", f"{y:.2e}")) for x, y in zip(xs, ys, strict=True)]
    own = found["bytes_per_position"]["total"], found["temperatures"][first]["gradient_error"]
    star = {"symbol": "star", "size": 16, "color": "#F0E442", "line": {"color": "#000000", "width": 1}}
    traces.append(
        go.Scatter(x=[own[0]], y=[max(own[1], SMALLEST)], name="this cache", mode="markers", marker=star)
    )
    rows.insert(0, (None, ("this cache", f"{own[0]:.1f}", f"{own[1]:.2e}")))
    plot = framed(traces, "bytes per position", "relative error of the gradient", x_type="log", y_type="log")
    plot["layout"]["showlegend"] = True
    summary = f"What a byte buys at T = {first} under every policy and codec; low and left is good. The star is this cache."
    columns = ("kind", "bytes", "error")
    return Figure("cache-frontier", "Fidelity frontier", summary, plot, columns, rows, width="whole")
