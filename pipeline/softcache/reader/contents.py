"""What a cache answers a person: its keys and names, labels by key or index, its source, and all of it as a table.

cache = open_cache("runs/digits/cache")
cache                                        # what it is
cache["digits/0007"].top(5)                  # the teacher's likeliest classes of a sample, by name
cache[-1], cache[:100, 1], cache[mask]       # as NumPy indexes samples, and views after a comma
cache.to_pandas().nsmallest(5, "confidence")
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from softcache.cache.samples import SampleKeys, SampleTable
from softcache.cache.storage.base import is_bucket
from softcache.errors import SoftcacheError, UnknownKeyError
from softcache.labels import SoftLabels
from softcache.reader.units import CacheReaderBase
from softcache.runtime.display import Displayed, Summary, shorten_list
from softcache.runtime.indexing import row_numbers
from softcache.runtime.suggest import did_you_mean

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    import xarray as xr

    from softcache.data.sources.base import SourceSettings

__all__ = ["CacheContents"]

KEYS_COMPARED = 20_000
"""At most so many keys are compared with one that is not there: a hundred thousand take a second."""


class CacheContents(Displayed, CacheReaderBase):
    """What a cache is, has and gives by key or index."""

    @abstractmethod
    def read(self, samples: Sequence[int] | np.ndarray, view: int = 0) -> SoftLabels:
        """Returns the labels of `samples`."""

    @cached_property
    def samples(self) -> SampleTable:
        """Keys, ground truth and number of rows of every sample; read from the cache once, and kept."""
        return self.samples_table()

    @property
    def keys(self) -> SampleKeys:
        """The samples' keys [N], a sequence."""
        return self.samples.keys

    @property
    def class_names(self) -> tuple[str, ...]:
        """[V] names of the classes; () where they have none."""
        return self.manifest.class_names

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and bool(self.keys.find([key])[0] >= 0)

    def __getitem__(self, index: Any) -> SoftLabels:
        """Returns the labels of the samples that an index chooses, of view 0 or of the view after a comma.

        Args:
            index: a key, an integer (negative ones count from the end), a slice, or a list or array of keys, integers or
                booleans; or a pair of one of these and the number of a view.

        Returns:
            All rows of these samples in that order; of one sample a record of its rows.

        Raises:
            UnknownKeyError: no sample has the key (a KeyError).
            IndexError: a sample or view out of range, a mask of another length, or anything that is not an index.
            IncompleteCacheError, CorruptionError: as `read`.

        Example:
            >>> cache = open_cache("runs/digits/cache")  # doctest: +SKIP
            >>> cache["digits/0007", 1].top(1)  # doctest: +SKIP
            [[('7', 0.9991)]]
        """
        view = 0
        if isinstance(index, tuple) and len(index) == 2:
            index, number = index
            views = row_numbers(number, self.num_views, f"cache {self.url}, views")
            if len(views) != 1:
                raise IndexError(
                    f"cache {self.url}: {len(views)} views; expected one, such as cache[index, 0]"
                )
            view = int(views[0])
        return self.read(self.sample_numbers(index), view)

    def sample_numbers(self, index: Any) -> np.ndarray:
        """Returns the numbers [B] int64 of the samples that an index chooses; see `cache[...]`."""
        if isinstance(index, str):
            return self._find([index])
        if not isinstance(index, slice | tuple) and _begins_with_key(index):
            return self._find(list(index))
        return row_numbers(index, len(self), f"cache {self.url}")

    def _find(self, keys: list[str]) -> np.ndarray:
        for key in keys:
            if not isinstance(key, str):
                raise IndexError(f"cache {self.url}: {key!r} among keys; expected all of them to be texts")
        numbers = self.keys.find(keys)
        for place in np.flatnonzero(numbers < 0)[:1].tolist():
            near = did_you_mean(keys[place], islice(self.keys, KEYS_COMPARED))
            hint = near or f"keys are such as {self.keys[0]!r} (cache.keys has them)"
            raise UnknownKeyError(f"cache {self.url}: no sample has the key {keys[place]!r}; {hint}")
        return numbers

    def source(
        self, settings: SourceSettings | Mapping[str, Any] | str | os.PathLike[str] | None = None
    ) -> Any:
        """Returns the data that was labeled, opened: `.image(i)` of images, `.sample(i)` of texts, numbered as here.

        A cache keeps the name and the digest of its source, and no path.

        Args:
            settings: the [source] table of the config that made the cache: a mapping, or the path of the TOML file;
                None where the source needs no more than its name.

        Raises:
            AlignmentError: it is not the data that was labeled; the difference is named.
            ConfigError: the file is not a config.
            SpecError: the source is not one of softcache's (a cache names no code to run), or needs more settings.
        """
        from softcache.reader.sources import open_labeled_source

        return open_labeled_source(self, settings)  # type: ignore[arg-type]

    def to_arrow(self, index: Any = slice(None), *, view: int | None = None) -> pa.Table:
        """Returns labels as an Arrow table of a row per label, all in memory.

        Columns: key, sample, view; position, where a sample has several rows; target and target_name, where each has one
        class; prediction, prediction_name and confidence, the teacher's likeliest class and its probability at T = 1 (not
        where all classes are drawn); and the arrays of the labels, those of several numbers as lists.

        Args:
            index: of the samples, as in `cache[index]`.
            view: of one view alone; None takes all.

        Raises:
            KeyError, IndexError, IncompleteCacheError, CorruptionError: as `cache[index]`.
        """
        from softcache.reader.tables import arrow_table

        return arrow_table(self, index, view)  # type: ignore[arg-type]

    def to_pandas(self, index: Any = slice(None), *, view: int | None = None) -> pd.DataFrame:
        """Returns labels as a DataFrame; see `to_arrow`.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        from softcache.reader.tables import pandas_frame

        return pandas_frame(self, index, view)  # type: ignore[arg-type]

    def to_xarray(self, index: Any = slice(None), *, view: int | None = None) -> xr.Dataset:
        """Returns labels as an xarray Dataset, all in memory; see `to_arrow`.

        Dimensions are view, sample (row, where a sample has several rows), rank (the kept classes, likeliest first) and
        temperature; coordinates are key, target, target_name, temperature, and class, the names of all classes.

        Raises:
            MissingExtraError: xarray is not installed.
        """
        from softcache.reader.tables import xarray_dataset

        return xarray_dataset(self, index, view)  # type: ignore[arg-type]

    def summarize(self) -> Summary:
        manifest, identity = self.manifest, self.manifest.identity
        rows = f"{len(self):,} samples x {self.num_views} view{'s' if self.num_views != 1 else ''}"
        if manifest.rows is not None:
            rows += f", {manifest.total_rows:,} rows"
        teacher, report = identity.get("teacher", {}), manifest.teacher
        scores = {"accuracy": report.eval_accuracy, "mAP": report.eval_map, "mIoU": report.eval_miou}
        score = ", ".join(f"{name} {value:.2%}" for name, value in scores.items() if value is not None)
        labels = identity.get("labels", {})
        shown = sorted(
            (k for k in labels if not isinstance(labels[k], list)), key=lambda k: (k != "policy", k)
        )
        facts = [
            ("teacher", f"{teacher.get('spec', '?')}{f' ({score})' if score else ''}"),
            ("source", str(identity.get("source", {}).get("name", "?"))),
            (
                "labels",
                ", ".join(
                    str(labels.get("policy", "?")) if k == "policy" else f"{k} {labels[k]}" for k in shown
                ),
            ),
            ("classes", shorten_list(self.class_names)),
            ("stored", f"{manifest.codec['name']} in {manifest.store}; {self._progress()}"),
        ]
        title = f"Cache {self.url}: {manifest.kind}, {rows}, {self.num_classes:,} classes"
        return Summary(title, [(name, text) for name, text in facts if text])

    def _progress(self) -> str:
        """Returns how many units are finished; lists no bucket, and keeps nothing."""
        if self._markers is None and is_bucket(self.url):
            return f"{self.num_units:,} units, not listed yet"
        try:
            finished = len(self._markers if self._markers is not None else self.index.snapshot())
        except SoftcacheError as error:
            return f"its units cannot be listed: {error}"
        return f"{finished:,} of {self.num_units:,} units are finished"


def _begins_with_key(index: Any) -> bool:
    """Whether an index is a list, an array or a column whose first element is a text."""
    try:
        return isinstance(next(iter(index), None), str)
    except TypeError:  # a number
        return False
