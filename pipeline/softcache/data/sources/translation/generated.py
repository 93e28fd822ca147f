"""What `softcache teacher-generate` wrote, as a source: the teacher's translations to learn from, people's to be scored on.

    manifest.json    who wrote it, how, and the digest of every part; written last
    train/00000.jsonl ...  key, source, target (the teacher's), score, reference (a person's), language
    eval.jsonl       the pairs that were held out: key, source, target (a person's), language
    tokenizer/       the teacher's; the source's own unless source.tokenizer names another

A part is checked against the manifest before a pair of it is used. Where the teacher generated nothing, there is nothing to
learn: such pairs are in the parts, are counted in the manifest, and are left out here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from softcache.data.sources.base import SOURCES, Split
from softcache.data.sources.generated_parts import check_part
from softcache.data.sources.translation.files import json_lines, text_field
from softcache.data.sources.translation.settings import Pair, TranslationSettings
from softcache.errors import SourceError
from softcache.runtime.files import parse_json
from softcache.runtime.logging import log_info

__all__ = ["GENERATED_VERSION", "Generated"]

GENERATED_VERSION = 1


@SOURCES.register("translation/generated")
class Generated(TranslationSettings):
    """The folder that `softcache teacher-generate` wrote; `tokenizer` is its own unless the table names another.

    Attributes:
        path: what `softcache teacher-generate` wrote.
    """

    name: str = "generated"
    path: str
    tokenizer: str | None = None  # type: ignore[assignment]

    @property
    def tokenizer_spec(self) -> str:
        return self.tokenizer or str(Path(self.path).expanduser() / "tokenizer")

    def read(self, split: Split) -> tuple[str, list[Pair], bool]:
        return _read(self, split)


def _read(settings: Generated, split: Split) -> tuple[str, list[Pair], bool]:
    """Returns the name of the source, the pairs of a split, and that they are of the split already.

    Raises:
        SourceError: it is not complete, or a part differs from the manifest.
    """
    folder = Path(settings.path).expanduser()
    manifest = _manifest(folder)
    pairs, silent = [], 0
    for name, digest in manifest["parts"].items():
        if (name == "eval.jsonl") != (split == "eval"):
            continue
        path = check_part(folder, name, digest)
        for line, found in json_lines(path):
            pair = _pair(found, f"source {path}, line {line}")
            if settings.languages and pair.language not in settings.languages:
                continue
            if pair.target:
                pairs.append(pair)
            else:
                silent += 1
    if silent:
        log_info(f"source {folder}: left out {silent} pairs for which the teacher wrote nothing")
    return str(settings.path), pairs, True


def _pair(found: dict[str, Any], place: str) -> Pair:
    fields = {
        name: text_field(found, name, place) for name in ("key", "source", "target", "language", "reference")
    }
    if not fields["key"] or not fields["source"]:
        raise SourceError(f"{place}: key or source is empty; generate the source again")
    return Pair(**fields | {"target": fields["target"].strip()})


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        manifest = parse_json(path.read_text("utf-8"))
        parts = manifest["parts"]
        if manifest["version"] != GENERATED_VERSION or not isinstance(parts, dict):
            raise ValueError(f"version {manifest['version']}")
    except FileNotFoundError as error:
        raise SourceError(
            f"source.path {folder}: no manifest.json, so nothing complete; run `softcache teacher-generate` to the end"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(
            f"source.path {folder}: manifest.json is not of this version {GENERATED_VERSION}: {error}"
        ) from error
    return manifest
