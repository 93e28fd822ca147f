"""The reading half: a cache and its source, joined sample by sample and checked by content.

dataset = SoftLabelDataset(source, open_cache("runs/digits/cache"))
for batch in DataLoader(dataset, batch_size=256, shuffle=True):
    batch.images, batch.targets, batch.labels.at_temperature(4.0)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from mmap import mmap
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data._utils.collate import (
    default_collate_fn_map,  # as the docstring of `default_collate` adds to it
)

from softcache.data.batch import Dataset
from softcache.errors import AlignmentError, ConfigError, ManifestError
from softcache.hashing.splitmix import SPLITMIX64_GAMMA, splitmix64
from softcache.reader.alignment import attach_labels, check_alignment, foreign_parts
from softcache.reader.cache import Cache, CachedBatch
from softcache.reader.order import Request
from softcache.runtime.display import Displayed, Summary
from softcache.runtime.indexing import row_numbers

if TYPE_CHECKING:
    from softcache.data.transforms import Views

__all__ = [
    "BatchedDataset",
    "FingerprintedSamples",
    "HardLabelDataset",
    "MatchedBatch",
    "MatchedSamples",
    "SoftLabelDataset",
    "as_teacher_saw",
    "cached_views",
    "group_by_view",
    "rows_per_sample",
]


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
    """Returns a source as the cache's teacher saw it: through its views, boxes or masks and all, or as tokens.

    Raises:
        ConfigError: it is no source.
    """
    if hasattr(source, "load"):  # it is one already
        return source
    if not hasattr(source, "digest"):
        raise ConfigError(
            f"source: expected one that is open; found {type(source).__name__}; pass "
            'open_source(config.source, split="train")'
        )
    from softcache.data.boxes import ViewedScenes
    from softcache.data.images import ViewedSource
    from softcache.data.masks import ViewedMasks
    from softcache.data.tokens import TokenData

    identity = cache.manifest.identity
    by_kind: dict[str, Any] = {data.kind: data for data in (ViewedSource, TokenData, ViewedScenes)}
    made: Any = ViewedMasks if "masks" in identity else by_kind[cache.manifest.kind]
    return made.from_identity(
        source,
        identity,
        views=(views or cached_views(cache)) if "views" in identity else None,
        rows_per_sample=rows_per_sample(cache),
    )


def rows_per_sample(cache: Cache) -> int:
    """Returns how many label rows a cache has of each sample; the mean, rounded down, where their numbers differ."""
    return cache.manifest.total_rows // (len(cache) * cache.num_views)


class BatchedDataset(Displayed, TorchDataset[Any]):
    """A map-style torch dataset that fetches whole batches: an index is a sample number, or a pair (sample, view).

    A batch comes from torch's `DataLoader(dataset, batch_size=256)` as it is; nothing is collated a second time.

    Attributes:
        view: of an index that names none.
    """

    view = 0

    @abstractmethod
    def __len__(self) -> int: ...
    @abstractmethod
    def load(self, samples: np.ndarray, view: int) -> Any:
        """Returns the batch of `samples` of one view."""

    def __getitem__(self, index: Any) -> Any:
        """Returns the batch of the samples that an index of NumPy chooses, or a pair of one and a view.

        Raises:
            IndexError: there is no such sample.
        """
        chosen, view = index if isinstance(index, tuple) and len(index) == 2 else (index, self.view)
        numbers = self.sample_numbers(chosen)
        return self.load(numbers, view)

    def sample_numbers(self, index: Any) -> np.ndarray:
        """Returns the numbers [B] int64 of the samples that an index chooses."""
        return row_numbers(index, len(self), type(self).__name__)

    def __getitems__(self, indices: Request | np.ndarray | Sequence[int | tuple[int, int]]) -> list[Any]:
        """Returns a list of one batch, which is what torch's DataLoader then collates."""
        batch = self.fetch(indices)
        default_collate_fn_map.setdefault(type(batch), _collate)
        return [batch]

    def fetch(self, indices: Request | np.ndarray | Sequence[int | tuple[int, int]]) -> Any:
        """Returns one batch.

        Args:
            indices: sample numbers, of `view`; or pairs (sample, view); an array of either is the fast way.
        """
        requests = group_by_view(indices, self.view)
        if len(requests) == 1:
            return self.load(*requests[0])
        with self.shared_reads(np.concatenate([samples for samples, _ in requests])):
            return self.collate([self.load(*request) for request in requests])

    def shared_reads(self, samples: np.ndarray) -> AbstractContextManager[None]:
        """Keeps what is decoded of samples that come more than once, until the end."""
        return nullcontext()

    @staticmethod
    def collate(items: Any) -> Any:
        """Returns one batch from several; what a DataLoader collates by default, too."""
        return items[0] if len(items) == 1 else type(items[0]).merge(items)

    def _describe(self, data: Dataset, facts: Sequence[tuple[str, str]] = ()) -> Summary:
        about = [("source", str(getattr(data.source, "name", "?"))), ("data", type(data).__name__), *facts]
        return Summary(f"{type(self).__name__}: {len(self):,} samples, torch Dataset", about)


def _collate(batches: Any, *, collate_fn_map: Any = None) -> Any:
    return BatchedDataset.collate(batches)


class MatchedSamples(ABC):
    """Samples of a student that are matched with labeled samples of another source; picklable.

    Attributes:
        rows_of: [N] int64, the rows that each labeled sample has on both sides; None: as many as it has labels.
        labeled_of: [N] int64, how many of them have a label; None: all.
    """

    rows_of: np.ndarray | None = None
    labeled_of: np.ndarray | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Returns how many labeled samples are matched."""

    @abstractmethod
    def load(self, samples: np.ndarray, view: int) -> Any:
        """Returns the student's batch for labeled `samples`, numbered as they are."""

    @abstractmethod
    def attach(self, batch: Any, labeled: Any) -> Any:
        """Returns the student's batch with the labels of the matched batch."""


class MatchedBatch(NamedTuple):
    """The teacher's side is compared with the cache; the student's is what is trained on."""

    teacher: Any
    student: Any

    def pin_memory(self) -> MatchedBatch:
        return MatchedBatch(self.teacher, self.student.pin_memory())


class FingerprintedSamples(BatchedDataset):
    """The part of a batch that a loader process makes: pixels or tokens with their fingerprints, and no labels.

    Which samples are fingerprinted is a function of (sample, view), so this needs no cache and travels light.

    Attributes:
        data: the teacher's side.
        student: the student's side; None where it is the same. A batch is a `MatchedBatch` where there is one.
    """

    student: MatchedSamples | None = None

    def __init__(
        self, data: Dataset, *, fingerprint_fraction: float = 1.0, fingerprint_first: int = 1024
    ) -> None:
        self.data, self._check_share, self._check_first = data, fingerprint_fraction, fingerprint_first

    def __len__(self) -> int:
        return len(self.data if self.student is None else self.student)

    def summarize(self) -> Summary:
        return self._describe(self.data)

    @contextmanager
    def shared_reads(self, samples: np.ndarray) -> Iterator[None]:
        numbers, counts = np.unique(samples, return_counts=True)
        data, self.data = self.data, self.data.sharing_reads(numbers[counts > 1])
        try:
            yield
        finally:
            self.data = data

    def load(self, samples: np.ndarray, view: int) -> Any:
        """Returns the batch of `samples`, without labels; the first ones of every process are all fingerprinted."""
        chosen: bool | np.ndarray = True
        if self._check_first > 0:
            self._check_first -= len(samples)
        else:
            chosen = self.fingerprint_mask(samples, view)
        batch = self.data.load(samples, view, fingerprints=chosen)
        return batch if self.student is None else MatchedBatch(batch, self.student.load(samples, view))

    def fingerprint_mask(self, samples: np.ndarray, view: int) -> np.ndarray:
        """Returns [B] bool, which samples have their content checked whenever they are seen."""
        if self._check_share in (0.0, 1.0):
            return np.full(len(samples), self._check_share == 1.0)
        counters_B = torch.from_numpy(np.asarray(samples, np.int64) + 1) * SPLITMIX64_GAMMA
        drawn_B = (
            splitmix64(splitmix64(counters_B) + torch.tensor(view) * SPLITMIX64_GAMMA).numpy().view(np.uint64)
        )
        return (drawn_B >> np.uint64(32)).astype(np.float64) < self._check_share * 2.0**32


class SoftLabelDataset(BatchedDataset):
    """Samples as the teacher saw them, with their soft labels.

    A DataLoader fetches whole batches at once:

        DataLoader(dataset, batch_size=256, shuffle=True)

    `SoftLabelLoader` is faster with loader processes: they load what they are good at, and labels are read once.

    `source` is a `Source` of images, a `TokenSource`, or either already wrapped in `ViewedSource` or `TokenData`.
    A batch is an `ImageBatch` (images, targets, labels, samples) or, for a source of text, a `TokenBatch`. A student that
    reads other samples has the dataset that `for_student` returns.

    Attributes:
        cache: where the labels are.
        view: of an index that names none; loader processes that run already see another one, too.
        rows_of: [N] int64, the rows of each sample, where they are not the source's; else None.
        labeled_of: [N] int64, the rows of each sample that have a label; None: all of them.
        unlabeled_dataset: the half of the work that needs no cache.

    Raises (from the constructor and on every fetch):
        AlignmentError: the source or the transform is not what was labeled; the sample is named.
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
        if foreign_parts(cache):  # what they would have been compared by
            fingerprint_fraction = 1.0
        self.cache, self._view = cache, _shared_number(view)
        self.rows_of: np.ndarray | None = None
        self.labeled_of = cache.rows.counts(np.arange(len(cache))) if cache.skips_positions else None
        self.unlabeled_dataset = FingerprintedSamples(
            self._data, fingerprint_fraction=fingerprint_fraction, fingerprint_first=fingerprint_first
        )

    @property
    def view(self) -> int:
        return int(self._view)

    @view.setter
    def view(self, view: int) -> None:
        self._view.fill_(view)

    def for_student(self, student: MatchedSamples) -> SoftLabelDataset:
        """Returns the dataset of the matched samples of a student, numbered as in the cache, with the labels here.

        The teacher's side is loaded too, and compared with the fingerprints that the cache has of it, so that a label of
        another sample is refused.
        """
        dataset = copy(self)
        dataset._view = _shared_number(self.view)
        dataset.unlabeled_dataset = copy(self.unlabeled_dataset)
        dataset.unlabeled_dataset.student = student
        dataset.rows_of, dataset.labeled_of = student.rows_of, student.labeled_of
        return dataset

    def __len__(self) -> int:
        return len(self.unlabeled_dataset)

    def sample_numbers(self, index: Any) -> np.ndarray:
        """Returns the numbers [B] int64 of the samples that an index or keys choose; see `Cache.__getitem__`."""
        return self.cache.sample_numbers(index)

    def summarize(self) -> Summary:
        cache = self.cache
        labels = f"{cache.url}, view {self.view} of {cache.num_views}, {cache.num_classes:,} classes"
        matched = [("student", type(self.unlabeled_dataset.student).__name__)] * bool(
            self.unlabeled_dataset.student
        )
        return self._describe(self._data, [("cache", labels), *matched])

    def load(self, samples: np.ndarray, view: int) -> Any:
        """Returns the batch of `samples` with its labels."""
        stored = self.read(samples, view)
        return self.join(self.unlabeled_dataset.load(samples, view), stored)

    def shared_reads(self, samples: np.ndarray) -> AbstractContextManager[None]:
        return self.unlabeled_dataset.shared_reads(samples)

    def read(self, samples: np.ndarray, view: int) -> CachedBatch:
        """Returns what the cache holds of `samples`; raises as `Cache.read` does."""
        return self.cache.read_stored(samples, view)

    def join(self, batch: Any, stored: CachedBatch) -> Any:
        """Returns an unlabeled batch with its labels, its contents compared with what the teacher saw.

        Raises:
            AlignmentError: a sample's content or rows are not what was labeled; the sample is named.
        """
        student = self.unlabeled_dataset.student
        if student is None:
            return self._join(batch, stored)
        return student.attach(batch.student, self._join(batch.teacher, stored))

    def _join(self, batch: Any, stored: CachedBatch) -> Any:
        taken_B = self.unlabeled_dataset.fingerprint_mask(batch.samples, batch.view) | (
            batch.fingerprints != 0
        )
        for row in np.flatnonzero(taken_B & (batch.fingerprints != stored.fingerprints)):
            if stored.fingerprints[row] == 0 and "views" in foreign_parts(self.cache):
                raise AlignmentError(
                    f"cache {self.cache.url}: sample {self._data.source.key(int(batch.samples[row]))!r}, view {batch.view}: "
                    "its labels are of a view of another program, which softcache cannot replay; give SoftLabelDataset a "
                    "data set that shows these views, with fingerprints of 0 (docs/how-to/import-caches.md)"
                )
            raise AlignmentError(
                f"cache {self.cache.url}: sample {self._data.source.key(int(batch.samples[row]))!r}, view {batch.view}: "
                f"the teacher saw content {int(stored.fingerprints[row]):016x}, the student would see "
                f"{int(batch.fingerprints[row]):016x}; the data, its decoder or the transform changed since the cache "
                "was made; restore them, or rebuild the cache"
            )
        return attach_labels(batch, stored, self.cache, self._data)


def _shared_number(value: int) -> torch.Tensor:
    """Returns a number that loader processes share, so that those that outlive an epoch see the next one's view.

    Where /dev/shm has no room, forked processes share it all the same; for others torch moves it there when they start.
    """
    try:
        return torch.tensor(value).share_memory_()
    except RuntimeError:
        return torch.frombuffer(mmap(-1, 8), dtype=torch.int64)[0].fill_(value)


class HardLabelDataset(FingerprintedSamples):
    """The same samples in the same batches, with the ground truth only: for baselines and online teachers.

    Attributes:
        cache: None; there is nothing to join.
    """

    cache: None = None

    def __init__(self, data: Dataset) -> None:
        super().__init__(data, fingerprint_fraction=0.0, fingerprint_first=0)

    @property
    def unlabeled_dataset(self) -> FingerprintedSamples:
        """The work of a loader process, which is all there is."""
        return self


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
