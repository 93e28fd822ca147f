"""A cache opened for reading: soft labels by (sample, view), read only from units that have a completion marker.

    cache = open_cache("runs/digits/cache")
    labels = cache.read([3, 1, 4], view=0)      # SoftLabels, NumPy arrays

Reading needs no torch. Random single rows through a chunked, compressed store are slow, so whole chunks are decoded and
the last few are kept: a reader whose order is shuffled by blocks (`softcache.reader.order`) decodes every chunk once per
window. With `memmap` settings a view is decoded once into a memory map (`softcache.reader.memmap`) instead, and reading is
a gather.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from softcache.cache.shared import shared_head
from softcache.cache.storage.base import is_bucket
from softcache.errors import CorruptionError, StorageError
from softcache.hashing.digests import digest_json
from softcache.labels import SoftLabels
from softcache.labels.base import LabelsBase
from softcache.reader.chunk_cache import DecodedBlocks
from softcache.reader.contents import CacheContents
from softcache.reader.memmap import MemmapFile, MemmapFolder, MemmapPlan, MemmapSettings
from softcache.reader.units import Chunk
from softcache.reader.windows import DecodedWindows, Piece, Window
from softcache.runtime.logging import log_info

__all__ = ["DEFAULT_WINDOW_BLOCKS", "Cache", "CachedBatch"]

DEFAULT_WINDOW_BLOCKS = 16
"""Chunks that are mixed with each other, and kept decoded for it, where a view is read by chunks."""


class CachedBatch(NamedTuple):
    """The stored labels of some samples.

    Attributes:
        labels: [P] of all their rows, sample by sample; `DetectionLabels` of a cache of cells, `VectorLabels` of one of
            hidden states.
        fingerprints: [B] uint64.
        counts: [B] int64, the rows of each sample.
        positions: [P] where in its sample each row is; None where each sample has one row.
    """

    labels: SoftLabels
    fingerprints: np.ndarray
    counts: np.ndarray
    positions: np.ndarray | None


class Cache(CacheContents):
    """Soft labels on storage, read by (sample, view).

    `cache[index]` reads by key or as NumPy indexes (`CacheContents`); `read` is the fast way in a loop.

    Picklable: a loader process opens the store again by itself, on its first read.
    """

    def __init__(
        self,
        url: str,
        *,
        window_blocks: int = DEFAULT_WINDOW_BLOCKS,
        verify: bool = True,
        memmap: MemmapSettings | None = None,
    ) -> None:
        super().__init__(url, verify=verify)
        self._window_blocks, self._memmap_settings = window_blocks, memmap
        this = weakref.ref(self)  # without a circle, the last user of a cache takes files and locks along
        self._blocks: DecodedBlocks[tuple[int, int], Chunk] = DecodedBlocks(
            lambda key: this()._decode_block(key),  # type: ignore[union-attr]
            keep=window_blocks,
        )
        self._windows = DecodedWindows(
            lambda window, block: this()._decode_to(window, block),  # type: ignore[union-attr]
            lambda: this()._record.columns(np.zeros((0, 0), np.uint8)),  # type: ignore[union-attr]
            (lambda window: this()._fetch(window)) if is_bucket(self.url) else None,  # type: ignore[union-attr]
        )
        self._memmaps: dict[int, MemmapFile | None] = {}
        self._one_each = np.ones(0, np.int64)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "url": self.url,
            "window_blocks": self._window_blocks,
            "verify": self._verify,
            "memmap": self._memmap_settings,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def read(self, samples: Sequence[int] | np.ndarray, view: int = 0) -> SoftLabels:
        """Returns the labels of `samples`, in that order, as NumPy arrays: one row each, or (tokens) all rows of each.

        Of a cache of a detector's cells they are `DetectionLabels`, all rows of each.

        Raises:
            IndexError: a sample or view outside of the cache.
            IncompleteCacheError: a row's unit is not finished.
            CorruptionError: the stored bytes are not what was written; unit and object are named.
        """
        labels = self.read_rows(samples, view)[0]
        return labels.with_class_names(self.class_names) if isinstance(labels, LabelsBase) else labels

    def read_rows(self, samples: Sequence[int] | np.ndarray, view: int = 0) -> tuple[SoftLabels, np.ndarray]:
        """Returns the labels [P] and the content fingerprints [len(samples)] uint64 of `samples`."""
        return self.read_stored(samples, view)[:2]

    def read_stored(self, samples: Sequence[int] | np.ndarray, view: int = 0) -> CachedBatch:
        """Returns labels, fingerprints, row counts and positions of `samples`, in that order; raises as `read` does."""
        samples = np.asarray(samples, np.int64)
        if not 0 <= view < self.num_views:
            raise IndexError(f"cache {self.url}: view {view}; expected 0 to {self.num_views - 1}")
        # A negative number, read as one without a sign, is a very large one.
        if len(samples) and samples.view(np.uint64).max() >= len(self):
            raise IndexError(
                f"cache {self.url}: sample {samples.min()}..{samples.max()}; it holds {len(self)}"
            )
        if (memmap := self.memmap(view)) is not None:
            return self._gather(memmap, samples)
        if (pieces := self._windows.take(view, samples)) is not None:
            return self._joined(pieces)
        return self._picked(samples, view)

    def _picked(self, samples: np.ndarray, view: int) -> CachedBatch:
        """Returns samples in any order, picked from the chunks that hold them, which are decoded and kept."""
        size, index = self.manifest.plan.chunk_samples, self.rows
        counts, numbers = index.counts(samples), samples // size
        by_block = np.argsort(numbers, kind="stable")
        bounds = np.append(np.flatnonzero(np.diff(numbers[by_block], prepend=-1)), len(samples)).tolist()
        blocks = numbers[by_block[bounds[:-1]]].tolist()
        offsets, sources = np.cumsum(counts) - counts, samples - numbers * size
        rows = np.empty((int(counts.sum()), self._record.num_bytes // 8), np.uint64)
        fingerprints = np.empty(len(samples), np.uint64)
        for number in self._blocks.cached_first([(view, block) for block in blocks]):
            chosen = by_block[bounds[number] : bounds[number + 1]]
            decoded = self._blocks.get((view, blocks[number]))
            fingerprints[chosen] = decoded.fingerprints[sources[chosen]]
            if not index.ragged:
                rows[chosen] = decoded.rows.take(sources[chosen], axis=0)
                continue
            starts = index.starts(samples[chosen], blocks[number] * size)
            spans = zip(starts.tolist(), offsets[chosen].tolist(), counts[chosen].tolist(), strict=True)
            for source, target, count in spans:
                rows[target : target + count] = decoded.rows[source : source + count]
        return self._stored(rows.view(np.uint8), fingerprints, counts)

    def _joined(self, pieces: list[Piece]) -> CachedBatch:
        """Returns pieces of windows as a batch: views of the one, copies of several."""
        if len(pieces) == 1:
            window, start, stop = pieces[0]
            one, fingerprints, counts = (
                pieces[0].columns,
                window.fingerprints[start:stop],
                window.counts[start:stop],
            )
        else:
            parts = [piece.columns for piece in pieces]
            one = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            fingerprints = np.concatenate([window.fingerprints[start:stop] for window, start, stop in pieces])
            counts = np.concatenate([window.counts[start:stop] for window, start, stop in pieces])
        return CachedBatch(self._pattern.with_arrays(one), fingerprints, counts, one.get("position"))

    def _stored(
        self, rows_PR: np.ndarray, fingerprints: np.ndarray | None, counts: np.ndarray
    ) -> CachedBatch:
        columns = self._record.columns(rows_PR)
        if fingerprints is None:
            fingerprints = columns["fingerprint"]
        return CachedBatch(self._pattern.with_arrays(columns), fingerprints, counts, columns.get("position"))

    @property
    def num_rows_done(self) -> int:
        """Rows of the finished units."""
        return self.markers.num_rows

    @property
    def num_samples_done(self) -> int:
        """Samples of the finished units, views counted."""
        return self.markers.num_samples

    def bytes_by_column(self) -> dict[str, int]:
        """Returns the stored bytes of the finished units by column, from the markers; of Parquet by "all columns"."""
        return {column or "all columns": size for column, size in self.markers.bytes_by_column().items()}

    @property
    def fits_in_memmap(self) -> bool:
        """Whether settings and size allow every view to be memory-mapped, so that any order is equally cheap.

        A function of the cache and of the settings alone: an order that depends on it is the same on every machine.
        """
        if self._memmap_settings is None or not self.is_complete:
            return False
        return self._plan_memmap(0, key="").num_bytes * self.num_views <= self._memmap_settings.limit_bytes

    def memmap(
        self,
        view: int,
        *,
        limit_bytes: int | None = None,
        progress: Callable[[int], None] = lambda rows: None,
    ) -> MemmapFile | None:
        """Returns a view's memory map, created on the first call; None where the cache is read by chunks.

        Args:
            limit_bytes: create it if this view alone fits, rather than all views together.
            progress: called with the number of rows added to the map.

        Raises:
            CorruptionError: the stored bytes are not what was written; unit and object are named.
            StorageError: the folder of memory maps cannot be written, and `MemmapSettings.required` is on.
        """
        if view not in self._memmaps:
            self._memmaps[view] = self._open_memmap(view, limit_bytes, progress)
        return self._memmaps[view]

    def memmap_plan(self, view: int) -> MemmapPlan | None:
        """Returns the layout of a view's memory map, existing or not; None while units of the view are missing."""
        first, count = view * self.manifest.plan.units_per_view, self.manifest.plan.units_per_view
        if not self.markers.is_finished[first : first + count].all():
            return None
        content = self.markers.digest(first, first + count)
        return self._plan_memmap(view, key=digest_json([self.manifest_sha256, view, content])[:32])

    def _plan_memmap(self, view: int, *, key: str) -> MemmapPlan:
        return MemmapPlan(
            key=key,
            about=f"{self.url}, view {view}",
            record=self._record,
            num_rows=self.manifest.rows.num_rows if self.manifest.rows else len(self),
            num_samples=len(self) if self.manifest.rows else 0,
        )

    def _open_memmap(
        self, view: int, limit_bytes: int | None, progress: Callable[[int], None]
    ) -> MemmapFile | None:
        if self._memmap_settings is None or (plan := self.memmap_plan(view)) is None:
            return None
        fits = plan.num_bytes <= limit_bytes if limit_bytes is not None else self.fits_in_memmap

        def fill() -> Iterator[np.ndarray]:
            fingerprints = []
            num_blocks = -(-len(self) // self.manifest.plan.chunk_samples)
            if is_bucket(self.url):  # the next unit is on its way while this one is decoded
                self._blocks.prefetch([(view, block) for block in range(num_blocks)])
            for block in range(num_blocks):
                decoded = self._blocks.get((view, block))
                if plan.num_samples:
                    fingerprints.append(decoded.fingerprints)
                yield decoded.rows
                progress(len(decoded.rows))
            yield from fingerprints
            self._watch.check(now=True)  # whoever opens the map later trusts it
            if self.markers.num_refreshed != refreshed:  # the map's key names what was there before
                raise CorruptionError(f"{what}: units were made again while it was decoded; try again")

        what, refreshed = f"cache {self.url}, view {view}", self.markers.num_refreshed
        try:
            folder = MemmapFolder(self._memmap_settings.folder)
            if not fits and not folder.holds(plan):
                return None
            if not self._verify:  # every later process trusts the map
                count = self.manifest.plan.units_per_view
                for number in range(view * count, (view + 1) * count):
                    self._check_shards(number, self.markers[number])
            return folder.open(
                plan, fill, limit_bytes=limit_bytes or self._memmap_settings.limit_bytes, what=what
            )
        except StorageError as error:
            if self._memmap_settings.required:
                raise
            log_info(f"{error}. Decoding into this process's own memory instead")
            # No view is tried again; `fits_in_memmap`, and with it the order of what is trained, stays as it was.
            self._memmaps = dict.fromkeys(range(self.num_views))
            self._blocks.keep = self.manifest.plan.num_samples  # any order may be requested: keep all
            return None

    def _gather(self, memmap: MemmapFile, samples: np.ndarray) -> CachedBatch:
        if self.manifest.rows is None:
            return self._stored(memmap.take(samples), None, self._ones(len(samples)))
        counts = self.rows.counts(samples)
        rows_PR = memmap.take_runs(self.rows.starts(samples, 0), counts)
        return self._stored(rows_PR, memmap.fingerprints[samples], counts)

    def _ones(self, count: int) -> np.ndarray:
        """Row counts of samples of one row; not to be written to."""
        if len(self._one_each) < count:
            self._one_each = np.ones(2 * count, np.int64)
            self._one_each.flags.writeable = False
        return self._one_each[:count]

    @cached_property
    def _pattern(self) -> Any:
        """A record without rows, checked once in the place of every batch that is read."""
        empty: Any = self._codec.decode(self._record.columns(np.zeros((0, self._record.num_bytes), np.uint8)))
        head = shared_head(self.url, self.manifest)
        return empty if head is None else replace(empty, head=head)

    def prefetch(self, windows: Sequence[tuple[int, np.ndarray]]) -> None:
        """Decodes the samples that will be read next ahead of time, in threads, each of their chunks once.

        Each call replaces the previous one. Samples that are read in the order given are slices of what was decoded, not
        copied again (`softcache.reader.windows`); in another order they are read as without a call. A chunk that cannot
        be read raises where it is read. Memory: the decoded rows of the window in use and of those after it.

        Args:
            windows: pairs (view, sample numbers in order of use), in order.
        """
        if any(self.memmap(view) is not None for view in {view for view, _ in windows}):
            return
        size = self.manifest.plan.chunk_samples
        self._windows.announce(windows, lambda view, samples: Window(view, samples, self.rows, size))

    def close(self) -> None:
        """Drops decoded chunks and ends the decoding threads; reading again starts anew."""
        self._blocks.close()
        self._windows.close()
