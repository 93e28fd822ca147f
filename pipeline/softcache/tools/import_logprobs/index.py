"""The first pass: where the answer for each sample lies. Lines are read and parsed one by one, and none is kept.

What is remembered of a sample is 20 bytes: its file, the offset of its line, and the line's number for messages. The
second pass reads the line again (`Responses.answer`). Compressed files are unpacked into a temporary folder.
"""

from __future__ import annotations

import lzma
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from softcache.data.sources.files import COMPRESSED
from softcache.data.sources.text.source import TokenSource
from softcache.errors import IdentityError, LabelError, SourceError
from softcache.tools.import_logprobs.jsonl import Answer, LineLocation, parse_line

__all__ = ["Responses", "find_responses"]

MAX_LINE_BYTES = 2**30


@dataclass(frozen=True, eq=False)
class Responses:
    """Where the answer for each sample of a source lies.

    Attributes:
        paths: the files.
        plain: the same, or where they are unpacked.
        model: that the answers name, or None.
        num_failed: lines whose request had failed.
        first_failed: the first of these, in words.
        files_N, offsets_N, lines_N: [N] of each sample's answer the number of its path (-1 where there is none), its
            first byte, its line.
    """

    paths: tuple[Path, ...]
    model: str | None
    num_failed: int
    first_failed: str
    files_N: np.ndarray
    offsets_N: np.ndarray
    lines_N: np.ndarray
    plain: tuple[Path, ...]
    _unpacked: tempfile.TemporaryDirectory[str]

    @property
    def found(self) -> np.ndarray:
        """[N] bool, which samples have an answer."""
        return self.files_N >= 0

    def answer(self, sample: int, key: str) -> Answer:
        """Returns the answer for a sample.

        Raises:
            SourceError: the file has changed since it was indexed.
        """
        place = LineLocation(self.paths[self.files_N[sample]], int(self.lines_N[sample]), key)
        try:
            with self.plain[self.files_N[sample]].open("rb") as file:
                file.seek(self.offsets_N[sample])
                answer = parse_line(file.readline(MAX_LINE_BYTES), place)
        except OSError as error:
            raise SourceError(f"{place}: cannot be read: {error.strerror or error}") from error
        if answer.key != key:
            raise SourceError(f"{place}: the file changed while it was read; run the import again")
        return answer


def find_responses(
    paths: Sequence[str | Path],
    source: TokenSource,
    *,
    any_model: bool = False,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> Responses:
    """Returns where the answer for each sample lies; every line is read and parsed once, none is kept.

    Args:
        any_model: accept answers that name different models: they are one under several names.
        progress: called with the size of each line.

    Raises:
        SourceError: a file cannot be read.
        LabelError: a line is no answer, its key is not the source's, or a key comes twice.
        IdentityError: two answers name different models.
    """
    numbers = {key: number for number, key in enumerate(source.keys())}
    files_N = np.full(len(source), -1, np.int32)
    offsets_N, lines_N = np.zeros(len(source), np.int64), np.zeros(len(source), np.int64)
    model, model_at, num_failed, first_failed = None, "", 0, ""
    files = tuple(Path(path) for path in paths)
    unpacked = tempfile.TemporaryDirectory(prefix="softcache-responses-")
    plain = tuple(
        Path(unpacked.name) / str(number) if path.suffix in COMPRESSED else path
        for number, path in enumerate(files)
    )
    for file, path in enumerate(files):
        _unpack(path, plain[file])
        for place, offset, line in _lines(path, plain[file]):
            progress(len(line))
            answer = parse_line(line, place)
            place = replace(place, key=answer.key)
            number = numbers.get(answer.key)
            if number is None:
                raise LabelError(
                    f"{place}: source {source.name} has no such sample (its first is {source.key(0)!r}); keys are "
                    "DOCUMENT@OFFSET as the source gives them; check [source] of the config"
                )
            if answer.failed:
                num_failed, first_failed = num_failed + 1, first_failed or f"{place}: {answer.failed}"
                continue
            if files_N[number] >= 0:
                first = LineLocation(files[files_N[number]], int(lines_N[number]))
                raise LabelError(f"{place}: comes twice; it was in {first} before; remove one of them")
            if answer.model is not None and model is None:
                model, model_at = answer.model, str(place)
            elif answer.model is not None and answer.model != model and not any_model:
                raise IdentityError(
                    f"{place}: of model {answer.model!r}; {model_at} is of {model!r}; a cache is of one teacher: import "
                    "them apart, or give --model-name if it is one model under two names"
                )
            files_N[number], offsets_N[number], lines_N[number] = file, offset, place.line
    return Responses(files, model, num_failed, first_failed, files_N, offsets_N, lines_N, plain, unpacked)


def _unpack(path: Path, plain: Path) -> None:
    """Writes what a compressed file holds to another place.

    Raises:
        SourceError: it is missing, damaged or cut off.
    """
    if plain == path:
        return
    try:
        with COMPRESSED[path.suffix](path) as packed, plain.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 24)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise SourceError(f"responses {path}: cannot be unpacked: {error}; compress it again") from error


def _lines(path: Path, plain: Path) -> Iterator[tuple[LineLocation, int, bytes]]:
    """Yields the lines that are not blank, with where they begin."""
    try:
        with plain.open("rb") as file:
            offset, number = 0, 0
            while line := file.readline(MAX_LINE_BYTES):
                number += 1
                place = LineLocation(path, number)
                if len(line) == MAX_LINE_BYTES:
                    raise LabelError(
                        f"{place}: longer than {MAX_LINE_BYTES:,} bytes; give one JSON object per line"
                    )
                if line.strip():
                    yield place, offset, line
                offset += len(line)
    except OSError as error:
        raise SourceError(
            f"responses {path}: cannot be read: {error.strerror or error}; check the path"
        ) from error
