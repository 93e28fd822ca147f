"""Export a finished student as ONNX, torch.export and int8, each run again and measured.

softcache export runs/digits/students/cnn-width-8-cache-0123abcd --out exported
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from softcache.runtime.display import format_duration
from softcache.runtime.logging import log_info

from .options import CACHE, LOCAL, PATH, json_option, log_option, print_json, print_table

if TYPE_CHECKING:
    from softcache.runs.export import ExportSettings

__all__ = ["export_and_print", "export_command", "export_options"]

TOLERANCE, ROUNDS, CALIBRATION_SAMPLES = 1e-4, 100, 256
"""The defaults of `ExportSettings`, whose module takes seconds to import."""


def export_options(command: Callable) -> Callable:
    """Adds --tolerance, --rounds, --calibration (together `settings`), --max-drop and --json."""

    @click.option(
        "--tolerance",
        default=TOLERANCE,
        type=click.FloatRange(0),
        help="By how much a logit of an fp32 file may differ from torch, as a share of the largest (at least 1).",
    )
    @click.option(
        "--rounds", default=ROUNDS, type=click.IntRange(1), help="Timed calls of each model and batch size."
    )
    @click.option(
        "--calibration",
        default=CALIBRATION_SAMPLES,
        type=click.IntRange(1),
        help="Training samples whose activations fix the ranges of int8 (static quantisation only).",
    )
    @click.option(
        "--max-drop",
        default=2.0,
        type=click.FLOAT,
        help="Points of accuracy that int8 may lose; more is an error, after the table.",
    )
    @json_option
    @wraps(command)
    def with_settings(tolerance: float, rounds: int, calibration: int, **others: Any) -> Any:
        from softcache.runs.export import ExportSettings

        return command(settings=ExportSettings(tolerance, rounds, calibration), **others)

    return with_settings


@click.command("export")
@click.argument("run", metavar="RUN", type=PATH)
@click.option(
    "--cache",
    "url",
    metavar="URL",
    type=CACHE,
    help="The cache [default: that of the run's config].",
)
@click.option("--out", required=True, metavar="DIR", type=LOCAL, help="Where the files go.")
@log_option
@export_options
def export_command(
    run: str, url: str | None, out: str, settings: ExportSettings, max_drop: float, as_json: bool
) -> None:
    """Export the student of RUN (a finished run's directory or URL): ONNX, torch.export, int8, a card, and a verified table.

    \b
    Example:
      softcache export runs/digits/students/cnn-width-8-cache-0123abcd --out exported
    """
    export_and_print(run, out, settings, url=url, cost=None, max_drop=max_drop, as_json=as_json)


def export_and_print(
    run: str | Path,
    out: str,
    settings: ExportSettings,
    *,
    url: str | None,
    cost: dict[str, Any] | None,
    max_drop: float,
    as_json: bool,
) -> None:
    """Exports a run, and prints its figures as a table or as JSON.

    Raises:
        RunError: RUN is a folder of runs, a file differs from torch, or int8 loses more than `max_drop`.
    """
    from softcache.runs.export import (
        check_drop,
        export_run,
        latency_table,
        load_onnxruntime,
        measurement_note,
        model_table,
    )
    from softcache.runs.report import open_run

    load_onnxruntime()
    report = open_run(run, cache_url=url)
    figures = export_run(
        report,
        report.runs[0],
        out,
        settings,
        cost=cost,
        progress=lambda what: log_info(f"export {out}: {what}"),
    )
    # What it cost may have grown since the files were made: trials of a sweep that went on.
    known = {name: value for name, value in (cost or {}).items() if value is not None}
    figures = figures | {"cost": figures["cost"] | known}
    if as_json:
        print_json(figures | {"out": str(out)})
    else:
        print_table(f"{figures['student']}, exported to {out}", *model_table(figures))
        print_table("latency", *latency_table(figures), note=measurement_note(figures))
        _print_cost(figures)
        if figures["teacher_missing"]:
            click.echo(f"the teacher is not measured: {figures['teacher_missing']}")
        click.echo(f"files, figures and card: {out}")
    check_drop(figures, max_drop, out)


def _print_cost(figures: dict[str, Any]) -> None:
    if figures["cost"]:
        cost = figures["cost"]
        names = ("teacher_training_seconds", "teacher_pass_seconds", "student_training_seconds")
        parts = [
            f"{name.removesuffix('_seconds').replace('_', ' ')} "
            + ("not measured" if cost[name] is None else format_duration(cost[name]))
            for name in names
        ]
        if cost.get("sweep_trials"):
            parts.append(f"sweep {format_duration(cost['sweep_seconds'])}, {cost['sweep_trials']} trials")
        passes = cost["teacher_passes"]
        click.echo(
            f"what it cost: {passes} teacher {'pass' if passes == 1 else 'passes'}; {'; '.join(parts)}"
        )
