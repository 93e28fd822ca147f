"""Several caches read as one: the parts of a corpus that were labeled, checked and stored one by one.

    cache = open_cache(["runs/lm/part-0", "runs/lm/part-1"])       # or open_cache("runs/lm/part-*")

The samples of the first part come first, then those of the second, and so on, each part with its own chunks, markers and
memory maps. Parts have the same classes, codec, label settings, views and tokenizer, and, unless it is allowed otherwise,
the same teacher: with several, each labels its own samples.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from glob import glob
from typing import Any

import numpy as np

from softcache.cache.finished import FinishedUnits
from softcache.cache.kinds import FOREIGN
from softcache.cache.manifest import Manifest, UnitMarker
from softcache.cache.row_index import RowIndex
from softcache.cache.samples import SampleKeys, SampleTable
from softcache.cache.storage.base import is_bucket
from softcache.errors import CacheNotFoundError, IdentityError, LabelError
from softcache.hashing.digests import digest_json, digest_of_parts
from softcache.labels.detection import concat_labels
from softcache.reader.cache import Cache, CachedBatch
from softcache.reader.memmap import MemmapFile, MemmapPlan
from softcache.runtime.indexing import concatenated_ranges

__all__ = ["CacheParts", "expand_parts", "is_pattern"]


def is_pattern(url: str) -> bool:
    """Returns whether a cache's place is a pattern of several, such as `runs/lm/part-*`."""
    return any(sign in url for sign in "*?[")


def expand_parts(pattern: str) -> list[str]:
    """Returns the folders of a pattern that hold a cache, in the order of the numbers in their names.

    Raises:
        CacheNotFoundError: there is none.
    """
    if is_bucket(pattern):
        raise CacheNotFoundError(
            f"cache {pattern}: patterns are of local folders; list the URLs of the parts"
        )
    found = [path.removesuffix("/manifest.json") for path in glob(f"{pattern.rstrip('/')}/manifest.json")]
    if not found:
        raise CacheNotFoundError(
            f"cache {pattern}: no folder of that pattern holds a cache; run `softcache teacher-logits` for each part, or "
            "correct the pattern"
        )
    return sorted(
        found, key=lambda path: [(not word.isdigit(), word.zfill(20)) for word in re.split(r"(\d+)", path)]
    )


class CacheParts(Cache):
    """Several caches as one; see the module docstring. Picklable.

    Attributes:
        parts: the caches.

    Raises (from the constructor):
        IdentityError: a part is of other classes, labels, views, tokenizer or (without `several_teachers`) teacher.
    """

    def __init__(self, parts: Sequence[Cache], *, several_teachers: bool = False) -> None:
        if not parts:
            raise CacheNotFoundError("open_cache: no part; expected the places of one cache or more")
        self.parts, self._several_teachers = list(parts), several_teachers
        first = self.parts[0]
        for part in self.parts[1:]:
            _check_part(first, part, several_teachers=several_teachers)
        self.url = first.url if len(parts) == 1 else f"{first.url} and {len(parts) - 1} more"
        self._starts = np.cumsum([0, *map(len, self.parts)])
        self.manifest = _manifest_of(self.parts)
        self.manifest_sha256 = digest_json([part.manifest_sha256 for part in self.parts])
        self._codec = self.manifest.build_codec()
        self._chunked = False
        self._prefetched: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {"parts": self.parts, "several_teachers": self._several_teachers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    # -- what there is --------------------------------------------------------------------------------------

    @cached_property
    def markers(self) -> PartUnits:  # type: ignore[override]
        """The finished units of all parts, numbered through."""
        return PartUnits([part.markers for part in self.parts])

    @property
    def num_units(self) -> int:
        return sum(part.num_units for part in self.parts)

    @property
    def missing_units(self) -> list[int]:
        return np.flatnonzero(~self.markers.is_finished).tolist()

    def describe_missing(self) -> str:
        parts = ", ".join(part.url for part in self.parts if not part.is_complete)
        return f"{super().describe_missing()} ({parts})"

    def samples_in(self, view: int) -> np.ndarray:
        found = [part.samples_in(view) + start for part, start in zip(self.parts, self._starts, strict=False)]
        return np.concatenate(found)

    def samples_table(self) -> SampleTable:
        tables = [part.samples_table() for part in self.parts]
        return SampleTable(
            SampleKeys.concat([table.keys for table in tables]),
            np.concatenate([table.targets for table in tables]),
            np.concatenate([table.num_rows for table in tables]),
        )

    @cached_property
    def rows(self) -> RowIndex:  # type: ignore[override]
        if self.manifest.rows is None:
            return RowIndex(self.manifest.plan, None)
        counts = [part.rows.counts(np.arange(len(part))) for part in self.parts]
        return RowIndex(self.manifest.plan, np.concatenate(counts))

    @property
    def num_rows_done(self) -> int:
        return sum(part.num_rows_done for part in self.parts)

    @property
    def num_samples_done(self) -> int:
        return sum(part.num_samples_done for part in self.parts)

    def bytes_by_column(self) -> dict[str, int]:
        totals: Counter[str] = Counter()
        for part in self.parts:
            totals.update(part.bytes_by_column())
        return dict(totals)

    def check_metadata(self) -> None:
        for part in self.parts:
            part.check_metadata()

    def check_objects(self) -> None:
        for part in self.parts:
            part.check_objects()

    def _progress(self) -> str:
        return f"{self.num_units:,} units of {len(self.parts):,} caches"

    def _one_by_one(self, what: str) -> LabelError:
        return LabelError(f"cache {self.url}: {what} is of one cache; do it for each part")

    def marker(self, number: int) -> UnitMarker | None:
        raise self._one_by_one("a unit's marker")

    def check_unit(self, marker: UnitMarker) -> None:
        raise self._one_by_one("a unit's check")

    def read_positions(self, number: int) -> np.ndarray:
        raise self._one_by_one("a unit's list of positions")

    def memmap_plan(self, view: int) -> MemmapPlan | None:
        raise self._one_by_one("a memory map's plan")

    # -- reading --------------------------------------------------------------------------------------------

    @property
    def fits_in_memmap(self) -> bool:
        settings = self.parts[0]._memmap_settings
        if settings is None or self._chunked or not self.is_complete:
            return False
        plans = [part.memmap_plan(0) for part in self.parts]
        num_bytes = sum(plan.num_bytes for plan in plans if plan is not None)
        return num_bytes * self.num_views <= settings.limit_bytes

    @cached_property
    def _reads_maps(self) -> bool:
        """Whether parts are read by memory maps: all of them or none, by their bytes together."""
        if not self.fits_in_memmap:
            self._chunked = True
            for part in self.parts:
                part._memmap_settings = None
        return not self._chunked

    def memmap(
        self,
        view: int,
        *,
        limit_bytes: int | None = None,
        progress: Callable[[int], None] = lambda rows: None,
    ) -> MemmapFile | None:
        """Creates the memory maps of a view of all parts; returns that of the last, None where they are read by chunks."""
        if not self._reads_maps:
            return None
        found = [part.memmap(view, limit_bytes=limit_bytes, progress=progress) for part in self.parts]
        return None if any(one is None for one in found) else found[-1]

    def read_stored(self, samples: Sequence[int] | np.ndarray, view: int = 0) -> CachedBatch:
        samples = np.asarray(samples, np.int64)
        if len(samples) and samples.view(np.uint64).max() >= len(self):
            raise IndexError(
                f"cache {self.url}: sample {samples.min()}..{samples.max()}; it holds {len(self)}"
            )
        _ = self._reads_maps  # decides it before a part would by itself
        part_B = np.searchsorted(self._starts, samples, side="right") - 1
        numbers = np.unique(part_B) if len(samples) else np.zeros(1, np.int64)
        chosen = [np.flatnonzero(part_B == number) for number in numbers]
        found = [
            self.parts[number].read_stored(samples[places] - self._starts[number], view)
            for number, places in zip(numbers, chosen, strict=True)
        ]
        if len(found) == 1:
            return found[0]
        counts = np.concatenate([one.counts for one in found])
        back = np.argsort(np.concatenate(chosen), kind="stable")
        rows = concatenated_ranges((np.cumsum(counts) - counts)[back], counts[back])
        positions = [one.positions for one in found]
        return CachedBatch(
            concat_labels([one.labels for one in found]).take(rows),
            np.concatenate([one.fingerprints for one in found])[back],
            counts[back],
            None if positions[0] is None else np.concatenate(positions)[rows],  # type: ignore[arg-type]
        )

    def prefetch(self, windows: Sequence[tuple[int, np.ndarray]]) -> None:
        """Decodes ahead as `Cache.prefetch`; a part that is in no window drops its decoded chunks."""
        if self._reads_maps:
            return
        needed: dict[int, list[tuple[int, np.ndarray]]] = {}
        for view, samples in windows:
            part_B = np.searchsorted(self._starts, samples, side="right") - 1
            for number in np.unique(part_B).tolist():
                inside = samples[part_B == number] - self._starts[number]
                needed.setdefault(number, []).append((view, inside))
        for number in self._prefetched - needed.keys():
            self.parts[number].close()
        for number, of_part in needed.items():
            self.parts[number].prefetch(of_part)
        self._prefetched = set(needed)

    def close(self) -> None:
        for part in self.parts:
            part.close()


class PartUnits(Mapping[int, UnitMarker]):
    """The finished units of several caches, numbered through.

    Attributes:
        is_finished: [units of all plans] bool.
    """

    def __init__(self, parts: Sequence[FinishedUnits]) -> None:
        self._parts = list(parts)
        self._starts = np.cumsum([0, *(len(part.is_finished) for part in parts)])
        self.is_finished = np.concatenate([part.is_finished for part in parts])

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __iter__(self) -> Iterator[int]:
        return iter(np.flatnonzero(self.is_finished).tolist())

    def __getitem__(self, number: int) -> UnitMarker:
        if not 0 <= number < len(self.is_finished):
            raise KeyError(number)
        part = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._parts[part][int(number - self._starts[part])]

    def digest(self) -> str:
        """Returns a digest of rows, sizes and checksums of the finished units; folding does not change it."""
        return digest_of_parts([part.digest() for part in self._parts])


def _check_part(first: Cache, part: Cache, *, several_teachers: bool) -> None:
    """Raises IdentityError where a part cannot be read together with the first one."""
    one, other = first.manifest, part.manifest

    def facts(manifest: Manifest) -> dict[str, Any]:
        identity = {name: value for name, value in manifest.identity.items() if name != "source"}
        teacher = identity.pop("teacher")
        weights = {
            name: teacher.get(name)
            for name in ("weights_digest", "architecture", "dtype", "class_map", "test_time_augmentation")
        }
        return {
            "kind": manifest.kind,
            "classes": manifest.num_classes,
            "class names": digest_json(list(manifest.class_names)),
            "views": manifest.plan.num_views,
            "codec": manifest.codec,
            "objects": {name: one.sha256 for name, one in manifest.objects.items()},
            **{f"identity.{name}": value for name, value in identity.items()},
            **({} if several_teachers else {"identity.teacher": weights}),
        }

    there, here = facts(one), facts(other)
    for name in sorted(there | here):
        if there.get(name) != here.get(name):
            allowed = (
                "; where each teacher labels its own samples, allow it: reader.several_teachers = true"
                if name == "identity.teacher"
                else ""
            )
            raise IdentityError(
                f"cache {part.url}: no part of {first.url}: {name} is {_shown(here.get(name))}; expected "
                f"{_shown(there.get(name))}; leave the part out, or capture it as the others{allowed}"
            )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _manifest_of(parts: Sequence[Cache]) -> Manifest:
    """Returns what describes the parts together: their common facts, and the sizes of all."""
    manifests = [part.manifest for part in parts]
    first = manifests[0]
    sources = [manifest.identity["source"] for manifest in manifests]
    source = sources[0] | {
        "name": f"{sources[0]['name']} and {len(parts) - 1} more" if len(parts) > 1 else sources[0]["name"],
        "digest": (FOREIGN if any(source["digest"].startswith(FOREIGN) for source in sources) else "")
        + digest_of_parts([source["digest"] for source in sources]),
    }
    teacher = first.teacher if all(manifest.teacher == first.teacher for manifest in manifests) else None
    rows = first.rows and first.rows.model_copy(
        update={"num_rows": sum(manifest.rows.num_rows for manifest in manifests if manifest.rows)}
    )
    return first.model_copy(
        update={
            "identity": first.identity | {"source": source},
            "plan": first.plan.model_copy(update={"num_samples": sum(map(len, parts))}),
            "rows": rows,
            "teacher": teacher
            or first.teacher.model_copy(
                update=dict.fromkeys(("eval_accuracy", "eval_loss", "eval_map", "eval_map50"))
                | {"eval_samples": 0}
            ),
        }
    )
