"""What `stages/completing.py` answers from: every command's options and every config key, made of the code that has them.

python -m softcache.stages.completion_table      # after an option or a config key has changed; writes stages/completion.json
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
from pydantic import BaseModel

from softcache.config.load import models_of
from softcache.config.run import RunConfig
from softcache.data.sources.base import names_of
from softcache.losses import LOSSES
from softcache.modalities import MODALITIES
from softcache.models import image as models
from softcache.models.detection.build import SMALL as DETECTORS
from softcache.models.language.causal_lm import BUILTIN as LANGUAGE_MODELS

from .commands import COMMANDS, LazyCommands

__all__ = ["make_table", "table_as_text"]

PATH = Path(__file__).with_name("completion.json")

TAKES = {
    "TABLE.KEY=VALUE": "setting",
    "SPEC": "model",
    "FILE": "file",
    "RESPONSES...": "file",
    "DIR": "dir",
    "RUN": "dir",
    "RUN…": "dir",
    "OUT": "dir",
    "SOURCE": "dir",
    "URL": "cache",
    "CACHE": "cache",
    "CACHE CACHE …": "cache",
    "[STORE]...": "cache",
}
"""What is typed, by the metavar that --help shows."""

MODELS = [*models.BUILTIN, "timm:", "torchvision:", *LANGUAGE_MODELS, *DETECTORS, "hf:"]

NAMES = {
    "source.name": [name for modality in MODALITIES.names() for name in names_of(modality)],
    "student.source.name": names_of("image"),
    "teacher.model": MODELS,
    "student.model": MODELS,
    "loss.name": LOSSES.names(),
}
"""Names that a config key takes in addition to those of its type."""


def make_table() -> dict[str, Any]:
    """Returns the table: `commands` (by name, the parameters of each), `config` (by key, its values) and `models`."""
    group = LazyCommands()
    commands = {}
    for name in COMMANDS:
        command = group.get_command(click.Context(group), name)
        assert command is not None
        commands[name] = [_parameter(parameter) for parameter in command.params]
    config: dict[str, list[str]] = {}
    for key, values in _keys(RunConfig):
        config[key] = list(dict.fromkeys([*config.get(key, []), *NAMES.get(key, []), *values]))
    return {"commands": commands, "config": config, "models": list(dict.fromkeys(MODELS))}


def _parameter(parameter: click.Parameter) -> dict[str, Any]:
    """Returns what completion knows of an option or argument; what is not so is left out."""
    described: dict[str, Any] = {"names": [*parameter.opts, *parameter.secondary_opts]}
    if parameter.secondary_opts:
        described["names"] = ["/".join([parameter.opts[-1], parameter.secondary_opts[-1]])]
    if isinstance(parameter, click.Option) and parameter.is_flag:
        described["is_flag"] = True
    if parameter.multiple:
        described["multiple"] = True
    if parameter.nargs != 1:
        described["nargs"] = parameter.nargs
    if isinstance(parameter.type, click.Choice):
        described["choices"] = list(parameter.type.choices)
    elif takes := TAKES.get(parameter.metavar or ""):
        described["takes"] = takes
    return described


def _keys(table: type[BaseModel], above: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yields every dotted key of a table that takes a value, with its values where they are few."""
    for name, field in table.model_fields.items():
        parts = list(_parts(field.annotation))
        inner = models_of(field)
        for part in inner:
            yield from _keys(part, f"{above}{name}.")
        if not inner:
            values = [value for part in parts if get_origin(part) is Literal for value in get_args(part)]
            values += ["true", "false"] if bool in parts else []
            yield above + name, [str(value) for value in values]


def _parts(annotation: Any) -> Iterator[Any]:
    """Yields what a value may be, of unions each member; what a tuple or mapping holds is no value of its own."""
    if get_origin(annotation) is Annotated:
        yield from _parts(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _parts(member)
    else:
        yield annotation


def table_as_text(table: dict[str, Any]) -> str:
    """Returns the table as JSON with a line for each parameter and key, so that two changes meet in few lines."""
    commands = [
        f"  {json.dumps(name)}: [\n"
        + ",\n".join(f"   {json.dumps(parameter)}" for parameter in parameters)
        + "\n  ]"
        for name, parameters in table["commands"].items()
    ]
    config = [f"  {json.dumps(key)}: {json.dumps(values)}" for key, values in table["config"].items()]
    return (
        '{\n "commands": {\n' + ",\n".join(commands) + "\n },\n"
        ' "config": {\n' + ",\n".join(config) + "\n },\n"
        f' "models": {json.dumps(table["models"])}\n}}\n'
    )


if __name__ == "__main__":
    PATH.write_text(table_as_text(make_table()))
    click.echo(f"wrote {PATH}")
