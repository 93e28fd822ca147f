"""Options that several commands share, and how results are printed."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from softcache.errors import ConfigError, SpecError, TemperatureError
from softcache.runtime.files import expand_home, finite
from softcache.runtime.logging import set_log_format

if TYPE_CHECKING:
    from softcache.config.run import RunConfig
    from softcache.reader.cache import Cache

__all__ = [
    "CACHE",
    "LOCAL",
    "PATH",
    "cache_option",
    "cache_report",
    "check_reads_cache",
    "config_file_options",
    "config_options",
    "json_option",
    "log_option",
    "parse_temperatures",
    "print_json",
    "print_table",
    "student_option",
    "track_option",
]


class _Path(click.Path):
    """A path, or the URL of a bucket; `~` is the home folder also where no shell has said so (a container's args)."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(expand_home(value) if isinstance(value, str) else value, param, ctx)


class _CachePath(_Path):
    """A path or URL of a cache; completed to the caches below runs/ where nothing is typed yet."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        known = (
            []
            if incomplete
            else sorted(str(found.parent) for found in Path("runs").glob("*/*/manifest.json"))
        )
        return [CompletionItem(path) for path in known] or super().shell_complete(ctx, param, incomplete)


class _LocalPath(_Path):
    """A path of this machine. A URL is refused, of which a folder named `s3:` would be made here."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if "://" in str(value):
            self.fail(
                f"{value}: expected a path of this machine; copy from or to a bucket with its own tools (aws s3 cp)",
                param,
                ctx,
            )
        return super().convert(value, param, ctx)


OWN_CONFIG = "softcache.toml"
"""What `softcache init` writes, and commands take where no --config is given."""
PATH, CACHE, LOCAL = _Path(readable=False), _CachePath(readable=False), _LocalPath(readable=False)
"""Types of options and arguments that shells complete; the path may be missing, or, but for LOCAL, the URL of a bucket."""


def config_options(command: Callable | None = None, **settings: Any) -> Callable:
    """Adds --config and --set; the command gets the config that they describe as `config`.

    Args:
        settings: of the option --config, where they differ from `--config FILE`, which is `softcache.toml` by default if
            there is one, else `configs/digits.toml`.
    """
    if command is None:
        return partial(config_options, **settings)

    @config_file_options(
        **settings or {"default": _default_config, "show_default": "softcache.toml, else configs/digits.toml"}
    )
    @wraps(command)
    def with_config(config_path: str, overrides: tuple[str, ...], **others: Any) -> Any:
        from softcache.config.load import load_config

        return command(config=load_config(config_path, overrides), **others)

    return with_config


def _default_config() -> str:
    return OWN_CONFIG if Path(OWN_CONFIG).exists() else "configs/digits.toml"


def config_file_options(*, help: str = "The run's TOML file.", **settings: Any) -> Callable:
    """Adds --config and --set; the command gets them as `config_path` and `overrides`."""

    def add(command: Callable) -> Callable:
        path = click.option("--config", "config_path", metavar="FILE", type=LOCAL, help=help, **settings)
        return path(override_option(command))

    return add


override_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="TABLE.KEY=VALUE",
    help="Override one key of the config; may be given several times.",
)


cache_option = click.option(
    "--cache", "url", metavar="URL", type=CACHE, help="The cache [default: runs/NAME/cache]."
)

student_option = click.option(
    "--student", "model", metavar="SPEC", help="The architecture [default: student.model of the config]."
)


def _track(context: click.Context, option: click.Parameter, names: str | None) -> None:
    if names is not None:
        from softcache.runs.tracking import tracking

        try:
            context.with_resource(tracking(names))
        except SpecError as error:
            raise click.BadParameter(str(error)) from error


track_option = click.option(
    "--track",
    metavar="NAME[:PROJECT],…",
    expose_value=False,
    callback=_track,
    help="Send figures and settings to trackers: tensorboard, wandb, trackio, mlflow, comet_ml, aim, clearml, dvclive or "
    "swanlab.",
)
"""Adds --track, which takes effect at once and is no argument of the command."""

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout, and nothing else there."
)
"""Adds --json: the command then prints one JSON object on stdout (`print_json`) and nothing else."""

log_option = click.option(
    "--log",
    type=click.Choice(["text", "json"]),
    default="text",
    expose_value=False,
    callback=lambda context, option, value: set_log_format(value),
    help="Format of stderr: lines of text, or one JSON object per line.",
)
"""Adds --log, which takes effect at once and is no argument of the command."""


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


def cache_report(cache: Cache) -> dict[str, Any]:
    """Returns the JSON summary of a written cache: units, rows, bytes, store and codec."""
    return {
        "cache": cache.url,
        "units": cache.manifest.plan.num_units,
        "units_done": len(cache.markers),
        "rows": cache.num_rows_done,
        "num_bytes": sum(cache.bytes_by_column().values()),
        "num_classes": cache.num_classes,
        "store": cache.manifest.store,
        "codec": cache.manifest.codec,
    }


def print_json(found: Mapping[str, Any]) -> None:
    """Prints a result to stdout as one JSON object on a line; NaN and infinities, which JSON lacks, become null."""
    click.echo(json.dumps(finite(found), allow_nan=False, default=str))


def check_reads_cache(config: RunConfig) -> None:
    """Raises ConfigError where [train] has students learn from something else than a cache."""
    if config.train.labels != "cache":
        raise ConfigError(
            f"train.labels: {config.train.labels!r} in the config; expected 'cache', which this command's students learn "
            "from; drop the key, or use `softcache train-student`, or `softcache compare`"
        )


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, note: str = "") -> None:
    """Prints a table to stdout: text left, everything after the first column right; no word is broken.

    A terminal that is too narrow for the table has it without a frame, or else a line of names and cells for each row.
    """
    table = Table(
        title=escape(title), title_justify="left", caption=escape(note) or None, caption_justify="left"
    )
    for number, column in enumerate(columns):
        justify: Any = "left" if number == 0 else "right"
        # A number that does not fit goes on in the next line: its last digits are worth more than a straight table.
        table.add_column(column, justify=justify, no_wrap=number == 0, overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))  # [brackets] are text here, not a style
    if not sys.stdout.isatty():
        Console(width=_width_of_whole_words(table, [columns, *rows])).print(table)
        return
    console, cells = Console(), [columns, *rows]
    if not (fits := _width_of_whole_words(table, cells, least=console.width) == console.width):
        table.box, table.padding, table.pad_edge = None, (0, 1, 0, 0), False  # type: ignore[assignment]
        fits = _width_of_whole_words(table, cells, least=console.width) == console.width
    if fits:
        console.print(table)
        return
    console.print(title, markup=False, highlight=False)
    for first, *others in rows:
        pairs = (f"{name} {cell}" for name, cell in zip(columns[1:], others, strict=True) if str(cell))
        head = f"{columns[0]} {first}".strip()
        console.print(f"{head}: {', '.join(pairs)}", markup=False, highlight=False)
    if note:
        console.print(note, markup=False, highlight=False)


def _width_of_whole_words(table: Table, cells: Sequence[Sequence[Any]], least: int = 120) -> int:
    """Returns how wide a table is printed into a file: 120, or more where a word would be broken."""
    words = {word for row in cells for cell in row for word in str(cell).split()}
    for width in range(least, least + 280, 10):
        console = Console(width=width, file=io.StringIO())
        with console.capture() as printed:
            console.print(table)
        if words <= set(printed.get().split()):
            return width
    return least
