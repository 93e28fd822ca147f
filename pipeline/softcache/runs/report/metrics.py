"""Metrics of the report: NumPy in, NumPy out; of rows, or of the contents of a cache."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from softcache.labels import STATS
from softcache.reader.cache import Cache

__all__ = [
    "MASS_TEMPERATURES",
    "Bin",
    "agrees_with_teacher",
    "break_even",
    "by_class",
    "by_decile",
    "calibration_error",
    "deciles",
    "entropies",
    "kept_by_k",
    "kept_masses",
    "misses_teacher",
    "reliability",
]

BINS = 10
MASS_TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
MAX_ROWS = 65536
"""Of the cache, read for a histogram."""


def _rows(cache: Cache) -> Any:
    samples = cache.samples_in(0)
    counts = np.cumsum(cache.rows.counts(samples))
    return cache.read(samples[: max(1, int(np.searchsorted(counts, MAX_ROWS)))], 0)


def kept_masses(cache: Cache) -> dict[float, np.ndarray]:
    """Returns the mass [P] of the kept classes of view 0, for each temperature that the cache reaches."""
    labels = _rows(cache)
    return {t: np.asarray(labels.kept_mass(t)) for t in _served(cache)}


def kept_by_k(cache: Cache) -> dict[tuple[float, float], float]:
    """Returns the mean mass of the K likeliest classes of view 0 at T, by (K, T); empty where classes were drawn.

    K is each power of two that the cache keeps, and all that it keeps.
    """
    if cache.manifest.codec.get("sampling"):
        return {}
    labels = _rows(cache)
    counts = sorted({*(2**power for power in range(labels.k.bit_length())), labels.k})
    found: dict[tuple[float, float], float] = {}
    for t in _served(cache):
        mass_PK = np.exp(np.asarray(labels.at_temperature(t).log_probs, np.float64)).cumsum(1)
        found |= {(k, t): float(np.minimum(mass_PK[:, k - 1], 1).mean()) for k in counts}
    return found


def _served(cache: Cache) -> list[float]:
    """Returns those of `MASS_TEMPERATURES` that a cache reaches."""
    highest = cache.manifest.codec.get("max_temperature")
    return [t for t in MASS_TEMPERATURES if highest is None or t <= highest]


def entropies(cache: Cache) -> np.ndarray | None:
    """Returns the teacher's entropy [P] at T = 1 of view 0, nats; None where the cache does not have it."""
    stats = _rows(cache).stats
    return None if stats is None else np.asarray(stats[:, STATS.index("entropy")], np.float64)


class Bin(NamedTuple):
    """Rows whose confidence is in one interval: how many, how sure on average, how often right."""

    rows: int
    confidence: float
    accuracy: float


def reliability(confidence_P: np.ndarray, correct_P: np.ndarray, *, bins: int = BINS) -> list[Bin]:
    """Returns the bins (0, 1/n], (1/n, 2/n], … that have rows."""
    number_P = np.clip(np.ceil(confidence_P * bins).astype(int) - 1, 0, bins - 1)
    return [
        Bin(int(chosen.sum()), float(confidence_P[chosen].mean()), float(correct_P[chosen].mean()))
        for number in range(bins)
        if (chosen := number_P == number).any()
    ]


def calibration_error(confidence_P: np.ndarray, correct_P: np.ndarray, *, bins: int = BINS) -> float:
    """Returns the expected calibration error (arXiv 1706.04599, eq. 3) over equal intervals of confidence."""
    found = reliability(confidence_P, correct_P, bins=bins)
    return sum(one.rows * abs(one.accuracy - one.confidence) for one in found) / len(confidence_P)


def deciles(confidence_P: np.ndarray) -> np.ndarray:
    """Returns int64 [P], 0 (the tenth of the rows with the least confidence) to 9; ties by their order."""
    order = np.argsort(confidence_P, kind="stable")
    out = np.empty(len(order), np.int64)
    out[order] = np.arange(len(order)) * 10 // max(len(order), 1)
    return out


def by_decile(values_P: np.ndarray, decile_P: np.ndarray) -> list[float | None]:
    """Returns the mean of each tenth, None of an empty one."""
    return [
        float(values_P[d == 1].mean()) if (d := (decile_P == n).astype(int)).any() else None
        for n in range(10)
    ]


def by_class(values_P: np.ndarray, targets_P: np.ndarray, classes_C: np.ndarray) -> list[float | None]:
    """Returns the mean over the rows of each class, None where there is no row."""
    return [float(values_P[chosen].mean()) if (chosen := targets_P == c).any() else None for c in classes_C]


def agrees_with_teacher(teacher_P: np.ndarray, student_P: np.ndarray, targets_P: np.ndarray) -> np.ndarray:
    """Returns the rows [n] on which student and teacher predict the same class, which is not the label."""
    return np.flatnonzero((teacher_P == student_P) & (teacher_P != targets_P))


def misses_teacher(teacher_P: np.ndarray, student_P: np.ndarray, targets_P: np.ndarray) -> np.ndarray:
    """Returns the rows [n] on which the teacher is right and the student is not."""
    return np.flatnonzero((teacher_P == targets_P) & (student_P != targets_P))


def break_even(num_views: int, epochs: float) -> int:
    """Returns the number of students at which the cache needs no more teacher passes than an online teacher."""
    return max(1, math.ceil(num_views / epochs))
