"""The reading half: a cache and its source, joined sample by sample and checked by content.

dataset = SoftLabelDataset(source, open_cache("runs/digits/cache"))
loader = DataLoader(dataset, batch_size=256, shuffle=True, collate_fn=dataset.collate)
for batch in loader:
    batch.images, batch.targets, batch.labels.at_temperature(4.0)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from pipeline.batches import Dataset, ViewedSource
from pipeline.cache import Cache, StoredRows
from pipeline.errors import AlignmentError, ManifestError
from pipeline.settings import Settings

if TYPE_CHECKING:
    from pipeline.views import Views

__all__ = [
    "HardLabelDataset",
    "ReaderSettings",
    "SoftLabelDataset",
    "cached_views",
    "check_alignment",
    "joined_data",
    "with_labels",
]


class ReaderSettings(Settings):
    """[reader]: how a student reads the cache.

    `check_share` is the share of (sample, view) pairs whose content is compared with the fingerprint that
    the teacher's side took; the first `check_first` samples of every loader process always are. `verify`
    compares each unit with its marker's sha256 the first time that a process reads from it.
    """

    workers: int = Field(0, ge=0)
    block_samples: int | None = Field(None, ge=1)
    window_blocks: int = Field(16, ge=1)
    check_share: float = Field(1.0, ge=0, le=1)
    check_first: int = Field(1024, ge=0)
    verify: bool = True
    num_views: int | None = Field(None, ge=1)


def cached_views(cache: Cache) -> Views:
    """Returns the views that the cache was made with, rebuilt from its manifest.

    Raises:
        AlignmentError: they apply a transform of the user's own, which is code and never taken from a cache.
    """
    from pipeline.views import Views, ViewSettings

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


def joined_data(source: Any, cache: Cache, views: Views | None = None) -> Dataset:
    """Returns a source as the cache's teacher saw it: through its views, or as tokens."""
    if hasattr(source, "load"):  # it is one already
        return source
    if cache.manifest.kind == "tokens":
        from pipeline.token_batches import TokenData

        across = cache.manifest.identity["attention"]["digest"] == "across documents"
        return TokenData(source, cross_documents=across)
    return ViewedSource(source, views or cached_views(cache))


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
                f"{where}: {_PARTS[part][0]} ({identity[part]['digest'][:17]} there, "
                f"{here['digest'][:17]} here); restore the [{_PARTS[part][1]}] table of the config that made it, or "
                "rebuild the cache"
            )
    if identity["source"]["digest"] != data.source.digest:
        raise AlignmentError(
            f"{where}: {_source_difference(cache, data)}; train on the dataset that was labelled, or rebuild the cache"
        )


_PARTS = {
    "views": ("its views were made by another transform", "views"),
    "tokenizer": ("its tokens were made by another tokenizer", "source"),
    "attention": ("its teacher attended otherwise", "source"),
}


def _source_difference(cache: Cache, data: Dataset) -> str:
    """Returns what changed, naming the first sample at fault; reads the data only on this path."""
    table, source = cache.samples_table(), data.source
    keys = source.keys()
    if len(table.keys) != len(source):
        lost, new = sorted(set(table.keys) - set(keys)), sorted(set(keys) - set(table.keys))
        told = [f"{key!r} is gone" for key in lost[:1]] + [f"{key!r} is new" for key in new[:1]]
        return f"{len(table.keys)} samples were labelled, the source has {len(source)} ({', '.join(told)})"
    for sample, (there, here) in enumerate(zip(table.keys, keys, strict=True)):
        if there != here:
            return f"sample {sample} was {there!r} when labelled and is {here!r} now (order or keys changed)"
    fact, then, now = (
        ("rows", table.num_rows, source.num_rows())
        if data.kind == "tokens"
        else ("ground truth", table.targets, source.targets())
    )
    for sample in np.flatnonzero(then != now)[:1] if not cache.skips_positions else ():
        return f"sample {keys[sample]!r} had {fact} {then[sample]} when labelled and has {now[sample]} now"
    for samples in np.array_split(cache.samples_in(0), max(1, len(source) // 256)):
        stored = cache.read_rows(samples, 0)[1]
        changed = np.flatnonzero(data.load(samples, 0).fingerprints != stored)
        if len(changed):
            return f"the contents of sample {keys[samples[changed[0]]]!r} changed since it was labelled"
    return f"the contents of source {source.name} changed since it was labelled (in samples not finished yet)"


def with_labels(batch: Any, stored: StoredRows, cache: Cache, data: Dataset) -> Any:
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


class SoftLabelDataset:
    """A map-style torch dataset: samples as the teacher saw them, with their soft labels.

    An index is a sample number (of `view`), or a pair (sample, view). Use `collate` with a DataLoader; it
    fetches whole batches at once:

        DataLoader(dataset, batch_size=256, shuffle=True, collate_fn=dataset.collate)

    `source` is a `Source` of images, a `TokenSource`, or either already wrapped in `ViewedSource` or `TokenData`.
    A batch is an `ImageBatch` (images, targets, labels, samples) or, for a source of text, a `TokenBatch`.

    Attributes:
        labelled_of: [N] int64, the rows of each sample that have a label; None: all of them.

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
        check_share: float = 1.0,
        check_first: int = 1024,
    ) -> None:
        self._data = joined_data(source, cache, views)
        check_alignment(cache, self._data)
        self.cache, self.view = cache, view
        self.labelled_of = cache.rows.counts(np.arange(len(cache))) if cache.skips_positions else None
        self._check_share, self._check_first = check_share, check_first

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int | tuple[int, int]) -> Any:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int | tuple[int, int]]) -> Any:
        """Returns one batch; torch's DataLoader calls it once per batch."""
        pairs = [index if isinstance(index, tuple) else (index, self.view) for index in indices]
        views = {view for _, view in pairs}
        if len(views) > 1:
            return self.collate([self.__getitems__([pair]) for pair in pairs])
        view = views.pop() if views else self.view
        return self._load(np.array([sample for sample, _ in pairs], np.int64), view)

    def _load(self, samples: np.ndarray, view: int) -> Any:
        stored = self.cache.read_stored(samples, view)
        stored_B = stored.fingerprints
        chosen_B = _chosen(stored_B, self._check_share)
        if self._check_first > 0:
            chosen_B[:] = True
            self._check_first -= len(stored_B)
        batch = self._data.load(samples, view, fingerprints=chosen_B)
        for row in np.flatnonzero(chosen_B & (batch.fingerprints != stored_B)):
            raise AlignmentError(
                f"cache {self.cache.url}: sample {self._data.source.key(int(samples[row]))!r}, view {view}: the teacher "
                f"saw content {int(stored_B[row]):016x}, the student would see {int(batch.fingerprints[row]):016x}; the "
                "data, its decoder or the transform changed since the cache was made; restore them, or rebuild the cache"
            )
        return with_labels(batch, stored, self.cache, self._data)

    @staticmethod
    def collate(items: Any) -> Any:
        """Returns one batch from what `__getitems__` or several `__getitem__` returned."""
        return type(items[0]).merge(items) if isinstance(items, list) else items


class HardLabelDataset:
    """The same samples in the same batches, with the ground truth only: for baselines and live teachers."""

    def __init__(self, data: Dataset) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: tuple[int, int]) -> Any:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[tuple[int, int]]) -> Any:
        samples, view = np.array([sample for sample, _ in indices], np.int64), indices[0][1]
        return self._data.load(samples, view, fingerprints=False)

    collate = staticmethod(SoftLabelDataset.collate)


def _chosen(stored_B: np.ndarray, share: float) -> np.ndarray:
    # A fingerprint is a uniform 64-bit number: comparing its high half with the share picks the same
    # samples in every epoch, process and run.
    return (stored_B >> np.uint64(32)).astype(np.float64) < share * 2.0**32
