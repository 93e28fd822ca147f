"""Who reads labels in `benchmarks.reading`: memory maps, caches and the peers' files, each by its own way of reading.

A contender walks one epoch and gives its batches as a student would get them. What the batches hold can be asked for, so
that a test sees that all of them do the same work.
"""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader

from benchmarks.peer_files import DistillKitFiles, FkdFiles, MegatronFiles, TinyVitFiles
from benchmarks.raw_files import RawDataset, RawRecords
from softcache.reader.cache import DEFAULT_WINDOW_BLOCKS, Cache, CachedBatch
from softcache.reader.dataset import SoftLabelDataset
from softcache.reader.loader import ANNOUNCED_WINDOWS, SoftLabelLoader
from softcache.reader.memmap import MemmapSettings
from softcache.reader.open import open_cache
from softcache.reader.order import BlockShuffle

__all__ = ["Contender", "Labels", "Made", "cache_reader", "loaders", "map_reader", "peer_loaders"]

FORKSERVER_LOADS = ["torch", "benchmarks.reading_contenders"]


class Labels(NamedTuple):
    """What a batch holds: samples [B], ids [P, K], log-probabilities [P, K]."""

    samples: np.ndarray
    ids: np.ndarray
    log_probs: np.ndarray


@dataclass
class Contender:
    """One way of reading.

    Attributes:
        epoch: number -> its batches.
        rows: of a batch.
        labels: of a batch.
        files: what it reads, so that it can be made cold.
        close: lets go of what it keeps of an epoch: open maps, decoded blocks.
    """

    name: str
    epoch: Callable[[int], Iterator[Any]]
    rows: Callable[[Any], int]
    labels: Callable[[Any], Labels]
    files: list[Path] = field(default_factory=list)
    close: Callable[[], None] = lambda: None

    def run(self, number: int) -> int:
        """Walks an epoch; returns its rows."""
        return sum(self.rows(batch) for batch in self.epoch(number))


@dataclass
class Made:
    """Labels of one kind on disk, in every layout.

    Attributes:
        batch_samples: of every contender.
        caches: URL by codec.
        peers: folder of the peers' files.
        peer_samples: how many samples the slow peers have.
    """

    folder: Path
    data: Any
    batch_samples: int
    caches: dict[str, str]
    records: RawRecords
    columns: RawRecords
    peers: Path
    peer_samples: int

    @property
    def memmap(self) -> MemmapSettings:
        return MemmapSettings(folder=str(self.folder / "memmaps"), required=True)

    def order(self, *, full: bool) -> BlockShuffle:
        """Returns batches in the order that the reader takes by itself: shuffled by blocks, or in full (of a memory map)."""
        cache = open_cache(next(iter(self.caches.values())))
        samples = np.arange(len(cache))
        return BlockShuffle(
            lambda view: samples,
            batch_size=self.batch_samples,
            view_of=lambda epoch: 0,
            block_samples=cache.manifest.plan.chunk_samples,
            window_blocks=None if full else DEFAULT_WINDOW_BLOCKS,
            seed=0,
        )


# -- in this process ---------------------------------------------------------------------------------------


def map_reader(name: str, made: Made, raw: RawRecords, *, full: bool) -> Contender:
    """np.memmap, gathered batch by batch."""
    order = made.order(full=full)

    def epoch(number: int) -> Iterator[Any]:
        order.epoch = number
        for request in order:
            yield request.samples, raw.read(request.samples)

    def labels(batch: Any) -> Labels:
        rows = raw.rows(batch[1])
        return Labels(batch[0], rows["ids"], rows["log_probs"])

    return Contender(
        name, epoch, lambda batch: len(batch[0]) * raw.rows_per_sample, labels, raw.paths(), raw.close
    )


class _OpenCache:
    """A cache kept open over epochs; what it kept of an epoch is let go of by `close`."""

    def __init__(self, url: str, memmap: MemmapSettings | None) -> None:
        self._url, self._memmap = url, memmap
        self._cache: Cache | None = None

    def get(self) -> Cache:
        if self._cache is None:
            self._cache = open_cache(self._url, memmap=self._memmap)
        return self._cache

    def close(self) -> None:
        if self._cache is not None:
            self._cache.close()
        if self._memmap is not None:  # pages that are mapped cannot be dropped from memory
            self._cache = None
            gc.collect()


def cache_reader(
    name: str,
    made: Made,
    codec: str,
    *,
    memmap: bool,
    full: bool,
    prepare: Callable[[Cache], None] = lambda cache: None,
) -> Contender:
    """`Cache.read_stored`, by chunks (the next window decoded ahead) or from a memory map; `prepare` sees the open cache."""
    order = made.order(full=full)
    opened = _OpenCache(made.caches[codec], made.memmap if memmap else None)

    def epoch(number: int) -> Iterator[Any]:
        cache, order.epoch = opened.get(), number
        prepare(cache)
        last, ahead = order.window_of(order.num_steps(number) - 1), -1
        for step, request in enumerate(order):
            if not memmap and (window := order.window_of(step)) != ahead:
                coming = order.windows(window, min(ANNOUNCED_WINDOWS, last - window + 1))
                cache.prefetch([(one.view, one.samples) for one in coming])
                ahead = window
            yield request.samples, cache.read_stored(request.samples, request.view)
        if not memmap:
            cache.prefetch([])  # every epoch decodes all of its blocks: a window hands out a row once

    def labels(batch: tuple[np.ndarray, CachedBatch]) -> Labels:
        return Labels(batch[0], batch[1].labels.ids, batch[1].labels.log_probs)

    files = [made.folder / "memmaps"] if memmap else [Path(made.caches[codec])]
    return Contender(name, epoch, lambda batch: len(batch[1].labels), labels, files, opened.close)


# -- through loaders ---------------------------------------------------------------------------------------


def _context(workers: int) -> Any:
    """Workers that start quickly and share nothing with this process, which has used TensorStore's threads."""
    if not workers:
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(FORKSERVER_LOADS)
    return context


def _own(batches: Any) -> Any:
    return batches


def _loader(dataset: Any, workers: int, **how: Any) -> DataLoader:
    return DataLoader(dataset, num_workers=workers, multiprocessing_context=_context(workers), **how)


def _joined_labels(batch: Any) -> Labels:
    labels = batch.labels.to_numpy()
    return Labels(batch.samples, labels.ids, labels.log_probs)


def loaders(made: Made, workers: int, codec: str = "open", *, full: bool) -> list[Contender]:
    """The memory map and the cache through torch's DataLoader, batches joined with their samples; workers persist."""
    out = [_map_loader(made, workers, full=full)]
    for how, make in (("SoftLabelLoader", _own_loader), ("DataLoader", _dataset_loader)):
        for memmap in (False, True):
            name = f"cache, {'memory map' if memmap else 'block-shuffled'}, {how}"
            out.append(make(name, made, workers, codec, memmap=memmap))
    return out


def _map_loader(made: Made, workers: int, *, full: bool) -> Contender:
    order, raw = made.order(full=full), made.records
    loader = _loader(
        RawDataset(made.data, raw),
        workers,
        batch_sampler=order,
        collate_fn=_own,
        persistent_workers=workers > 0,
    )

    def epoch(number: int) -> Iterator[Any]:
        order.epoch = number
        yield from loader

    def labels(batch: Any) -> Labels:
        rows = raw.rows({name: values.numpy() for name, values in batch[1].items()})
        return Labels(batch[0].samples, rows["ids"], rows["log_probs"])

    return Contender("memory map", epoch, lambda batch: len(batch[0].samples) * raw.rows_per_sample, labels)


def _own_loader(name: str, made: Made, workers: int, codec: str, *, memmap: bool) -> Contender:
    """Labels are read in this process; workers load samples alone."""
    cache = open_cache(made.caches[codec], memmap=made.memmap if memmap else None)
    order = made.order(full=memmap)
    loader = SoftLabelLoader(SoftLabelDataset(made.data, cache), order, workers=workers)

    def epoch(number: int) -> Iterator[Any]:
        order.epoch, order.step = number, 0
        yield from loader  # every epoch decodes all of its blocks: a window hands out a row once

    return Contender(name, epoch, lambda batch: len(batch.labels), _joined_labels, close=loader.close)


def _dataset_loader(name: str, made: Made, workers: int, codec: str, *, memmap: bool) -> Contender:
    cache = open_cache(made.caches[codec], memmap=made.memmap if memmap else None)
    dataset, order = SoftLabelDataset(made.data, cache), made.order(full=memmap)
    loader = _loader(
        dataset,
        workers,
        batch_sampler=order,
        collate_fn=dataset.collate,
        persistent_workers=workers > 0,
    )

    def epoch(number: int) -> Iterator[Any]:
        order.epoch = number
        yield from loader
        cache.close()

    return Contender(name, epoch, lambda batch: len(batch.labels), _joined_labels)


def peer_loaders(made: Made, workers: int) -> list[Contender]:
    """The peers' files through loaders of their own."""
    cache = open_cache(next(iter(made.caches.values())))
    k = cache.manifest.build_codec().k
    if cache.manifest.kind == "image":
        return [_tinyvit(made, workers, k), _fkd(made, workers)]
    return [_megatron(made, workers), _distillkit(made, workers, cache.num_classes, k)]


def _tinyvit(made: Made, workers: int, k: int) -> Contender:
    dataset = TinyVitFiles(made.peers / "tinyvit", made.data.source, k)
    loader = _loader(dataset, workers, batch_size=made.batch_samples, shuffle=True)

    def epoch(number: int) -> Iterator[Any]:
        dataset.set_epoch()
        yield from loader

    def labels(batch: Any) -> Labels:
        ids, probs, seeds = (values.numpy() for values in batch[1])
        return Labels(seeds.astype(np.int64), ids, np.log(probs.astype(np.float32)))

    return Contender("TinyViT", epoch, lambda batch: len(batch[1][0]), labels)


def _fkd(made: Made, workers: int) -> Contender:
    dataset = FkdFiles(made.peers / "fkd", made.data.source, made.peer_samples)
    loader = _loader(
        dataset, workers, batch_size=made.batch_samples, shuffle=True, persistent_workers=workers > 0
    )

    def labels(batch: Any) -> Labels:
        ids, probs, _, _, samples = batch[1]
        return Labels(samples.numpy(), ids.numpy(), np.log(probs.float().numpy()))

    return Contender("FKD", lambda number: iter(loader), lambda batch: len(batch[1][0]), labels)


def _megatron(made: Made, workers: int) -> Contender:
    dataset = MegatronFiles(made.peers / "megatron.tar")
    loader = _loader(dataset, workers, batch_size=None, persistent_workers=workers > 0)

    def labels(batch: Any) -> Labels:
        samples, ids, log_probs = (values.numpy() for values in batch)
        return Labels(samples, ids, log_probs)

    return Contender(
        "Megatron-LM, in order", lambda number: iter(loader), lambda batch: len(batch[1]), labels
    )


def _distillkit(made: Made, workers: int, num_classes: int, k: int) -> Contender:
    dataset = DistillKitFiles(made.peers / "distillkit.parquet", num_classes, k, made.peer_samples)
    loader = _loader(
        dataset, workers, batch_size=made.batch_samples, shuffle=True, persistent_workers=workers > 0
    )

    def labels(batch: Any) -> Labels:
        samples, ids, log_probs = (values.numpy() for values in batch)
        return Labels(samples, ids.reshape(-1, k), log_probs.reshape(-1, k))

    return Contender(
        "DistillKit", lambda number: iter(loader), lambda batch: batch[1].shape[0] * batch[1].shape[1], labels
    )
