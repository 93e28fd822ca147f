"""The figures of a cache: at each temperature how its rows differ from their teacher, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from softcache.labels import SoftLabels
from softcache.reader.cache import Cache
from softcache.tools.fidelity.frontier import Point, frontier
from softcache.tools.fidelity.metrics import measure
from softcache.tools.fidelity.reference import STUDENT_T, ReferenceDistribution
from softcache.tools.fidelity.teacher_logits import Rerun, check_measured

__all__ = ["bytes_per_position", "measure_cache"]

LABEL_FREE = ("fingerprint", "position", "num_rows")


def measure_cache(
    cache: Cache,
    rerun: Rerun,
    *,
    temperatures: Sequence[float],
    progress: Callable[[int], None] = lambda points: None,
) -> tuple[dict[str, Any], list[Point]]:
    """Returns the report of a cache, ready for JSON, and the points of the frontier at the same temperatures.

    Raises:
        TemperatureError: the cache does not reach one of the temperatures.
    """
    check_measured(cache)
    sizes = bytes_per_position(cache)
    if cache.manifest.store == "zarr":
        other_bytes = sum(size for name, size in sizes.items() if name in LABEL_FREE)
    else:  # Parquet's one file holds all: 8 bytes of fingerprint per sample are most of what is not labels
        other_bytes = 8.0 * cache.num_samples_done / cache.num_rows_done
    by_temperature = {
        f"{t:g}": _summary(rerun, ReferenceDistribution(rerun.logits_PV, t)) | _tail_bounds(rerun.labels, t)
        for t in temperatures
    }
    points = frontier(
        rerun, cache.manifest, temperatures=temperatures, other_bytes=other_bytes, progress=progress
    )
    report = {
        "cache": cache.url,
        "manifest_sha256": cache.manifest_sha256,
        "teacher": cache.manifest.identity["teacher"],
        "source": cache.manifest.identity["source"]["name"],
        "labels": cache.manifest.identity["labels"],
        "codec": cache.manifest.codec,
        "num_classes": cache.num_classes,
        "rows": len(rerun),
        "samples": rerun.num_samples,
        "student_temperature": STUDENT_T,
        "bytes_per_position": sizes | {"total": sum(sizes.values())},
        "temperatures": by_temperature,
        "frontier": [point.to_dict() for point in points],
    }
    return report, points


def bytes_per_position(cache: Cache) -> dict[str, float]:
    """Returns the stored bytes of a row by column, from the markers; Parquet has "all columns" only."""
    return {name: total / cache.num_rows_done for name, total in cache.bytes_by_column().items()}


def _summary(rerun: Rerun, truth: ReferenceDistribution) -> dict[str, float]:
    found = measure(rerun.labels, truth)
    out = {
        "top1_agreement": _mean(found["agrees"]),
        "kept_mass": _mean(found["kept_mass"]),
        "gradient_error": float(found["gradient"].sum() / truth.gradient_P.sum()) ** 0.5,
        "gradient_mean_square": _mean(found["gradient"]),
    }
    if "total_mass" in found:
        mass_P = found["total_mass"]
        return out | {"total_mass_mean": _mean(mass_P), "total_mass_std": float(mass_P.std(correction=0))}
    return out | {
        "kl_mean_nats": _mean(found["kl_nats"]),
        "kl_max_nats": float(found["kl_nats"].max()),
        "bucket_kl_mean_nats": _mean(found["bucket_kl_nats"]),
        "bucket_kl_max_nats": float(found["bucket_kl_nats"].max()),
        "tail_error_mean": _mean(found["tail_error"].abs()),
        "tail_error_max": float(found["tail_error"].abs().max()),
    }


def _tail_bounds(labels: SoftLabels, temperature: float) -> dict[str, float]:
    error_P = labels.tail_error(temperature)
    return {"tail_bound_p99": float(np.percentile(error_P, 99)), "tail_bound_max": float(error_P.max())}


def _mean(x_P: Tensor) -> float:
    return float(x_P.mean())
