"""Which sample of a student's source is the same thing as which sample of the teacher's: joined by key, checked whole.

    [student.pairing]
    replace = [["train/", ""], [".png", ""]]   # texts of the student's key, replaced in this order: the teacher's key
    suffix = "ignore"                          # or: both keys without their file extension are the same
    file = "pairs.parquet"                     # or: a table of teacher_key, student_key (Parquet, or CSV with a header)
    subset = true                              # the student has fewer samples than were labeled

By default both sources have the same keys. A pairing is whole: each labeled sample has one match (unless `subset`), each
sample of the student has one too, and both are of one class. Its digest is of the pairs themselves, so it is part of a
run's identity however they were found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from softcache.errors import AlignmentError, ConfigError
from softcache.hashing.digests import digest_json
from softcache.settings import Settings

if TYPE_CHECKING:
    from softcache.data.sources.images.base import Source

__all__ = ["Pairing", "PairingSettings", "pair_sources"]


class PairingSettings(Settings):
    """[student.pairing]: how keys of the student's source are found to be those of the teacher's.

    Attributes:
        file: a table of pairs of keys, `teacher` and `student`.
        replace: texts in the keys of the student that are replaced, in this order, to get those of the teacher.
        suffix: "ignore": keys are compared without what follows the last dot.
        subset: whether samples of the cache may have no match.
    """

    file: str | None = Field(None, min_length=1)
    replace: tuple[Annotated[tuple[str, str], Field(strict=False)], ...] = Field((), strict=False)
    suffix: Literal["keep", "ignore"] = "keep"
    subset: bool = False

    @model_validator(mode="after")
    def _check_rule(self) -> PairingSettings:
        if self.file is not None and (self.replace or self.suffix == "ignore"):
            raise ValueError("file names every pair by itself; drop replace and suffix, or file")
        if any(not what for what, _ in self.replace):
            raise ValueError("replace: pairs of texts, the first of which is not empty")
        return self


@dataclass(frozen=True, eq=False)
class Pairing:
    """Pairs of samples.

    Attributes:
        samples: [S] int64, the teacher's samples that have a match, ascending.
        student_of: [N] int64, of each of the teacher's samples the student's; -1: none.
        teacher_of: [S] int64, of each of the student's samples the teacher's.
        digest: of the pairs of keys, in the order of the teacher's samples, and of how many have none.
    """

    samples: np.ndarray
    student_of: np.ndarray
    teacher_of: np.ndarray
    digest: str

    @property
    def num_missing(self) -> int:
        """Labeled samples without a match."""
        return len(self.student_of) - len(self.samples)


def pair_sources(teacher: Source | Any, student: Source | Any, settings: PairingSettings) -> Pairing:
    """Returns the pairs of two sources.

    Args:
        teacher, student: with `name`, `keys()`, `targets()` and `num_classes`.

    Raises:
        ConfigError: the pairing's file cannot be read.
        AlignmentError: a key comes twice, has no match or names no sample, or the classes of a pair differ; the first
            keys and their number are named.
    """
    theirs, ours = list(teacher.keys()), list(student.keys())
    if teacher.num_classes != student.num_classes:
        raise AlignmentError(
            f"student.source {student.name}: {student.num_classes} classes, source {teacher.name} has "
            f"{teacher.num_classes}; both must be of the same classes, in the same order"
        )
    if settings.file is not None:
        place_of = _from_file(settings.file, teacher.name, theirs, student.name, ours)
    else:
        place_of = _by_rule(settings, teacher.name, theirs, student.name, ours)
    teacher_of = np.array([place_of.get(number, -1) for number in range(len(ours))], np.int64)
    _none_left(
        [ours[number] for number in np.flatnonzero(teacher_of < 0)],
        f"samples of student.source {student.name} have no match in source {teacher.name}",
        "take them out of it, or correct [student.pairing]",
    )
    student_of = np.full(len(theirs), -1, np.int64)
    student_of[teacher_of] = np.arange(len(ours))
    samples = np.flatnonzero(student_of >= 0)
    if not settings.subset:
        _none_left(
            [theirs[number] for number in np.flatnonzero(student_of < 0)],
            f"samples of source {teacher.name} have no match in student.source {student.name}",
            "add them, correct [student.pairing], or say student.pairing.subset = true to train on fewer",
        )
    _check_targets(teacher, student, samples, student_of, theirs)
    pairs = [[theirs[number], ours[student_of[number]]] for number in samples]
    return Pairing(
        samples, student_of, teacher_of, digest_json({"pairs": pairs, "missing": len(theirs) - len(samples)})
    )


def _by_rule(
    settings: PairingSettings, teacher: str, theirs: Sequence[str], student: str, ours: Sequence[str]
) -> dict[int, int]:
    """Returns of the student's samples the teacher's, by what a rule makes of the keys."""
    here = [_stem(key, settings) for key in theirs]
    there = [_stem(_replaced(key, settings.replace), settings) for key in ours]
    fix = "each sample needs one of its own: rename them, correct [student.pairing], or name the pairs in a file"
    _none_left(_twice(here), f"keys of source {teacher} come more than once", fix)
    _none_left(_twice(there), f"keys of student.source {student} come more than once", fix)
    numbers = {key: number for number, key in enumerate(here)}
    return {number: numbers[key] for number, key in enumerate(there) if key in numbers}


def _replaced(key: str, replace: Iterable[tuple[str, str]]) -> str:
    for what, by in replace:
        key = key.replace(what, by)
    return key


def _stem(key: str, settings: PairingSettings) -> str:
    return str(PurePosixPath(key).with_suffix("")) if settings.suffix == "ignore" and key else key


def _from_file(
    file: str, teacher: str, theirs: Sequence[str], student: str, ours: Sequence[str]
) -> dict[int, int]:
    """Returns of the student's samples the teacher's, by a table of both keys."""
    named = _read_pairs(file)
    numbers: list[list[int]] = []
    for side, name, keys in ((0, f"source {teacher}", theirs), (1, f"student.source {student}", ours)):
        _none_left(_twice(keys), f"keys of {name} come more than once", "each sample needs a key of its own")
        column = [pair[side] for pair in named]
        _none_left(_twice(column), f"keys of {name} come more than once in {file}", "pair each sample once")
        places = {key: number for number, key in enumerate(keys)}
        _none_left(
            [key for key in column if key not in places],
            f"keys in {file} name no sample of {name}",
            "take them out of the file, or give the source that has them",
        )
        numbers.append([places[key] for key in column])
    return dict(zip(numbers[1], numbers[0], strict=True))


def _read_pairs(file: str) -> list[tuple[str, str]]:
    import pyarrow as pa
    from pyarrow import csv, parquet

    names, path = ["teacher_key", "student_key"], Path(file).expanduser()
    try:
        if path.suffix.lower() == ".parquet":
            table = parquet.read_table(path)
        else:
            texts = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
            table = csv.read_csv(path, convert_options=texts)
        table = table.select(names).cast(pa.schema([(name, pa.string()) for name in names]))
        columns = [table.column(name).to_pylist() for name in names]
    except (OSError, KeyError, pa.ArrowException) as error:
        raise ConfigError(
            f"student.pairing.file {file}: cannot be read: {error}; expected Parquet or CSV with the columns "
            "teacher_key and student_key"
        ) from error
    pairs = list(zip(*columns, strict=True))
    empty = [number for number, pair in enumerate(pairs) if not all(pair)]
    _none_left([f"row {number}" for number in empty], f"pairs in {file} lack a key", "complete them")
    return pairs


def _check_targets(
    teacher: Source, student: Source, samples: np.ndarray, student_of: np.ndarray, keys: Sequence[str]
) -> None:
    here = np.asarray(teacher.targets())[samples]
    there = np.asarray(student.targets())[student_of[samples]]
    differing = [f"{keys[samples[n]]} ({here[n]}, {there[n]})" for n in np.flatnonzero(here != there)]
    _none_left(
        differing,
        f"samples are of another class in student.source {student.name} than in source {teacher.name}",
        "a pair is one thing: correct the classes or [student.pairing]",
    )


def _twice(keys: Iterable[str]) -> list[str]:
    return [key for key, count in Counter(keys).items() if count > 1]


def _none_left(keys: Sequence[str], what: str, fix: str) -> None:
    """Raises if there are keys; names the first few and how many there are."""
    if keys:
        shown = ", ".join(repr(key) for key in keys[:3])
        raise AlignmentError(
            f"student.pairing: {len(keys)} {what}: {shown}{', …' if len(keys) > 3 else ''}; {fix}"
        )
