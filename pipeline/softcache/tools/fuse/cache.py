"""One cache of several teachers' caches of the same samples and views.

    for every unit of the first cache: read its samples from all, compare their fingerprints, fuse the records, publish

The fused cache is cut into units as the first one is, and its rows lie where that one's do; the others may be cut
otherwise and be kept in another store or codec. Its identity names the caches by the sha256 of their manifests, and the
rule. Killed and run again, it goes on where it was; the bytes are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from softcache import __version__
from softcache.cache.codecs import OpenCodec
from softcache.cache.create import create_cache
from softcache.cache.manifest import Manifest, TeacherReport, Unit
from softcache.cache.repair import usable_units
from softcache.cache.storage.open import open_objects
from softcache.cache.units import claimed_units, fold_if_possible, open_index, open_store, publish_unit
from softcache.errors import AlignmentError, LabelError
from softcache.hashing.digests import digest_json
from softcache.labels import SoftLabels, concat
from softcache.reader.cache import Cache, CachedBatch
from softcache.reader.open import open_cache
from softcache.runtime.logging import count_found
from softcache.tools.fuse.compatibility import check_agreement, check_same_rows, check_teachers
from softcache.tools.fuse.labels import fused_labels
from softcache.tools.fuse.settings import FusionSettings
from softcache.tools.fuse.weights import Rule

__all__ = ["fuse_caches", "fused_manifest"]

CHUNK_ELEMENTS = 2**20
"""Kept classes of all teachers that are fused at once."""


def fuse_caches(
    caches: Sequence[Cache],
    target_url: str,
    settings: FusionSettings,
    *,
    progress: Callable[[int], None] = lambda rows: None,
) -> Cache:
    """Returns the fused cache at `target_url`; units of it that are finished already are kept.

    Args:
        caches: at least two, finished; `settings.caches` is not read.
        progress: called with a number of rows that are there.

    Raises:
        LabelError: labels that cannot be fused: drawn classes, other classes, another grid, one cache twice, a teacher that
            hardly knows the classes.
        IncompleteCacheError: a cache has missing units.
        AlignmentError: the caches are not of the same samples, views or tokens; where it can be, the sample is named.
        CorruptionError: a unit of one of them is damaged.
        IdentityError: there is another cache at `target_url`.
    """
    manifest = fused_manifest(caches, settings)
    first, objects = caches[0], open_objects(target_url, create=True)
    samples = open_objects(first.url).get(first.manifest.samples)
    manifest, digest = create_cache(objects, manifest, samples)
    writing, index = open_store(manifest, objects), open_index(objects, manifest, digest)
    finished = usable_units(index)
    count_found(progress, finished.num_rows)
    pending = finished.missing.tolist()
    if pending and not settings.allow_weak_teachers:
        check_teachers(caches)
    keys, targets = first.samples_table()[:2] if pending else ([], np.zeros(0, np.int64))
    codec = manifest.soft_codec("fuse")
    for unit in claimed_units(index, map(manifest.plan.unit, pending)):
        stored = _read(caches, unit, keys)
        wanted = targets[unit.start : unit.stop] if len(targets) else None
        labels = _fused([rows.labels for rows in stored], settings.rule, codec.k, wanted)
        publish_unit(objects, writing, digest, unit, {**codec.encode(labels), **_other_columns(stored[0])})
        progress(len(labels))
    fold_if_possible(index)
    return open_cache(target_url)


def _read(caches: Sequence[Cache], unit: Unit, keys: Sequence[str]) -> list[CachedBatch]:
    samples = np.arange(unit.start, unit.stop)
    stored = [cache.read_stored(samples, unit.view) for cache in caches]
    for cache, rows in zip(caches[1:], stored[1:], strict=True):
        found = check_same_rows(stored[0], rows)
        if found is not None:
            place, what = found
            raise AlignmentError(
                f"cache {cache.url}: sample {keys[unit.start + place]!r}, view {unit.view}: {what} than in "
                f"{caches[0].url}; the data, its decoder or the transform changed between the two: make them from one "
                "source"
            )
    return stored


def _fused(records: Sequence[SoftLabels], rule: Rule, k: int, targets: np.ndarray | None) -> SoftLabels:
    size = max(1, CHUNK_ELEMENTS // sum(record.k for record in records))
    parts = [slice(start, start + size) for start in range(0, max(1, len(records[0])), size)]
    return concat(
        [
            fused_labels(
                [record.take(part) for record in records],
                rule,
                k,
                targets=None if targets is None else targets[part],
            )
            for part in parts
        ]
    )


def _other_columns(stored: CachedBatch) -> dict[str, np.ndarray]:
    """The columns other than labels."""
    columns = {"fingerprint": stored.fingerprints}
    if stored.positions is not None:
        columns |= {"position": stored.positions, "num_rows": stored.counts.astype(np.uint32)}
    return columns


# -- the manifest ------------------------------------------------------------------------------------------


def fused_manifest(caches: Sequence[Cache], settings: FusionSettings) -> Manifest:
    """Returns the manifest of the fused cache; raises as `fuse_caches` does, but for checks that need the rows."""
    check_agreement(caches)
    first, manifests = caches[0].manifest, [cache.manifest for cache in caches]
    if first.mixes_images and settings.rule in ("confidence", "best"):
        raise LabelError(
            f"fuse: rule {settings.rule!r} weighs teachers by the ground-truth class; views of cache {caches[0].url} mix "
            'images, which have two classes each; choose rule "mean", "geometric" or "entropy"'
        )
    codecs = [manifest.build_codec() for manifest in manifests]
    k = settings.slots([codec.k for codec in codecs], first.num_classes)
    codec = OpenCodec(
        num_classes=first.num_classes, k=k, temperatures=codecs[0].temperatures, values=settings.values
    ).to_dict()
    labels: dict[str, Any] = {
        "policy": _policy(manifests, k),
        "k": k,
        "temperatures": list(codecs[0].temperatures),
    }
    if "positions" in first.identity["labels"]:
        labels["positions"] = first.identity["labels"]["positions"]
    sources = [cache.manifest_sha256 for cache in caches]
    identity = first.identity | {
        "teacher": {
            "spec": f"fused:{settings.rule}",
            "weights_digest": digest_json([settings.rule, *sources]),
            "dtype": "float64",
        },
        "labels": labels,
        "codec": codec,
        "fusion": {
            "rule": settings.rule,
            "caches": sources,
            "teachers": [manifest.identity["teacher"]["spec"] for manifest in manifests],
        },
    }
    parameters = sum(manifest.teacher.num_parameters for manifest in manifests)
    return first.model_copy(
        update={
            "softcache_version": __version__,
            "identity": identity,
            "codec": codec,
            "samples": "samples.parquet",
            "teacher": TeacherReport(num_parameters=parameters),
            "slimmed_from": None,
            "features": (),
            "extensions": {},
            "attributes": {},
        }
    )


def _policy(manifests: Sequence[Manifest], k: int) -> Literal["dense", "top_k"]:
    whole = all(manifest.identity["labels"]["policy"] == "dense" for manifest in manifests)
    return "dense" if whole and k == manifests[0].num_classes else "top_k"
