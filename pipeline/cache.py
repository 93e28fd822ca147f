"""A cache, opened for reading: soft labels by (sample, view), trusted only where a marker says so.

    cache = open_cache("runs/digits/cache")
    labels = cache.read([3, 1, 4], view=0)      # SoftLabels, NumPy arrays

Reading needs no torch. Random single rows through a chunked, compressed store are slow, so whole chunks
are decoded and the last few are kept: a reader whose order is shuffled by blocks (`pipeline.shuffle`)
decodes every chunk once per window.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import CacheNotFoundError, CorruptionError, IncompleteCacheError
from pipeline.identity import digest_bytes
from pipeline.labels import SoftLabels
from pipeline.manifest import Manifest, UnitMarker
from pipeline.stores.objects import open_objects
from pipeline.stores.samples import RowIndex, SampleTable, read_samples
from pipeline.stores.units import alignment_columns, check_unit, finished_units, open_store, read_marker

__all__ = ["Cache", "StoredRows", "open_cache"]

MANIFEST = "manifest.json"


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns start, start + 1, … for each start, `counts` of them, one after the other."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)


def open_cache(url: str, *, window_blocks: int = 16, verify: bool = True) -> Cache:
    """Returns the cache at a path or URL, its manifest validated.

    Args:
        window_blocks: decoded blocks that are kept; the shuffle's window should fit.
        verify: compare each unit with its marker's sha256 before its first row is trusted.

    Raises:
        CacheNotFoundError: there is no manifest there.
        ManifestError: the manifest is malformed or of another format version.
    """
    return Cache(url, window_blocks=window_blocks, verify=verify)


class StoredRows(NamedTuple):
    """What a cache holds of some samples.

    Attributes:
        labels: [P] of all their rows, sample by sample.
        fingerprints: [B] uint64.
        counts: [B] int64, the rows of each sample.
        positions: [P] where in its sample each row is; None where each sample has one row.
    """

    labels: SoftLabels
    fingerprints: np.ndarray
    counts: np.ndarray
    positions: np.ndarray | None


class Cache:
    """Soft labels on storage, read by (sample, view).

    Picklable: a loader process opens the store again by itself, on its first read.

    Attributes:
        url: where it is.
        manifest: what it is.
        manifest_sha256: the digest of the manifest's bytes; it names this very cache.
    """

    def __init__(self, url: str, *, window_blocks: int = 16, verify: bool = True) -> None:
        self.url, self._window_blocks, self._verify = str(url), window_blocks, verify
        self._objects = open_objects(self.url)
        if self._objects.size(MANIFEST) is None:
            raise CacheNotFoundError(
                f"cache {self.url}: no {MANIFEST} there; run `softcache teacher-logits`, or correct the path"
            )
        stored = self._objects.get(MANIFEST)
        self.manifest = Manifest.parse(stored, where=f"cache {self.url}")
        self.manifest_sha256 = digest_bytes(stored)
        self._open()

    def _open(self) -> None:
        self._store: Any = None
        self._markers: dict[int, UnitMarker] | None = None
        self._checked: set[int] = set()
        self._blocks: OrderedDict[tuple[int, int], dict[str, np.ndarray]] = OrderedDict()
        self._codec = self.manifest.build_codec()
        self._per_sample = {column.name for column in alignment_columns(self.manifest) if column.per_sample}
        self._rows: RowIndex | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "window_blocks": self._window_blocks, "verify": self._verify}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __len__(self) -> int:
        return self.manifest.plan.num_samples

    @property
    def num_views(self) -> int:
        return self.manifest.plan.num_views

    @property
    def num_classes(self) -> int:
        return self.manifest.num_classes

    @property
    def skips_positions(self) -> bool:
        """Whether only some of a sample's rows have a label: its `labels.positions` were not "all"."""
        return "positions" in self.manifest.identity["labels"]

    @property
    def markers(self) -> dict[int, UnitMarker]:
        """The markers of the finished units, by unit number, as they were when first asked for."""
        if self._markers is None:
            self._markers = finished_units(self._objects, self.manifest, self.manifest_sha256)
        return self._markers

    def marker(self, number: int) -> UnitMarker | None:
        """Returns the marker of a unit as it is now, or None if the unit is not finished.

        Raises:
            ManifestError: the marker is malformed, or belongs to another cache or unit.
        """
        return read_marker(self._objects, self.manifest, self.manifest_sha256, number)

    def check_unit(self, marker: UnitMarker) -> None:
        """Compares every object of a unit with its marker, byte by byte, and decodes all of its rows.

        Raises:
            CorruptionError: size, checksum or content differ; unit and object are named.
        """
        check_unit(self._objects, marker)
        unit = self.manifest.plan.unit(marker.unit)
        rows = self.rows.span(unit, unit.start, unit.stop)
        if marker.num_rows != rows[1]:
            raise CorruptionError(
                f"cache {self.url}: unit {unit.number}: its marker counts {marker.num_rows} rows, the table of samples "
                f"{rows[1]}; restore {self.manifest.samples} or the marker"
            )
        self._opened_store().read(unit, unit.start, unit.stop, rows=rows)

    def check_metadata(self) -> None:
        """Compares the descriptions that other tools read (`zarr.json`) with the manifest.

        Raises:
            CorruptionError: one is missing or differs; it is named.
        """
        self._opened_store().check_metadata()

    @property
    def missing_units(self) -> list[int]:
        return [unit.number for unit in self.manifest.plan.units() if unit.number not in self.markers]

    def samples_in(self, view: int) -> np.ndarray:
        """Returns the sample numbers [N] int64, ascending, whose rows of `view` are finished."""
        units = [u for u in self.manifest.plan.units() if u.view == view and u.number in self.markers]
        return np.concatenate([np.arange(u.start, u.stop) for u in units] or [np.zeros(0, np.int64)])

    def read(self, samples: Sequence[int] | np.ndarray, view: int = 0) -> SoftLabels:
        """Returns the labels of `samples`, in that order, as NumPy arrays: one row each, or (tokens) all rows of each.

        Raises:
            IndexError: a sample or view outside of the cache.
            IncompleteCacheError: a row's unit is not finished.
            CorruptionError: the stored bytes are not what was written; unit and object are named.
        """
        return self.read_rows(samples, view)[0]

    def read_rows(self, samples: Sequence[int] | np.ndarray, view: int = 0) -> tuple[SoftLabels, np.ndarray]:
        """Returns the labels [P] and the content fingerprints [len(samples)] uint64 of `samples`."""
        return self.read_stored(samples, view)[:2]

    def read_stored(self, samples: Sequence[int] | np.ndarray, view: int = 0) -> StoredRows:
        """Returns all that there is of `samples`, in that order; raises as `read` does."""
        samples = np.asarray(samples, np.int64)
        if not 0 <= view < self.num_views:
            raise IndexError(f"cache {self.url}: view {view}; expected 0 to {self.num_views - 1}")
        if len(samples) and not (samples.min() >= 0 and samples.max() < len(self)):
            raise IndexError(
                f"cache {self.url}: sample {samples.min()}..{samples.max()}; it holds {len(self)}"
            )
        size, index = self.manifest.plan.chunk_samples, self.rows
        counts = index.counts(samples)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        out: dict[str, np.ndarray] = {}
        blocks, inverse = np.unique(samples // size, return_inverse=True)
        for number, block in enumerate(blocks):
            chosen = np.flatnonzero(inverse == number)
            within = samples[chosen] - block * size
            first = index.starts(samples[chosen], int(block) * size)
            source, target = _ranges(first, counts[chosen]), _ranges(offsets[chosen], counts[chosen])
            for name, column in self._block(view, int(block)).items():
                per_sample = name in self._per_sample
                if name not in out:
                    length = len(samples) if per_sample else int(offsets[-1])
                    out[name] = np.empty((length, *column.shape[1:]), column.dtype)
                if per_sample:
                    out[name][chosen] = column[within]
                else:
                    out[name][target] = column[source]
        if not len(blocks):
            out = {name: column[:0] for name, column in self._block(view, 0).items()}
        return StoredRows(self._codec.decode(out), out["fingerprint"], counts, out.get("position"))

    def read_positions(self, number: int) -> np.ndarray:
        """Returns where in its sample each row of a finished unit is; of a cache of tokens."""
        unit = self.manifest.plan.unit(number)
        rows = self.rows.span(unit, unit.start, unit.stop)
        return self._opened_store().read(unit, unit.start, unit.stop, ["position"], rows=rows)["position"]

    def _block(self, view: int, block: int) -> dict[str, np.ndarray]:
        """Returns one decoded chunk of samples, from the window or from the store."""
        if (view, block) in self._blocks:
            self._blocks.move_to_end((view, block))
            return self._blocks[view, block]
        plan = self.manifest.plan
        start = block * plan.chunk_samples
        unit = plan.locate(view, start)
        marker = self.markers.get(unit.number)
        if marker is None:
            raise IncompleteCacheError(
                f"cache {self.url}: unit {unit.number} (view {unit.view}, samples {unit.start} to {unit.stop - 1}) "
                f"is not finished; {len(self.missing_units)} of {plan.num_units} units are missing; rerun "
                "`softcache teacher-logits`, or train on what is there with --allow-partial"
            )
        if self._verify and unit.number not in self._checked:
            check_unit(self._objects, marker)
            self._checked.add(unit.number)
        stop = min(start + plan.chunk_samples, unit.stop)
        columns = self._opened_store().read(unit, start, stop, rows=self.rows.span(unit, start, stop))
        columns = self._codec.unpack(columns)
        self._blocks[view, block] = columns
        while len(self._blocks) > self._window_blocks:
            self._blocks.popitem(last=False)
        return columns

    def _opened_store(self) -> Any:
        if self._store is None:
            self._store = open_store(self.manifest, self._objects)
        return self._store

    @property
    def rows(self) -> RowIndex:
        """Which rows each sample has; loads the table of samples where there is not one for each."""
        if self._rows is None:
            ragged = self.manifest.rows is not None
            self._rows = RowIndex(self.manifest.plan, self.samples_table().num_rows if ragged else None)
        return self._rows

    def samples_table(self) -> SampleTable:
        """Returns keys, ground truth and number of rows of every sample, as the teacher's side saw them."""
        stored = self._objects.get(self.manifest.samples)
        if digest_bytes(stored) != self.manifest.samples_sha256:
            raise CorruptionError(
                f"cache {self.url}: {self.manifest.samples} is not the table that the manifest names "
                f"(sha256 {self.manifest.samples_sha256[:12]}… expected, {digest_bytes(stored)[:12]}… found); "
                "restore it, or rebuild the cache"
            )
        return read_samples(stored)
