"""Labels of a cache as a table: of Arrow, of pandas, and as a Dataset of xarray."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from softcache.errors import missing_extra
from softcache.labels import STATS, DetectionLabels, SoftLabels, VectorLabels
from softcache.labels.base import LabelsBase
from softcache.runtime.indexing import row_numbers

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

    from softcache.reader.cache import Cache

__all__ = ["arrow_table", "pandas_frame", "xarray_dataset"]

SAMPLES_AT_ONCE = 65536


class _Rows(NamedTuple):
    """The label rows of one view.

    Attributes:
        samples: [P] int64, the sample of each row.
        positions: [P] where in its sample each row is; None where each sample has one row.
        columns: [P, ...] by name: the arrays of the labels, and what is derived of them.
    """

    view: int
    samples: np.ndarray
    positions: np.ndarray | None
    columns: dict[str, np.ndarray]


def arrow_table(cache: Cache, index: Any, view: int | None) -> pa.Table:
    """See `Cache.to_arrow`."""
    parts = [_arrow_part(cache, rows) for rows in _read(cache, index, view)]
    return pa.concat_tables(parts)


def pandas_frame(cache: Cache, index: Any, view: int | None) -> pd.DataFrame:
    """See `Cache.to_pandas`."""
    _import("pandas", "Cache.to_pandas")
    return arrow_table(cache, index, view).to_pandas()


def xarray_dataset(cache: Cache, index: Any, view: int | None) -> xr.Dataset:
    """See `Cache.to_xarray`."""
    library = _import("xarray", "Cache.to_xarray")
    views = list(_read(cache, index, view))
    grid = cache.manifest.codec.get("temperatures")
    inner: dict[str, tuple[str, ...]] = dict.fromkeys(("ids", "log_probs", "logits", "counts"), ("rank",))
    inner |= {"log_tail": ("temperature",), "boxes": ("side",), "bins": ("side", "bin")}
    coordinates: dict[str, Any] = {"temperature": np.asarray(grid)} if grid else {}
    if cache.class_names:
        coordinates["class"] = np.asarray(cache.class_names, dtype=object)
    if any(rows.positions is not None for rows in views):
        dims: tuple[str, ...] = ("row",)
        columns = {name: np.concatenate([rows.columns[name] for rows in views]) for name in views[0].columns}
        samples = np.concatenate([rows.samples for rows in views])
        coordinates["view"] = (
            dims,
            np.repeat([rows.view for rows in views], [len(rows.samples) for rows in views]),
        )
        coordinates["sample"] = dims, samples
        coordinates["position"] = dims, np.concatenate([rows.positions for rows in views])  # type: ignore[arg-type]
    else:
        dims = ("view", "sample")
        columns = {name: np.stack([rows.columns[name] for rows in views]) for name in views[0].columns}
        samples = views[0].samples
        coordinates["view"] = [rows.view for rows in views]
        coordinates["sample"] = samples
    on_samples = dims[-1:]
    for name, column in _of_samples(cache, samples).items():
        coordinates[name] = on_samples, column
    variables = {
        name: (dims + inner.get(name, (name,) if column.ndim > len(dims) else ()), column)
        for name, column in columns.items()
    }
    return library.Dataset(variables, coordinates, {"cache": cache.url, "kind": str(cache.manifest.kind)})


def _read(cache: Cache, index: Any, view: int | None) -> Iterator[_Rows]:
    """Yields the rows of one view, or of every view."""
    numbers = cache.sample_numbers(index)
    views = range(cache.num_views) if view is None else row_numbers(view, cache.num_views, "views").tolist()
    for number in views:
        parts = []
        for start in range(0, max(len(numbers), 1), SAMPLES_AT_ONCE):
            chosen = numbers[start : start + SAMPLES_AT_ONCE]
            stored = cache.read_stored(chosen, number)
            parts.append((np.repeat(chosen, stored.counts), stored.positions, _columns(stored.labels)))
        samples = np.concatenate([part[0] for part in parts])
        positions = None if parts[0][1] is None else np.concatenate([part[1] for part in parts])
        columns = {name: np.concatenate([part[2][name] for part in parts]) for name in parts[0][2]}
        yield _Rows(number, samples, positions, columns)


def _columns(labels: Any) -> dict[str, np.ndarray]:
    """Returns the arrays of a record, statistics one by one, with the likeliest class and its probability."""
    if isinstance(labels, VectorLabels):
        return {name: labels.vectors(name) for name in labels.encodings}
    columns = dict(labels.arrays())
    stats = columns.pop("stats", None)
    if stats is not None:
        columns |= {name: stats[:, place] for place, name in enumerate(STATS)}
    of_classes = labels.labels if isinstance(labels, DetectionLabels) else labels
    sampling = of_classes.sampling if isinstance(of_classes, SoftLabels) else None
    if isinstance(labels, LabelsBase) and (sampling is None or sampling.exact):
        probs_PK = labels._probabilities(1.0)
        best_P = probs_PK.argmax(1) if len(probs_PK) else np.zeros(0, np.int64)
        rows_P = np.arange(len(probs_PK))
        columns = {
            "prediction": labels.ids[rows_P, best_P].astype(np.int64),
            "confidence": probs_PK[rows_P, best_P].astype(np.float32),
            **columns,
        }
    return {name: _plain(column) for name, column in columns.items()}


def _plain(column: np.ndarray) -> np.ndarray:
    """Returns a column in a type that every tool has."""
    if column.dtype.kind == "f":
        return column.astype(np.float32, copy=False)
    return column.astype(np.int64 if column.dtype.itemsize > 2 else np.int32, copy=False)


def _of_samples(cache: Cache, samples: np.ndarray) -> dict[str, Any]:
    """Returns keys and ground truth of samples; the truth where every sample has one class."""
    table = cache.samples
    found: dict[str, Any] = {"key": np.asarray(table.keys[samples], dtype=object)}
    if len(table.targets):
        found["target"] = table.targets[samples]
        if cache.class_names:
            found["target_name"] = np.asarray(_names(cache, found["target"]), dtype=object)
    return found


def _names(cache: Cache, classes: np.ndarray) -> list[str | None]:
    names = cache.class_names
    return [names[number] if 0 <= number < len(names) else None for number in classes.tolist()]


def _arrow_part(cache: Cache, rows: _Rows) -> pa.Table:
    columns: dict[str, Any] = dict(_of_samples(cache, rows.samples))
    columns["sample"] = rows.samples
    columns["view"] = np.full(len(rows.samples), rows.view, np.int32)
    if rows.positions is not None:
        columns["position"] = rows.positions.astype(np.int64)
    if rows.view and cache.manifest.mixes_images:  # such a row has two classes
        for name in {"target", "target_name"} & columns.keys():
            columns[name] = np.full(len(rows.samples), None)
    columns |= rows.columns
    if "prediction" in columns and cache.class_names:
        columns["prediction_name"] = np.asarray(_names(cache, columns["prediction"]), dtype=object)
    first = ("key", "sample", "view", "position", "target", "target_name", "prediction", "prediction_name")
    order = [name for name in first if name in columns] + [name for name in columns if name not in first]
    types: dict[str, Any] = {name: pa.string() for name in ("key", "target_name", "prediction_name")}
    types["target"] = pa.int64()
    return pa.table({name: _arrow_column(columns[name], types.get(name)) for name in order})


def _arrow_column(column: np.ndarray, kind: Any) -> pa.Array:
    """Returns an array [P, ...] as a column; what is behind the first axis as lists of one length."""
    array = pa.array(np.ascontiguousarray(column).reshape(-1), kind)
    for size in reversed(column.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, size)
    return array


def _import(package: str, wanted_by: str) -> Any:
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        raise missing_extra(error, wanted_by) from error
