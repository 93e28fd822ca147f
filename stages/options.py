"""Options that several commands share, and how results are printed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from pipeline.errors import TemperatureError
from pipeline.progress import log_as

__all__ = [
    "cache_option",
    "config_options",
    "log_option",
    "parse_temperatures",
    "print_table",
    "track_option",
]


def config_options(command: Callable) -> Callable:
    """Adds --config and --set."""
    command = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="TABLE.KEY=VALUE",
        help="Override one key of the config; may be given several times.",
    )(command)
    return click.option(
        "--config",
        "config_path",
        default="configs/digits.toml",
        show_default=True,
        metavar="FILE",
        help="The run's TOML file.",
    )(command)


def cache_option(command: Callable) -> Callable:
    return click.option("--cache", "url", metavar="URL", help="The cache [default: runs/NAME/cache].")(
        command
    )


def log_option(command: Callable) -> Callable:
    """Adds --log, which takes effect at once and is no argument of the command."""
    return click.option(
        "--log",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        expose_value=False,
        callback=lambda context, option, value: log_as(value),
        help="What stderr gets: text for people, or one JSON object per line.",
    )(command)


def track_option(command: Callable) -> Callable:
    return click.option(
        "--track",
        "track_with",
        type=click.Choice(["tensorboard"]),
        help="Log the training curves with a tracker.",
    )(command)


def parse_temperatures(given: str) -> tuple[float, ...]:
    """Returns the numbers of an option `T,T,…`.

    Raises:
        TemperatureError: it holds something else, or a number below 1.
    """
    try:
        found = tuple(float(part) for part in given.split(","))
    except ValueError:
        found = ()
    if not found or not all(1.0 <= t < float("inf") for t in found):
        raise TemperatureError(
            f"--temperatures: expected numbers of at least 1, with commas between them; found {given!r}; such as 1,2,4"
        )
    return found


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, note: str = "") -> None:
    """Prints a table to stdout: text left, everything after the first column right."""
    table = Table(title=title, title_justify="left", caption=note or None, caption_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=number == 0)
    for row in rows:
        table.add_row(*map(str, row))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
