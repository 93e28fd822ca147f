"""Answers a shell's question: which words may come next.

Every Tab starts a process, so nothing of what answers imports torch. A command's module would (it brings the models and
losses that the command runs), and so would the config's tables; so both are answered from `completion.json`, which
`stages/completion_table.py` makes of the commands and tables themselves and a test holds to them: 0.15 s in place of
the seconds that the imports take. click walks the line and finds the option or argument that is being typed; here is what
click does not know: config keys and their values, model specs, and where bash breaks words.

    _SOFTCACHE_COMPLETE=bash_complete COMP_WORDS="softcache ver" COMP_CWORD=1 softcache    # plain,verify
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import click
from click.shell_completion import BashComplete, CompletionItem, FishComplete, ShellComplete, ZshComplete

from .commands import COMMANDS

__all__ = ["COMPLETE_VAR", "SHELLS", "answer", "script"]

COMPLETE_VAR = "_SOFTCACHE_COMPLETE"
"""Set by the shells' scripts: the process is to complete a line, not to run one."""

OPEN_ENDS = "=.:"
"""A word that ends so goes on: no space comes behind it."""

Items = list[CompletionItem]


# -- what may be typed ---------------------------------------------------------------------------------------


def _items(words: Iterable[str], incomplete: str) -> Items:
    return [CompletionItem(word) for word in words if word.startswith(incomplete)]


def _cache(table: Mapping[str, Any], incomplete: str) -> Items:
    """The caches below runs/, or once something is typed any folder."""
    known = sorted(str(found.parent) for found in Path("runs").glob("*/*/manifest.json"))
    return _items(known, "") if known and not incomplete else [CompletionItem(incomplete, type="dir")]


def _setting(table: Mapping[str, Any], incomplete: str) -> Items:
    """Of TABLE.KEY=VALUE: the next part of the key, or the value."""
    key, equals, _ = incomplete.partition("=")
    if equals:
        return _items((f"{key}={choice}" for choice in table["config"].get(key, [])), incomplete)
    parents = key.rpartition(".")[0]
    depth = len(parents) + 1 if parents else 0
    words = []
    for known in table["config"]:
        if known.startswith(key):
            part, dot, _ = known[depth:].partition(".")
            words.append(known[:depth] + part + (dot or "="))
    return _items(dict.fromkeys(words), incomplete)


KINDS: dict[str, Callable[[Mapping[str, Any], str], Items]] = {
    "cache": _cache,
    "dir": lambda table, incomplete: [CompletionItem(incomplete, type="dir")],
    "file": lambda table, incomplete: [CompletionItem(incomplete, type="file")],
    "model": lambda table, incomplete: _items(table["models"], incomplete),
    "setting": _setting,
}
"""By the value type of an option or argument in `completion.json`."""


def _group(table: Mapping[str, Any]) -> click.Group:
    """Returns `softcache` as far as completion goes: every command with its options and arguments, which do nothing."""

    def completer(kind: str) -> Callable[[click.Context, click.Parameter, str], Items]:
        return lambda context, parameter, incomplete: KINDS[kind](table, incomplete)

    def parameter(described: dict[str, Any]) -> click.Parameter:
        described = dict(described)
        names = described.pop("names")
        if (kind := described.pop("takes", None)) is not None:
            described["shell_complete"] = completer(kind)
        if (choices := described.pop("choices", None)) is not None:
            described["type"] = click.Choice(choices)
        return (click.Option if names[0].startswith("-") else click.Argument)(names, **described)

    group = click.Group("softcache", context_settings={"help_option_names": ["-h", "--help"]})
    group.params.append(click.Option(["--version"], is_flag=True))
    for name, parameters in table["commands"].items():
        line = COMMANDS[name][1]
        group.add_command(
            click.Command(name, params=[parameter(described) for described in parameters], short_help=line)
        )
    return group


# -- the shells ----------------------------------------------------------------------------------------------


class Bash(BashComplete):
    """click's, for words that hold `=` or `:`, where bash breaks them; and without a space behind an open end.

    bash asks for what comes behind the break, and hands over the pieces as words: `--set`, `loss.name`, `=`, `forw`.
    """

    source_template = BashComplete.source_template.replace(
        "COMPREPLY+=($value)",
        f"COMPREPLY+=($value)\n            [[ $value == *[{OPEN_ENDS}] ]] && compopt -o nospace",
    )
    before: str = ""
    """What of the word stands before the break, and is not asked for."""

    @staticmethod
    def _check_version() -> None:
        """The script is for the shell that reads it, which is not always the one that is found here."""

    def get_completion_args(self) -> tuple[list[str], str]:
        args, last = super().get_completion_args()
        words: list[str] = []
        glued = False
        for word in [*args, last]:
            separates = word != "" and not word.strip("=:")
            if words and (glued or separates):
                words[-1] += word
            else:
                words.append(word)
            glued = separates
        incomplete = words.pop()
        self.before = (
            incomplete if last and not last.strip("=:") else incomplete[: len(incomplete) - len(last)]
        )
        if self.before.startswith("--"):  # --option=value: click completes the value alone
            self.before = self.before.partition("=")[2]
        return words, incomplete

    def format_completion(self, item: CompletionItem) -> str:
        if item.type == "plain":
            item = CompletionItem(item.value.removeprefix(self.before))
        return super().format_completion(item)


class Zsh(ZshComplete):
    """click's, without a space behind an open end."""

    source_template = ZshComplete.source_template.replace(
        "compadd -U -V unsorted -a completions",
        f"""local -a open=(${{(M)completions:#*[{OPEN_ENDS}]}})
        completions=(${{completions:#*[{OPEN_ENDS}]}})
        compadd -U -V unsorted -S '' -a open
        compadd -U -V unsorted -a completions""",
    )


SHELLS: dict[str, type[ShellComplete]] = {"bash": Bash, "zsh": Zsh, "fish": FishComplete}


def script(shell: str) -> str:
    """Returns what makes `bash`, `zsh` or `fish` complete softcache's lines."""
    return SHELLS[shell](click.Group(), {}, "softcache", COMPLETE_VAR).source()


def answer(asked: str) -> int:
    """Prints what may come next, for a shell's script; returns the exit code.

    An error here occurs in the middle of a line that is being typed: nothing is printed.

    Args:
        asked: what the script has put into COMPLETE_VAR, such as `bash_complete`.
    """
    try:
        shell, _, what = asked.partition("_")
        if what != "complete":
            return 1
        table = json.loads(files(__package__).joinpath("completion.json").read_text())
        click.echo(SHELLS[shell](_group(table), {}, "softcache", COMPLETE_VAR).complete())
    except Exception:
        return 1
    return 0
