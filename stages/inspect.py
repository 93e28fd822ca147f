"""Show the contents of a cache: identity, progress, bytes, and how much of the teacher it keeps per temperature.

softcache inspect runs/digits/cache
"""

import itertools
from collections.abc import Iterator
from typing import Any

import click
import numpy as np

from softcache.labels import STATS, BernoulliLabels, DetectionLabels, SoftLabels
from softcache.labels.sampling import estimate_mass
from softcache.modalities import percent
from softcache.reader.cache import Cache
from softcache.reader.open import open_cache
from softcache.runtime.display import printable

from .options import CACHE, json_option, print_json, print_table

__all__ = ["inspect_command"]

TEMPERATURES = (1.0, 2.0, 4.0, 10.0)
PERCENTILES = (1, 10, 50, 90)
PART_ROWS, PART_BYTES = 65536, 2**27
BOUND_ROWS = 65536
"""At most so many rows, evenly spread, are bounded between the grid's temperatures: 25 microseconds each."""


@click.command("inspect")
@click.argument("url", metavar="CACHE", type=CACHE)
@json_option
def inspect_command(url: str, as_json: bool) -> None:
    """Show the contents of CACHE, and how much of the teacher's distribution it keeps.

    \b
    Example:
      softcache inspect runs/digits/cache
    """
    cache = open_cache(url)
    report = {**_identity(cache), **_storage(cache), **_labels(cache)}
    if as_json:
        print_json(report)
        return
    for name in report["identity"]:
        if name == "codec":
            continue
        shown = {
            key: value
            for key, value in report["identity"][name].items()
            if not isinstance(value, dict | list)
        }
        if positions := report["identity"][name].get("positions"):
            policy_text = " ".join(map(str, itertools.chain(*positions.items())))
            shown["positions"] = policy_text.removeprefix("policy ")
        if name == "fusion":
            shown["teachers"] = " + ".join(map(str, report["identity"][name]["teachers"]))
        short = (
            f"{key} {value[:12]}…" if len(str(value)) == 64 else f"{key} {value}"
            for key, value in shown.items()
        )
        click.echo(f"{name:9} {', '.join(short)}")
    click.echo(
        f"store     {report['store']}, {report['num_bytes']:,} bytes in {report['units_done']} of {report['units']} units"
    )
    for name, value in report["extensions"].items():
        click.echo(f"extension {name}: {printable(str(value))[:200]}")
    if not report["rows"]:
        return
    print_table(
        "bytes per row", ("column", "bytes"), [(k, f"{v:.2f}") for k, v in report["bytes_per_row"].items()]
    )
    _print_labels(report)


def _print_labels(report: dict[str, Any]) -> None:
    percentiles = ("mean", *(f"p{p}" for p in PERCENTILES))
    if "norms" in report:
        rows = [
            (name, *(f"{value:.4g}" for value in norms.values())) for name, norms in report["norms"].items()
        ]
        print_table("Euclidean norm of a row's vector", ("vector", *percentiles), rows)
        for name, size in report["shared_bytes"].items():
            click.echo(f"{name:9} {size:,} bytes, once: {size / report['rows']:.2f} a row")
        return
    if "score" in report:
        rows = [
            (words, *(f"{value:.4f}" for value in report[name].values()))
            for name, words in (
                ("score", "of the most likely class"),
                ("dropped_mass", "of all dropped classes"),
            )
        ]
        where = " at the kept anchors" if "grid" in report["identity"] else ""
        print_table(f"the teacher's probabilities{where}", ("", *percentiles), rows)
        return
    if "drawn" in report:
        _print_drawn(report["drawn"])
    else:
        rows = [(f"T={t}", *(f"{v:.4f}" for v in mass.values())) for t, mass in report["kept_mass"].items()]
        print_table("share of the teacher's mass in the kept classes", ("kept mass at", *percentiles), rows)
    rows = [(f"T={t}", *(f"{v:.1e}" for v in error.values())) for t, error in report["tail_error"].items()]
    print_table(
        f"bound of the tail's error, {report['tail_error_rows']:,} rows",
        ("error at", "p99", "worst row"),
        rows,
    )
    if report["entropy_nats"] is not None:
        click.echo(f"entropy   {report['entropy_nats']['mean']:.4f} nats on average")
    if report["agreement"] is not None:
        click.echo(
            f"teacher agrees with the ground truth on {percent(report['agreement'])} of {report['agreement_rows']:,} rows"
        )


def _print_drawn(drawn: dict[str, Any]) -> None:
    rows = [
        (
            f"T={t}",
            f"{drawn['exact_mass'][t]['mean']:.4f}",
            f"{found['mean']:.1f}",
            f"{found['p10']:.1f}",
            f"{drawn['mass_error'][t]:.4f}",
        )
        for t, found in drawn["effective_samples"].items()
    ]
    how = f"{drawn['draws']} draws a row of {drawn['classes']['mean']:.1f} classes behind {drawn['exact']} exact ones"
    print_table(
        f"what {how} stand for",
        ("at", "exact mass", "effective draws", "p10", "standard error of the mass"),
        rows,
        note="The drawn classes stand for all others on average; the error is that of one row's sum, whose truth is 1.",
    )


def _identity(cache: Cache) -> dict[str, Any]:
    manifest = cache.manifest
    return {
        "cache": cache.url,
        "identity": manifest.identity,
        "store": manifest.store,
        "extensions": manifest.extensions,
    }


def _storage(cache: Cache) -> dict[str, Any]:
    by_column, rows = cache.bytes_by_column(), cache.num_rows_done
    return {
        "units": cache.manifest.plan.num_units,
        "units_done": len(cache.markers),
        "rows": rows,
        "num_bytes": sum(by_column.values()),
        "bytes_per_row": {name: size / rows for name, size in by_column.items()}
        | {"total": sum(by_column.values()) / max(rows, 1)},
    }


def _summary(values: np.ndarray) -> dict[str, float]:
    values = values if len(values) else np.zeros(1)
    return {"mean": float(values.mean())} | {
        f"p{p}": float(value)
        for p, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)
    }


def _worst(values: np.ndarray) -> dict[str, float]:
    return {"p99": float(np.percentile(values, 99)), "worst": float(values.max())}


def _labels(cache: Cache) -> dict[str, Any]:
    """Reads every finished row once; a few numbers per row are kept."""
    codec = cache.manifest.codec
    if "bernoulli" in (codec["name"], codec.get("distribution")):
        return _bernoulli(cache)
    if codec["name"] == "vectors":
        return _vectors(cache)
    targets, highest = cache.samples_table().targets, cache.manifest.codec.get("max_temperature")
    temperatures = [t for t in TEMPERATURES if highest is None or t <= highest]
    mass: dict[float, list[np.ndarray]] = {t: [] for t in temperatures}
    error: dict[float, list[np.ndarray]] = {t: [] for t in temperatures}
    sampling = cache.manifest.codec.get("sampling")
    estimates: dict[float, list[tuple[np.ndarray, np.ndarray]]] = {t: [] for t in temperatures}
    entropy: list[np.ndarray] = []
    drawn_classes: list[np.ndarray] = []
    num_rows, compared, hits = 0, 0, 0
    stride = max(1, -(-cache.num_rows_done // BOUND_ROWS))
    for view, part, record in _parts(cache):
        is_cells = isinstance(record, DetectionLabels)
        labels: SoftLabels = record.labels if is_cells else record
        num_rows += len(labels)
        for t in temperatures:
            mass[t].append(np.asarray(labels.kept_mass(t)))
            error[t].append(labels.take(slice(0, None, stride)).tail_error(t))
            if sampling:
                estimates[t].append(estimate_mass(labels, t))
        if sampling:
            drawn_classes.append((labels.ids < labels.num_classes).sum(1) - sampling["exact"])
        if labels.stats is not None:
            entropy.append(labels.stats[:, STATS.index("entropy")])
        # The target of a detector's anchor depends on matched boxes; a mixed image has two classes.
        if not is_cells and not (view and cache.manifest.mixes_images):
            compared += len(labels)
            hits += _agreeing(labels, targets[part] if len(targets) else None)
    if not num_rows:
        return {}
    kept = {t: _summary(np.concatenate(values)) for t, values in mass.items()}
    return {
        **({"drawn": _drawn(sampling, kept, estimates, drawn_classes)} if sampling else {"kept_mass": kept}),
        "tail_error": {t: _worst(np.concatenate(values)) for t, values in error.items()},
        "tail_error_rows": sum(map(len, error[temperatures[0]])),
        "entropy_nats": _summary(np.concatenate(entropy)) if entropy else None,
        # The most likely class of the sampled ones need not be the teacher's prediction.
        "agreement": hits / compared if compared and not cache.manifest.codec.get("sampling") else None,
        "agreement_rows": compared,
    }


def _drawn(
    sampling: dict[str, Any],
    exact_mass: dict[float, dict[str, float]],
    estimates: dict[float, list[tuple[np.ndarray, np.ndarray]]],
    classes: list[np.ndarray],
) -> dict[str, Any]:
    """Returns what drawn classes are worth: none of them is the teacher's mass, each stands for others."""
    error, effective = {}, {}
    for t, parts in estimates.items():
        mass_P, effective_P = (np.concatenate(column) for column in zip(*parts, strict=True))
        error[t] = float(np.sqrt(np.mean((mass_P - 1) ** 2)))
        effective[t] = _summary(effective_P[np.isfinite(effective_P)])
    return {
        "draws": sampling["draws"],
        "exact": sampling["exact"],
        "classes": _summary(np.concatenate(classes).clip(min=0)),
        "exact_mass": exact_mass,
        "effective_samples": effective,
        "mass_error": error,
    }


def _bernoulli(cache: Cache) -> dict[str, Any]:
    """Returns a sigmoid head's masses in each row: its highest probability, and the sum of those dropped."""
    found: dict[str, list[np.ndarray]] = {"score": [], "dropped_mass": []}
    for _, _, record in _parts(cache):
        is_cells = isinstance(record, DetectionLabels)
        labels: BernoulliLabels = record.labels if is_cells else record
        found["score"].append(1 / (1 + np.exp(-labels.logits[:, 0].astype(np.float64))))
        found["dropped_mass"].append(np.asarray(labels.dropped_mass))
    return {name: _summary(np.concatenate(values)) for name, values in found.items() if values}


def _vectors(cache: Cache) -> dict[str, Any]:
    """Returns how long vectors are, by name, and the bytes of what all rows share."""
    norms: dict[str, list[np.ndarray]] = {name: [] for name in cache.manifest.codec["vectors"]}
    for _, _, labels in _parts(cache, max(1, PART_BYTES // cache.manifest.build_codec().row_bytes)):
        for name, found in norms.items():
            found.append(np.linalg.norm(labels.vectors(name), axis=1))
    shared = {name: one.num_bytes for name, one in cache.manifest.objects.items()}
    return {
        "norms": {name: _summary(np.concatenate(found)) for name, found in norms.items() if found},
        "shared_bytes": shared,
    }


def _parts(cache: Cache, num_rows: int = PART_ROWS) -> Iterator[tuple[int, np.ndarray, Any]]:
    """Yields all finished samples, about `num_rows` rows at a time: view, samples, and their labels."""
    for view in range(cache.num_views):
        samples = cache.samples_in(view)
        rows = int(cache.rows.counts(samples).sum())
        for part in np.array_split(samples, max(1, rows // num_rows)):
            if len(part):
                yield view, part, cache.read(part, view)


def _agreeing(labels: SoftLabels, targets: np.ndarray | None) -> int:
    """Returns how many rows have the ground truth as the teacher's prediction."""
    if targets is not None:
        return int((labels.ids[:, 0] == targets).sum())
    # A token's ground truth is known by its log-probability alone; one that ties with the prediction counts.
    assert labels.target_log_prob is not None
    return int((labels.target_log_prob.astype(labels.log_probs.dtype) >= labels.log_probs[:, 0]).sum())
