"""The figures, drawn by plotly; each has a sentence for screen readers and a table.

Colours and marks are given by student, the same in every figure: a colour of Okabe and Ito 2008, which the colour-blind can
tell apart, for an architecture, or for a run where several are of one; a full line and disc for one taught from the cache, a
dotted or broken line and ring for one that was not. Text of the data is escaped here: plotly reads a small HTML.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from softcache.errors import MissingExtraError
from softcache.runs.report.load import Run

__all__ = [
    "TEACHER",
    "Figure",
    "Section",
    "Styles",
    "bars",
    "escaped",
    "framed",
    "heat",
    "heat_of_values",
    "lines",
    "load_plotly",
    "points",
]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")
TEACHER = "#7f7f7f"
MAX_GRID, MAX_TEXTS = 12, 8
"""Different values on an axis of a heat map, at most; and across one whose cells have room for texts on a phone."""
DASHES = {"cache": "solid", "hard": "dot", "online": "dash"}


def load_plotly() -> Any:
    """Returns plotly.graph_objects.

    Raises:
        MissingExtraError: plotly or Jinja2 is not installed.
    """
    try:
        import jinja2  # noqa: F401
        import plotly.graph_objects as go
    except ImportError as error:
        raise MissingExtraError(
            f"report: {error.name} is not installed; pip install 'softcache[report]'"
        ) from error
    return go


@dataclass
class Figure:
    """A figure and the same as a table.

    Attributes:
        summary: a sentence that describes it.
        plot: plotly's data and layout, ready for JSON; None: the table alone.
        columns, rows: the table; a row is (name of the student or None, cells).
        width: of the page, where there is room: "third", "half" or "whole".
        student: the one that the figure is about, and is hidden with.
        sortable: the table is shown by itself, and a column's name sorts it. Its rows may be of several students, a tuple.
    """

    key: str
    title: str
    summary: str
    plot: dict[str, Any] | None
    columns: Sequence[str]
    rows: Sequence[tuple[Any, Sequence[Any]]] = ()
    width: str = "third"
    student: str | None = None
    sortable: bool = False


@dataclass
class Section:
    """A part of the page.

    Attributes:
        lead: what to look for.
        missing: what is not shown, and what it would need.
        galleries: of `softcache.runs.report.examples`.
    """

    key: str
    title: str
    lead: str
    figures: list[Figure] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    galleries: list[Any] = field(default_factory=list)


def escaped(text: Any) -> str:
    """Returns text that plotly shows as it is."""
    return html.escape(str(text), quote=False)


class Styles:
    """Which colour, line and mark a student has in every figure."""

    def __init__(self, runs: Sequence[Run]) -> None:
        kinds = [(run.model, run.labels) for run in runs]
        # An architecture has a colour, unless it learnt from the same kind of labels several times: then each run has one.
        groups = [run.model for run in runs] if len(set(kinds)) == len(kinds) else [run.name for run in runs]
        colors = dict(zip(dict.fromkeys(groups), itertools.cycle(COLORS), strict=False))
        self._of = {run.name: (colors[group], run.labels) for run, group in zip(runs, groups, strict=True)}

    def color(self, name: str) -> str:
        return self._of[name][0] if name in self._of else TEACHER

    def dash(self, name: str) -> str:
        """Returns the kind of line: full from the cache, dotted on ground truth, broken with an online teacher."""
        return DASHES[self._of[name][1]] if name in self._of else "solid"

    def line(self, name: str) -> dict[str, Any]:
        return {"color": self.color(name), "dash": self.dash(name), "width": 2}

    def marker(self, name: str) -> dict[str, Any]:
        if name not in self._of:
            return {"color": TEACHER, "symbol": "star", "size": 13}
        return {
            "color": self.color(name),
            "symbol": "circle" if self._of[name][1] == "cache" else "circle-open",
            "size": 10,
        }

    def pattern(self, name: str) -> dict[str, Any]:
        shape = {"solid": "", "dot": "/", "dash": "."}[self.dash(name)]
        return {"color": self.color(name), "pattern": {"shape": shape}}


def points(
    styles: Styles, xs: Mapping[str, float], ys: Mapping[str, float], *, x: str, y: str, log: bool
) -> dict[str, Any]:
    """Returns a figure of one point per name."""
    go = load_plotly()
    traces = [
        go.Scatter(
            x=[xs[name]],
            y=[ys[name]],
            mode="markers",
            name=escaped(name),
            meta=name,
            marker=styles.marker(name),
        )
        for name in xs
    ]
    return framed(traces, x, y, x_type="log" if log else "linear")


def lines(
    styles: Styles,
    series: Mapping[str, tuple[Sequence[Any], Sequence[Any]]],
    *,
    x: str,
    y: str,
    diagonal: bool = False,
    marks: bool = True,
    weights: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, Any]:
    """Returns a figure of one line (x values, y values) per name.

    Args:
        weights: [of each name, of each point] shares in [0, 1], shown as the area of its mark.
    """
    go = load_plotly()
    traces = [
        go.Scatter(
            x=list(xs),
            y=list(ys),
            name=escaped(name),
            meta=name,
            mode="lines+markers" if marks else "lines",
            line=styles.line(name),
            marker=styles.marker(name)
            | {"size": [4 + 16 * weight**0.5 for weight in weights[name]] if weights else 6},
        )
        for name, (xs, ys) in series.items()
    ]
    if diagonal:
        even = go.Scatter(
            x=[0, 1], y=[0, 1], mode="lines", name="as sure as right", line={"color": TEACHER, "width": 1}
        )
        traces.insert(0, even)
    return framed(traces, x, y)


def bars(
    styles: Styles, names: Sequence[str], series: Mapping[str, Sequence[Any]], *, x: str, y: str
) -> dict[str, Any]:
    """Returns a figure of bars side by side: a group per name, a bar per series."""
    go = load_plotly()
    traces = [
        go.Bar(
            x=[escaped(n) for n in names],
            y=list(ys),
            name=escaped(name),
            meta=name,
            marker=styles.pattern(name),
        )
        for name, ys in series.items()
    ]
    return framed(traces, x, y, x_type="category")


def heat(names: Sequence[str], values: Any, *, x: str, y: str, meta: str) -> dict[str, Any]:
    """Returns a heat map of probabilities on a logarithmic scale of colours, from 1e-4 up."""
    import numpy as np

    go = load_plotly()
    shown = np.log10(np.maximum(values, 1e-4))
    labels = [escaped(name) for name in names]
    trace = go.Heatmap(
        z=shown.round(3).tolist(),
        x=labels,
        y=labels,
        zmin=-4,
        zmax=0,
        colorscale="Cividis",
        meta=meta,
        customdata=np.round(values, 5).tolist(),
        hovertemplate=f"{escaped(y)} %{{y}}<br>{escaped(x)} %{{x}}<br>%{{customdata}}<extra></extra>",
        colorbar={"tickvals": [-4, -3, -2, -1, 0], "ticktext": ["≤ 0.0001", "0.001", "0.01", "0.1", "1"]},
    )
    figure = framed([trace], x, y, x_type="category", y_type="category")
    figure["layout"]["yaxis"]["autorange"] = "reversed"
    return figure


def heat_of_values(
    values: Mapping[tuple[float, float], float],
    texts: Mapping[tuple[float, float], str],
    *,
    x: str,
    y: str,
    title: str = "",
    reverse: bool = False,
) -> dict[str, Any]:
    """Returns a heat map of values by (x, y), each with its text; where there are many, one mark each.

    Args:
        title: of the scale of colours.
        reverse: the smallest value has the brightest colour.
    """
    go = load_plotly()
    xs, ys = sorted({place[0] for place in values}), sorted({place[1] for place in values})
    scale = "Cividis_r" if reverse else "Cividis"
    bar = {"thickness": 12, "title": {"text": escaped(title), "side": "right"}}
    has_room = len(xs) <= MAX_TEXTS
    if max(len(xs), len(ys)) > MAX_GRID:
        trace = go.Scatter(
            x=[place[0] for place in values],
            y=[place[1] for place in values],
            mode="markers",
            text=[escaped(texts[place]) for place in values],
            hovertemplate=f"{escaped(x)} %{{x}}<br>{escaped(y)} %{{y}}<br>%{{text}}<extra></extra>",
            marker={
                "color": list(values.values()),
                "colorscale": scale,
                "size": 11,
                "line": {"color": TEACHER, "width": 1},  # the ends of the scale are those of the two themes
                "colorbar": bar,
            },
        )
        return framed([trace], x, y)
    trace = go.Heatmap(
        z=[[values.get((one, other)) for one in xs] for other in ys],
        text=[[texts.get((one, other), "") for one in xs] for other in ys],
        texttemplate="%{text}" if has_room else None,
        x=[f"{one:g}" for one in xs],
        y=[f"{other:g}" for other in ys],
        colorscale=scale,
        showscale=not has_room,
        colorbar=bar,
        hovertemplate=f"{escaped(x)} %{{x}}<br>{escaped(y)} %{{y}}<br>%{{text}}<extra></extra>",
    )
    return framed([trace], x, y, x_type="category", y_type="category")


def framed(
    traces: list[Any], x: str, y: str, *, x_type: str = "linear", y_type: str = "linear"
) -> dict[str, Any]:
    go = load_plotly()
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": x}, "type": x_type, "automargin": True},
        "yaxis": {"title": {"text": y}, "type": y_type, "automargin": True},
        "showlegend": False,
        "margin": {"l": 10, "r": 10, "t": 10, "b": 10},
        "barmode": "group",
        "template": "none",
    }
    if x_type == "log":  # plotly's own ticks between the powers of ten are bare digits
        shown = [float(x) for trace in traces for x in trace.x]
        span = max(shown) / min(shown)
        digits = (1, 1.5, 2, 3, 4, 6, 8) if span < 5 else (1, 2, 5) if span < 50 else (1,)
        marks = [digit * 10.0**power for power in range(-6, 12) for digit in digits]
        layout["xaxis"] |= {"tickvals": marks, "ticktext": [_short(mark) for mark in marks], "tickangle": 0}
    if y_type == "log":
        layout["yaxis"] |= {"dtick": 1, "exponentformat": "power"}
    figure: dict[str, Any] = go.Figure(data=traces, layout=layout).to_plotly_json()
    return figure


def _short(number: float) -> str:
    """Returns 2k for 2,000, 5M for 5,000,000."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g}{letter}"
    return f"{number:g}"
