"""Search a student's settings from one cache: many trials, one table, the best one as a config.

make sweep                                                    # embedded data, the default space
make sweep CONFIG=configs/sweep-digits.toml WORKERS=2
softcache sweep --config configs/sweep-digits.toml --trials 30 --seeds 3
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from softcache.errors import ConfigError
from softcache.modalities import modality_of
from softcache.reader.parts import CacheParts

from .options import (
    LOCAL,
    cache_option,
    check_reads_cache,
    config_options,
    json_option,
    log_option,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from softcache.config.run import RunConfig
    from softcache.runs.sweep import Sweep
    from softcache.runs.sweep.cost import Cost
    from softcache.runs.sweep.results import Repeated, Result

__all__ = ["sweep_command"]


@click.command("sweep")
@config_options
@cache_option
@log_option
@json_option
@click.option(
    "--trials",
    type=click.IntRange(1),
    help="Trials in total, including those of earlier runs [default: sweep.trials].",
)
@click.option("--workers", default=1, type=click.IntRange(1), help="Processes, this one included.")
@click.option(
    "--out",
    metavar="DIR",
    type=LOCAL,
    help="The sweep's directory, with working locks [default: runs/NAME/sweep].",
)
@click.option(
    "--seeds",
    default=0,
    type=click.IntRange(0),
    help="Train the best three and the unchanged config again with so many other seeds.",
)
@click.option(
    "--cost/--no-cost",
    default=True,
    help="Train the best for a few epochs with an online teacher, to estimate what the sweep would have cost.",
)
def sweep_command(
    config: RunConfig,
    url: str | None,
    trials: int | None,
    workers: int,
    out: str | None,
    seeds: int,
    cost: bool,
    as_json: bool,
) -> None:
    """Search temperature, alpha, loss, K, learning rate and student from one cache.

    Every trial is a student run in a directory of its own. A killed sweep goes on; the same command in a
    second terminal shares the trials.

    \b
    Example:
      softcache sweep --config configs/sweep-digits.toml --trials 30 --workers 2
    """
    from softcache.runs import open_labels
    from softcache.runs.sweep import run_sweep
    from softcache.runs.sweep.cost import measure_cost, unmeasured_reason
    from softcache.runs.sweep.plots import draw_importance, draw_surface, importances
    from softcache.runs.sweep.results import repeat_best, write_best, write_json

    check_reads_cache(config)
    path = Path(out or config.root / "sweep")
    cache = open_labels(config, url)
    if isinstance(cache, CacheParts):
        raise ConfigError(
            f"cache {cache.url}: a sweep reads one cache, and these are several that are read as one; give --cache that of "
            "a part, with source.part"
        )
    labels = cache.url  # with [fusion], of the fused cache
    sweep = run_sweep(config, labels, path, trials=trials or config.sweep.trials, workers=workers)
    if not as_json:
        _print_trials(sweep)
    best = write_best(sweep)
    again = repeat_best(sweep, seeds=seeds) if seeds else []
    if again and not as_json:
        _print_repeats(sweep, again, seeds)
    reason = unmeasured_reason(sweep) if cost else "skipped by --no-cost"
    measured = measure_cost(sweep) if reason is None else None
    if not as_json:
        _print_cost(measured, reason)
    figures = [*draw_importance(sweep, path), *draw_surface(sweep, path)]
    found: dict[str, Any] = {
        "importances": importances(sweep),
        "repeats": [row._asdict() | {"mean": row.mean, "std": row.std} for row in again],
        "cost": measured and measured._asdict(),
    }
    results_file = write_json(sweep, found)
    if as_json:
        written = {"best": str(best), "figures": list(map(str, figures)), "cost_unmeasured": reason}
        print_json(json.loads(Path(results_file).read_text(encoding="utf-8")) | written)
        return
    click.echo(f"all trials: {results_file}")
    click.echo(f"figures: {', '.join(map(str, figures)) or 'none: too few different trials are finished'}")
    click.echo(f"the best one: softcache train-student --config {best}")


def _print_trials(sweep: Sweep) -> None:
    from softcache.runs.sweep.results import ranked_trials

    results = ranked_trials(sweep)
    format_score = modality_of(sweep.bench.config).score.format
    columns = ("trial", sweep.bench.metric, "state", *sweep.space, "epochs", "seconds")
    note = "the best is chosen by the eval split and one seed: repeat it with --seeds before you rely on it"
    print_table(
        f"sweep {sweep.bench.path}", columns, [_row(sweep, format_score, r) for r in results], note=note
    )


def _row(sweep: Sweep, format_score: Callable[[float | None], str], result: Result) -> tuple[str, ...]:
    from softcache.runs.sweep.space import format_value

    state = result.state if result.same_as is None else f"as trial {result.same_as}"
    params = (format_value(result.params.get(name, "-")) for name in sweep.space)
    return (
        str(result.number),
        format_score(result.value),
        state,
        *params,
        str(result.epochs),
        f"{result.seconds:.1f}",
    )


def _print_repeats(sweep: Sweep, again: list[Repeated], seeds: int) -> None:
    score = modality_of(sweep.bench.config).score
    rows = [
        (
            "unchanged config" if row.number is None else f"trial {row.number}",
            score.format(row.mean),
            score.format_std(row.std),
            ", ".join(score.format(value) for value in row.values),
        )
        for row in again
    ]
    print_table(
        f"the best again, {seeds} other seeds",
        ("settings", sweep.bench.metric, score.std_title, "each"),
        rows,
    )


def _print_cost(cost: Cost | None, reason: str | None) -> None:
    if cost is None:
        click.echo(f"cost with an online teacher: not measured: {reason}")
        return
    extra = cost.online_epoch_seconds - cost.cached_epoch_seconds
    rows = [
        (
            f"{cost.trials} trials, {cost.epochs} epochs, from the cache",
            f"{cost.cached_seconds:.1f}",
            "measured",
        ),
        ("an epoch of the best, from the cache", f"{cost.cached_epoch_seconds:.3f}", "measured"),
        ("an epoch of the best, with an online teacher", f"{cost.online_epoch_seconds:.3f}", "measured"),
        ("the teacher pass that fills the cache", f"{cost.teacher_pass_seconds:.1f}", f"{extra:.3f} x views"),
        (
            "all trials with an online teacher",
            f"{cost.online_seconds:.1f}",
            f"measured + {extra:.3f} x epochs",
        ),
    ]
    note = (
        f"online teacher over cache: {cost.ratio:.2f} times the seconds; {cost.ratio_with_pass:.2f} times if the cache "
        "is made for this sweep alone"
    )
    print_table("cost", ("", "seconds", "source"), rows, note=note)
