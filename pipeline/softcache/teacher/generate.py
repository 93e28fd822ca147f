"""A teacher's translations of a source, written as a source of its own: sequence-level distillation.

    generation.json  what is being made, from what and how; written first, never replaced
    tokenizer/…      the source's tokenizer, so that no other one is trained on the teacher's translations
    train/00000.jsonl  a part: so many pairs, in the source's order; put whole
    eval.jsonl       the held-out pairs as they are, for scores against people's translations
    manifest.json    generation.json and the sha256 of every part; written last

A part depends on its own pairs alone, and nothing in it on the time: killed anywhere and run again, the bytes are the
same. A folder that another teacher, source or setting began is refused, with each difference named.

Reference: Kim and Rush (2016), Sequence-Level Knowledge Distillation, arXiv 1606.07947, section 3.2.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from softcache.cache.storage.base import Objects
from softcache.data.sources.translation.generated import GENERATED_VERSION
from softcache.data.tokens import TokenData
from softcache.errors import IdentityError, SourceError
from softcache.hashing.digests import digest_json
from softcache.models.language import PairTokens
from softcache.models.language.generate import GeneratedSequence, GenerateSettings, translate
from softcache.runtime.files import parse_json
from softcache.runtime.logging import count_found
from softcache.teacher.language import LanguageTeacher

__all__ = ["GenerateReport", "SourcePairs", "generate_source", "lines", "write_source"]


class SourcePairs(Protocol):
    """What is translated: the data of a run on pairs."""

    train: TokenData
    tokens: PairTokens
    max_tokens: int

    def pairs_by_key(self, split: Any) -> Mapping[str, Any]: ...
    def decode(self, tokens: Any) -> list[str]: ...
    def identity(self) -> dict[str, Any]: ...
    def save_tokenizer(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class GenerateReport:
    """What a call did.

    Attributes:
        num_rows, num_silent: written in all, and those of them for which the model wrote nothing.
        parts_done, parts_found: made now, and there already.
    """

    num_rows: int
    num_silent: int
    parts_done: int
    parts_found: int


def generate_source(
    objects: Objects,
    data: SourcePairs,
    teacher: LanguageTeacher,
    settings: GenerateSettings,
    *,
    progress: Callable[[int], None] = lambda pairs: None,
) -> GenerateReport:
    """Writes the teacher's translations of the training split, and the held-out pairs.

    Raises:
        IdentityError: something else is being written there, or was.
        SourceError: there is something else than a generated source.
    """
    held_out = lines(
        {"key": pair.key, "source": pair.source, "target": pair.target, "language": pair.language}
        for pair in data.pairs_by_key("eval").values()
    )
    return write_source(
        objects,
        _plan(data, teacher, settings),
        lambda samples: _part(data, teacher, settings, samples),
        num_rows=len(data.train),
        part_rows=settings.part_pairs,
        held_out=held_out,
        save_tokenizer=data.save_tokenizer,
        written="target",
        rows="pairs",
        progress=progress,
    )


def write_source(
    objects: Objects,
    plan: Mapping[str, Any],
    part: Callable[[np.ndarray], bytes],
    *,
    num_rows: int,
    part_rows: int,
    held_out: bytes,
    save_tokenizer: Callable[[Path], None],
    written: str,
    rows: str,
    progress: Callable[[int], None],
) -> GenerateReport:
    """Writes a source in parts, or what is missing of one; the manifest is last.

    Args:
        plan: what is made; the same plan gives the same bytes on the same machine.
        part: from the numbers of rows to their lines.
        held_out: the lines of eval.jsonl.
        written: the field of a line that holds what a model wrote; empty where it wrote nothing.
        rows: what a row is, in the manifest's counts.

    Raises:
        IdentityError: something else is being written there, or was.
        SourceError: there is something else than a generated source.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder))
        _begin(objects, plan)
        _put_tokenizer(objects, Path(folder))
    parts, done, silent = {}, 0, 0
    for number, start in enumerate(range(0, num_rows, part_rows)):
        numbers = np.arange(start, min(start + part_rows, num_rows))
        name = f"train/{number:05d}.jsonl"
        if is_new := objects.size(name) is None:
            objects.put(name, part(numbers))
            done += 1
        content = objects.get(name)
        parts[name] = hashlib.sha256(content).hexdigest()
        silent += sum(not json.loads(line)[written] for line in content.splitlines())
        progress(len(numbers)) if is_new else count_found(progress, len(numbers))
    objects.put("eval.jsonl", held_out)
    parts["eval.jsonl"] = hashlib.sha256(held_out).hexdigest()
    content = _json({**plan, f"num_{rows}": num_rows, "num_silent": silent, "parts": parts})
    if not objects.put_if_absent("manifest.json", content) and objects.get("manifest.json") != content:
        raise IdentityError(
            f"source {objects.url}: manifest.json is of other parts than those that are there; one was changed since: "
            "restore it, or give --out another place"
        )
    return GenerateReport(num_rows, silent, done, len(parts) - 1 - done)


def _plan(data: SourcePairs, teacher: LanguageTeacher, settings: GenerateSettings) -> dict[str, Any]:
    """What is made: the same plan gives the same bytes on the same machine."""
    return {
        "kind": "softcache generated pairs",
        "version": GENERATED_VERSION,
        "teacher": {
            "spec": teacher.spec,
            "weights_digest": teacher.weights_digest,
            "dtype": teacher.dtype,
        },
        "source": {"name": data.train.source.name, "num_pairs": len(data.train), **data.identity()},
        "references": digest_json([[key, pair.target] for key, pair in data.pairs_by_key("train").items()]),
        "generate": {
            **settings.model_dump(mode="json", exclude={"score_beams"}),
            "max_tokens": data.max_tokens,
        },
    }


def _begin(objects: Objects, plan: Mapping[str, Any]) -> None:
    """Creates the source, or joins the one that is there."""
    if objects.size("generation.json") is None:
        there = [path for path in objects.list("") if not path.startswith(".")]
        if there and objects.size("generation.json") is None:  # else another run has begun it meanwhile
            raise SourceError(
                f"source {objects.url}: there is something else ({', '.join(there[:3])}); give --out an empty place"
            )
        objects.put_if_absent("generation.json", _json(plan))
    try:
        found = parse_json(objects.get("generation.json", max_bytes=1 << 24))
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}")
    except ValueError as error:
        raise SourceError(
            f"source {objects.url}: generation.json: expected a JSON object; found {error}; restore it from a copy, or give "
            "--out another place"
        ) from error
    one, two = (_flat(value) for value in (plan, found))
    differing = sorted(key for key in one.keys() | two.keys() if one.get(key) != two.get(key))
    if differing:
        raise IdentityError(
            f"source {objects.url}: begun by another run:\n  "
            + "\n  ".join(f"{key}: {one.get(key)!r} now, {two.get(key)!r} there" for key in differing)
            + "\ngive --out another place, or go back to these settings"
        )


def _flat(value: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{before}{key}.") if isinstance(inner, dict) else {before + key: inner}
    return flat


def _put_tokenizer(objects: Objects, folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        name = f"tokenizer/{path.relative_to(folder).as_posix()}"
        if path.is_file() and objects.size(name) is None:
            objects.put(name, path.read_bytes())


def _part(
    data: SourcePairs, teacher: LanguageTeacher, settings: GenerateSettings, samples: np.ndarray
) -> bytes:
    with teacher.autocast():
        found = translate(
            teacher.model,
            teacher.parts,
            data.train,
            samples,
            tokens=data.tokens,
            max_tokens=data.max_tokens,
            beams=settings.beams,
            length_penalty=settings.length_penalty,
            batch_size=settings.batch_size,
        )
    texts = data.decode([one.tokens for one in found])
    originals = data.pairs_by_key("train")
    keys = [data.train.source.key(int(sample)) for sample in samples]
    return lines(_line(originals[key], text, one) for key, text, one in zip(keys, texts, found, strict=True))


def _line(pair: Any, text: str, found: GeneratedSequence) -> dict[str, Any]:
    return {
        "key": pair.key,
        "source": pair.source,
        "target": text,
        "score": {
            "log_prob": round(found.log_prob, 4),
            "log_prob_per_token": round(found.log_prob / found.length, 4),
            "tokens": found.length,
        },
        "reference": pair.reference or pair.target,
        "language": pair.language,
    }


def lines(objects: Any) -> bytes:
    """Returns JSON lines."""
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in objects).encode()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
