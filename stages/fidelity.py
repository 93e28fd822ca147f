"""Measure a cache against its teacher, per temperature and per byte.

make fidelity
softcache fidelity runs/digits/cache --config configs/digits.toml --rows 512
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from softcache.errors import StorageError
from softcache.modalities import percent
from softcache.reader.cache import Cache
from softcache.reader.open import open_cache
from softcache.runtime.files import replace_file, to_json
from softcache.runtime.logging import progress_bar

from .options import CACHE, LOCAL, config_options, json_option, parse_temperatures, print_json, print_table

if TYPE_CHECKING:
    from softcache.config.run import RunConfig

__all__ = ["fidelity"]

TEMPERATURES = (1.0, 1.3, 2.0, 4.0, 8.0)


@click.command()
@click.argument("url", metavar="CACHE", type=CACHE)
@config_options(required=True, help="The TOML file of the run that made CACHE.")
@click.option(
    "--rows",
    default=512,
    type=click.IntRange(1),
    help="Rows that the teacher labels again.",
)
@click.option(
    "--temperatures",
    metavar="T,T,…",
    help="Where to measure [default: 1,1.3,2,4,8, as far as CACHE reaches]. The figure is drawn at the first.",
)
@click.option("--seed", default=0, help="Seed of the choice of rows.")
@click.option(
    "--out",
    metavar="DIR",
    type=LOCAL,
    help="Where the report and the figure go [default: runs/NAME/fidelity].",
)
@json_option
def fidelity(
    url: str,
    config: RunConfig,
    rows: int,
    temperatures: str | None,
    seed: int,
    out: str | None,
    as_json: bool,
) -> None:
    """Measure CACHE against its own teacher, and against every other policy and codec.

    Writes fidelity.json, frontier.png and frontier.svg.

    \b
    Example:
      softcache fidelity runs/digits/cache --config configs/digits.toml
    """
    from softcache.runs import open_data, open_teacher
    from softcache.tools.fidelity import draw_frontier, measure_cache, num_points, rerun_teacher

    cache = open_cache(url)
    wanted = _temperatures(cache, temperatures)
    data = open_data(config)
    teacher = open_teacher(config, data)
    with progress_bar("fidelity: teacher", rows, "rows") as advance:
        rerun = rerun_teacher(cache, data.train, teacher, num_rows=rows, seed=seed, progress=advance)
    with progress_bar("fidelity: frontier", num_points(cache.num_classes, rerun.width), "points") as advance:
        report, points = measure_cache(cache, rerun, temperatures=wanted, progress=advance)
    report = {"config": config.name, "seed": seed, **report}
    folder = Path(out) if out else config.root / "fidelity"
    written = [folder / "fidelity.json"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(written[0], to_json(report))
        written += draw_frontier(
            points, folder, title=_title(report), temperature=wanted[0], own=_own(report, wanted[0])
        )
    except OSError as error:
        raise StorageError(f"fidelity {folder}: cannot be written: {error}; choose another --out") from error
    if as_json:
        print_json(report)
        return
    _print(report)
    for path in written:
        click.echo(f"wrote {path}")


def _temperatures(cache: Cache, given: str | None) -> list[float]:
    if given is None:
        highest = cache.manifest.codec.get("max_temperature")
        return [t for t in TEMPERATURES if highest is None or t <= highest]
    return list(dict.fromkeys(parse_temperatures(given)))


def _kind(report: dict[str, Any]) -> str:
    """Returns the cache's policy as the figure labels it."""
    labels = report["labels"]
    policy = labels["policy"]
    if policy == "hidden":
        return f"hidden, {labels['components']} coordinates" if "components" in labels else "hidden states"
    if policy == "hybrid":
        return f"hybrid, K={labels['k']}+{labels['draws']}"
    if policy == "sample":
        return f"sample, N={labels['draws']}"
    number = f"p={labels['p']}" if policy == "top_p" else f"K={labels['k']}"
    return f"{policy.replace('_', '-')}, {number}"


def _codec(report: dict[str, Any]) -> str:
    codec = report["codec"]
    if codec["name"] == "vectors":
        return str(codec["vectors"]["hidden"]["values"])
    return f"packed 1/{1 / codec['step']:.0f}" if codec.get("step") else f"{codec['name']} {codec['values']}"


def _own(report: dict[str, Any], temperature: float) -> dict[str, Any]:
    found = report["temperatures"][f"{temperature:g}"]
    return {
        "label": f"{_kind(report)}, {_codec(report)}",
        "codec": _codec(report),
        "bytes": report["bytes_per_position"]["total"],
        "kl_nats": found.get("kl_mean_nats"),
        "gradient_error": found["gradient_error"],
    }


def _title(report: dict[str, Any]) -> str:
    return (
        f"{report['config']} ({report['source']}), teacher {report['teacher']['spec']}, V = {report['num_classes']:,}, "
        f"{report['rows']:,} positions of {report['samples']:,} samples"
    )


def _print(report: dict[str, Any]) -> None:
    drawn = "total_mass_mean" in next(iter(report["temperatures"].values()))
    columns = ["at", "kept mass", "top-1", "gradient error"]
    columns += (
        ["total mass", "its std"]
        if drawn
        else ["KL mean", "KL max", "bucket KL", "tail error", "max", "bound"]
    )
    rows = []
    for t, found in report["temperatures"].items():
        row = [
            f"T={t}",
            f"{found['kept_mass']:.4f}",
            percent(found["top1_agreement"]),
            f"{found['gradient_error']:.2e}",
        ]
        if drawn:
            row += [f"{found['total_mass_mean']:.4f}", f"{found['total_mass_std']:.4f}"]
        else:
            names = (
                "kl_mean_nats",
                "kl_max_nats",
                "bucket_kl_mean_nats",
                "tail_error_mean",
                "tail_error_max",
                "tail_bound_max",
            )
            row += [f"{found[name]:.2e}" for name in names]
        rows.append(row)
    print_table(f"{_title(report)}: {_kind(report)}, {_codec(report)}", columns, rows)
    _print_states(report)
    sizes = [(name, f"{size:.2f}") for name, size in report["bytes_per_position"].items()]
    print_table("bytes per position", ("column", "bytes"), sizes)


def _print_states(report: dict[str, Any]) -> None:
    """Prints what hidden states would take and hold, next to the best of the other policies in at most as many bytes."""
    points = report["frontier"]
    states = [point for point in points if point["policy"] == "hidden"]
    if not states:
        return
    at = next(iter(report["temperatures"])), list(report["temperatures"])[-1]
    cut = [point for point in points if point["policy"] in ("top_k", "top_p")]
    rows = []
    for point in sorted(states, key=lambda point: point["bytes_per_position"]["total"]):
        size, kept = point["bytes_per_position"]["total"], point["components"]
        row = [f"{point['codec']}{'' if kept is None else f', {kept} coordinates'}", f"{size:.0f}"]
        for t in at:
            other = min(
                (
                    one["temperatures"][t]["kl_nats"]
                    for one in cut
                    if one["bytes_per_position"]["total"] <= size
                ),
                default=None,
            )
            row += [f"{point['temperatures'][t]['kl_nats']:.1e}", "-" if other is None else f"{other:.1e}"]
        rows.append(row)
    columns = ["hidden states as", "bytes"]
    for t in at:
        columns += [f"KL at T={t}", "top-k, as many bytes"]
    print_table("hidden states of these rows, and top-k or top-p in at most as many bytes", columns, rows)
