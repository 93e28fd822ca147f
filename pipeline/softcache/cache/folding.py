"""Folds the markers of finished units into blocks, and takes units out of them so that they are made again.

    fold      base generation, loose markers, create the next generation, read it back, delete the markers that equal
              their entry, retire the base
    unmark    delete the loose marker, create a generation without the entry, retire the base

A generation is created by `put_if_absent` and its number never used again, so that history is linear; whether it counts is
decided by what is read back. docs/design/decisions/0071 goes through what can go wrong at each step.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable

import numpy as np

from softcache.cache import folded
from softcache.cache.finished import TRIES, UnitIndex, UnitNames
from softcache.cache.folded import (
    FENCE,
    FENCE_CONTENT,
    RETIRED,
    TAIL_BYTES,
    FoldedBlock,
    block_claim_path,
    block_path,
    block_range,
    encode_block,
    record_of,
)
from softcache.cache.manifest import claim_path, marker_path
from softcache.errors import CacheNotFoundError, CorruptionError, StorageError
from softcache.runtime.display import format_duration
from softcache.runtime.logging import log_info

__all__ = ["FOLD_EVERY", "fold_if_possible", "fold_markers", "unmark_units"]

FOLD_EVERY = 1024
"""Of so many units, the process that publishes the last one folds."""
MIN_LOOSE = 512
"""A block with fewer loose markers is left alone, unless the cache is complete."""
KEPT_LOOSE = 128
"""The newest markers of a cache that is not complete stay: `softcache status` takes the rate from their times."""
CLAIM_SECONDS, CLAIM_POLL_SECONDS = 120.0, 0.5


def fold_if_possible(index: UnitIndex) -> None:
    """Folds markers; a storage that refuses is logged, since nothing depends on it."""
    try:
        fold_markers(index)
    except StorageError as error:
        log_info(f"cache {index.objects.url}: markers were not folded: {error}")


def fold_markers(index: UnitIndex) -> int:
    """Folds loose markers into blocks where there are enough; returns how many markers were deleted.

    Raises:
        ManifestError: a marker or block is malformed, or of another cache.
        CorruptionError: a block is damaged.
        StorageError: the storage refused; the cache is whole all the same.
    """
    if not index.folds:
        return 0
    times = index.objects.times("units")
    names = UnitNames(list(times))
    names.check(index.manifest, index.objects.url)
    blocks = {block: index.known(block, generation) for block, generation in names.generations.items()}
    num_folded = sum(block.num_units for block in blocks.values() if block is not None)
    loose, fewest = set(names.loose), 1
    if len(loose) + num_folded < index.manifest.plan.num_units:
        newest = (
            sorted(loose, key=lambda number: times[marker_path(number)])[-KEPT_LOOSE:] if KEPT_LOOSE else []
        )
        loose, fewest = loose - set(newest), MIN_LOOSE
    by_block = defaultdict(list)
    for number in sorted(loose):
        by_block[number // folded.BLOCK_UNITS].append(number)
    return sum(
        _fold_block(index, block, numbers) for block, numbers in by_block.items() if len(numbers) >= fewest
    )


def _fold_block(index: UnitIndex, block: int, numbers: list[int]) -> int:
    """Folds the loose markers of some units of a block; returns how many were deleted."""
    with index.objects.claim(block_claim_path(block)) as is_held:
        if not is_held:
            return 0
        for _ in range(TRIES):
            # Before the markers are read: a unit that is unmarked meanwhile stays so.
            base, finished, records = _base(index, block)
            start = block_range(index.manifest.plan, block)[0]
            is_new = False
            for number, marker in zip(numbers, index.loose_markers(numbers), strict=True):
                if marker is None or marker.extensions:  # which an entry has no place for
                    continue
                record = record_of(marker, index.limits.columns, index.dtype)
                is_new |= (
                    not finished[number - start] or records[number - start].tobytes() != record.tobytes()
                )
                finished[number - start], records[number - start] = True, record
            found = _create(index, block, base, finished, records) if is_new else base
            if found is not None:
                count = _delete_folded(index, found, numbers)
                _retire_before(index, found)
                return count
    return 0


def _base(index: UnitIndex, block: int) -> tuple[FoldedBlock | None, np.ndarray, np.ndarray]:
    """Returns the newest generation of a block, which units are in it [units] bool, and the records of all [units].

    The generation before it is retired, which a process that crashed may have left.

    Raises:
        CorruptionError: the generation is damaged.
    """
    start, stop = block_range(index.manifest.plan, block)
    finished, records = np.zeros(stop - start, bool), np.zeros(stop - start, index.dtype)
    for _ in range(TRIES):
        base = index.newest(block)
        if base is None:
            return None, finished, records
        try:
            records[base.finished] = base.records()
        except CorruptionError:
            if index.newest(block) is base:
                raise
            continue  # it was retired meanwhile
        _retire_before(index, base)
        return base, base.finished.copy(), records
    raise index.restless(block)


def _create(
    index: UnitIndex, block: int, base: FoldedBlock | None, finished: np.ndarray, records: np.ndarray
) -> FoldedBlock | None:
    """Creates the generation after `base`; None if the one that is there then is another process's."""
    generation = base.generation + 1 if base else 1
    path, objects = block_path(block, generation), index.objects
    data = encode_block(index.limits, block, finished, records[finished])
    if generation == 1:
        objects.put_if_absent(FENCE, FENCE_CONTENT)
    objects.put_if_absent(path, data)  # its answer may be lost, and is not needed
    most = len(records) * index.dtype.itemsize + TAIL_BYTES
    if objects.get(path, max_bytes=most) != data:
        return None
    return index.known(block, generation)


def _delete_folded(index: UnitIndex, found: FoldedBlock, numbers: list[int]) -> int:
    """Deletes the loose markers that equal their entry in the newest generation."""
    if index.newest(found.block) is not found:
        return 0
    gone = []
    for number, marker in zip(numbers, index.loose_markers(numbers), strict=True):
        if marker is None or marker.extensions:
            continue
        try:
            record = found.record(number)
        except (CorruptionError, CacheNotFoundError):
            if index.newest(found.block) is found:
                raise
            return 0  # it was retired meanwhile
        if (
            record is not None
            and record.tobytes() == record_of(marker, index.limits.columns, index.dtype).tobytes()
        ):
            gone.append(marker_path(number))
    index.objects.delete_many(gone)
    return len(gone)


def _retire_before(index: UnitIndex, block: FoldedBlock) -> None:
    """Retires the generation before one that was read."""
    if block.generation > 1:
        path = block_path(block.block, block.generation - 1)
        if index.objects.size(path) != len(RETIRED):
            index.objects.put(path, RETIRED)


def unmark_units(
    index: UnitIndex, numbers: Iterable[int], *, still: Callable[[int], bool] = lambda number: True
) -> list[int]:
    """Makes units unfinished, so that the next run makes them again; returns those that were unmarked.

    A unit that another process is making is left alone.

    Args:
        still: asked with a unit claimed whether it is to be unmarked.

    Raises:
        StorageError: a block is held by another process for minutes, or the storage refused.
    """
    by_block, done = defaultdict(list), []
    for number in sorted(set(numbers)):
        by_block[number // folded.BLOCK_UNITS].append(number)
    for block, wanted in by_block.items():
        if not index.folds and index.newest(block) is None:
            done += _delete_markers(index, wanted, still)
        else:
            done += _unmark_folded(index, block, wanted, still)
    return done


def _unmark_folded(
    index: UnitIndex, block: int, numbers: list[int], still: Callable[[int], bool]
) -> list[int]:
    until = time.monotonic() + CLAIM_SECONDS
    while True:
        with index.objects.claim(block_claim_path(block)) as is_held:
            if is_held:
                # Before the generation is created: see the module docstring.
                numbers = _delete_markers(index, numbers, still)
                if not numbers:
                    return []
                places = np.array(numbers, np.int64) - block_range(index.manifest.plan, block)[0]
                for _ in range(TRIES):
                    base, finished, records = _base(index, block)
                    finished[places] = False
                    if (found := _create(index, block, base, finished, records)) is not None:
                        _retire_before(index, found)
                        return numbers
                raise index.restless(block)
        if time.monotonic() > until:
            raise StorageError(
                f"cache {index.objects.url}, {block_claim_path(block)}: held by another process for "
                f"{format_duration(CLAIM_SECONDS)}; wait for the runs that write this cache, and try again"
            )
        time.sleep(CLAIM_POLL_SECONDS)


def _delete_markers(index: UnitIndex, numbers: list[int], still: Callable[[int], bool]) -> list[int]:
    """Deletes loose markers of units that no process holds; returns the units."""
    done = []
    for number in numbers:
        with index.objects.claim(claim_path(number)) as is_held:
            if is_held and still(number):
                index.objects.delete(marker_path(number))
                done.append(number)
    return done
