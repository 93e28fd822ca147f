"""The commands of `softcache` by name: where each is, and its line in the list.

A command's module is imported when the command is needed, so that `softcache --help` and the commands that only
read a cache start at once and need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click
from click.shell_completion import CompletionItem

from softcache.errors import missing_extra

__all__ = ["COMMANDS", "GROUPS", "LazyCommands"]


COMMANDS = {
    "init": ("init:init", "Write a config to start from."),
    "teacher-logits": (
        "teacher_logits:teacher_logits",
        "Run the teacher once; write its soft labels to the cache.",
    ),
    "teacher-generate": (
        "teacher_generate:teacher_generate",
        "Generate teacher translations or rollouts as a training set.",
    ),
    "status": ("status:status", "Show the progress of a capture, its rate and time left."),
    "train-student": (
        "train_student:train_student_command",
        "Train one student from the cache, without the teacher.",
    ),
    "train-students": (
        "train_students:train_students",
        "Train many students from one cache; print one table.",
    ),
    "sweep": ("sweep:sweep_command", "Search a student's settings from one cache."),
    "compare": ("compare:compare", "Compare cache, online teacher and hard labels."),
    "distill": ("distill:distill", "Run teacher, cache, student, export and int8."),
    "export": (
        "export:export_command",
        "Export a student as ONNX, torch.export and int8.",
    ),
    "report": ("report:report_command", "Write an HTML report of finished runs."),
    "train-teacher": ("train_teacher:train_teacher_command", "Train the config's teacher on hard labels."),
    "inspect": (
        "inspect:inspect_command",
        "Show the contents of a cache and its share of the teacher.",
    ),
    "browse": ("browse:browse", "Look through a cache in a browser."),
    "verify": ("verify:verify", "Check everything in a cache."),
    "fidelity": ("fidelity:fidelity", "Measure a cache against its teacher."),
    "convert": ("convert:convert", "Copy a cache to another store, bit for bit."),
    "shrink": ("shrink:shrink", "Make a smaller cache from a bigger one."),
    "fuse": ("fuse:fuse", "Fuse several teachers' caches into one."),
    "materialize": ("materialize:materialize", "Decode a cache into local memory maps."),
    "gc": ("gc:gc", "List or delete files left by crashed runs."),
    "doctor": ("doctor:doctor", "Diagnose the installation, this machine and stores."),
    "query": ("query:query_command", "Ask a server for the log-probabilities of a text."),
    "import": (
        "import_labels:import_command",
        "Make a cache from a server's answers or another's cache.",
    ),
    "completion": ("completion:completion", "Print the completion script of bash, zsh or fish."),
}
"""By name: `module:attribute` below `stages`, and the command's line in the list."""


GROUPS = {
    "Run": [
        "init",
        "distill",
        "train-teacher",
        "teacher-logits",
        "teacher-generate",
        "status",
        "train-student",
    ],
    "Compare and show": ["train-students", "sweep", "compare", "report", "export"],
    "Look at a cache": ["inspect", "browse", "verify", "fidelity"],
    "Change or make a cache": ["convert", "shrink", "fuse", "materialize", "gc", "query", "import"],
    "This machine": ["doctor", "completion"],
}
"""Titles in `softcache --help`, with their commands; a command that none has is under "Commands"."""


NUMBERS = click.types.IntParamType, click.types.FloatParamType
"""Types of options whose value is N in a help text, where click writes INTEGER RANGE; ranges are subclasses of them."""


class LazyCommands(click.Group):
    """A group of COMMANDS, each imported when it is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(f".{module}", __package__), attribute)
        for option in command.params:
            if option.metavar is None and isinstance(option.type, NUMBERS):
                option.metavar = "N"
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command.

        Raises:
            MissingExtraError: it imports a package of an extra that is not installed.
        """
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            raise missing_extra(error, f"softcache {ctx.invoked_subcommand}") from error

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Returns the commands that begin so, without importing them, and the group's options."""
        names = [name for name in COMMANDS if name.startswith(incomplete)]
        items = [CompletionItem(name, help=COMMANDS[name][1]) for name in names]
        return items + click.Command.shell_complete(self, ctx, incomplete)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Returns the command that the words begin with; the error of an unknown one names the closest."""
        try:
            return super().resolve_command(ctx, args)
        except click.NoSuchCommand as error:  # click looks among the commands that are loaded
            raise click.NoSuchCommand(args[0], possibilities=COMMANDS, ctx=ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the list by groups, without importing a command."""
        grouped = {name for names in GROUPS.values() for name in names}
        groups = {**GROUPS, "Commands": [name for name in COMMANDS if name not in grouped]}
        width = max(map(len, COMMANDS))
        for title, names in groups.items():
            if names:
                with formatter.section(title):
                    formatter.write_dl([(name.ljust(width), COMMANDS[name][1]) for name in names])
