"""What every benchmark shares: interleaved rounds, ratios to a named baseline, a table, JSON, a plot.

Rounds of all contenders are interleaved, so that a drift of the machine touches every one alike. A ratio is taken
within its round, and the median is shown with the smallest and largest.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from softcache.runtime.logging import log_info
from softcache.stages.options import print_table

__all__ = ["Figure", "best", "compare", "cpu_seconds", "draw", "machine", "measure", "save", "show"]


@dataclass(frozen=True)
class Figure:
    """One contender: what it did per second, and that over the baseline's of the same round."""

    name: str
    per_second: float
    ratio: float
    min: float
    max: float


def measure(
    contenders: dict[str, Callable[[], int]],
    rounds: int,
    *,
    prepare: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """Returns things per second of each contender, one number per interleaved round.

    Args:
        contenders: by name, a function that does its work and returns how many things it did.
        prepare: called with the name before each run, outside of the time.
    """
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, run in contenders.items():
            prepare(name)
            started = time.perf_counter()
            count = run()
            rates[name].append(count / (time.perf_counter() - started))
            log_info(f"round {number + 1}/{rounds} {name}: {rates[name][-1]:,.0f}/s")
    return rates


def cpu_seconds() -> float:
    """Returns the CPU time of this process and of all that it started, alive or not."""
    me = psutil.Process()
    others = sum(sum(process.cpu_times()[:4]) for process in me.children(recursive=True))
    return time.process_time() + sum(me.cpu_times()[2:4]) + others


def best(contenders: dict[str, Callable[[], int]], rounds: int) -> dict[str, tuple[float, float]]:
    """Returns things per second and per second of CPU time of each contender, the best of interleaved rounds.

    For machines with other work, which can only slow a round down. A round before the others is not counted.
    """
    found = dict.fromkeys(contenders, (0.0, 0.0))
    for number in range(rounds + 1):
        for name, run in contenders.items():
            wall, cpu = time.perf_counter(), cpu_seconds()
            count = run()
            wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
            if number:
                rates = (count / wall, count / max(cpu, 1e-9))
                found[name] = (max(found[name][0], rates[0]), max(found[name][1], rates[1]))
                log_info(f"round {number}/{rounds} {name}: {rates[0]:,.0f}/s, {rates[1]:,.0f}/CPU s")
    return found


def compare(rates: dict[str, list[float]], baseline: str) -> list[Figure]:
    """Returns the figures of all contenders, with ratios to the baseline: above 1 is faster than it."""
    figures = []
    for name, values in rates.items():
        of_round = [value / base for value, base in zip(values, rates[baseline], strict=True)]
        figures.append(
            Figure(name, statistics.median(values), statistics.median(of_round), min(of_round), max(of_round))
        )
    return figures


def show(title: str, figures: list[Figure], unit: str = "rows/s") -> None:
    cells = [
        (f.name, f"{f.per_second:,.0f}", *(f"{value:.3f}" for value in (f.ratio, f.min, f.max)))
        for f in figures
    ]
    print_table(title, ("", unit, "ratio", "min", "max"), cells)


def machine() -> dict[str, Any]:
    """Returns where figures were taken, for their JSON."""
    packages = ("torch", "numpy", "zarr", "tensorstore", "pyarrow")
    return {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def save(path: str | Path, results: dict[str, list[Figure]]) -> None:
    """Writes {"machine": …, "results": {title: [figure, …]}}."""
    rows = {title: [asdict(figure) for figure in figures] for title, figures in results.items()}
    Path(path).write_text(json.dumps({"machine": machine(), "results": rows}, indent=2) + "\n")


def draw(path: str | Path, results: dict[str, list[Figure]]) -> None:
    """Draws every table as bars of ratios with their spread; PNG or SVG by the name."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heights = [len(figures) for figures in results.values()]
    figure, axes = plt.subplots(
        len(results),
        figsize=(9, 0.45 * sum(heights) + 1.1 * len(results)),
        squeeze=False,
        height_ratios=heights,
    )
    for ax, (title, rows) in zip(axes[:, 0], results.items(), strict=True):
        names = [row.name for row in rows][::-1]
        values = [row.ratio for row in rows][::-1]
        spread = [[row.ratio - row.min for row in rows][::-1], [row.max - row.ratio for row in rows][::-1]]
        ax.barh(names, values, xerr=spread, color="#4878a8", ecolor="#333333", height=0.6)
        ax.axvline(1.0, color="#333333", linewidth=0.8)
        ax.set_title(title, loc="left", fontsize=10)
        ax.tick_params(labelsize=8)
        ax.margins(x=0.12)  # room for the figure at the longest bar
        for place, (value, reach) in enumerate(zip(values, spread[1], strict=True)):
            ax.annotate(
                f"{value:.2f}", (value + reach, place), xytext=(4, -3), textcoords="offset points", fontsize=8
            )
        if max(values) > 20 * min(values):
            ax.set_xscale("log")
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Date": None} if str(path).endswith(".svg") else None)
    plt.close(figure)
