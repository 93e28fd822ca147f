"""What the cache holds: bytes per column, and per temperature how much mass the kept classes have."""

from __future__ import annotations

import numpy as np

from softcache.labels import STATS
from softcache.reader.cache import Cache

__all__ = ["MASS_TEMPERATURES", "bytes_per_row", "entropies", "kept_masses"]

MASS_TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
MAX_ROWS = 65536
"""Of the cache, read for a histogram."""


def bytes_per_row(cache: Cache) -> dict[str, float]:
    """Returns the stored bytes of a row by column; Parquet has "all columns" only."""
    from softcache.tools.fidelity.report import bytes_per_position

    return bytes_per_position(cache)


def _rows(cache: Cache) -> object:
    samples = cache.samples_in(0)
    counts = np.cumsum(cache.rows.counts(samples))
    return cache.read(samples[: max(1, int(np.searchsorted(counts, MAX_ROWS)))], 0)


def kept_masses(cache: Cache) -> dict[float, np.ndarray]:
    """Returns the mass [P] of the kept classes of view 0, for each temperature that the cache reaches."""
    highest = cache.manifest.codec.get("max_temperature")
    labels = _rows(cache)
    wanted = [t for t in MASS_TEMPERATURES if highest is None or t <= highest]
    return {t: np.asarray(labels.kept_mass(t)) for t in wanted}  # type: ignore[attr-defined]


def entropies(cache: Cache) -> np.ndarray | None:
    """Returns the teacher's entropy [P] at T = 1 of view 0, nats; None where the cache does not have it."""
    stats = _rows(cache).stats  # type: ignore[attr-defined]
    return None if stats is None else np.asarray(stats[:, STATS.index("entropy")], np.float64)
