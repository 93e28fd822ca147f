"""The finished units of a cache, by their markers: loose ones, and entries of blocks into which markers were folded.

    index = UnitIndex(objects, manifest, manifest_sha256, store)
    finished = index.snapshot()          # a mapping from number to marker: a bitmap, and markers made on demand
    index.marker(17)                     # as it is now

A loose marker overrides an entry. Folding writes a block before it deletes markers, so what is looked for first as a marker
and then in the block never falls between; what has vanished meanwhile is looked for again.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import numpy as np

from softcache.cache import folded
from softcache.cache.folded import (
    FENCE,
    TAIL_BYTES,
    EntryLimits,
    FoldedBlock,
    block_path,
    block_range,
    digest_of_records,
    is_retired,
    marker_of,
    parse_block_path,
    record_of,
    record_type,
)
from softcache.cache.manifest import (
    MAX_MARKER_BYTES,
    Manifest,
    Unit,
    UnitMarker,
    claim_path,
    marker_path,
)
from softcache.cache.storage.base import Objects
from softcache.errors import CacheNotFoundError, CorruptionError, ManifestError, SoftcacheError

__all__ = ["MIN_FOLDED_UNITS", "FinishedUnits", "UnitIndex", "UnitNames", "list_names"]

MIN_FOLDED_UNITS = 1024
"""A plan of less units keeps its markers as they are."""
TRIES = 8
_NAME = re.compile(r"units/(\d{5,8})\.(json|lock)", re.ASCII)
_BLOCK_CLAIM = re.compile(r"units/folded/(\d{5})\.lock", re.ASCII)


class ShardNames(Protocol):
    """What is asked of a store: the objects of a unit."""

    def shard_paths(self, unit: Unit) -> dict[str, str | None]: ...
    def max_shard_bytes(self, name: str | None) -> int: ...


class UnitNames:
    """What is below units/, by name.

    Attributes:
        loose: numbers of the units with a loose marker.
        claimed: numbers of the units with a claim.
        claimed_blocks: the same of blocks.
        generations: of each block, the highest number that was listed.
        strays: paths that softcache does not write.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self.loose: list[int] = []
        self.claimed: list[int] = []
        self.claimed_blocks: list[int] = []
        self.generations: dict[int, int] = {}
        self.strays: list[str] = []
        for path in paths:
            self.add(path)

    def add(self, path: str) -> None:
        found = _NAME.fullmatch(path)
        number = int(found[1]) if found else 0
        if found and path == marker_path(number):
            if path != FENCE:
                self.loose.append(number)
        elif found and path == claim_path(number):
            self.claimed.append(number)
        elif (block := parse_block_path(path)) is not None:
            self.generations[block[0]] = max(block[1], self.generations.get(block[0], 0))
        elif (claim := _BLOCK_CLAIM.fullmatch(path)) is not None:
            self.claimed_blocks.append(int(claim[1]))
        else:
            self.strays.append(path)

    def check(self, manifest: Manifest, url: str) -> None:
        """Raises ManifestError where a marker or block is of no unit of the plan."""
        num_units = manifest.plan.num_units
        for number in self.loose:
            if number >= num_units:
                raise ManifestError(
                    f"cache {url}, {marker_path(number)}: is of no unit of the plan (0 to {num_units - 1}); remove it"
                )
        for block, generation in self.generations.items():
            if block * folded.BLOCK_UNITS >= num_units:
                raise ManifestError(
                    f"cache {url}, {block_path(block, generation)}: is of no unit of the plan (0 to {num_units - 1}); "
                    "remove it"
                )


def list_names(objects: Objects, *, may_fold: bool) -> UnitNames:
    """Returns what is below units/; blocks are listed after markers, so that a marker folded meanwhile is in one of them.

    Args:
        may_fold: there may be blocks, even if none was there before.
    """
    paths = objects.list("units")
    if may_fold or any("/folded/" in path for path in paths):
        paths += objects.list("units/folded")
    return UnitNames(sorted(set(paths)))


class UnitIndex:
    """Looks up the units of a cache, and remembers the newest generation that it saw of each block.

    Args:
        store: of the cache; asked for names and sizes of shards.
    """

    def __init__(self, objects: Objects, manifest: Manifest, manifest_sha256: str, store: ShardNames) -> None:
        self.objects, self.manifest, self.manifest_sha256 = objects, manifest, manifest_sha256
        self.store = store
        columns = tuple(store.shard_paths(manifest.plan.unit(0)).values())
        sizes = tuple(store.max_shard_bytes(column) for column in columns)
        self.limits = EntryLimits(manifest, manifest_sha256, columns, sizes)
        self.dtype = record_type(len(columns))
        self._blocks: dict[int, FoldedBlock] = {}
        self._listed = False

    @property
    def folds(self) -> bool:
        """Whether markers of this cache are folded."""
        return self.manifest.plan.num_units >= MIN_FOLDED_UNITS

    # -- markers --------------------------------------------------------------------------------------------

    def loose_marker(self, number: int) -> UnitMarker | None:
        """Returns the loose marker of a unit, or None.

        Raises:
            ManifestError: it is malformed, or belongs to another cache or unit.
        """
        try:
            data = self.objects.get(marker_path(number), max_bytes=MAX_MARKER_BYTES)
        except CacheNotFoundError:
            return None
        return self.checked_marker(number, data)

    def loose_markers(self, numbers: list[int]) -> Iterator[UnitMarker | None]:
        """Yields the loose markers of units, None for one that is gone."""
        found = self.objects.get_many([marker_path(n) for n in numbers], max_bytes=MAX_MARKER_BYTES)
        for number, data in zip(numbers, found, strict=True):
            yield None if data is None else self.checked_marker(number, data)

    def marker(self, number: int) -> UnitMarker | None:
        """Returns the marker of a unit as it is now, loose or folded; None if the unit is not finished.

        Raises:
            ManifestError: it is malformed, or belongs to another cache or unit.
            CorruptionError: the block of folded markers is damaged.
        """
        if (marker := self.loose_marker(number)) is not None:
            return marker
        block = number // folded.BLOCK_UNITS
        for _ in range(TRIES):
            found = self.newest(block)
            if found is None or number not in found:
                return None
            try:
                return self.folded_marker(found, number)
            except (CorruptionError, CacheNotFoundError):
                if self.newest(block) is found:
                    raise
        raise self.restless(block)

    def folded_marker(self, block: FoldedBlock, number: int) -> UnitMarker | None:
        unit, record = self.manifest.plan.unit(number), block.record(number)
        paths = self.store.shard_paths(unit)
        return None if record is None else marker_of(record, unit, self.manifest_sha256, paths)

    def checked_marker(self, number: int, data: bytes) -> UnitMarker:
        """Returns the marker of a unit from its bytes.

        Raises:
            ManifestError: it is malformed, or belongs to another cache or unit.
        """
        manifest, path = self.manifest, marker_path(number)
        where = f"cache {self.objects.url}, {path}"
        marker = UnitMarker.parse(data, where=where)
        unit = manifest.plan.unit(number)
        if marker.manifest_sha256 != self.manifest_sha256:
            raise ManifestError(
                f"{where}: written for another manifest (sha256 {marker.manifest_sha256[:12]}… there, "
                f"{self.manifest_sha256[:12]}… here): the manifest was changed, or the marker is of another cache; restore "
                "both from one copy"
            )
        expected = (unit.number, unit.view, unit.start, unit.stop)
        found = (marker.unit, marker.view, marker.start, marker.stop)
        room = manifest.rows.shard_rows if manifest.rows else unit.stop - unit.start
        if found != expected or marker.num_rows > room or (manifest.rows is None and marker.num_rows != room):
            raise ManifestError(
                f"{where}: is of unit (number, view, start, stop) {found} with {marker.num_rows} rows; expected {expected} "
                f"with {room} rows{' at most' if manifest.rows else ''}; delete it and rerun `softcache teacher-logits`"
            )
        names = {shard.path: shard.column for shard in marker.shards}
        wanted = self.store.shard_paths(unit)
        if names != wanted or len(names) != len(marker.shards):
            raise ManifestError(
                f"{where}: names the shards {sorted(names)}; expected {sorted(wanted)} for unit {number}; delete it and "
                "rerun `softcache teacher-logits`"
            )
        most = dict(zip(self.limits.columns, self.limits.max_shard_bytes, strict=True))
        for shard in marker.shards:
            if shard.num_bytes > most[shard.column]:
                raise ManifestError(
                    f"{where}: gives {shard.path} {shard.num_bytes:,} bytes; a unit of this cache has "
                    f"{most[shard.column]:,} at most; restore it from a copy"
                )
        return marker

    # -- blocks ---------------------------------------------------------------------------------------------

    def newest(self, block: int) -> FoldedBlock | None:
        """Returns the newest generation of a block, None if there is none; generations after the last known are asked for by
        name, so that a late listing does no harm."""
        if not self._listed:
            self._listed = True
            for number, generation in list_names(self.objects, may_fold=self.folds).generations.items():
                self.known(number, generation)
        found = self._blocks.get(block)
        if found is None and not self.folds:
            return None
        return self._walk(block, (found.generation if found else 0) + 1)

    def known(self, block: int, generation: int) -> FoldedBlock | None:
        """Returns the newest generation of a block from one that was listed on: the listed one, unless it was retired."""
        self._listed = True
        found = self._blocks.get(block)
        if found is not None and found.generation >= generation:
            return found
        return self._walk(block, generation, stop_at_first=True)

    def _walk(self, block: int, generation: int, *, stop_at_first: bool = False) -> FoldedBlock | None:
        """Reads generations from a number on until there is none; retired ones are passed over."""
        skipped = None
        while (end := self._end_of(block_path(block, generation))) is not None:
            if is_retired(*end):
                skipped = generation
            else:
                skipped = None
                self._blocks[block] = FoldedBlock(self.objects, self.limits, block, generation, *end)
                if stop_at_first:
                    break
            generation += 1
        if skipped is not None:
            raise ManifestError(
                f"cache {self.objects.url}, {block_path(block, skipped)}: a retired generation of a block of markers, and "
                f"the next one is missing; restore it from a copy, or delete units/folded/{block:05d}.* and rerun "
                "`softcache teacher-logits`, which makes the units of the block again"
            )
        return self._blocks.get(block)

    def _end_of(self, path: str) -> tuple[bytes, int] | None:
        try:
            return self.objects.get_suffixes({path: TAIL_BYTES})[0]
        except CacheNotFoundError:
            return None

    def restless(self, block: int) -> SoftcacheError:
        """Returns the error of a block that changed each time that it was read."""
        return CorruptionError(
            f"cache {self.objects.url}: block {block} of folded markers changed {TRIES} times while it was read; try again"
        )

    # -- all of them ----------------------------------------------------------------------------------------

    def snapshot(self) -> FinishedUnits:
        """Returns all finished units: one listing, the loose markers, and the end of each block.

        Raises:
            ManifestError: a marker or block is malformed, of another cache, or of a unit that the plan does not have.
            CorruptionError: a block is damaged.
        """
        names = list_names(self.objects, may_fold=self.folds)
        names.check(self.manifest, self.objects.url)
        loose, vanished = {}, defaultdict(list)
        for number, marker in zip(names.loose, self.loose_markers(names.loose), strict=True):
            if marker is None:  # folded meanwhile, or unmarked
                vanished[number // folded.BLOCK_UNITS].append(number)
            else:
                loose[number] = marker
        blocks = {block: self.known(block, names.generations[block]) for block in names.generations}
        for block, numbers in vanished.items():
            found = blocks.get(block)
            if found is None or not all(number in found for number in numbers):
                blocks[block] = self.newest(block)
        for _ in range(TRIES):
            live = {block: found for block, found in blocks.items() if found is not None}
            try:
                return FinishedUnits(self, loose, live)
            except (
                CorruptionError,
                CacheNotFoundError,
            ):  # an entry that a loose marker overrides was retired
                blocks = {block: self.newest(block) for block in live}
                if blocks == live:
                    raise
        raise self.restless(min(blocks))


class FinishedUnits(Mapping[int, UnitMarker]):
    """The finished units of a cache at one moment, by number, ascending.

    Args:
        loose: markers that are not folded, or override their entry.

    Attributes:
        is_finished: [units of the plan] bool.
        num_refreshed: how many markers were found to have changed since.
    """

    def __init__(
        self, index: UnitIndex, loose: Mapping[int, UnitMarker], blocks: Mapping[int, FoldedBlock]
    ) -> None:
        self._index, self._loose, self._blocks = index, dict(loose), dict(blocks)
        self.is_finished = np.zeros(index.manifest.plan.num_units, bool)
        for block in self._blocks.values():
            self.is_finished[block.first : block.first + len(block.finished)] = block.finished
        self.is_finished[list(self._loose)] = True
        self._count, self.num_refreshed = int(self.is_finished.sum()), 0
        self._sums = np.zeros(1 + len(index.limits.columns), np.int64)  # rows, and bytes by column
        for block in self._blocks.values():
            self._sums += [block.num_rows, *block.num_bytes]
        for number, marker in self._loose.items():
            self._sums += _sizes(record_of(marker, index.limits.columns, index.dtype))
            found = self._blocks.get(number // folded.BLOCK_UNITS)
            if found is not None and (record := found.record(number)) is not None:
                self._sums -= _sizes(record)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers.tolist())

    def __contains__(self, number: object) -> bool:
        if not isinstance(number, int | np.integer):
            return False
        return bool(0 <= number < len(self.is_finished) and self.is_finished[number])

    def __getitem__(self, number: int) -> UnitMarker:
        if number not in self:
            raise KeyError(number)
        if number in self._loose:
            return self._loose[number]
        for _ in range(TRIES):
            block = self._blocks[number // folded.BLOCK_UNITS]
            try:
                marker = self._index.folded_marker(block, number)
            except (CorruptionError, CacheNotFoundError):
                if not self._renew(block):
                    raise
                continue
            if marker is None:  # a newer generation has it no more
                marker = self._index.loose_marker(number)
            if marker is None:
                raise KeyError(number)
            return marker
        raise self._index.restless(number // folded.BLOCK_UNITS)

    def _renew(self, block: FoldedBlock) -> bool:
        """Takes the newest generation of a block; whether it is another one."""
        newest = self._index.newest(block.block)
        if newest is None or newest is block:
            return False
        self._blocks[block.block] = newest
        return True

    def refresh(self, number: int) -> bool:
        """Reads the marker of a unit anew; whether it is another one than before."""
        before, marker = self.get(number), self._index.marker(number)
        if marker is None or marker == before:
            return False
        self._loose[number] = marker
        self.num_refreshed += 1
        self._count += not self.is_finished[number]
        self.is_finished[number] = True
        return True

    def discard(self, number: int) -> None:
        """Takes a unit out, as one that is not finished."""
        if number in self:
            if (marker := self.get(number)) is not None:
                self._sums -= _sizes(record_of(marker, self._index.limits.columns, self._index.dtype))
            self._loose.pop(number, None)
            self.is_finished[number] = False
            self._count -= 1

    def block_faults(self) -> Iterator[CorruptionError]:
        """Reads each block whole; yields what is wrong with it."""
        for block in list(self._blocks.values()):
            try:
                self._all_records(block)
            except CorruptionError as error:
                yield error

    # -- sums -----------------------------------------------------------------------------------------------

    @property
    def numbers(self) -> np.ndarray:
        """The finished units [len(self)] int64, ascending."""
        return np.flatnonzero(self.is_finished)

    @property
    def missing(self) -> np.ndarray:
        """The other units of the plan, int64, ascending."""
        return np.flatnonzero(~self.is_finished)

    @property
    def num_loose(self) -> int:
        return len(self._loose)

    @property
    def num_samples(self) -> int:
        """Samples of the finished units, views counted."""
        return self._index.manifest.plan.num_samples_of(self.numbers)

    @property
    def num_rows(self) -> int:
        """Rows of the finished units."""
        return int(self._sums[0])

    def bytes_by_column(self) -> dict[str | None, int]:
        """Returns the bytes of the finished units' shards by column; None: all columns in one."""
        sums = self._sums[1:].tolist()
        return dict(zip(self._index.limits.columns, sums, strict=True)) if self else {}

    @property
    def num_bytes(self) -> int:
        """Bytes of the finished units' shards."""
        return int(self._sums[1:].sum())

    def digest(self, start: int = 0, stop: int | None = None) -> str:
        """Returns a digest of rows, sizes and checksums of the finished units in a range; folding does not change it."""
        return digest_of_records(self._records(start, len(self.is_finished) if stop is None else stop))

    def _records(self, start: int, stop: int) -> Iterator[np.ndarray]:
        size = folded.BLOCK_UNITS
        for block in range(start // size, -(-stop // size)):
            first, last = block_range(self._index.manifest.plan, block)
            records = np.zeros(last - first, self._index.dtype)
            if (found := self._blocks.get(block)) is not None:
                records[found.finished] = self._all_records(found)
                records[~self.is_finished[first:last]] = np.zeros((), self._index.dtype)
            for number in range(max(first, start), min(last, stop)) if self._loose else ():
                if number in self._loose:
                    records[number - first] = record_of(
                        self._loose[number], self._index.limits.columns, self._index.dtype
                    )
            yield records[max(first, start) - first : min(last, stop) - first]

    def _all_records(self, block: FoldedBlock) -> np.ndarray:
        try:
            return block.records()
        except (CorruptionError, CacheNotFoundError):
            if not self._renew(block):
                raise
        # A unit may have been made again since; what was finished before counts.
        newest = self._blocks[block.block]
        records = np.zeros(len(newest.finished), self._index.dtype)
        records[newest.finished] = newest.records()
        return records[block.finished]


def _sizes(record: np.ndarray | np.void) -> list[int]:
    """Returns rows, and bytes by column, of a record."""
    return [int(record["num_rows"]), *record["num_bytes"].tolist()]
