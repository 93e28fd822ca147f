"""Streams of token ids: nanoGPT's .bin files, and those of llm.c and modded-nanogpt, which have a header.

    nanoGPT     uint16 ids one after another; each document ends with the end-of-text token
    llm.c       a header of 256 int32 (magic number, version, number of ids), then the ids; each document starts with the
                end-of-text token: 20240520, version 1, uint16 (GPT-2); 20240801, version 7, uint32 (Llama 3)

Documents are found by their separator when the source is opened, at about 1 GB/s; that takes 8 bytes of memory for each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from softcache.data.sources.base import SOURCES
from softcache.data.sources.text.token_files import MappedIds, TokenFileSettings, token_files
from softcache.data.sources.text.tokenizer import load_tokenizer
from softcache.errors import SourceError, SpecError

__all__ = ["TokenStreamTexts"]

HEADER_INTS = 256
HEADERS = {20240520: (1, "uint16"), 20240801: (7, "uint32")}
"""Version and dtype by magic number."""
CHUNK_IDS = 2**24
LOOKED_AT = 2**16  # ids, to tell one dtype from another

Separator = Literal["end", "start", "none"]


@SOURCES.register("text/token_stream")
class TokenStreamTexts(TokenFileSettings):
    """A stream of token ids in .bin files.

    `dtype` is of files without a header. `document_separator`: the separator ends each document ("end"; the default of
    files without a header), starts it ("start"; the default of files with one), or there is none ("none"): all is one text.
    `separator_id`: by default the tokenizer's end-of-text token.
    """

    name: str = "token_stream"
    dtype: Literal["uint16", "uint32"] = "uint16"
    document_separator: Separator | None = None
    separator_id: int | None = Field(None, ge=0)

    def mapped(self, path: str) -> tuple[list[MappedIds], Any]:
        files = token_files(path, self, kind=".bin", what="files of token ids")
        vocab_size, separator = self._vocabulary()
        found = []
        plain = files.unpacked(self)
        for file in plain.paths:
            ids, has_header = _ids(file, self.dtype)
            _check_dtype(file, ids, self.dtype, has_header, vocab_size)
            where = self.document_separator or ("start" if has_header else "end")
            found.append(MappedIds(plain.name(file), ids, _ends(file, ids, where, separator)))
        return found, ["token_stream", files.digest, self.dtype, self.document_separator, separator]

    def _vocabulary(self) -> tuple[int, int | None]:
        """The number of ids, and the separator."""
        tokenizer = load_tokenizer(self)
        separator = tokenizer.eos_token_id if self.separator_id is None else self.separator_id
        if self.document_separator == "none":
            separator = None
        elif separator is None:
            raise SpecError(
                f"source.tokenizer {self.tokenizer!r}: it has no end-of-text token, which separates documents; give "
                'source.separator_id, or set source.document_separator = "none"'
            )
        return len(tokenizer), separator


def _ids(file: Path, dtype: str) -> tuple[np.ndarray, bool]:
    """Returns the ids of a file, memory-mapped, and whether it has a header.

    Raises:
        SourceError: its size is not that of whole ids, or not what the header has.
    """
    size = file.stat().st_size
    head = np.fromfile(file, "<i4", min(HEADER_INTS, size // 4))
    has_header = len(head) == HEADER_INTS and int(head[0]) in HEADERS
    start = 0
    if not has_header and len(head) == HEADER_INTS and head[:4].any() and not head[4:].any():
        raise SourceError(
            f"source.path: {file}: expected ids, or a header with one of the magic numbers {', '.join(map(str, HEADERS))}; "
            f"found a header with {head[0]}; give files of training tokens"
        )
    if has_header:
        version, dtype = HEADERS[int(head[0])]
        start = 4 * HEADER_INTS
        if head[1] != version:
            raise SourceError(
                f"source.path: {file}: expected version {version} in a header of magic number {head[0]}; found {head[1]}; "
                "write the file again with a script that writes this version"
            )
    kind = np.dtype(dtype).newbyteorder("<")
    if (size - start) % kind.itemsize:
        raise SourceError(
            f"source.path: {file}: expected whole ids of {dtype}; found {size - start:,} bytes, which {kind.itemsize} does "
            "not divide; fetch the file again, or set source.dtype"
        )
    num_ids = (size - start) // kind.itemsize
    if has_header and num_ids != head[2]:
        raise SourceError(
            f"source.path: {file}: expected {head[2]:,} ids, as its header has it; found {num_ids:,}; fetch the file again"
        )
    if not num_ids:
        raise SourceError(f"source.path: {file}: expected token ids; found none; fetch the file again")
    return np.memmap(file, kind, "r", offset=start), has_header


def _check_dtype(file: Path, ids: np.ndarray, dtype: str, has_header: bool, vocab_size: int) -> None:
    """Raises SourceError where a file without a header holds another dtype than the settings have."""
    if has_header or dtype != "uint16":
        return
    if vocab_size > 2**16:
        raise SourceError(
            f"source.dtype: uint16, which holds no id of {2**16:,} and more; the tokenizer has {vocab_size:,}; set it to "
            f'"uint32" if {file.name} was written so, or name the tokenizer that made it'
        )
    first = np.asarray(ids[:LOOKED_AT])
    if len(first) >= 4 and not first[1::2].any() and first[::2].any():
        raise SourceError(
            f"source.path: {file}: expected ids of uint16; found that every second one is 0, as in a file of uint32; set "
            'source.dtype = "uint32"'
        )


def _ends(file: Path, ids: np.ndarray, where: Separator, separator: int | None) -> np.ndarray:
    """Returns where documents end [N] int64.

    Raises:
        SourceError: there is no separator.
    """
    if where == "none":
        return np.array([len(ids)], np.int64)
    found = [
        start + np.flatnonzero(ids[start : start + CHUNK_IDS] == separator)
        for start in range(0, len(ids), CHUNK_IDS)
    ]
    places = np.concatenate(found).astype(np.int64)
    if not len(places):
        raise SourceError(
            f"source.path: {file}: expected documents that {where} with id {separator}; found none in {len(ids):,} ids; "
            'name the tokenizer that made them, give source.separator_id, or set source.document_separator = "none" for one '
            "running text"
        )
    ends = places + 1 if where == "end" else places[places > 0]
    return ends if len(ends) and ends[-1] == len(ids) else np.append(ends, len(ids))
