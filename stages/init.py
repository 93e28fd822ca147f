"""Write a config to start from: a template that ships with softcache, with data, teacher and student put in.

softcache init --list
softcache init --task image --data data/pets --teacher 'timm:resnet50?pretrained=true' --student timm:resnet18
"""

from __future__ import annotations

import glob
import json
import os
import re
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import click

from softcache.config.overrides import parse_override
from softcache.errors import ConfigError
from softcache.runtime.suggest import did_you_mean

from .options import LOCAL, OWN_CONFIG, override_option

__all__ = ["can_ask", "init"]

TEMPLATES = Path(__file__).resolve().parent.parent / "configs"
TASKS = {"image": "imagefolder", "text": "hf-causal-lm"}
DATA_KEYS = ("root", "path")
"""Of `[source]`: where the data are, in a template whose data do not come with it."""
IMAGE_FILES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".tar": "webdataset"}
"""Ends of names of files of images and labels, and the sources that read them."""
HUB_SOURCES = "hf", "rollouts"
FILES = ".arrow", ".csv", ".json", ".jsonl", ".parquet", ".tar", ".tsv", ".txt"
"""Ends of names of files, which no data set on the hub is looked for under."""


@click.command()
@click.option("--list", "lists", is_flag=True, help="List the templates and write nothing.")
@click.option(
    "--task", type=click.Choice(sorted(TASKS)), help="A template for images in folders, or for texts."
)
@click.option("--template", metavar="NAME", help="One of --list, in place of --task.")
@click.option(
    "--data",
    metavar="PATH",
    help="Images: a folder (train/CLASS/*, eval/CLASS/*), or tar, Parquet, CSV. Texts: a file, folder or hub name.",
)
@click.option(
    "--teacher", metavar="SPEC", help="The teacher, such as timm:resnet50?pretrained=true or hf:NAME."
)
@click.option("--student", metavar="SPEC", help="The student.")
@override_option
@click.option("--out", type=LOCAL, default=OWN_CONFIG, help="The config; an existing file is not replaced.")
def init(
    lists: bool,
    task: str | None,
    template: str | None,
    data: str | None,
    teacher: str | None,
    student: str | None,
    overrides: tuple[str, ...],
    out: str,
) -> None:
    """Write a commented config to start from; every command takes softcache.toml of the current folder.

    On a terminal, what is not given is asked for.

    \b
    Example:
      softcache init --list
      softcache init --task image --data data/pets --teacher 'timm:resnet50?pretrained=true'
      softcache init --template digits --set train.epochs=10
    """
    if lists:
        formatter = click.HelpFormatter(max_width=110)
        formatter.write_dl([(path.stem, _first_line(path)) for path in sorted(TEMPLATES.glob("*.toml"))])
        click.echo(formatter.getvalue(), nl=False)
        return
    if not task and not template:
        if not can_ask():
            raise click.UsageError("give --task image, --task text or --template NAME (see --list)")
        task = click.prompt("What are your data?", type=click.Choice(sorted(TASKS)))
        data = data or click.prompt("Where are they? (a folder, a file, a hub name)")
        teacher = teacher or click.prompt("Teacher", default="", show_default=False) or None
        student = student or click.prompt("Student", default="", show_default=False) or None
    if task and template:
        raise click.UsageError("--task and --template: give one of them")
    name = template or TASKS[str(task)]
    for option, spec in (("--teacher", teacher), ("--student", student)):
        if spec is not None:
            _check_folder(option, spec)
    text, path = _filled(_on_this_machine(_template(name), name), data, teacher, student), Path(out)
    if path.stem != name and not re.search(r"^name = ", text.partition("\n[")[0], re.M):
        text = text.replace("\n[", f'\nname = "{name}"   # of the folder in runs\n\n[', 1)
    for override in overrides:
        parents, key, value = parse_override(override)
        literal = json.dumps(value) if isinstance(value, str) else override.partition("=")[2].strip()
        text = _with_key(text, ".".join(parents), key, literal)
    if overrides and find_spec("torch") is not None:
        from softcache.config.load import build_config

        build_config({"name": path.stem} | tomllib.loads(text), str(path))
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise ConfigError(
            f"config {path}: is there already; nothing was written; name another with --out"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"config {path}: cannot be written: {error.strerror}; name another with --out"
        ) from error
    config = "" if out == OWN_CONFIG else f" --config {out}"
    click.echo(f"wrote {path} from template {name}; look it over, then:")
    if find_spec("torch") is None:
        extra = "text" if 'modality = "text"' in text else "vision"
        click.echo(f"  pip install 'softcache[{extra}]'      # torch is not installed")
    first = "is trained by [train_teacher], and " if _table(text, "train_teacher") else ""
    click.echo(f"  softcache teacher-logits{config}     # the teacher {first}runs once")
    click.echo(f"  softcache train-student{config}      # as often as you like")


def can_ask() -> bool:
    """Whether there is a terminal to ask on."""
    return sys.stdin.isatty()


def _first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].strip("# .")


def _template(name: str) -> str:
    path = TEMPLATES / f"{name}.toml"
    if not path.is_file():
        known = sorted(found.stem for found in TEMPLATES.glob("*.toml"))
        question = did_you_mean(name, known)
        raise ConfigError(
            f"--template {name!r}: there is none; `softcache init --list` shows them{'; ' if question else ''}{question}"
        )
    return path.read_text("utf-8")


def _on_this_machine(text: str, name: str) -> str:
    """Returns a template without commands that name its file, and with no more loader processes than there are cores."""
    text = re.sub(rf"^#   (?:softcache|make) [^\n]*configs/{name}\.toml[^\n]*\n", "", text, flags=re.M)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return re.sub(r"(?<=^workers = )\d+", lambda found: str(min(int(found[0]), cores)), text, flags=re.M)


def _filled(text: str, data: str | None, teacher: str | None, student: str | None) -> str:
    """Returns a template with data, teacher and student put in; comments stay."""
    if data is not None:
        source = _table(text, "source")
        key = next((key for key in DATA_KEYS if source and re.search(rf"^{key} = ", source[0], re.M)), None)
        if source is None or key is None:
            raise ConfigError(f"--data {data}: the data of this template come with it; leave it out")
        folder, name = Path(data).expanduser(), tomllib.loads(source[0])["source"]["name"]
        if name == "imagefolder" and (kind := _kind_of_images(data)) is not None:
            key, name = "path", kind
            text = _without_keys(_with_key(text, "source", "name", json.dumps(name)), "source", "root")
            if split := _held_out_split(folder):
                text = _with_key(text, "source", "eval_split", json.dumps(split))
        _check_data(data, key, has_hub=name in HUB_SOURCES)
        text = _with_key(text, "source", key, json.dumps(data))
        if key == "path":
            text = _without_keys(text, "source", "subset")
        labels = _table(text, "labels")
        kept = re.search(r"^k = (\d+)", labels[0], re.M) if labels else None
        if key == "root" and kept and 0 < (classes := _class_folders(folder)) < int(kept[1]):
            text = _with_key(text, "labels", "k", str(classes))
        has_classes = not (folder / "train").is_dir() and _class_folders(folder) > 0
        if name == "imagefolder" and has_classes:
            text = _with_key(text, "source", "eval_share", "0.1")
    if teacher is not None:
        text = _with_key(text, "teacher", "model", json.dumps(teacher))
        if teacher.startswith("hf:") and re.search(r"^tokenizer = ", text, re.M):
            text = _with_key(text, "source", "tokenizer", json.dumps(teacher[3:].partition("?")[0]))
        is_finished = teacher.startswith(("hf:", "timm:hf-hub:", "timm:local-dir:"))
        if is_finished or "pretrained=true" in teacher:  # views default to what the weights were trained with
            text = _without_keys(text, "views", "mean", "std", "size")
        if is_finished:  # else its head is of other classes, until [train_teacher] has fine-tuned it
            text = _without_keys(_without_table(text, "train_teacher"), "teacher", "weights")
    if student is not None:
        text = _with_key(text, "student", "model", json.dumps(student))
        text = _without_keys(text, "student", "models")
    return text


def _kind_of_images(data: str) -> str | None:
    """Returns the source that reads files of images and labels, by their names; None of folders of classes."""
    from softcache.data.sources.files import suffix_of

    path = Path(data).expanduser()
    if not path.is_dir():
        return IMAGE_FILES.get(suffix_of(data))
    if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        return "hf"
    if _class_folders(path):
        return None
    kinds = {IMAGE_FILES.get(suffix_of(file.name)) for file in path.iterdir()} - {
        None,
        "csv",
    }  # which may be beside photos
    return kinds.pop() if len(kinds) == 1 else None


def _held_out_split(folder: Path) -> str | None:
    """Returns the name of the held-out split of a folder of `DatasetDict.save_to_disk`; None where there is none."""
    from softcache.data.sources.images.image_folder import EVAL_FOLDERS

    if not (folder / "dataset_dict.json").is_file():
        return None
    return next((name for name in EVAL_FOLDERS if (folder / name).is_dir()), None)


def _check_data(data: str, key: str, *, has_hub: bool) -> None:
    """Raises ConfigError unless the data are there, in a bucket, or of a name that the hub may have."""
    from softcache.cache.storage.base import is_bucket
    from softcache.data.sources.files import expand_braces, suffix_of
    from softcache.models.spec import is_path

    path = Path(data).expanduser()
    if path.is_dir() or _is_of_a_run(path):
        return
    if key == "path":
        found, may_be_named = "no such file or folder", has_hub and not is_path(data)
        if is_bucket(data) or path.exists() or (may_be_named and suffix_of(data) not in FILES):
            return
        if all(glob.glob(one, recursive=True) for one in expand_braces(str(path))):
            return
    else:
        found = "a file, and a folder is expected" if path.is_file() else "no such folder"
    raise ConfigError(
        f"--data {data}: {found}; correct it, or leave it out and set source.{key} in the file that is written"
    )


def _check_folder(option: str, spec: str) -> None:
    """Raises ConfigError where the checkpoint that a model spec names can only be a folder, and that is not there."""
    from softcache.models.spec import is_path, parse_spec

    kind, _, place = parse_spec(spec).name.partition(":")
    path = Path(place).expanduser()
    if (kind == "local-dir" or is_path(place)) and not (path.is_dir() or _is_of_a_run(path)):
        raise ConfigError(f"{option} {spec}: no such folder: {place}; correct it, or name a model of the hub")


def _is_of_a_run(path: Path) -> bool:
    """Whether a path is one that a run writes, which may follow."""
    return path.parts[:1] == ("runs",)


def _table(text: str, name: str) -> re.Match[str] | None:
    return re.search(rf"^\[{re.escape(name)}\][^\n]*\n(?:(?!\[)[^\n]*\n?)*", text, re.M)


def _class_folders(data: Path) -> int:
    """Returns how many classes a folder of images has; 0 where it is none."""
    folder = data / "train" if (data / "train").is_dir() else data
    return sum(path.is_dir() for path in folder.iterdir()) if folder.is_dir() else 0


def _with_key(text: str, table: str, key: str, literal: str) -> str:
    """Returns TOML with a key of a table set to a value, itself TOML; the comment behind it stays."""
    found = _table(text, table) if table else re.match(r"(?:(?!\[)[^\n]*\n?)*", text)
    line = f"{key} = {literal}"
    if found is None:
        return f"{text.rstrip()}\n\n[{table}]\n{line}\n"
    old = re.compile(rf'^{key} = (?:"[^"\n]*"|[^#\n]*?)(?=\s*(?:#|$))', re.M)
    body = found[0]
    if old.search(body):
        body = old.sub(lambda _: line, body, count=1)
    else:
        header, _, rest = body.partition("\n")
        body = f"{header}\n{line}\n{rest}"
    return text[: found.start()] + body + text[found.end() :]


def _without_keys(text: str, table: str, *keys: str) -> str:
    found = _table(text, table)
    if found is None:
        return text
    body = re.sub(rf"^(?:{'|'.join(keys)}) = [^\n]*\n", "", found[0], flags=re.M)
    return text[: found.start()] + body + text[found.end() :]


def _without_table(text: str, name: str) -> str:
    found = _table(text, name)
    return text if found is None else text[: found.start()] + text[found.end() :]
