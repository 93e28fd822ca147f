"""The second pass: the cache that a capture would have made, unit by unit, from answers instead of from a teacher.

The manifest is that of a capture, with policy "imported", a teacher known by name only, and a codec without `stats`
whose labels are known at T=1. Units are claimed, written and published as a capture does it, so an import that was
killed goes on, and several can be at it together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np

from softcache.cache.codecs import Codec
from softcache.cache.create import create_cache
from softcache.cache.manifest import Manifest, Unit
from softcache.cache.repair import usable_units
from softcache.cache.storage.open import open_objects
from softcache.cache.units import claimed_units, fold_if_possible, open_index, open_store, publish_unit
from softcache.data.sources.text.source import TokenSource
from softcache.data.tokens import TokenData
from softcache.errors import LabelError, SourceError
from softcache.labels.sparsify import TopK
from softcache.reader.cache import Cache
from softcache.reader.open import open_cache
from softcache.runtime.logging import count_found
from softcache.teacher.base import TeacherFacts
from softcache.teacher.capture.plan import CaptureSettings, plan_manifest
from softcache.teacher.capture.run import CaptureReport
from softcache.tools.import_logprobs.index import Responses
from softcache.tools.import_logprobs.labels import check_not_renormalized, label_batch

__all__ = ["check_attention", "import_labels"]

POLICY = "imported"
FIRST_ROWS = 256
"""That are looked at before anything is written."""


def import_labels(
    responses: Responses,
    data: TokenData,
    url: str,
    *,
    k: int,
    settings: CaptureSettings,
    model_name: str | None = None,
    allow_missing: bool = False,
    is_truncated: bool = False,
    progress: Callable[[int], None] = lambda rows: None,
) -> tuple[Cache, CaptureReport]:
    """Returns the cache at `url` with every unit that the answers fill, and what was done.

    Killed at any moment and run again, it completes what is missing. Units that are finished are not looked at, so
    their samples need not be answered again; those that another import holds are waited for, and taken over if it dies.

    Args:
        k: kept tokens of each row.
        settings: units, chunks, store and precision, as for a captured cache; how many samples are read at a time.
        model_name: of the teacher; None takes the answers' own.
        allow_missing: leave out units that the answers do not fill, to be made by a later import.
        is_truncated: the server renormalized over its top-k or top-p, and the labels are of the teacher that is cut so:
            nothing is left for the tokens that are not given.
        progress: called with a number of finished rows, those that were there at the start first.

    Raises:
        SourceError: samples hold several documents that must not see each other, as a server's prompt would let them.
        AlignmentError: an answer is of other tokens than the sample; the first is named.
        LabelError: an answer lacks rows or breaks what log-probabilities must be, a unit's can only be renormalized
            and are not declared to be, samples are not answered, or no model is named.
        IdentityError: there is a cache of something else.
    """
    started, report = time.monotonic(), CaptureReport()
    check_attention(data.source, cross_documents=data.cross_documents)
    manifest, samples = _manifest(
        responses, data, k=k, settings=settings, model_name=model_name, is_truncated=is_truncated
    )
    if open_objects(url).size("manifest.json") is None:
        if not allow_missing:
            _check_complete(responses, data.source, manifest, set())
        if not is_truncated:
            _check_first(responses, data, manifest.soft_codec("import"))
    objects = open_objects(url, create=True)
    manifest, digest = create_cache(objects, manifest, samples)
    index = open_index(objects, manifest, digest)
    finished = usable_units(index)
    if not allow_missing:
        _check_complete(responses, data.source, manifest, finished)
    count_found(progress, finished.num_rows)
    store, codec = open_store(manifest, objects), manifest.soft_codec("import")
    missing = map(manifest.plan.unit, finished.missing.tolist())
    pending = (unit for unit in missing if responses.found[unit.start : unit.stop].all())
    for unit in claimed_units(index, pending):
        columns = _unit_columns(unit, data, responses, codec, settings.batch_size, is_truncated=is_truncated)
        marker = publish_unit(objects, store, digest, unit, columns)
        report.units_done += 1
        report.rows += marker.num_rows
        progress(marker.num_rows)
    fold_if_possible(index)
    report.seconds = time.monotonic() - started
    cache = open_cache(url)
    report.units_found = len(cache.markers) - report.units_done
    return cache, report


def _unit_columns(
    unit: Unit, data: TokenData, responses: Responses, codec: Codec, batch_size: int, *, is_truncated: bool
) -> dict[str, np.ndarray]:
    source, parts, least = data.source, [], []
    for start in range(unit.start, unit.stop, batch_size):
        batch = data.load(range(start, min(start + batch_size, unit.stop)))
        labels, least_P = label_batch(batch, source, responses, codec, is_truncated=is_truncated)
        columns = codec.encode(labels)
        least.append(least_P)
        columns["fingerprint"] = batch.fingerprints
        columns["num_rows"] = batch.row_counts.astype(np.uint32)
        columns["position"] = batch.positions.astype(np.uint32)
        parts.append(columns)
    if not is_truncated:
        place = responses.answer(unit.start, source.key(unit.start)).place
        check_not_renormalized(np.concatenate(least), codec.num_classes, place)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _check_first(responses: Responses, data: TokenData, codec: Codec) -> None:
    """Raises LabelError where the first rows can only be renormalized, before a manifest has it that they are not."""
    answered, least = np.flatnonzero(responses.found), np.zeros(0)
    for sample in answered:
        batch = data.load(np.array([sample]))
        least = np.append(least, label_batch(batch, data.source, responses, codec)[1])
        if len(least) >= FIRST_ROWS:
            break
    if len(answered):
        place = responses.answer(int(answered[0]), data.source.key(int(answered[0]))).place
        check_not_renormalized(least, codec.num_classes, place)


def _manifest(
    responses: Responses,
    data: TokenData,
    *,
    k: int,
    settings: CaptureSettings,
    model_name: str | None,
    is_truncated: bool,
) -> tuple[Manifest, bytes]:
    """Returns the manifest that a captured cache would have, of a teacher known by name and labels known at T=1."""
    name = model_name or responses.model
    if name is None:
        raise LabelError(
            "responses: none names its `model`; give --model-name, the teacher's name in the cache's identity"
        )
    server = TeacherFacts(f"imported:{name}", data.source.vocab_size)
    manifest, samples = plan_manifest(data, server, TopK(k=k, temperatures=(1.0,)), settings)
    codec = replace(manifest.soft_codec("import"), stats=False, max_temperature=1.0).to_dict()
    identity = manifest.identity | {
        "codec": codec,
        "labels": manifest.identity["labels"]
        | {"policy": POLICY}
        | ({"truncated": True} if is_truncated else {}),
    }
    return manifest.model_copy(update={"codec": codec, "identity": identity}), samples


def check_attention(source: TokenSource, *, cross_documents: bool) -> None:
    """Raises SourceError where samples hold several documents that must not see each other, as a server lets them."""
    if source.packing != "documents" and not cross_documents:
        raise SourceError(
            f"source {source.name}: its samples are packed ({source.packing}), and attention stays inside a document; a "
            "server lets a prompt see all of itself, so its labels would be of something else; set "
            'source.packing = "documents", or source.cross_documents = true if students shall see across documents too'
        )


def _check_complete(
    responses: Responses, source: TokenSource, manifest: Manifest, finished: Collection[int]
) -> None:
    """Raises unless every sample of a unit that is not finished has an answer."""
    wanted = np.ones(len(source), bool)
    for number in finished:
        unit = manifest.plan.unit(number)
        wanted[unit.start : unit.stop] = False
    missing = np.flatnonzero(wanted & ~responses.found)
    if len(missing):
        failed = f"; {responses.num_failed} requests had failed, the first: {responses.first_failed}"
        raise LabelError(
            f"responses: {len(missing):,} of {len(source):,} samples are not answered, the first: "
            f"{source.key(int(missing[0]))!r}{failed if responses.num_failed else ''}; add the files that have them, or "
            "give --allow-missing to import the units that are whole"
        )
