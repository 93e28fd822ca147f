"""The reading half: a cache and its source, joined sample by sample and checked by content.

dataset = SoftLabelDataset(source, open_cache("runs/digits/cache"))
loader = DataLoader(dataset, batch_size=256, shuffle=True, collate_fn=dataset.collate)
for batch in loader:
    batch.images, batch.targets, batch.labels.at_temperature(4.0)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from softcache.data.batch import Dataset, ViewedSource
from softcache.errors import AlignmentError, ManifestError
from softcache.hashing.splitmix import SPLITMIX64_GAMMA, splitmix64
from softcache.reader.cache import DEFAULT_WINDOW_BLOCKS, Cache, CachedBatch, open_cache
from softcache.reader.memmap import MemmapSettings
from softcache.reader.order import Request
from softcache.settings import Settings

if TYPE_CHECKING:
    from softcache.data.transforms import Views

__all__ = [
    "FingerprintedSamples",
    "HardLabelDataset",
    "ReaderSettings",
    "SoftLabelDataset",
    "as_teacher_saw",
    "attach_labels",
    "cached_views",
    "cells_per_image",
    "check_alignment",
    "group_by_view",
]


class ReaderSettings(Settings):
    """[reader]: how a student reads the cache.

    `fingerprint_fraction` is the fraction of (sample, view) pairs whose content is compared with the fingerprint taken at
    capture; the first `fingerprint_first` samples of every loader process always are. `verify` compares each unit with
    its marker's sha256 the first time that a process reads from it.

    With `memmap` "auto" a view is decoded once into a memory map in `memmap_dir` (see `softcache.reader.memmap`), if the
    whole cache takes at most `memmap_limit_bytes` there. The order is then a full shuffle, otherwise a shuffle within
    windows of 16 chunks; `window_blocks` and `block_samples` override that.
    """

    workers: int = Field(0, ge=0)
    block_samples: int | None = Field(None, ge=1)
    window_blocks: int | None = Field(None, ge=1)
    memmap: Literal["auto", "never"] = "auto"
    memmap_limit_bytes: int = Field(8 << 30, ge=0)
    memmap_dir: str | None = None
    fingerprint_fraction: float = Field(1.0, ge=0, le=1)
    fingerprint_first: int = Field(1024, ge=0)
    verify: bool = True
    num_views: int | None = Field(None, ge=1)

    def open_cache(self, url: str) -> Cache:
        """Returns the cache at a path or URL, to be read as these settings say; raises as
        `softcache.reader.cache.open_cache`."""
        memmap = MemmapSettings(self.memmap_limit_bytes, self.memmap_dir) if self.memmap == "auto" else None
        window = self.window_blocks or DEFAULT_WINDOW_BLOCKS
        return open_cache(url, window_blocks=window, verify=self.verify, memmap=memmap)


def cached_views(cache: Cache) -> Views:
    """Returns the views that the cache was made with, rebuilt from its manifest.

    Raises:
        AlignmentError: they apply a transform of the user's own, which is code and never taken from a cache.
    """
    from softcache.data.transforms import Views, ViewSettings

    settings = cache.manifest.identity["views"]["settings"]
    if settings.get("transform") is not None:
        raise AlignmentError(
            f"cache {cache.url}: made with your own transform {settings['transform']!r}; a cache never names code "
            "to run: pass views=Views(ViewSettings(transform=...)) yourself"
        )
    try:
        return Views(ViewSettings.model_validate(settings))
    except ValueError as error:
        raise ManifestError(f"cache {cache.url}: identity.views.settings cannot be read: {error}") from error


def as_teacher_saw(source: Any, cache: Cache, views: Views | None = None) -> Dataset:
    """Returns a source as the cache's teacher saw it: through its views, boxes and all, or as tokens."""
    if hasattr(source, "load"):  # it is one already
        return source
    if cache.manifest.kind == "tokens":
        from softcache.data.tokens import TokenData

        across = cache.manifest.identity["attention"]["digest"] == "across documents"
        return TokenData(source, cross_documents=across)
    if cache.manifest.kind == "cells":
        from softcache.data.scenes import ViewedScenes

        return ViewedScenes(source, views or cached_views(cache), rows_per_sample=cells_per_image(cache))
    return ViewedSource(source, views or cached_views(cache))


def cells_per_image(cache: Cache) -> int:
    """Returns how many of a detector's cells a cache has of each image."""
    assert cache.manifest.rows is not None
    return cache.manifest.rows.num_rows // len(cache)


def check_alignment(cache: Cache, data: Dataset) -> None:
    """Raises unless the cache was made from this very source, seen through these very views.

    Raises:
        AlignmentError: keys, order, ground truth, contents, transform or tokenizer differ; the first sample at
            fault is named.
    """
    identity, where = cache.manifest.identity, f"cache {cache.url}"
    if cache.manifest.kind != data.kind:
        raise AlignmentError(
            f"{where}: holds labels of kind {cache.manifest.kind!r}, the source is of kind {data.kind!r}; "
            "give --cache the one that was made from this source"
        )
    for part, here in data.identity(cache.num_views).items():
        if identity[part]["digest"] != here["digest"]:
            raise AlignmentError(
                f"{where}: {_PARTS[part][0]} ({_part_difference(identity[part], here, _PARTS[part][1])}); restore the "
                f"[{_PARTS[part][1]}] table of the config that made it, or rebuild the cache"
            )
    if identity["source"]["digest"] != data.source.digest:
        raise AlignmentError(
            f"{where}: {_source_difference(cache, data)}; train on the dataset that was labelled, or rebuild the cache"
        )


_PARTS = {
    "views": ("its views were made by another transform", "views"),
    "boxes": ("its boxes were left out by another rule", "views"),
    "tokenizer": ("its tokens were made by another tokenizer", "source"),
    "attention": ("its teacher attended otherwise", "source"),
}


def _part_difference(there: dict[str, Any], here: dict[str, Any], table: str) -> str:
    """Returns each setting that differs, or where they are the same the digests."""
    then, now = there.get("settings", {}), here.get("settings", {})
    # Through JSON, as the manifest has been.
    now = json.loads(json.dumps(now))
    differing = [
        f"{table}.{key}: {then.get(key)!r} there, {now.get(key)!r} here"
        for key in sorted(then | now)
        if then.get(key) != now.get(key)
    ]
    return "; ".join(differing) or f"{there['digest'][:17]} there, {here['digest'][:17]} here"


def _source_difference(cache: Cache, data: Dataset) -> str:
    """Returns what changed, naming the first sample at fault; reads the data only on this path."""
    table, source = cache.samples_table(), data.source
    keys = source.keys()
    lost, new = sorted(set(table.keys) - set(keys)), sorted(set(keys) - set(table.keys))
    told = [f"{key!r} is gone" for key in lost[:1]] + [f"{key!r} is new" for key in new[:1]]
    if len(table.keys) != len(source):
        return f"{len(table.keys)} samples were labelled, the source has {len(source)} ({', '.join(told)})"
    for sample, (there, here) in enumerate(zip(table.keys, keys, strict=True)):
        if there != here:
            why = ", ".join(told) or "the order changed"
            return f"sample {sample} was {there!r} when labelled and is {here!r} now ({why})"
    if data.kind != "cells" and not cache.skips_positions:  # boxes are in the source's digest alone
        fact, then, now = (
            ("rows", table.num_rows, source.num_rows())
            if data.kind == "tokens"
            else ("ground truth", table.targets, source.targets())
        )
        for sample in np.flatnonzero(then != now)[:1]:
            return (
                f"sample {keys[sample]!r} had {fact} {then[sample]} when labelled and has {now[sample]} now"
            )
    for samples in np.array_split(cache.samples_in(0), max(1, len(source) // 256)):
        stored = cache.read_rows(samples, 0)[1]
        changed = np.flatnonzero(data.load(samples, 0).fingerprints != stored)
        if len(changed):
            return f"the contents of sample {keys[samples[changed[0]]]!r} changed since it was labelled"
    if cache.missing_units:
        return f"the contents of source {source.name} changed since it was labelled (in samples not finished yet)"
    if data.kind == "cells":
        return (
            f"the boxes of source {source.name} changed since it was labelled; keys and pixels are the same"
        )
    return (
        f"source {source.name} is another one than was labelled, though keys, ground truth and contents of its samples are "
        "the same (files that were written anew with other sizes, or what else its digest covers)"
    )


def attach_labels(batch: Any, stored: CachedBatch, cache: Cache, data: Dataset) -> Any:
    """Returns the batch with its labels, each at the row of its own position.

    Raises:
        AlignmentError: the samples do not have the rows that were labelled; the first sample at fault is named.
    """
    if batch.num_rows != len(stored.labels) and not cache.skips_positions:
        raise AlignmentError(
            f"cache {cache.url}: {len(stored.labels)} rows of labels for {batch.num_rows} rows of samples "
            f"{batch.samples[:8].tolist()}…, view {batch.view}; the source changed since the cache was made"
        )
    labels = stored.labels.to_torch()
    if stored.positions is None:
        return replace(batch, labels=labels)
    import torch

    rows_Q = batch.rows_at(stored.positions, stored.counts)
    for place in np.flatnonzero(rows_Q < 0)[:1]:
        sample = int(np.repeat(batch.samples, stored.counts)[place])
        raise AlignmentError(
            f"cache {cache.url}: sample {data.source.key(sample)!r} has a label for position "
            f"{int(stored.positions[place])}, where the source has nothing to predict, or a label already; the source "
            "changed since the cache was made; restore it, or rebuild the cache"
        )
    if len(rows_Q) < batch.num_rows:
        batch = replace(batch, labelled=torch.from_numpy(rows_Q), label_counts=stored.counts)
    return replace(batch, labels=labels)


class FingerprintedSamples:
    """What a loader process does of a batch: pixels or tokens with their fingerprints, and no labels.

    Which samples are fingerprinted is a function of (sample, view), so this needs no cache and travels light.
    """

    def __init__(
        self, data: Dataset, *, fingerprint_fraction: float = 1.0, fingerprint_first: int = 1024
    ) -> None:
        self.data, self._check_share, self._check_first = data, fingerprint_fraction, fingerprint_first

    def __getitems__(self, request: Request) -> Any:
        return self.load(request.samples, request.view)

    def load(self, samples: np.ndarray, view: int) -> Any:
        """Returns the batch of `samples`, without labels; the first ones of every process are all fingerprinted."""
        chosen: bool | np.ndarray = True
        if self._check_first > 0:
            self._check_first -= len(samples)
        else:
            chosen = self.fingerprint_mask(samples, view)
        return self.data.load(samples, view, fingerprints=chosen)

    def fingerprint_mask(self, samples: np.ndarray, view: int) -> np.ndarray:
        """Returns [B] bool, which samples have their content checked whenever they are seen."""
        if self._check_share in (0.0, 1.0):
            return np.full(len(samples), self._check_share == 1.0)
        import torch

        counters_B = torch.from_numpy(np.asarray(samples, np.int64) + 1) * SPLITMIX64_GAMMA
        drawn_B = (
            splitmix64(splitmix64(counters_B) + torch.tensor(view) * SPLITMIX64_GAMMA).numpy().view(np.uint64)
        )
        return (drawn_B >> np.uint64(32)).astype(np.float64) < self._check_share * 2.0**32


class SoftLabelDataset:
    """A map-style torch dataset: samples as the teacher saw them, with their soft labels.

    An index is a sample number (of `view`), or a pair (sample, view). Use `collate` with a DataLoader; it
    fetches whole batches at once:

        DataLoader(dataset, batch_size=256, shuffle=True, collate_fn=dataset.collate)

    `SoftLabelLoader` is faster with loader processes: they load what they are good at, and labels are read once.

    `source` is a `Source` of images, a `TokenSource`, or either already wrapped in `ViewedSource` or `TokenData`.
    A batch is an `ImageBatch` (images, targets, labels, samples) or, for a source of text, a `TokenBatch`.

    Attributes:
        cache: where the labels are.
        view: of an index that names none.
        labelled_of: [N] int64, the rows of each sample that have a label; None: all of them.
        unlabeled_dataset: the half of the work that needs no cache.

    Raises (from the constructor and on every fetch):
        AlignmentError: the source or the transform is not what was labelled; the sample is named.
    """

    def __init__(
        self,
        source: Any,
        cache: Cache,
        *,
        views: Views | None = None,
        view: int = 0,
        fingerprint_fraction: float = 1.0,
        fingerprint_first: int = 1024,
    ) -> None:
        self._data = as_teacher_saw(source, cache, views)
        check_alignment(cache, self._data)
        self.cache, self.view = cache, view
        self.labelled_of = cache.rows.counts(np.arange(len(cache))) if cache.skips_positions else None
        self.unlabeled_dataset = FingerprintedSamples(
            self._data, fingerprint_fraction=fingerprint_fraction, fingerprint_first=fingerprint_first
        )

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int | tuple[int, int]) -> Any:
        return self.__getitems__([index])

    def __getitems__(self, indices: Request | np.ndarray | Sequence[int | tuple[int, int]]) -> Any:
        """Returns one batch; torch's DataLoader calls it once per batch.

        Args:
            indices: sample numbers, of `view`; or pairs (sample, view); an array of either is the fast way.
        """
        batches = []
        for request in group_by_view(indices, self.view):
            stored = self.read(*request)
            batches.append(self.join(self.unlabeled_dataset.load(*request), stored))
        return batches[0] if len(batches) == 1 else self.collate(batches)

    def read(self, samples: np.ndarray, view: int) -> CachedBatch:
        """Returns what the cache holds of `samples`; raises as `Cache.read` does."""
        return self.cache.read_stored(samples, view)

    def join(self, batch: Any, stored: CachedBatch) -> Any:
        """Returns an unlabeled_dataset batch with its labels, its contents compared with what the teacher saw.

        Raises:
            AlignmentError: a sample's content or rows are not what was labelled; the sample is named.
        """
        taken_B = self.unlabeled_dataset.fingerprint_mask(batch.samples, batch.view) | (
            batch.fingerprints != 0
        )
        for row in np.flatnonzero(taken_B & (batch.fingerprints != stored.fingerprints)):
            raise AlignmentError(
                f"cache {self.cache.url}: sample {self._data.source.key(int(batch.samples[row]))!r}, view {batch.view}: "
                f"the teacher saw content {int(stored.fingerprints[row]):016x}, the student would see "
                f"{int(batch.fingerprints[row]):016x}; the data, its decoder or the transform changed since the cache "
                "was made; restore them, or rebuild the cache"
            )
        return attach_labels(batch, stored, self.cache, self._data)

    @staticmethod
    def collate(items: Any) -> Any:
        """Returns one batch from what `__getitems__` or several `__getitem__` returned."""
        return type(items[0]).merge(items) if isinstance(items, list) else items


class HardLabelDataset:
    """The same samples in the same batches, with the ground truth only: for baselines and live teachers.

    Attributes:
        cache: None; there is nothing to join.
        unlabeled_dataset: the work of a loader process, which is all there is.
    """

    cache: None = None

    def __init__(self, data: Dataset) -> None:
        self.unlabeled_dataset = FingerprintedSamples(data, fingerprint_fraction=0.0, fingerprint_first=0)

    def __len__(self) -> int:
        return len(self.unlabeled_dataset.data)

    def __getitem__(self, index: tuple[int, int]) -> Any:
        return self.__getitems__([index])

    def __getitems__(self, indices: Request | np.ndarray | Sequence[tuple[int, int]]) -> Any:
        batches = [self.unlabeled_dataset.load(*request) for request in group_by_view(indices, 0)]
        return batches[0] if len(batches) == 1 else self.collate(batches)

    collate = staticmethod(SoftLabelDataset.collate)


def group_by_view(indices: Any, view: int) -> list[tuple[np.ndarray, int]]:
    """Returns (samples [B] int64, view) of each run of indices of one view; of no index, one empty run."""
    if isinstance(indices, Request):
        return [(indices.samples, indices.view)]
    if not isinstance(indices, np.ndarray) and any(isinstance(index, tuple) for index in indices):
        indices = [index if isinstance(index, tuple) else (index, view) for index in indices]
    array = np.asarray(indices)
    if not array.size:
        return [(np.zeros(0, np.int64), view)]
    if array.dtype.kind not in "iu" or array.shape[1:] not in ((), (2,)):
        raise TypeError(
            f"indices: {array.dtype} of shape {array.shape}; expected sample numbers [B], or pairs (sample, view) [B, 2]"
        )
    array = array.astype(np.int64, copy=False)
    if array.ndim == 1:
        return [(array, view)]
    runs = np.split(array, np.flatnonzero(np.diff(array[:, 1])) + 1)
    return [(run[:, 0], int(run[0, 1])) for run in runs]
