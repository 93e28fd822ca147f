"""The finished units of a cache: what they are, whether they are what their markers say, and their decoded chunks.

Everything that is read is compared with the manifest, and a unit with its marker before its first row is trusted.
`softcache.reader.cache` reads rows in any order on top of this.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from softcache.cache.codecs import SoftLabelCodec
from softcache.cache.codecs.column import RowPlaces
from softcache.cache.invariants import broken_invariants, name_invariant
from softcache.cache.manifest import MAX_MANIFEST_BYTES, Manifest, Unit, UnitMarker
from softcache.cache.row_index import RowIndex
from softcache.cache.samples import (
    MAX_SAMPLE_BYTES,
    SampleTable,
    check_samples,
    read_row_counts,
    read_samples,
)
from softcache.cache.shared import get_shared
from softcache.cache.storage.open import open_objects
from softcache.cache.units import (
    FinishedUnits,
    UnitIndex,
    alignment_columns,
    check_unit,
    open_index,
    open_store,
    stray_names,
)
from softcache.errors import CacheNotFoundError, CorruptionError, IncompleteCacheError, LabelError
from softcache.hashing.digests import digest_bytes
from softcache.reader.manifest_watch import ManifestWatch
from softcache.reader.memmap import Record
from softcache.reader.windows import Window

__all__ = ["CacheReaderBase", "Chunk"]

MANIFEST = "manifest.json"
WRITTEN_SO = "its checksums are right, so it was written so: make it again with a teacher that you trust"


class Chunk(NamedTuple):
    """A decoded chunk: its rows' records as uint64 [rows, R / 8], and the fingerprints [samples]."""

    rows: np.ndarray
    fingerprints: np.ndarray


class CacheReaderBase:
    """What a cache holds, chunk by chunk.

    Attributes:
        url: where it is.
        manifest: what it is.
        manifest_sha256: the digest of the manifest's bytes; it names this very cache.

    Raises (from the constructor):
        CacheNotFoundError: there is no manifest there.
        ManifestError: the manifest is malformed or of another format version.
    """

    def __init__(self, url: str, *, verify: bool) -> None:
        self.url, self._verify = str(url), verify
        self._objects = open_objects(self.url)
        if self._objects.size(MANIFEST) is None:
            raise CacheNotFoundError(
                f"cache {self.url}: no {MANIFEST} there; run `softcache teacher-logits`, or correct the path"
            )
        stored = self._objects.get(MANIFEST, max_bytes=MAX_MANIFEST_BYTES)
        self.manifest = Manifest.parse(stored, where=f"cache {self.url}")
        self.manifest_sha256 = digest_bytes(stored)
        self._watch = ManifestWatch(self._objects, MANIFEST, self.manifest_sha256)
        self._store: Any = None
        self._index: UnitIndex | None = None
        self._markers: FinishedUnits | None = None
        self._checked: set[int] = set()
        self._unit_locks: dict[int, threading.Lock] = {}
        self._codec = self.manifest.build_codec()
        self._rows: RowIndex | None = None

    def __len__(self) -> int:
        return self.manifest.plan.num_samples

    @property
    def num_views(self) -> int:
        return self.manifest.plan.num_views

    @property
    def num_units(self) -> int:
        return self.manifest.plan.num_units

    @property
    def num_classes(self) -> int:
        return self.manifest.num_classes

    @property
    def skips_positions(self) -> bool:
        return self.manifest.skips_positions

    @property
    def markers(self) -> FinishedUnits:
        """The finished units, a mapping from number to marker, as they were when first asked for."""
        if self._markers is None:
            self._markers = self.index.snapshot()
        return self._markers

    @property
    def index(self) -> UnitIndex:
        """What looks up the units of this cache as they are now."""
        if self._index is None:
            self._index = open_index(self._objects, self.manifest, self.manifest_sha256)
        return self._index

    def marker(self, number: int) -> UnitMarker | None:
        """Returns the marker of a unit as it is now, or None if the unit is not finished.

        Raises:
            ManifestError: the marker is malformed, or belongs to another cache or unit.
        """
        return self.index.marker(number)

    def unit_faults(self, marker: UnitMarker) -> Iterator[str]:
        """Compares every object of a unit with its marker, and its rows with the invariants; yields one line per fault.

        Raises:
            StorageError: the storage does not answer.
        """
        try:
            check_unit(self._objects, marker, self._opened_store())
        except CorruptionError as error:
            yield name_invariant("I5", error)
            return
        unit = self.manifest.plan.unit(marker.unit)
        where = f"cache {self.url}: unit {unit.number} (view {unit.view}, samples from {unit.start})"
        rows = self.rows.span(unit, unit.start, unit.stop)
        if marker.num_rows != rows[1]:
            fault = (
                f"{where}: its marker counts {marker.num_rows} rows, the table of samples {rows[1]}; restore "
                f"{self.manifest.samples} or the marker"
            )
            yield name_invariant("I4", fault)
            return
        samples, targets = np.arange(unit.start, unit.stop), self._known_targets
        try:
            columns = self._codec.unpack(self._opened_store().read(unit, unit.start, unit.stop, rows=rows))
            for violation in broken_invariants(
                self.manifest,
                columns,
                self.rows.counts(samples),
                None if targets is None else targets[samples],
            ):
                yield f"{where}: {violation}; {WRITTEN_SO}"
        except (CorruptionError, LabelError) as error:
            yield name_invariant("I10", error if isinstance(error, CorruptionError) else f"{where}: {error}")

    def check_samples(self) -> None:
        """Compares the table of samples with the manifest, and its keys with each other.

        Raises:
            CorruptionError: it is another table, keys are there twice, or rows lie elsewhere.
        """
        check_samples(self._stored_samples(), self.manifest.plan, self.manifest.rows)

    @cached_property
    def _known_targets(self) -> np.ndarray | None:
        """The ground truth of every sample, -1 where there is none; None where the rows are not of one class each."""
        codec = self._codec
        if self.manifest.rows is not None or not isinstance(codec, SoftLabelCodec):
            return None
        targets = self.samples_table().targets
        if not len(targets):
            return None
        return np.where((targets >= 0) & (targets < codec.num_classes), targets, -1)

    def _unpack(self, unit: Unit, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the arrays of decoded columns by name, each number looked at.

        Raises:
            CorruptionError: a number that no teacher can have given; unit, column and row are named.
        """
        arrays = self._codec.unpack(columns)
        try:
            self._codec.validate(arrays)
        except LabelError as error:
            raise CorruptionError(
                f"cache {self.url}: unit {unit.number} (view {unit.view}, samples from {unit.start}): {error}; {WRITTEN_SO}"
            ) from error
        return arrays

    def check_metadata(self) -> None:
        """Compares the descriptions that other tools read (`zarr.json`) with the manifest.

        Raises:
            CorruptionError: one is missing or differs; it is named.
        """
        self._opened_store().check_metadata()

    def check_objects(self) -> None:
        """Compares the objects that all rows share with the manifest.

        Raises:
            CorruptionError: one is missing, or not what was written; it is named.
        """
        for described in self.manifest.objects.values():
            get_shared(self._objects, described)

    def stray_names(self) -> list[str]:
        """Returns the paths of files in units/ that softcache does not write; nothing reads them."""
        return stray_names(self._objects)

    @property
    def is_complete(self) -> bool:
        """Whether every unit is finished."""
        return len(self.markers) == self.num_units

    @property
    def missing_units(self) -> list[int]:
        return self.markers.missing.tolist()

    def describe_missing(self) -> str:
        """Returns in words how many units are missing."""
        return f"{self.num_units - len(self.markers)} of {self.num_units} units are missing"

    def samples_in(self, view: int) -> np.ndarray:
        """Returns the sample numbers [N] int64, ascending, whose rows of `view` are finished."""
        plan = self.manifest.plan
        first = view * plan.units_per_view
        is_finished = self.markers.is_finished[first : first + plan.units_per_view]
        if is_finished.all():
            return np.arange(plan.num_samples)
        return np.flatnonzero(np.repeat(is_finished, plan.unit_samples)[: plan.num_samples])

    @cached_property
    def _record(self) -> Record:
        """The layout of a row in memory: decoded columns, and its position (one row per sample: its fingerprint)."""
        extra = "position" if self.manifest.rows else "fingerprint"
        columns = [*self._codec.columns, *alignment_columns(self.manifest)]
        kept = [column for column in columns if column.name == extra or column in self._codec.columns]
        return Record(self._codec.unpack({c.name: np.zeros((0, *c.shape), c.dtype) for c in kept}))

    def read_positions(self, number: int) -> np.ndarray:
        """Returns where in its sample each row of a finished unit is; of a cache of tokens."""
        unit = self.manifest.plan.unit(number)
        rows = self.rows.span(unit, unit.start, unit.stop)
        return self._opened_store().read(unit, unit.start, unit.stop, ["position"], rows=rows)["position"]

    def _decode_block(self, key: tuple[int, int]) -> Chunk:
        """Returns one decoded chunk from the store, its unit checked; called by several threads."""
        unit, start, stop = self._checked_part(*key)
        columns = self._opened_store().read(unit, start, stop, rows=self.rows.span(unit, start, stop))
        self._watch.check()
        fingerprints = columns["fingerprint"]
        return Chunk(self._record.pack(self._unpack(unit, columns)).view(np.uint64), fingerprints)

    def _decode_to(self, window: Window, block: int) -> None:
        """Writes the rows of a chunk to their places in a window; called by several threads.

        Raises as `_decode_block`, which reads what cannot be decoded chunk by chunk into the window's own memory.
        """
        unit, start, stop = self._checked_part(window.view, block)
        span = self.rows.span(unit, start, stop)
        places_P, chosen = window.places(block, span[1] - span[0]), window.chosen(block)
        if self._decode_parts(window, (unit, start, stop, span), places_P, chosen):
            return
        decoded = self._decode_block((window.view, block))
        for name, values in self._record.columns(decoded.rows.view(np.uint8)).items():
            RowPlaces(places_P).put(values, window.columns[name])
        window.fingerprints[chosen] = decoded.fingerprints[window.samples[chosen] - start]

    def _fetch(self, window: Window) -> dict[int, Any]:
        """Returns a window's chunks as a bucket has them, by number, asked for at once.

        Those of units that are not compared with their markers yet are left out: that fetches the units whole.
        """
        plan, blocks, parts = self.manifest.plan, [], []
        for block in window.blocks:
            start = block * plan.chunk_samples
            unit = plan.locate(window.view, start)
            if unit.number in self._checked if self._verify else self.markers.is_finished[unit.number]:
                stop = min(start + plan.chunk_samples, unit.stop)
                blocks.append(block)
                parts.append((unit, start, stop, self.rows.span(unit, start, stop)))
        found = self._opened_store().fetch_parts(parts) if parts else None
        return {} if found is None else dict(zip(blocks, found, strict=True))

    def _decode_parts(
        self,
        window: Window,
        part: tuple[Unit, int, int, tuple[int, int]],
        places_P: np.ndarray,
        chosen: np.ndarray,
    ) -> bool:
        """Does so without new arrays; returns False where that cannot be, or something is not as it should be."""
        store = self._opened_store()
        stored = window.stored(part[1] // self.manifest.plan.chunk_samples)
        if stored is None:
            fetched = store.fetch_parts([part])
            if fetched is None:
                return False
            (stored,) = fetched
        per_sample, parts = store.decode_parts(part[0], stored)
        sources = window.samples[chosen] - part[1]
        if per_sample:
            window.fingerprints[chosen] = per_sample["fingerprint"][sources]
        try:
            for decoded in parts:
                if decoded is None:
                    return False
                if not per_sample:
                    window.fingerprints[chosen] = decoded.columns["fingerprint"][sources]
                places = RowPlaces(places_P[decoded.first : decoded.stop])
                self._codec.unpack_to(decoded.columns, places, window.columns)
        except LabelError:
            return False
        self._watch.check()
        return True

    def _checked_part(self, view: int, block: int) -> tuple[Unit, int, int]:
        """Returns the unit and the samples of a chunk, the unit compared with its marker when it is first read from."""
        plan = self.manifest.plan
        start = block * plan.chunk_samples
        unit = plan.locate(view, start)
        marker = self.markers.get(unit.number)
        if marker is None and self.markers.refresh(unit.number):  # the listing was late
            marker = self.markers[unit.number]
        if marker is None:
            raise IncompleteCacheError(
                f"cache {self.url}: unit {unit.number} (view {unit.view}, samples {unit.start} to {unit.stop - 1}) "
                f"is not finished; {self.describe_missing()}; rerun "
                "`softcache teacher-logits`, or train on what is there with --allow-partial"
            )
        with self._unit_locks.setdefault(unit.number, threading.Lock()):
            if self._verify and unit.number not in self._checked:
                self._check_shards(unit.number, marker)
                self._checked.add(unit.number)
        return unit, start, min(start + plan.chunk_samples, unit.stop)

    def _check_shards(self, number: int, marker: UnitMarker) -> None:
        """Compares a unit with its marker; where they differ, with the marker as it is now: it may have been made again."""
        try:
            check_unit(self._objects, marker, self._opened_store())
        except CorruptionError:
            if not self.markers.refresh(number):
                raise
            check_unit(self._objects, self.markers[number], self._opened_store())

    def _opened_store(self) -> Any:
        if (
            self._store is None or self._store[0] != os.getpid()
        ):  # open files are not shared with a forked child
            self._store = os.getpid(), open_store(self.manifest, self._objects)
        return self._store[1]

    @property
    def rows(self) -> RowIndex:
        """Which rows each sample has; loads the table of samples where there is not one for each."""
        if self._rows is None:
            ragged = self.manifest.rows is not None
            counts = read_row_counts(self._stored_samples(), len(self)) if ragged else None
            self._rows = RowIndex(self.manifest.plan, counts, self.manifest.rows)
        return self._rows

    def samples_table(self) -> SampleTable:
        """Returns keys, ground truth and number of rows of every sample, as the teacher's side saw them."""
        return read_samples(self._stored_samples(), len(self))

    def _stored_samples(self) -> bytes:
        most = MAX_SAMPLE_BYTES * (len(self) + 1024)
        stored = self._objects.get(self.manifest.samples, max_bytes=most)
        if digest_bytes(stored) != self.manifest.samples_sha256:
            raise CorruptionError(
                f"cache {self.url}: {self.manifest.samples} is not the table that the manifest names "
                f"(sha256 {self.manifest.samples_sha256[:12]}… expected, {digest_bytes(stored)[:12]}… found); "
                "restore it, or rebuild the cache"
            )
        return stored
