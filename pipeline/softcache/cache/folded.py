"""Blocks of folded markers: the entries of up to 32,768 finished units in one object, read by page.

    records | bitmap | page digests | header (JSON) | sha256 of the last three | header length, uint32 | SOFTFOLD

A record is rows, and size and sha256 of each shard; paths, views and ranges follow from the plan. The end of the object
is enough to know which units are there and what they sum up to. docs/format.md specifies the bytes; docs/design/decisions/
0071 has the protocol, which is in `folding` (writing) and `finished` (reading).
"""

from __future__ import annotations

import hashlib
import re
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field

from softcache.cache.manifest import Count, Digest, Document, Manifest, Plan, Shard, Unit, UnitMarker
from softcache.cache.storage.base import Objects
from softcache.errors import CorruptionError, ManifestError
from softcache.hashing.digests import digest_bytes

__all__ = [
    "BLOCK_UNITS",
    "FENCE",
    "RETIRED",
    "EntryLimits",
    "FoldedBlock",
    "block_claim_path",
    "block_path",
    "block_range",
    "encode_block",
    "parse_block_path",
    "record_type",
]

BLOCK_UNITS = 32_768
PAGE_UNITS = 256
MAGIC = b"SOFTFOLD"
RETIRED = MAGIC + b" retired\n"
"""What a generation is replaced by once there is a newer one; its name is never used again."""
FENCE = "units/99999999.json"
"""A marker of a unit that no plan has: versions that do not know blocks refuse the cache."""
FENCE_CONTENT = (
    b'{"folded": "markers of this cache are in units/folded/, which this version of softcache cannot read"}\n'
)
TAIL_BYTES = 1 << 16
MAX_HEADER_BYTES = 1 << 15
KEPT_PAGES = 64
_FOOTER = struct.Struct("<32sI8s")


def block_path(block: int, generation: int) -> str:
    return f"units/folded/{block:05d}.{generation:06d}.fold"


def block_claim_path(block: int) -> str:
    """Returns the path of the claim on a block, held while its markers are folded or units of it are unmarked."""
    return f"units/folded/{block:05d}.lock"


def parse_block_path(path: str) -> tuple[int, int] | None:
    """Returns block and generation of a path; None if it is no block's, as that of a claim."""
    found = re.fullmatch(r"units/folded/(\d{5})\.(\d{6})\.fold", path, re.ASCII)
    return (int(found[1]), int(found[2])) if found and int(found[2]) else None


def block_range(plan: Plan, block: int) -> tuple[int, int]:
    """Returns the numbers of the units of a block, from and to; equal where the plan has none."""
    start = block * BLOCK_UNITS
    return min(start, plan.num_units), min(start + BLOCK_UNITS, plan.num_units)


def record_type(num_shards: int) -> np.dtype:
    """Returns the dtype of a record, without padding: 8 + 40 bytes per shard."""
    return np.dtype(
        [("num_rows", "<u8"), ("num_bytes", "<u8", (num_shards,)), ("sha256", "u1", (num_shards, 32))]
    )


class _Header(Document):
    """What a block holds, at its end."""

    format_version: Literal[1] = 1
    manifest_sha256: Digest
    block: Count
    num_units: Count
    columns: Annotated[tuple[str | None, ...], Field(min_length=1, max_length=64)]
    num_rows: Count
    num_bytes: Annotated[tuple[Count, ...], Field(min_length=1, max_length=64)]


class EntryLimits(NamedTuple):
    """What a block of a cache is compared with.

    Attributes:
        columns: of a unit's shards, in the order of the store.
        max_shard_bytes: of each.
    """

    manifest: Manifest
    manifest_sha256: str
    columns: tuple[str | None, ...]
    max_shard_bytes: tuple[int, ...]

    def check_records(self, numbers: np.ndarray, records: np.ndarray, where: str) -> None:
        """Raises CorruptionError where rows or sizes [len(numbers)] are not possible for units of these numbers."""
        plan, rows = self.manifest.plan, self.manifest.rows
        starts = numbers % plan.units_per_view * plan.unit_samples
        room = np.minimum(starts + plan.unit_samples, plan.num_samples) - starts
        found = records["num_rows"]
        wrong = found != room.astype(np.uint64) if rows is None else found > rows.shard_rows
        wrong = wrong | (records["num_bytes"] > np.array(self.max_shard_bytes, np.uint64)).any(axis=1)
        if wrong.any():
            place = int(np.argmax(wrong))
            raise CorruptionError(
                f"{where}: unit {numbers[place]}: {found[place]:,} rows, shards of "
                f"{', '.join(f'{size:,}' for size in records['num_bytes'][place])} bytes; the plan has "
                f"{int(room[place]) if rows is None else rows.shard_rows:,} rows{'' if rows is None else ' at most'}, and "
                f"shards of at most {', '.join(f'{size:,}' for size in self.max_shard_bytes)} bytes; restore it from a copy"
            )


def encode_block(limits: EntryLimits, block: int, finished: np.ndarray, records: np.ndarray) -> bytes:
    """Returns the bytes of a block.

    Args:
        finished: [units of the block] bool.
        records: [number of those that are True], in the order of the units.
    """
    body = records.tobytes()
    page = PAGE_UNITS * records.dtype.itemsize
    header = _Header(
        manifest_sha256=limits.manifest_sha256,
        block=block,
        num_units=len(records),
        columns=limits.columns,
        num_rows=int(records["num_rows"].sum()),
        num_bytes=tuple(int(size) for size in records["num_bytes"].sum(axis=0)),
    ).to_bytes()
    if len(header) > MAX_HEADER_BYTES:
        raise ManifestError(
            f"block {block} of folded markers: the names of its {len(limits.columns)} columns take {len(header):,} bytes; "
            f"at most {MAX_HEADER_BYTES:,} are read; give columns shorter names"
        )
    tail = np.packbits(finished, bitorder="little").tobytes()
    tail += b"".join(hashlib.sha256(body[at : at + page]).digest() for at in range(0, len(body), page))
    tail += header
    return body + tail + _FOOTER.pack(hashlib.sha256(tail).digest(), len(header), MAGIC)


class FoldedBlock:
    """One generation of a block, as far as it was read: its end at once, its records by page.

    Attributes:
        finished: [units of the block] bool.
        num_rows: of its units together.
        num_bytes: of its units together, for each column.

    Raises (from the constructor):
        CorruptionError: it is damaged.
        ManifestError: it is of another cache or block.
    """

    def __init__(
        self, objects: Objects, limits: EntryLimits, block: int, generation: int, tail: bytes, size: int
    ) -> None:
        self.block, self.generation, self.path = block, generation, block_path(block, generation)
        self._objects, self._limits = objects, limits
        self.where = f"cache {objects.url}, {self.path}"
        self._parse(tail, size)
        self.first = block_range(limits.manifest.plan, block)[0]
        self._ranks = np.cumsum(self.finished, dtype=np.int32)
        self._pages: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def _parse(self, tail: bytes, size: int) -> None:
        limits = self._limits
        start, stop = block_range(limits.manifest.plan, self.block)
        if len(tail) < _FOOTER.size or not tail.endswith(MAGIC):
            raise self._damage(f"does not end as a block of folded markers does ({size:,} bytes)")
        digest, length, _ = _FOOTER.unpack(tail[-_FOOTER.size :])
        content = tail[: -_FOOTER.size]
        if length > min(MAX_HEADER_BYTES, len(content)):
            raise self._damage(f"gives its header {length:,} bytes")
        header = _Header.parse(content[len(content) - length :], where=self.where)
        found, expected = (header.block, header.columns), (self.block, limits.columns)
        if header.manifest_sha256 != limits.manifest_sha256:
            raise ManifestError(
                f"{self.where}: written for another manifest (sha256 {header.manifest_sha256[:12]}… there, "
                f"{limits.manifest_sha256[:12]}… here): the manifest was changed, or the object is of another cache; "
                "restore both from one copy"
            )
        if (
            found != expected
            or len(header.num_bytes) != len(limits.columns)
            or header.num_units > stop - start
        ):
            raise ManifestError(
                f"{self.where}: is of block and columns {found}, {header.num_units:,} units; expected {expected}, at most "
                f"{stop - start:,} units; restore it from a copy"
            )
        self._type = record_type(len(limits.columns))
        num_pages, map_bytes = -(-header.num_units // PAGE_UNITS), -(-(stop - start) // 8)
        tail_bytes = map_bytes + 32 * num_pages + length
        expected_size = header.num_units * self._type.itemsize + tail_bytes + _FOOTER.size
        if size != expected_size or len(content) < tail_bytes:
            raise self._damage(f"{size:,} bytes; {expected_size:,} bytes expected")
        content = content[len(content) - tail_bytes :]
        if hashlib.sha256(content).digest() != digest:
            raise self._damage("its end has another sha256 than the one that is stored there")
        bits = np.unpackbits(np.frombuffer(content[:map_bytes], np.uint8), bitorder="little").astype(bool)
        self.finished = bits[: stop - start]
        if bits[stop - start :].any() or int(self.finished.sum()) != header.num_units:
            raise self._damage(f"its bitmap has {int(bits.sum()):,} units; {header.num_units:,} expected")
        self._digests = [content[map_bytes + 32 * page :][:32] for page in range(num_pages)]
        self._size, self.num_units = size, header.num_units
        self.num_rows, self.num_bytes = header.num_rows, header.num_bytes

    def _damage(self, what: str) -> CorruptionError:
        return CorruptionError(
            f"{self.where}: {what}; restore it from a copy, or delete units/folded/{self.block:05d}.* and rerun "
            "`softcache teacher-logits`, which makes the units of the block again"
        )

    def __contains__(self, number: int) -> bool:
        return bool(self.finished[number - self.first])

    def record(self, number: int) -> np.void | None:
        """Returns the record of a unit, from its page; None if it is not in the block.

        Raises:
            CorruptionError: the page is damaged, or the generation was retired meanwhile.
        """
        if number not in self:
            return None
        page, place = divmod(int(self._ranks[number - self.first]) - 1, PAGE_UNITS)
        with self._lock:
            if (records := self._pages.get(page)) is None:
                start = page * PAGE_UNITS * self._type.itemsize
                stop = min(start + PAGE_UNITS * self._type.itemsize, self.num_units * self._type.itemsize)
                (data,) = self._objects.get_ranges([(self.path, start, stop)])
                records = self._pages[page] = self._checked([(page, data)])
                while len(self._pages) > KEPT_PAGES:
                    self._pages.popitem(last=False)
            self._pages.move_to_end(page)
        return records[place]

    def records(self) -> np.ndarray:
        """Returns the records of all units of the block, compared with each other and with the header.

        Raises:
            CorruptionError: it is damaged, or the generation was retired meanwhile.
        """
        length = self.num_units * self._type.itemsize
        (data,) = self._objects.get_ranges([(self.path, 0, length)]) if length else (b"",)
        size = PAGE_UNITS * self._type.itemsize
        records = self._checked([(page, data[page * size :][:size]) for page in range(len(self._digests))])
        sums = int(records["num_rows"].sum()), tuple(int(size) for size in records["num_bytes"].sum(axis=0))
        if sums != (self.num_rows, self.num_bytes):
            raise self._damage(
                f"its units have {sums} rows and bytes; its header {self.num_rows, self.num_bytes}"
            )
        return records

    def _checked(self, pages: Sequence[tuple[int, bytes]]) -> np.ndarray:
        for page, data in pages:
            if hashlib.sha256(data).digest() != self._digests[page]:
                raise self._damage(
                    f"entries {page * PAGE_UNITS} and on have another sha256 than the one stored at its end"
                )
        records = np.frombuffer(b"".join(data for _, data in pages), self._type)
        if pages:
            numbers = self.first + np.flatnonzero(self.finished)
            self._limits.check_records(
                numbers[pages[0][0] * PAGE_UNITS :][: len(records)], records, self.where
            )
        return records


def is_retired(tail: bytes, size: int) -> bool:
    """Whether an object, by its end, is a generation that was retired."""
    return size == len(RETIRED) and tail == RETIRED


def record_of(marker: UnitMarker, columns: Sequence[str | None], dtype: np.dtype) -> np.ndarray:
    """Returns the record [] of a marker."""
    record = np.zeros((), dtype)
    shards = {shard.column: shard for shard in marker.shards}
    record["num_rows"] = marker.num_rows
    record["num_bytes"] = [shards[column].num_bytes for column in columns]
    record["sha256"] = [list(bytes.fromhex(shards[column].sha256)) for column in columns]
    return record


def marker_of(
    record: np.void, unit: Unit, manifest_sha256: str, paths: Mapping[str, str | None]
) -> UnitMarker:
    """Returns the marker that a record was made of.

    Args:
        paths: of the unit's shards, with their columns, in the order of the record.
    """
    shards: Iterable = zip(paths.items(), record["num_bytes"].tolist(), record["sha256"], strict=True)
    return UnitMarker(
        unit=unit.number,
        view=unit.view,
        start=unit.start,
        stop=unit.stop,
        num_rows=int(record["num_rows"]),
        manifest_sha256=manifest_sha256,
        shards=tuple(
            Shard(path=path, column=column, num_bytes=size, sha256=sha256.tobytes().hex())
            for (path, column), size, sha256 in shards
        ),
    )


def digest_of_records(records: Iterable[np.ndarray]) -> str:
    """Returns the sha256 of records, one after the other."""
    return digest_bytes(b"".join(record.tobytes() for record in records))
