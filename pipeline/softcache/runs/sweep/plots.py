"""Two figures of a sweep: how much each parameter matters, and the metric over temperature and alpha.

Importance is Optuna's (fANOVA): the share of the metric's variance, over the finished trials, that a parameter explains. The
surface is linear between the finished trials and empty outside of them; it is a projection, the other parameters
vary, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from softcache.config.sweep import SEARCH_PARAMETERS, Range
from softcache.runs.sweep.results import Result, ranked_trials
from softcache.runs.sweep.run import Sweep
from softcache.runs.sweep.space import Space
from softcache.runs.sweep.study import load_optuna

__all__ = ["draw_importance", "draw_surface", "importances"]

MIN_TRIALS_FOR_IMPORTANCE = 4  # finished trials below which a figure would show chance
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "softcache",
}


def importances(sweep: Sweep) -> dict[str, float] | None:
    """Returns each parameter's share of the metric's variance; None for too few, or equal, values."""
    values = [result.value for result in ranked_trials(sweep) if result.state == "complete"]
    if len(values) < MIN_TRIALS_FOR_IMPORTANCE or len(set(values)) < 2:
        return None
    optuna = load_optuna()
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    found = optuna.importance.get_param_importances(sweep.study.optuna_study, evaluator=evaluator)
    return {name: float(share) for name, share in found.items()}


def draw_importance(sweep: Sweep, out: Path) -> list[Path]:
    """Writes importance.png and .svg; returns their paths, none where there is nothing to draw."""
    found = importances(sweep)
    if found is None:
        return []
    plt = _pyplot()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(4.6, 0.5 + 0.32 * len(found)), layout="constrained")
        names = list(reversed(found))
        axes.barh(
            [SEARCH_PARAMETERS[name].key for name in names], [found[name] for name in names], color="#0072B2"
        )
        axes.set_xlabel(f"share of the variance of {sweep.bench.metric}")
        axes.spines[["top", "right"]].set_visible(False)
        return _save(plt, figure, out, "importance")


def draw_surface(sweep: Sweep, out: Path) -> list[Path]:
    """Writes surface.png and .svg; returns their paths, none where temperature or alpha has one value only."""
    finished = [result for result in ranked_trials(sweep) if result.state == "complete"]
    pairs = {(r.params.get("temperature"), r.params.get("alpha")) for r in finished}
    if not {"temperature", "alpha"} <= sweep.space.keys() or len(pairs) < MIN_TRIALS_FOR_IMPORTANCE:
        return []
    plt = _pyplot()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(4.6, 3.4), layout="constrained")
        _draw_points(figure, axes, sweep, finished)
        axes.set(xlabel="temperature", ylabel="alpha (weight of the teacher)")
        axes.margins(0.06)
        if _is_log(sweep.space, "temperature"):
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, place: f"{value:g}")
        axes.use_sticky_edges = False  # or half of a dot at the border is cut off
        axes.autoscale_view()
        return _save(plt, figure, out, "surface")


def _draw_points(figure: Any, axes: Any, sweep: Sweep, finished: list[Result]) -> None:
    import numpy as np
    from matplotlib.tri import Triangulation

    T, alpha, value = (
        np.array(column, dtype=float)
        for column in zip(
            *((r.params["temperature"], r.params["alpha"], r.value) for r in finished), strict=True
        )
    )
    limits = {
        "vmin": value.min(),
        "vmax": value.max(),
        "cmap": "viridis" if sweep.bench.maximize else "viridis_r",
    }
    points = np.unique(np.stack([T, alpha], axis=1), axis=0)
    spread = np.linalg.matrix_rank(points - points[0], tol=1e-6)
    if spread == 2 and value.min() < value.max():
        mean = [value[(t == T) & (alpha == a)].mean() for t, a in points]
        triangles = Triangulation(np.log(points[:, 0]), points[:, 1])
        triangles.x = points[:, 0]
        axes.tricontourf(triangles, mean, levels=12, alpha=0.55, **limits)
    drawn = axes.scatter(T, alpha, c=value, edgecolors="black", linewidths=0.5, s=26, zorder=3, **limits)
    figure.colorbar(drawn, label=sweep.bench.metric)
    pruned = [r for r in ranked_trials(sweep) if r.state == "pruned"]
    axes.scatter(
        [r.params["temperature"] for r in pruned],
        [r.params["alpha"] for r in pruned],
        marker="x",
        color="#777777",
        linewidths=0.8,
        s=18,
        zorder=2,
    )
    axes.set_title("dots: finished trials; crosses: pruned ones", loc="left")


def _is_log(space: Space, name: str) -> bool:
    axis = space[name]
    return axis.log if isinstance(axis, Range) else False


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(plt: Any, figure: Any, out: Path, name: str) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{name}.png", out / f"{name}.svg"]
    figure.savefig(paths[0], dpi=200)
    figure.savefig(paths[1], metadata={"Date": None})
    plt.close(figure)
    return paths
