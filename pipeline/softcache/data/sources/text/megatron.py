"""Megatron-LM's tokenized corpora: ids in PREFIX.bin, their documents in PREFIX.idx.

An index of version 1, as Megatron-LM, Megatron-DeepSpeed and NeMo write it, little-endian:

    "MMIDIDX" and two zeros | version uint64 | dtype code uint8 | sequences S uint64 | document bounds D uint64
    | lengths [S] int32 | byte offsets [S] int64 | document bounds [D] int64, of sequences: from 0 to S

The ids of all sequences follow one another in PREFIX.bin. All of that is checked when the source is opened; a document is
what is between two bounds.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from softcache.data.sources.base import SOURCES
from softcache.data.sources.text.token_files import MappedIds, TokenFileSettings, check_same, token_files
from softcache.errors import SourceError

__all__ = ["MegatronTexts"]

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
REMEDY = "copy the pair again, or write it again with Megatron's preprocess_data.py"


@SOURCES.register("text/megatron")
class MegatronTexts(TokenFileSettings):
    """Megatron-LM's .bin and .idx files.

    `path` and `eval_path` are a prefix (`corpus_text_document`), one of its two files, or a glob of either.
    """

    name: str = "megatron"

    def mapped(self, path: str) -> tuple[list[MappedIds], Any]:
        prefix = path.removesuffix(".idx").removesuffix(".bin")
        indices, data = (
            token_files(prefix + kind, self, kind=kind, what=f"Megatron-LM's {kind} files")
            for kind in (".idx", ".bin")
        )
        names = [
            [Path(files.name(found)).with_suffix("").as_posix() for found in files.paths]
            for files in (indices, data)
        ]
        check_same(*names, path=path, kinds=(".idx", ".bin"))
        pairs = zip(names[0], indices.paths, data.paths, strict=True)
        return [_mapped(*pair) for pair in pairs], ["megatron", indices.digest, data.digest]


class _Header(NamedTuple):
    magic: bytes
    version: int
    code: int
    num_sequences: int
    num_bounds: int


def _mapped(name: str, index: Path, data: Path) -> MappedIds:
    """Returns the ids of a pair of files.

    Raises:
        SourceError: one is truncated, or they disagree.
    """

    def refuse(expected: str, found: Any) -> SourceError:
        return SourceError(f"source.path: {index}: expected {expected}; found {found}; {REMEDY}")

    size = index.stat().st_size
    with index.open("rb") as stream:
        head = stream.read(HEADER.size)
    if not head.startswith(MAGIC):
        if head.startswith(b"TNTIDX"):
            raise refuse(
                "an index of Megatron-LM's mmap form (MMIDIDX)", "the older TNTIDX of its lazy or cached form"
            )
        raise refuse("an index that starts with MMIDIDX", f"{head[:9]!r}")
    if len(head) < HEADER.size:
        raise refuse(f"a header of {HEADER.size} bytes", f"{size} bytes in all")
    header = _Header(*HEADER.unpack(head))
    if header.version != 1:
        raise refuse("version 1", f"version {header.version}")
    if header.code not in DTYPES:
        raise refuse(f"a dtype code of whole numbers ({', '.join(map(str, DTYPES))})", header.code)
    num_sequences, num_bounds = header.num_sequences, header.num_bounds
    expected = HEADER.size + 12 * num_sequences + 8 * num_bounds
    if size == expected + num_sequences and num_sequences:
        raise refuse("an index of text", "one with a mode for each sequence, which is multimodal")
    if size != expected:
        raise refuse(
            f"{expected:,} bytes for {num_sequences:,} sequences and {num_bounds:,} bounds", f"{size:,}"
        )
    dtype = np.dtype(DTYPES[header.code]).newbyteorder("<")
    lengths = np.fromfile(index, "<i4", num_sequences, offset=HEADER.size)
    offsets = np.fromfile(index, "<i8", num_sequences, offset=HEADER.size + 4 * num_sequences)
    bounds = np.fromfile(index, "<i8", num_bounds, offset=HEADER.size + 12 * num_sequences)
    if (lengths < 0).any():
        raise refuse("lengths of 0 and more", int(lengths.min()))
    stops = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    if wrong := np.flatnonzero(offsets != stops[:-1] * dtype.itemsize)[:1].tolist():
        place = wrong[0]
        raise refuse(
            f"sequence {place} at byte {stops[place] * dtype.itemsize:,}, where the one before it ends",
            f"{offsets[place]:,}",
        )
    if not num_bounds or bounds[0] != 0 or bounds[-1] != num_sequences or (np.diff(bounds) < 0).any():
        raise refuse(
            f"bounds of documents from 0 to {num_sequences:,}, ascending",
            f"{bounds[:3].tolist()} … {bounds[-3:].tolist()}",
        )
    num_bytes, found_bytes = int(stops[-1]) * dtype.itemsize, data.stat().st_size
    if num_bytes != found_bytes:
        raise SourceError(
            f"source.path: {data}: expected {num_bytes:,} bytes, {stops[-1]:,} ids of {dtype.name} as {index.name} has it; "
            f"found {found_bytes:,}; {REMEDY}"
        )
    ids = np.memmap(data, dtype, "r") if num_bytes else np.zeros(0, dtype)
    return MappedIds(name, ids, stops[bounds[1:]])
