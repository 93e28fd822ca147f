"""Copy a cache unit by unit into another store: the columns move as they are, so nothing is lost."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from softcache.cache.create import create_cache
from softcache.cache.repair import usable_units
from softcache.cache.shared import get_shared
from softcache.cache.storage.open import open_objects
from softcache.cache.units import (
    check_unit,
    claimed_units,
    fold_if_possible,
    open_index,
    open_store,
    publish_unit,
)
from softcache.reader.cache import Cache
from softcache.reader.open import open_cache
from softcache.runtime.logging import count_found

__all__ = ["convert_cache"]


def convert_cache(
    cache: Cache, target_url: str, *, store: str, progress: Callable[[int], None] = lambda rows: None
) -> Cache:
    """Returns the copy of `cache` at `target_url`; units of it that are finished already are kept.

    Every unit of the original is checked against its marker before it is copied. Units that are missing in
    the original stay missing in the copy.

    Raises:
        CorruptionError: a unit of the original is damaged.
        IdentityError: there is another cache at `target_url`.
    """
    origin = cache.manifest
    manifest = origin.model_copy(
        update={
            "store": store,
            "data": "labels.zarr" if store == "zarr" else "parquet",
            "features": tuple(name for name in origin.features if name != "array_codecs"),
        }
    )
    objects = open_objects(target_url, create=True)
    source_objects = open_objects(cache.url)
    manifest, digest = create_cache(
        objects,
        manifest,
        source_objects.get(origin.samples),
        shared=lambda: {name: get_shared(source_objects, one) for name, one in origin.objects.items()},
    )
    reading, writing = open_store(origin, source_objects), open_store(manifest, objects)
    index = open_index(objects, manifest, digest)
    finished = usable_units(index)
    count_found(progress, finished.num_rows)
    pending = np.flatnonzero(cache.markers.is_finished & ~finished.is_finished).tolist()
    for unit in claimed_units(index, map(origin.plan.unit, pending)):
        marker = cache.markers[unit.number]
        check_unit(source_objects, marker, reading)
        rows = cache.rows.span(unit, unit.start, unit.stop)
        columns = reading.read(unit, unit.start, unit.stop, rows=rows)
        publish_unit(objects, writing, digest, unit, columns)
        progress(marker.num_rows)
    fold_if_possible(index)
    return open_cache(target_url)
