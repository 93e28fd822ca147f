"""Pairs from files of the user's own.

    *.jsonl   one object a line: source, target; language and key where you have them
    *.tsv     source, target[, language[, key]], separated by tabs, no header, no quoting

A folder is read file by file, in order of names. Without a key, a pair is named FILE:LINE. Pairs that are equal in
source, target and language are one, under the first key. A side without text is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from softcache.data.sources.base import SOURCES, Split
from softcache.data.sources.translation.settings import Pair, TranslationSettings
from softcache.errors import SourceError
from softcache.runtime.files import parse_json

__all__ = ["PairFiles", "json_lines", "text_field"]

COLUMNS = ("source", "target", "language", "key")


@SOURCES.register("translation/files")
class PairFiles(TranslationSettings):
    """Files of pairs; `eval_path` names pairs to be held out, in place of `eval_share`.

    Attributes:
        path: file or folder of the pairs.
    """

    name: str = "files"
    path: str
    eval_path: str | None = None

    def read(self, split: Split) -> tuple[str, list[Pair], bool]:
        return _read(self, split)


def _read(settings: PairFiles, split: Split) -> tuple[str, list[Pair], bool]:
    """Returns the name of the source, its pairs, and whether they are of the split already.

    Raises:
        SourceError: a file is missing or malformed, a side is empty, a source text is in both splits, or another language
            than source.languages is named.
    """
    train = _merged(settings.path, settings)
    if settings.eval_path is None:
        return settings.path, train, False
    held_out = _merged(settings.eval_path, settings)
    if both := {pair.source for pair in train} & {pair.source for pair in held_out}:
        raise SourceError(
            f"source.eval_path {settings.eval_path}: {len(both)} of its source texts are in {settings.path}, too, the first "
            f"{min(both)[:80]!r}; take them out of one, or drop eval_path to hold out source.eval_share of all"
        )
    return settings.path, train if split == "train" else held_out, True


def _merged(where: str, settings: PairFiles) -> list[Pair]:
    merged: dict[tuple[str, str, str], Pair] = {}
    for path in _files(Path(where).expanduser()):
        for line, found in _records(path):
            place = f"source {path}, line {line}"
            key = text_field(found, "key", place) or f"{path.name}:{line}"
            source, target = (text_field(found, side, place).strip() for side in ("source", "target"))
            for side, text in (("source", source), ("target", target)):
                if not text:
                    raise SourceError(
                        f"{place}: key {key!r}: the {side} is empty; a pair has a text on both sides: complete it, or take "
                        "it out"
                    )
            language = text_field(found, "language", place)
            if settings.languages and language not in settings.languages:
                raise SourceError(
                    f"{place}: key {key!r}: language {language!r}; expected one of source.languages: "
                    f"{', '.join(settings.languages)}"
                )
            merged.setdefault((language, source, target), Pair(key, source, target, language))
    return list(merged.values())


def _files(path: Path) -> list[Path]:
    if path.is_file() and path.suffix in (".jsonl", ".tsv"):
        return [path]
    files = sorted(file for kind in ("*.jsonl", "*.tsv") for file in path.glob(kind))
    if not files:
        raise SourceError(
            f"source.path {path}: no pairs; expected a .jsonl or .tsv file, or a folder with some; found "
            f"{'a folder without any' if path.is_dir() else 'none of these'}"
        )
    return files


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.suffix == ".jsonl":
        yield from json_lines(path)
        return
    for line, text in _lines(path):
        fields = text.split("\t")
        if not 2 <= len(fields) <= len(COLUMNS):
            raise SourceError(
                f"source {path}, line {line}: {len(fields)} columns; expected source, target[, language[, key]] separated "
                "by tabs"
            )
        yield line, dict(zip(COLUMNS, fields, strict=False))


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line, object) of a file of JSON lines; empty lines are skipped.

    Raises:
        SourceError: the file cannot be read, or a line is no object.
    """
    for line, text in _lines(path):
        try:
            found = parse_json(text)
        except ValueError as error:
            raise SourceError(f"source {path}, line {line}: not JSON: {error}") from error
        if not isinstance(found, dict):
            raise SourceError(f"source {path}, line {line}: expected an object with source and target")
        yield line, found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        for number, text in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
            if text.strip():
                yield number, text
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"source {path}: cannot be read as UTF-8 text: {error}") from error


def text_field(found: dict[str, Any], name: str, place: str) -> str:
    """Returns a field that is a text, or "" where there is none.

    Raises:
        SourceError: it is something else.
    """
    value = found.get(name)
    if value is not None and not isinstance(value, str):
        raise SourceError(f"{place}: {name} is {type(value).__name__} {value!r}; expected a text")
    return value or ""
