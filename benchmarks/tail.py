"""How far the tail's mass is off, at any temperature: a table by family of logits, and what each grid buys.

    python -m benchmarks.tail [--seeds N] [--json FILE]

Above T = 1: the worst absolute error of the tail's mass after normalisation, T = 1 to 1e6, V = 10 to 262144, K = 1 to
256; the grid's values in float32, the rest in float64; and the bound
that a record gives for itself. Below: half the distance, in mass, between the bounds, which
is how far off serving the middle can be; then the lowest T at which that is within 2e-3 for every record. Classes
beyond the 256th are summed in bins of 0.01 nats (4e-6 in the log of the mass).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np

from softcache.labels.mass_bounds import log_tail_bounds
from softcache.labels.tail import (
    DEFAULT_TEMPERATURES,
    interpolate_log_tail,
    log_sum_exp,
)
from softcache.labels.tail_bounds import log_tail_bounds_below_one

PROMISED = ("flat", "zipf", "peaky", "bimodal 5-15", "one-hot", "N(0,8^2)")
FAMILIES = (*PROMISED, "bimodal 20-40", "t(2)")
KEPT = (1, 2, 3, 4, 5, 8, 16, 32, 64, 128, 256)
SIZES = {10: 20, 17: 10, 50: 8, 300: 4, 10_000: 2, 262_144: 1}  # vocabulary: draws for each of `--seeds`
ABOVE = (*(200.0 / k for k in range(200, 0, -1)), 1e3, 1e6)
BELOW = (0.99, 0.98, 0.97, 0.96, 0.95, 0.93, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.3, 0.1)
GRIDS = {
    "8 points, the first default": (1.0, 1.1, 1.25, 1.5, 1.8, 2.5, 4.0, 8.0),
    **{f"{n} points, equal in 1/T": tuple(n / k for k in range(n, 0, -1)) for n in (7, 8, 9, 10, 12)},
}


def draw_logits(family: str, num_classes: int, rng: np.random.Generator) -> np.ndarray:
    """[V] float64, of one family."""
    noise = rng.normal(0.0, 1.0, num_classes)
    if family == "flat":
        return noise * rng.choice([0.0, 0.05, 0.3])
    if family == "zipf":
        return noise * rng.choice([0.0, 0.1, 0.3, 1.0]) - rng.uniform(0.5, 3.0) * np.log(
            np.arange(num_classes) + 1
        )
    if family == "peaky":
        noise *= rng.choice([0.3, 1.0, 2.0, 3.0])
        peaks = min(int(rng.integers(1, 31)), num_classes // 2)
        noise[:peaks] += rng.uniform(5.0, 12.0, peaks)
    elif family.startswith("bimodal"):
        low, high = (float(x) for x in family.split()[1].split("-"))
        noise *= rng.choice([0.3, 1.0])
        noise[: max(1, int(num_classes * rng.choice([0.5, 0.25, 0.1, 0.01, 0.001])))] += rng.uniform(
            low, high
        )
    elif family == "one-hot":
        noise *= rng.uniform(0.5, 2.0)
        noise[0] += rng.uniform(20.0, 40.0)
    elif family == "N(0,8^2)":
        noise *= 8.0
    else:
        return rng.standard_t(2, num_classes)
    return noise


def draw_records(family: str, seeds: int) -> dict[str, np.ndarray]:
    """What is known of the dropped classes [P], and atoms [P] for the truth at any temperature."""
    rows = []
    for num_classes, draws in SIZES.items():
        for seed in range(draws * seeds):
            rng = np.random.default_rng([FAMILIES.index(family), num_classes, seed])
            log_probs = -np.sort(-draw_logits(family, num_classes, rng))
            log_probs -= log_sum_exp(log_probs)
            binned = _binned(log_probs[256:])
            for kept in (k for k in KEPT if k < num_classes):
                dropped = log_probs[kept:]
                weights = np.exp(dropped - log_sum_exp(dropped))
                near = log_probs[kept:256]
                rows.append(
                    {
                        "kept": log_probs[:kept],
                        "atoms": np.concatenate([near, binned[0]]),
                        "log_counts": np.concatenate([0.0 * near, binned[1]]),
                        "log_support_P": np.log(len(dropped)),
                        "slopes": (dropped.mean(), float(weights @ dropped)),
                        "curvature_P": dropped.var(),
                        "highest_log_prob_P": log_probs[kept - 1],
                    }
                )
    return {name: [row[name] for row in rows] for name in rows[0]}


def _binned(log_probs: np.ndarray, width: float = 0.01) -> tuple[np.ndarray, np.ndarray]:
    if len(log_probs) == 0:
        return log_probs, log_probs
    _, place = np.unique(np.floor((log_probs[0] - log_probs) / width), return_inverse=True)
    counts = np.bincount(place)
    return np.bincount(place, log_probs) / counts, np.log(counts)


def log_tails(records: dict[str, Any], temperatures: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """True logs of the sums of p^(1/T), [P, T] each: dropped, kept."""
    beta = 1.0 / np.array(temperatures)[:, None]
    pairs = zip(records["atoms"], records["log_counts"], strict=True)
    dropped = np.stack([log_sum_exp(beta * atoms + counts) for atoms, counts in pairs])
    return dropped, np.stack([log_sum_exp(beta * kept) for kept in records["kept"]])


def mass(log_tail: np.ndarray, log_kept: np.ndarray) -> np.ndarray:
    """Of the tail, after normalisation with the kept classes."""
    return np.exp(log_tail - np.logaddexp(log_tail, log_kept))


def worst_above(records: dict[str, Any], truth: tuple, grid: tuple[float, ...], use: str) -> float:
    """Largest error of the tail's mass at T >= 1."""
    stored = log_tails(records, grid)[0].astype(np.float32)
    slopes = tuple(np.array(records["slopes"]).T)
    known: dict[str, Any] = {"log_support_P": np.array(records["log_support_P"])}
    if use != "no stats":
        known["end_slopes_P"] = slopes
    if use == "all":
        known["curvature_P"] = np.array(records["curvature_P"])
    found = np.stack([interpolate_log_tail(stored, grid, float(t), **known) for t in ABOVE], axis=1)
    return float(np.abs(mass(found, truth[1]) - mass(*truth)).max())


def half_gaps(records: dict[str, Any]) -> list[float]:
    """Largest distance, in mass, from the middle to a bound, for each T < 1."""
    stored = log_tails(records, DEFAULT_TEMPERATURES)[0].astype(np.float32)
    known = {name: np.array(records[name]) for name in ("log_support_P", "highest_log_prob_P")}
    slope = np.array(records["slopes"])[:, 1]
    kept = log_tails(records, BELOW)[1]
    gaps = []
    for index, temperature in enumerate(BELOW):
        bounds = log_tail_bounds_below_one(
            stored, DEFAULT_TEMPERATURES, temperature, **known, slope_at_one_P=slope
        )
        low, high, middle = (mass(x, kept[:, index]) for x in bounds)
        gaps.append(float(np.maximum(high - middle, middle - low).max()))
    return gaps


def bounds_above(records: dict[str, Any], truth: tuple) -> dict[str, tuple[float, float]]:
    """99th percentile and largest of a record's own bound (`SoftLabels.tail_error`), by range of T."""
    stored = log_tails(records, DEFAULT_TEMPERATURES)[0].astype(np.float32)
    known = {name: np.array(records[name]) for name in ("log_support_P", "highest_log_prob_P")}
    slopes = tuple(np.array(records["slopes"]).T)
    more = {"end_slopes_P": slopes, "curvature_P": np.array(records["curvature_P"])}
    found: dict[str, list[np.ndarray]] = {"T up to 8": [], "T above 8": []}
    for index, temperature in enumerate(ABOVE[::3]):
        bounds = log_tail_bounds(stored, DEFAULT_TEMPERATURES, temperature, **known)
        served = interpolate_log_tail(
            stored, DEFAULT_TEMPERATURES, temperature, log_support_P=known["log_support_P"], **more
        )
        low, high, middle, true = (
            mass(x, truth[1][:, 3 * index]) for x in (*bounds, served, truth[0][:, 3 * index])
        )
        if not ((low <= true + 1e-9) & (true <= high + 1e-9)).all():
            raise SystemExit(f"T = {temperature:g}: a bound is broken")
        found["T up to 8" if temperature <= 8 else "T above 8"].append(
            np.maximum(high - middle, middle - low)
        )
    return {name: (float(np.percentile(x, 99)), float(np.max(x))) for name, x in found.items()}


@click.command()
@click.option("--seeds", default=1, show_default=True, help="Multiplies the draws per family and vocabulary.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the figures there too.")
def main(seeds: int, path: Path | None) -> None:
    """Print the errors of the tail's mass by family of logits."""
    rows: dict[str, list[float]] = {}
    lowest: list[float] = []
    for family in FAMILIES:
        records = draw_records(family, seeds)
        truth = log_tails(records, ABOVE)
        for name, grid in GRIDS.items():
            rows.setdefault(name, []).append(worst_above(records, truth, grid, "all"))
        for use in ("no curvature", "no stats"):
            name = f"default grid, {use}"
            rows.setdefault(name, []).append(worst_above(records, truth, DEFAULT_TEMPERATURES, use))
        for name, (most, worst) in bounds_above(records, truth).items():
            rows.setdefault(f"bound, {name}, p99", []).append(most)
            rows.setdefault(f"bound, {name}, worst", []).append(worst)
        gaps = half_gaps(records)
        for temperature, gap in zip(BELOW, gaps, strict=True):
            rows.setdefault(f"bounds at T = {temperature}", []).append(gap)
        bad = [i for i, gap in enumerate(gaps) if gap > 2e-3]
        lowest.append(([1.0, *BELOW])[bad[0]] if bad else BELOW[-1])
    rows["lowest T within 2e-3"] = lowest
    click.echo(f"{'':28s}" + "".join(f"{family:>15s}" for family in FAMILIES))
    for name, values in rows.items():
        shown = [f"{v:.2f}" if name.startswith("lowest") else f"{v:.1e}" for v in values]
        click.echo(f"{name:28s}" + "".join(f"{v:>15s}" for v in shown))
    if path:
        path.write_text(json.dumps({"families": FAMILIES, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
