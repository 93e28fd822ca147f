"""Checks that caches can be fused: labels of one kind, for the same samples and the same views."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from softcache.errors import AlignmentError, IncompleteCacheError, LabelError
from softcache.reader.cache import Cache, CachedBatch

__all__ = ["check_agreement", "check_same_rows", "check_teachers"]

SCORED_SAMPLES = 2048
"""Of each cache, evenly spread over its plain view: their ground truth scores a teacher."""
LEAST_SHARE = 0.5
"""Of the best teacher's accuracy, which every teacher has to have."""

DIGESTS = {
    "views": ("were seen through another transform", "make both with the same [views]"),
    "tokenizer": ("were cut by another tokenizer", "fuse teachers of one tokenizer"),
    "attention": ("were attended to otherwise", "make both with the same source.cross_documents"),
}


def check_agreement(caches: Sequence[Cache]) -> None:
    """Raises unless the caches can be fused, as far as this is known before their rows are read.

    Raises:
        LabelError: fewer than two caches, one of them twice, or labels that cannot be fused.
        IncompleteCacheError: units are missing.
        AlignmentError: they are of other samples, views or tokens.
    """
    if len(caches) < 2:
        raise LabelError(f"fuse: {len(caches)} cache given; at least two are needed; name another one")
    for number, cache in enumerate(caches):
        _check_usable(cache)
        for other in caches[:number]:
            if cache.manifest_sha256 == other.manifest_sha256:
                raise LabelError(
                    f"fuse: {cache.url} and {other.url} are the same cache; name each teacher's cache once"
                )
        if number:
            _check_labels(caches[0], cache)
            _check_samples(caches[0], cache)


def check_teachers(caches: Sequence[Cache]) -> None:
    """Raises where a teacher hardly knows the classes: most often its outputs are in another order than their names.

    A teacher's accuracy on the ground truth has to be well above 1/V, that of guessing, and at least half of the best one's.
    Caches without ground truth are not scored.

    Raises:
        LabelError: a teacher is too weak; it and its accuracy are named.
    """
    scores = [_accuracy(cache) for cache in caches]
    best = max((score for score in scores if score is not None), default=0.0)
    for cache, score in zip(caches, scores, strict=True):
        chance = 1.0 / cache.num_classes
        least = chance + min(chance, 0.1 * (1.0 - chance))
        if score is None or (score > least and score >= LEAST_SHARE * best):
            continue
        raise LabelError(
            f"cache {cache.url}: its teacher is right on {score:.1%} of the ground truth; expected above {least:.1%} "
            f"(guessing has {chance:.1%}) and at least half of the best one's {best:.1%}: are its outputs in the order of "
            "the class names? Fuse without it, or set fusion.allow_weak_teachers (--allow-weak-teachers)"
        )


def _accuracy(cache: Cache) -> float | None:
    """Returns the share of a plain view's rows whose most likely class is the ground truth; None where none is known."""
    num_samples = cache.manifest.plan.num_samples
    samples = np.unique(np.linspace(0, num_samples - 1, min(num_samples, SCORED_SAMPLES)).astype(np.int64))
    labels = cache.read_stored(samples, 0).labels
    if labels.target_log_prob is None:
        return None
    known_P = ~np.isnan(labels.target_log_prob)
    right_P = labels.target_log_prob.astype(labels.log_probs.dtype) >= labels.log_probs[:, 0]
    return float(right_P[known_P].mean()) if known_P.any() else None


def _check_usable(cache: Cache) -> None:
    where = f"cache {cache.url}"
    codec = cache.manifest.soft_codec(f"fuse, {where}")
    if not cache.is_complete:
        raise IncompleteCacheError(
            f"{where}: {cache.describe_missing()}; finish it with "
            "`softcache teacher-logits` before it is fused"
        )
    if codec.sampling is not None:
        raise LabelError(
            f"{where}: its classes were drawn at random (policy {cache.manifest.identity['labels']['policy']!r}), and what "
            'one teacher drew another one did not; capture with labels.policy = "top_k"'
        )
    if codec.max_temperature is not None or not codec.stats:
        raise LabelError(
            f"{where}: its labels were imported and are known at T = 1 only, without statistics, so a dropped class cannot "
            "be estimated; capture with `softcache teacher-logits`"
        )


def _check_labels(first: Cache, cache: Cache) -> None:
    here, there, where = first.manifest, cache.manifest, f"cache {cache.url}"
    if here.kind != there.kind:
        raise AlignmentError(
            f"{where}: holds labels of kind {there.kind!r}, {first.url} of {here.kind!r}; fuse caches of one source"
        )
    if here.num_classes != there.num_classes or here.class_names != there.class_names:
        raise LabelError(
            f"{where}: {there.num_classes} classes {_some(there.class_names)}; {first.url} has {here.num_classes} "
            f"{_some(here.class_names)}; fuse teachers of the same classes or vocabulary"
        )
    grids = [list(manifest.build_codec().temperatures) for manifest in (here, there)]
    if grids[0] != grids[1]:
        raise LabelError(
            f"{where}: its tail is stored at the temperatures {grids[1]}, that of {first.url} at {grids[0]}; give both the "
            "same with `softcache shrink --temperatures`"
        )


def _some(names: Sequence[str]) -> str:
    return f"({', '.join(names[:3])}, …)" if names else ""


def _check_samples(first: Cache, cache: Cache) -> None:
    here, there, where = first.manifest, cache.manifest, f"cache {cache.url}"
    for part, (what, then) in DIGESTS.items():
        digests = [manifest.identity.get(part, {}).get("digest") for manifest in (here, there)]
        if digests[0] != digests[1]:
            raise AlignmentError(f"{where}: its samples {what} than those of {first.url}; {then}")
    positions = [manifest.identity["labels"].get("positions") for manifest in (here, there)]
    if positions[0] != positions[1]:
        raise AlignmentError(
            f"{where}: its labels are of other positions than those of {first.url} (labels.positions {positions[1]}; "
            f"{positions[0]}); capture with the same"
        )
    if here.plan.num_views != there.plan.num_views:
        raise AlignmentError(
            f"{where}: {there.plan.num_views} views, {first.url} has {here.plan.num_views}; cut the larger one with "
            "`softcache shrink --views`"
        )
    _check_tables(first, cache)
    if here.identity["source"]["digest"] != there.identity["source"]["digest"]:
        raise AlignmentError(
            f"{where}: {_content_difference(first, cache)}; fuse caches of one source, of which nothing changed in between"
        )


def _check_tables(first: Cache, cache: Cache) -> None:
    here, there, where = first.samples_table(), cache.samples_table(), f"cache {cache.url}"
    if len(here.keys) != len(there.keys):
        odd = sorted(set(here.keys) ^ set(there.keys))
        raise AlignmentError(
            f"{where}: {len(there.keys)} samples, {first.url} has {len(here.keys)} (in one of them only: {odd[0]!r}); fuse "
            "caches of one source"
            if odd
            else f"{where}: {len(there.keys)} samples, {first.url} has {len(here.keys)}; fuse caches of one source"
        )
    for sample, (one, other) in enumerate(zip(here.keys, there.keys, strict=True)):
        if one != other:
            raise AlignmentError(
                f"{where}: sample {sample} is {other!r}, in {first.url} it is {one!r}; fuse caches of one source, in one "
                "order"
            )
    for what, one_N, other_N in (
        ("ground truth", here.targets, there.targets),
        ("rows", here.num_rows, there.num_rows),
    ):
        if len(one_N) != len(other_N):
            raise AlignmentError(
                f"{where}: {what} of {len(other_N)} samples, {first.url} of {len(one_N)}; fuse caches of one source"
            )
        for sample in np.flatnonzero(one_N != other_N)[:1]:
            raise AlignmentError(
                f"{where}: sample {here.keys[sample]!r} has {what} {other_N[sample]}, in {first.url} {one_N[sample]}; fuse "
                "caches of one source"
            )


def _content_difference(first: Cache, cache: Cache) -> str:
    """Returns which sample's contents differ; reads rows, on this path only."""
    keys = first.samples_table().keys
    for samples in np.array_split(np.arange(len(first)), max(1, len(first) // 2048)):
        found = check_same_rows(first.read_stored(samples), cache.read_stored(samples))
        if found is not None:
            return f"sample {keys[samples[found[0]]]!r}: {found[1]} than in {first.url}"
    return f"its source has another digest than that of {first.url}, though keys, ground truth and contents are the same"


def check_same_rows(one: CachedBatch, other: CachedBatch) -> tuple[int, str] | None:
    """Returns which of the samples has other contents or rows in two caches, and what differs; None: none has."""
    for place in np.flatnonzero(one.fingerprints != other.fingerprints)[:1]:
        return int(
            place
        ), f"another content ({other.fingerprints[place]:016x}, not {one.fingerprints[place]:016x})"
    for place in np.flatnonzero(one.counts != other.counts)[:1]:
        return int(place), f"{other.counts[place]} rows, not {one.counts[place]}, so other ones"
    if one.positions is not None:
        assert other.positions is not None
        samples = np.repeat(np.arange(len(one.counts)), one.counts)
        for row in np.flatnonzero(one.positions != other.positions)[:1]:
            return int(samples[row]), f"other positions ({other.positions[row]}, not {one.positions[row]})"
    return None
