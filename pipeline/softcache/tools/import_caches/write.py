"""The cache of an original: the manifest of a capture, which names what is not known, then unit by unit.

Policy is "imported", the teacher is known by name only, there are no statistics and labels are known at T = 1. The
identity names format and files (`original`), so that an import which was killed goes on from the same files only. Views
that softcache cannot replay have a digest of another writer (`foreign:…`) and no fingerprints (0): samples are joined by
key, and a student has to show them as the teacher saw them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from softcache.cache.codecs import Codec, OpenCodec
from softcache.cache.create import create_cache
from softcache.cache.kinds import FOREIGN
from softcache.cache.manifest import Manifest, Plan, Unit
from softcache.cache.repair import usable_units
from softcache.cache.storage.open import open_objects
from softcache.cache.units import claimed_units, fold_if_possible, open_index, open_store, publish_unit
from softcache.data.batch import Dataset
from softcache.data.sources.images.classes import sorted_places
from softcache.errors import AlignmentError, ConfigError, LabelError
from softcache.hashing.digests import digest_json
from softcache.labels import SoftLabels
from softcache.labels.class_order import find_other_order
from softcache.labels.sparsify import TopK
from softcache.reader.cache import Cache
from softcache.reader.open import open_cache
from softcache.runtime.logging import count_found
from softcache.teacher.base import TeacherFacts
from softcache.teacher.capture.plan import CaptureSettings, plan_manifest
from softcache.teacher.capture.run import CaptureReport
from softcache.tools.import_caches.base import Original
from softcache.tools.import_caches.top_rows import soft_labels

__all__ = ["ImportReport", "import_cache"]

LEAST_ROWS = 100
"""Rows of a unit from which on its labels are compared with the ground truth."""


@dataclass
class ImportReport(CaptureReport):
    """What one import did.

    Attributes:
        rows_scaled: rows whose approximated probabilities were scaled to a sum of 1.
        agreement: share of the rows whose most likely class is the ground truth; None where no unit was made.
    """

    rows_scaled: int = 0
    agreement: float | None = None


def import_cache(
    original: Original,
    data: Dataset,
    url: str,
    *,
    settings: CaptureSettings,
    model_name: str,
    k: int | None = None,
    plain_view: bool = False,
    progress: Callable[[int], None] = lambda rows: None,
) -> tuple[Cache, ImportReport]:
    """Returns the cache at `url` of an original's labels, and what was done.

    Killed at any moment and run again, it completes what is missing. Units that another import holds are waited for, and
    taken over if it dies.

    Args:
        settings: units, chunks and store, as for a captured cache; its codec is "open".
        model_name: of the teacher; no format has it.
        k: kept classes of each row; None: all that the original has.
        plain_view: the user's word that the teacher saw the plain view of the config's [views]; of a format that has one
            view of images. Fingerprints are of that view, and students see it.
        progress: called with a number of finished rows, those that were there at the start first.

    Raises:
        LabelError, AlignmentError, SourceError: as `Original`; a row that cannot be a label, or labels that agree with the
            ground truth no more than a guess. Format, file, sample and view are named.
        ConfigError: the codec holds no unknown numbers, or the plain view is given of several.
        IdentityError: there is a cache of something else.
    """
    started, report = time.monotonic(), ImportReport()
    _check_plain(original, plain_view)
    manifest, samples = _manifest(original, data, k, settings, model_name, plain_view)
    objects = open_objects(url, create=True)
    manifest, digest = create_cache(objects, manifest, samples)
    index = open_index(objects, manifest, digest)
    finished = usable_units(index)
    count_found(progress, finished.num_rows)
    store = open_store(manifest, objects)
    writer = _UnitColumns(original, data, manifest, settings.batch_size, plain_view)
    pending = (unit for unit in _order(manifest.plan, original) if unit.number not in finished)
    for unit in claimed_units(index, pending):
        marker = publish_unit(objects, store, digest, unit, writer.make(unit))
        report.units_done += 1
        report.rows += marker.num_rows
        progress(marker.num_rows)
    fold_if_possible(index)
    report.seconds, report.rows_scaled = time.monotonic() - started, writer.rows_scaled
    report.agreement = writer.rows_right / report.rows if report.rows else None
    cache = open_cache(url)
    report.units_found = len(cache.markers) - report.units_done
    return cache, report


def _order(plan: Plan, original: Original) -> Iterator[Unit]:
    """Yields all units, those of one range of samples after one another where an original has all views in one place."""
    if original.by_view:
        return plan.units()
    each = plan.units_per_view
    return (plan.unit(view * each + place) for place in range(each) for view in range(plan.num_views))


class _UnitColumns:
    """Makes the columns of units, and counts."""

    def __init__(
        self, original: Original, data: Dataset, manifest: Manifest, batch_size: int, plain_view: bool
    ) -> None:
        self._original, self._data, self._batch_size = original, data, batch_size
        self._codec = manifest.soft_codec("import")
        self._has_prints = plain_view or original.sees_source
        self._is_text = data.kind == "tokens"
        self._targets_N = np.zeros(0, np.int64)
        if not self._is_text:
            self._targets_N = np.asarray(data.source.targets(), np.int64)
        self.rows_scaled, self.rows_right = 0, 0

    def make(self, unit: Unit) -> dict[str, np.ndarray]:
        # An original of images may read a file per sample for all views at once: it is asked for a unit as a whole.
        step = self._batch_size if self._is_text else unit.stop - unit.start
        parts, guesses, targets = [], [], []
        for start in range(unit.start, unit.stop, step):
            samples = np.arange(start, min(start + step, unit.stop))
            batch = self._data.load(samples, unit.view) if self._is_text else None
            targets_R = self._targets_N[samples] if batch is None else batch.targets.numpy()
            labels = self._labels(samples, unit.view, batch, targets_R)
            guesses.append(labels.ids[:, 0])
            targets.append(targets_R)
            columns = self._columns(labels)
            columns["fingerprint"] = self._fingerprints(samples, unit.view, batch)
            if batch is not None:
                columns["num_rows"] = batch.row_counts.astype(np.uint32)
                columns["position"] = batch.positions.astype(np.uint32)
            parts.append(columns)
        self._check_agreement(unit, np.concatenate(guesses), np.concatenate(targets))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _labels(self, samples: np.ndarray, view: int, batch: Any, targets_R: np.ndarray) -> SoftLabels:
        original = self._original
        try:
            top = original.read(samples, view, batch)
            labels, num_scaled = soft_labels(
                top, targets_R, self._codec, max_mass=original.max_mass, bounds_tail=original.bounds_tail
            )
        except LabelError as error:
            if error.position is None:
                raise
            raise LabelError(
                f"{self._place(samples, view, batch, error.position)}: {error}", position=error.position
            ) from error
        self.rows_scaled += num_scaled
        return labels

    def _columns(self, labels: SoftLabels) -> dict[str, np.ndarray]:
        """Returns encoded labels; codecs refuse NaN, which here means that the ground truth's probability is not known."""
        target_R = np.asarray(labels.target_log_prob)
        columns = self._codec.encode(replace(labels, target_log_prob=np.nan_to_num(target_R)))
        columns["target_log_prob"] = target_R
        return columns

    def _place(self, samples: np.ndarray, view: int, batch: Any, row: int) -> str:
        """Returns format, file, sample and view or position of a row."""
        at = row if batch is None else int(np.repeat(np.arange(len(batch)), batch.row_counts)[row])
        sample = int(samples[at])
        detail = f"view {view}" if batch is None else f"position {int(batch.positions[row])}"
        place = self._original.where(sample, view)
        return f"{self._original.name}, {place}: sample {self._data.source.key(sample)!r}, {detail}"

    def _fingerprints(self, samples: np.ndarray, view: int, batch: Any) -> np.ndarray:
        if batch is not None:
            return batch.fingerprints
        if not self._has_prints:
            return np.zeros(len(samples), np.uint64)
        pieces = np.split(samples, range(self._batch_size, len(samples), self._batch_size))
        return np.concatenate([self._data.load(piece, view).fingerprints for piece in pieces])

    def _check_agreement(self, unit: Unit, guesses_R: np.ndarray, targets_R: np.ndarray) -> None:
        """Raises unless the labels know more of the ground truth than labels of other samples would.

        Whatever does not depend on the ground truth is right at most as often as the commonest class comes.
        """
        right_R = guesses_R == targets_R
        self.rows_right += int(right_R.sum())
        num_rows, known_N = len(right_R), targets_R if self._is_text else self._targets_N
        commonest = np.unique(known_N, return_counts=True)[1].max() / len(known_N)
        limit = commonest + 3 * np.sqrt(commonest * (1 - commonest) / num_rows)
        found = float(right_R.mean())
        key = self._data.source.key
        where = (
            f"{self._original.name}, {self._original.where(unit.start, unit.view)}: samples {key(unit.start)!r} to "
            f"{key(unit.stop - 1)!r}, view {unit.view}"
        )
        if not self._is_text:
            self._check_class_order(guesses_R, targets_R, where)
        if num_rows >= LEAST_ROWS and found <= limit:
            raise AlignmentError(
                f"{where}: the most likely class is the ground truth in {found:.1%} of {num_rows:,} rows; expected more "
                f"than {limit:.1%}, which a guess has: the labels are of other samples, of another order of samples or of "
                "classes, or shifted; give the source that was labeled"
            )

    def _check_class_order(self, guesses_R: np.ndarray, targets_R: np.ndarray, where: str) -> None:
        names = self._data.class_names
        found = find_other_order(targets_R, guesses_R, self._codec.num_classes, sorted_places(names))
        if found is not None:
            raise AlignmentError(
                f"{where}: the labels are of the source's classes in another order, or of its samples: "
                f"{found.describe(names)}; give the order of the labels' classes as source.class_names or "
                "source.class_order, or the source that was labeled"
            )


def _check_plain(original: Original, plain_view: bool) -> None:
    if plain_view and (original.sees_source or original.num_views > 1):
        found = (
            "which sees samples as they are" if original.sees_source else f"with {original.num_views} views"
        )
        raise ConfigError(
            f"import, format {original.name}: --plain-view of labels {found}; expected those of one view of images; drop it"
        )


def _manifest(
    original: Original,
    data: Dataset,
    k: int | None,
    settings: CaptureSettings,
    model_name: str,
    plain_view: bool,
) -> tuple[Manifest, bytes]:
    """Returns the manifest that a captured cache would have, of a teacher known by name and labels known at T = 1."""
    if k is not None and k > original.k:
        raise LabelError(
            f"import, format {original.name}: k = {k}; the original has {original.k} classes of each row; choose fewer"
        )
    num_classes = getattr(data.source, "vocab_size", None) or data.source.num_classes
    teacher = TeacherFacts(f"imported:{model_name}", num_classes)
    kept = min(k or original.k, num_classes)
    labels = TopK(k=kept, temperatures=(1.0,), num_views=original.num_views)
    manifest, samples = plan_manifest(data, teacher, labels, settings)
    codec = _codec(manifest.soft_codec("import"), original)
    identity: dict[str, dict[str, Any]] = manifest.identity | {
        "codec": codec,
        "labels": manifest.identity["labels"] | {"policy": "imported"},
        "original": {"format": original.name, "digest": original.digest},
    }
    sees = "the source's samples" if original.sees_source else "the plain view, by the user's word"
    if not (plain_view or original.sees_source):
        sees = "views of the original's, which are not replayed"
        named = digest_json([original.name, original.digest])
        views = {"digest": f"{FOREIGN}{original.name}:{named}", "num_views": original.num_views}
        identity["views"] = views | {"settings": {}}
    facts = {
        "format": original.name,
        "teacher_saw": sees,
        "missing": list(original.missing),
        **original.facts,
    }
    fields = {"codec": codec, "identity": identity, "attributes": {"imported": facts}}
    return manifest.model_copy(update=fields), samples


def _codec(codec: Codec, original: Original) -> dict[str, Any]:
    if not isinstance(codec, OpenCodec):
        raise ConfigError(
            f"import, format {original.name}: capture.codec: {codec.name!r} holds the ground truth's probability; "
            'an original lacks it where it dropped the class; set capture.codec = "open"'
        )
    return replace(codec, stats=False, max_temperature=1.0).to_dict()
