"""Which samples of a cache are looked at, and a few numbers of each: enough to sort and to filter by.

A cache of millions of rows is never read whole: whole chunks, spread evenly over view 0, are decoded, within bounds of
samples, rows and bytes. What was looked at is part of the result.

Shape suffixes: `S` samples, `P` rows, `K` kept classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from softcache.labels import STATS, BernoulliLabels, DetectionLabels, SoftLabels
from softcache.reader.cache import Cache

__all__ = [
    "MAX_VIEWS",
    "NONE",
    "Overview",
    "choose_samples",
    "is_background",
    "row_entropies",
    "summarize",
    "top_classes",
]

MAX_SAMPLES, MAX_ROWS, MAX_BYTES = 10_000, 100_000, 2**28
MAX_CHUNKS = 64
MAX_VIEWS = 8
"""Of a sample, read to compare the teacher with itself."""
NONE = -1


@dataclass
class Overview:
    """Numbers of the samples that are looked at.

    Attributes:
        sample_S: int64, ascending.
        guess_S: int64, the teacher's likeliest class (of tokens and cells: of the surest row); -1: none is kept.
        confidence_S: float, its probability.
        doubt_S: float, nats: the entropy; of several rows their mean.
        target_S: int64, the ground truth; -1 where the cache has none.
        agrees_S: float, share of the sample's rows whose likeliest class is the ground truth; NaN: not known.
        same_S: float, share of the other views on which the teacher's class is that of view 0; NaN: not known.
        rows_S: int64, rows of view 0.
    """

    sample_S: np.ndarray
    guess_S: np.ndarray
    confidence_S: np.ndarray
    doubt_S: np.ndarray
    target_S: np.ndarray
    agrees_S: np.ndarray
    same_S: np.ndarray
    rows_S: np.ndarray


def choose_samples(cache: Cache) -> np.ndarray:
    """Returns the samples [S] int64, ascending, that are looked at: all of a small cache, else chunks, evenly spread."""
    finished = cache.samples_in(0)
    if not len(finished):
        return finished
    plan = cache.manifest.plan
    views = min(cache.num_views, MAX_VIEWS)
    rows_each = max(1.0, cache.num_rows_done / max(cache.num_samples_done, 1))
    budget = max(1, int(min(MAX_SAMPLES, MAX_ROWS / (rows_each * views))))
    if len(finished) <= budget:
        return finished
    unit_bytes = sum(cache.bytes_by_column().values()) / max(len(cache.markers), 1)
    units = np.unique(finished // plan.unit_samples)
    units = _evenly(units, max(1, int(MAX_BYTES / max(unit_bytes * views, 1))))
    inside = (
        finished[np.isin(finished // plan.unit_samples, units)] if len(units) < plan.num_units else finished
    )
    chunks = np.unique(inside // plan.chunk_samples)
    chunks = _evenly(chunks, min(MAX_CHUNKS, max(4, -(-budget // plan.chunk_samples))))
    return _evenly(inside[np.isin(inside // plan.chunk_samples, chunks)], budget)


def _evenly(values: np.ndarray, count: int) -> np.ndarray:
    """Returns at most `count` of the values, evenly spread."""
    if len(values) <= count:
        return values
    return values[np.linspace(0, len(values) - 1, count).round().astype(np.int64)]


def summarize(cache: Cache, sample_S: np.ndarray, targets: np.ndarray) -> Overview:
    """Returns the numbers of samples; reads their rows in the first `MAX_VIEWS` views.

    Args:
        targets: [N] the ground truth of all samples; empty where the cache has none.
    """
    stored = cache.read_stored(sample_S, 0)
    labels, counts_S = _distributions(stored.labels), stored.counts
    guess_P, confidence_P = top_classes(labels, 1)
    guess_P, confidence_P = guess_P[:, 0], confidence_P[:, 0]
    owner_P = np.repeat(np.arange(len(sample_S)), counts_S)
    surest_S = _surest(owner_P, np.where(is_background(cache, guess_P), -1.0, confidence_P), len(sample_S))
    has_rows_S = counts_S > 0
    target_S = targets[sample_S] if len(targets) else np.full(len(sample_S), NONE)
    if not isinstance(stored.labels, SoftLabels):  # what is stored counts classes or boxes
        target_S = np.full(len(sample_S), NONE)
    guess_S = np.where(has_rows_S, guess_P[surest_S], NONE) if len(guess_P) else np.full(len(sample_S), NONE)
    confidence_S = (
        np.where(has_rows_S, confidence_P[surest_S], np.nan)
        if len(guess_P)
        else np.full(len(sample_S), np.nan)
    )
    return Overview(
        sample_S,
        guess_S,
        confidence_S,
        _mean_of(row_entropies(labels), owner_P, len(sample_S)),
        np.where(target_S < cache.num_classes, target_S, NONE),
        _agreement(cache, labels, guess_S, target_S, owner_P),
        _sameness(cache, sample_S, guess_S),
        counts_S,
    )


def _distributions(labels: Any) -> SoftLabels | BernoulliLabels:
    return labels.labels if isinstance(labels, DetectionLabels) else labels


def is_background(cache: Cache, guess_P: np.ndarray) -> np.ndarray:
    """Whether the class of a row is the background of a detector with a softmax."""
    names = cache.manifest.class_names
    is_softmax = cache.manifest.kind == "cells" and names[:1] == ("background",)
    return guess_P == 0 if is_softmax else np.zeros(len(guess_P), bool)


def _surest(owner_P: np.ndarray, confidence_P: np.ndarray, count: int) -> np.ndarray:
    """Returns the row [count] of the largest value of each owner; 0 of an owner without rows."""
    out = np.zeros(count, np.int64)
    order = np.lexsort((-np.arange(len(owner_P)), confidence_P, owner_P))
    out[owner_P[order]] = order  # the last of an owner stays: its largest, of equal ones the first
    return out


def _mean_of(values_P: np.ndarray, owner_P: np.ndarray, count: int) -> np.ndarray:
    known_P = ~np.isnan(values_P)
    sums = np.bincount(owner_P[known_P], values_P[known_P], count)
    rows = np.bincount(owner_P[known_P], minlength=count)
    return np.where(rows > 0, sums / np.maximum(rows, 1), np.nan)


def top_classes(labels: SoftLabels | BernoulliLabels, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the likeliest kept classes [P, n] int64, -1 where a slot is unused, and their probabilities at T = 1."""
    ids_PK = np.asarray(labels.ids).astype(np.int64)
    if isinstance(labels, BernoulliLabels):
        p_PK = 1 / (1 + np.exp(-np.asarray(labels.logits, np.float64)))
    else:
        p_PK = np.exp(np.asarray(labels.log_probs, np.float64))
    order = np.argsort(-p_PK, axis=1, kind="stable")[:, :count]
    ids, p = np.take_along_axis(ids_PK, order, 1), np.take_along_axis(p_PK, order, 1)
    used = (ids >= 0) & (ids < labels.num_classes)
    return np.where(used, ids, NONE), np.where(used, p, 0.0)


def row_entropies(labels: SoftLabels | BernoulliLabels) -> np.ndarray:
    """Returns the entropy [P] of each row at T = 1, nats; without statistics at least so much: that of the kept classes, and
    of all dropped ones as one. Of independent classes it is the sum over the kept ones."""
    if isinstance(labels, BernoulliLabels):
        p_PK = 1 / (1 + np.exp(-np.asarray(labels.logits, np.float64)))
        return (_plogp(p_PK) + _plogp(1 - p_PK)).sum(1)
    if labels.stats is not None:
        return np.asarray(labels.stats[:, STATS.index("entropy")], np.float64)
    kept_PK = np.exp(np.asarray(labels.exact(labels.log_probs), np.float64))
    return _plogp(kept_PK).sum(1) + _plogp(np.maximum(0.0, 1 - kept_PK.sum(1)))


def _plogp(p: np.ndarray) -> np.ndarray:
    return -p * np.log(np.where(p > 0, p, 1.0))


def _agreement(
    cache: Cache, labels: Any, guess_S: np.ndarray, target_S: np.ndarray, owner_P: np.ndarray
) -> np.ndarray:
    unknown = np.full(len(guess_S), np.nan)
    if (
        not isinstance(labels, SoftLabels)
        or cache.manifest.codec.get("sampling")
        or cache.manifest.kind == "cells"
    ):
        return unknown  # the likeliest of drawn classes need not be the teacher's
    if cache.manifest.kind != "tokens":
        return np.where(target_S >= 0, guess_S == target_S, np.nan)
    if labels.target_log_prob is None:
        return unknown
    hits_P = labels.target_log_prob.astype(labels.log_probs.dtype) >= labels.log_probs[:, 0]
    return _mean_of(hits_P.astype(float), owner_P, len(guess_S))


def _sameness(cache: Cache, sample_S: np.ndarray, guess_S: np.ndarray) -> np.ndarray:
    """Returns the share of further views with the class of view 0, of the views whose rows are finished."""
    manifest = cache.manifest
    if manifest.rows is not None or manifest.mixes_images or manifest.codec.get("sampling"):
        return np.full(len(sample_S), np.nan)
    equal_S, seen_S = np.zeros(len(sample_S)), np.zeros(len(sample_S))
    for view in range(1, min(cache.num_views, MAX_VIEWS)):
        there = np.flatnonzero(np.isin(sample_S, cache.samples_in(view), assume_unique=True))
        if len(there):
            found_P = top_classes(_distributions(cache.read(sample_S[there], view)), 1)[0][:, 0]
            equal_S[there] += found_P == guess_S[there]
            seen_S[there] += 1
    return np.where(seen_S > 0, equal_S / np.maximum(seen_S, 1), np.nan)
