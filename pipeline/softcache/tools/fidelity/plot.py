"""The frontier as a figure: what a byte per position buys, under every policy and codec, and where the cache stands.

Left, the divergence of the whole distribution; right, the error of the gradient, in which cut and drawn records can be
compared: a cut record's is bias, the same at every visit, a drawn one's is noise, which averages out over positions.
Errors below 1e-7 are rounding and not shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from softcache.tools.fidelity.frontier import DEFAULT_CODECS, Point

__all__ = ["draw_frontier"]

SMALLEST = 1e-7
CLOSE = 1.3  # points nearer to each other than this factor share one label
CODEC_STYLE = {  # colours of Okabe and Ito 2008, which the colour-blind can tell apart
    "open float32": ("#000000", "o"),
    "open float16": ("#0072B2", "o"),
    "packed 1/8": ("#E69F00", "s"),
    "packed 1/32": ("#D55E00", "s"),
    "packed 1/128": ("#CC79A7", "s"),
}
POLICY_STYLE: Any = {
    "top_k": ("#0072B2", "-", "o", "top-k (bias)"),
    "top_p": ("#56B4E9", "--", "v", "top-p (bias)"),
    "sample": ("#009E73", "-.", "^", "sample (noise)"),
    "hybrid": ("#D55E00", "-", "D", "hybrid, half drawn (noise)"),
}
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.2,
    "svg.fonttype": "none",
    "svg.hashsalt": "softcache",
}

STATE_STYLE: Any = {"bfloat16": ("s", "hidden, bfloat16"), "float8_e4m3": ("X", "hidden, float8")}
STATE_COLOR = "#7F7F7F"

LEGEND: Any = {"handlelength": 2.6, "labelspacing": 0.3, "columnspacing": 1.5}


def draw_frontier(
    points: Sequence[Point],
    out: Path,
    *,
    title: str,
    temperature: float,
    own: dict[str, Any],
) -> list[Path]:
    """Writes frontier.png (200 dpi) and frontier.svg; returns their paths.

    Args:
        out: a folder.
        title: data, teacher, classes and rows.
        temperature: one of those that were measured.
        own: the cache itself: `label`, `codec`, `bytes`, `kl_nats` (None of drawn records) and `gradient_error`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    key = f"{temperature:g}"
    with matplotlib.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(7.4, 4.3), layout="constrained")
        _draw_divergence(left, points, key, own)
        codec = DEFAULT_CODECS["packed" in own["codec"]]
        _draw_gradient(right, points, key, own, codec)
        for axes in (left, right):
            axes.set(xscale="log", yscale="log", xlabel="bytes per position, all columns")
            axes.grid(True, which="major", linewidth=0.4, color="#dddddd")
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_xlim(left=axes.get_xlim()[0] * 0.75)  # room for the labels of the first points
            _plain_ticks(axes)
            axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, **LEGEND)
        left.set_ylabel(f"KL(teacher || record) at T = {key}, nats per position")
        right.set_ylabel(f"gradient error at T = {key}, relative (RMS)")
        left.set_title("as a whole distribution", loc="left")
        powers = {point.proposal_exponent for point in points} - {None, 1.0}
        drawn = "".join(f", draws from p^{power:g}" for power in powers)
        right.set_title(f"as a training signal ({codec}{drawn})", loc="left")
        figure.suptitle(
            f"{title}\nthis cache: {own['label']}, {own['bytes']:.1f} bytes per position",
            fontsize=8.5,
            x=0.01,
            ha="left",
        )
        paths = [out / "frontier.png", out / "frontier.svg"]
        figure.savefig(paths[0], dpi=200)
        figure.savefig(paths[1], metadata={"Date": None})
        plt.close(figure)
    return paths


def _draw_divergence(axes: Any, points: Sequence[Point], key: str, own: dict[str, Any]) -> None:
    cut = [point for point in points if point.policy == "top_k"]
    leftmost = min(cut, key=lambda point: point.bytes_per_position["total"]).codec
    for codec, (color, marker) in CODEC_STYLE.items():
        for policy, line, fill in (("top_k", "-", color), ("top_p", ":", "white")):
            chosen = [point for point in points if (point.policy, point.codec) == (policy, codec)]
            x, y = _curve(chosen, key, "kl_nats")
            if x:
                name = f"{policy.replace('_', '-')}, {codec}"
                axes.plot(x, y, line, color=color, marker=marker, markerfacecolor=fill, label=name)
            if policy == "top_k" and codec == leftmost:
                _annotate(
                    axes, chosen, key, "kl_nats", lambda point: f"K={point.k}", color, (-4, -7), "right"
                )
            if (policy, codec) == ("top_p", "open float16"):
                _annotate(axes, chosen, key, "kl_nats", lambda point: f"p={point.p:g}", color, (5, 1), "left")
    _draw_states(axes, points, key, "kl_nats")
    if own["kl_nats"] is not None:
        _star(axes, own, "kl_nats")


def _draw_gradient(axes: Any, points: Sequence[Point], key: str, own: dict[str, Any], codec: str) -> None:
    for policy, (color, line, marker, name) in POLICY_STYLE.items():
        chosen = [point for point in points if (point.policy, point.codec) == (policy, codec)]
        x, y = _curve(chosen, key, "gradient_error")
        if not x:
            continue
        axes.plot(x, y, line, color=color, marker=marker, label=name)
        if policy == "top_k":
            _annotate(
                axes, chosen, key, "gradient_error", lambda point: f"K={point.k}", color, (-3, -8), "right"
            )
        elif policy == "sample":
            _annotate(
                axes, chosen, key, "gradient_error", lambda point: f"N={point.draws}", color, (3, 4), "left"
            )
    _draw_states(axes, points, key, "gradient_error")
    _star(axes, own, "gradient_error")


def _draw_states(axes: Any, points: Sequence[Point], key: str, name: str) -> None:
    """Draws hidden states, where the teacher has any: a curve over the coordinates that are kept, and other encodings."""
    states = [point for point in points if point.policy == "hidden"]
    curve = sorted(
        (point for point in states if point.codec == "int8"),
        key=lambda point: point.bytes_per_position["total"],
    )
    x, y = _curve(curve, key, name)
    if x:
        axes.plot(x, y, "-", color=STATE_COLOR, marker="P", label="hidden, int8 (R of D)")
        texts = {True: "whole", False: "R={}"}
        _annotate(
            *(axes, curve, key, name),
            lambda point: texts[point.components is None].format(point.components),
            *(STATE_COLOR, (3, 4), "left"),
        )
    for codec, (marker, label) in STATE_STYLE.items():
        x, y = _curve([point for point in states if point.codec == codec], key, name)
        if x:
            axes.plot(x, y, marker, color=STATE_COLOR, label=label)


def _curve(points: Sequence[Point], key: str, name: str) -> tuple[list[float], list[float]]:
    x, y = [], []
    for point in points:
        value = point.temperatures[key][name]
        if value is not None and value > SMALLEST:
            x.append(point.bytes_per_position["total"])
            y.append(value)
    return x, y


def _annotate(
    axes: Any,
    points: Sequence[Point],
    key: str,
    name: str,
    text: Callable[[Point], str],
    color: str,
    offset: tuple[int, int],
    side: str,
) -> None:
    last = None
    for point in points[:: 1 if len(points) < 7 else 2]:
        x, y = _curve([point], key, name)
        if not x or (last and max(x[0] / last[0], last[1] / y[0]) < CLOSE):
            continue
        last = x[0], y[0]
        axes.annotate(
            text(point),
            last,
            xytext=offset,
            textcoords="offset points",
            fontsize=6,
            color=color,
            ha=side,
        )


def _star(axes: Any, own: dict[str, Any], name: str) -> None:
    value = max(own[name], SMALLEST)
    axes.plot(
        own["bytes"],
        value,
        "*",
        markersize=12,
        color="#F0E442",
        markeredgecolor="black",
        markeredgewidth=0.7,
        label="this cache",
        zorder=5,
        linestyle="none",
    )


def _plain_ticks(axes: Any) -> None:
    """Plain numbers, with ticks between the powers of ten where an axis spans few of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        if high / low < 300:
            axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
            axis.set_major_formatter(
                FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
            )
            axis.set_minor_formatter(NullFormatter())
