"""Batches for a student's loop: pixels or tokens from loader processes, labels joined here.

    loader = SoftLabelLoader(dataset, order, workers=2)
    for _ in range(loader.epoch, epochs):
        for batch in loader:                 # the rest of the current epoch
            ...
            state = loader.state_dict()      # exact: what was handed over, not what was fetched ahead

Loader processes do what costs the most and needs no cache: they decode, transform and fingerprint. Labels are read in the
process that trains, so that each chunk of the cache is decoded once, not once in every loader process; a thread reads
those of the next few batches meanwhile, and the chunks of the next window are decoded by threads of the cache. From a
memory-mapped view labels are gathered where they are needed: that is cheaper than a thread. Pixels are never loaded in a
thread of this process: a user's own transform seeds the process-wide random state while it runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain, count
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader

from softcache.data.sent_batch import loader_batches
from softcache.reader.cache import Cache, CachedBatch
from softcache.reader.order import BlockShuffle, Request
from softcache.runtime.signals import shield_loaders, signals_first

if TYPE_CHECKING:
    from typing import Self

__all__ = ["ANNOUNCED_WINDOWS", "JoinedDataset", "SoftLabelLoader"]

ANNOUNCED_WINDOWS = 3
"""Of an order: one is read, one decoded, one fetched (from a bucket)."""


class JoinedDataset(Protocol):
    """What the loader needs of a dataset: its two halves, and how they meet; see `softcache.reader.dataset`.

    Attributes:
        cache: None: the batches have no labels.
        unlabeled_dataset: picklable; a loader process calls its `__getitems__(request)`, which gives a list of one batch.
    """

    @property
    def cache(self) -> Cache | None: ...
    @property
    def unlabeled_dataset(self) -> Any: ...
    def read(self, samples: np.ndarray, view: int) -> CachedBatch: ...
    def join(self, batch: Any, stored: CachedBatch) -> Any: ...


class SoftLabelLoader:
    """Iterates the batches of the rest of the current epoch; at its end, `order` is moved to the next one.

    A batch counts as consumed once it is handed over: `order.step` is then the next one's. Leaving an iteration in the
    middle keeps the place; the next iteration goes on there.

    Args:
        dataset: a `SoftLabelDataset`, a `HardLabelDataset`, or another `JoinedDataset`.
        order: which samples make the batches of this rank.
        workers: loader processes, started by a fork server and kept from epoch to epoch; 0: this process loads.
        pin_memory: batches are in page-locked memory.
        ahead: batches whose labels may be read before they are asked for.
    """

    def __init__(
        self,
        dataset: JoinedDataset | Any,
        order: BlockShuffle,
        *,
        workers: int = 0,
        pin_memory: bool = False,
        ahead: int = 4,
    ) -> None:
        self._dataset, self._order = dataset, order
        self._workers, self._pin_memory, self._ahead = workers, pin_memory, ahead
        self._unlabeled: DataLoader | None = None

    @property
    def epoch(self) -> int:
        return self._order.epoch

    @property
    def step(self) -> int:
        """Batches of the current epoch that were consumed."""
        return self._order.step

    def __len__(self) -> int:
        """Returns how many batches are left of the current epoch."""
        return self._order.num_steps(self.epoch) - self.step

    def state_dict(self) -> dict[str, int | None]:
        """Returns the place in the order, see `BlockShuffle.state_dict`; it fits any number of workers and ranks."""
        return self._order.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved place; raises as `BlockShuffle.load_state_dict`. An iteration that runs is not to go on."""
        self._order.load_state_dict(state)

    def __iter__(self) -> Iterator[Any]:
        order = self._order
        place = order.epoch, order.step
        if self._unlabeled is None:
            self._unlabeled = self._open()
        cache = self._dataset.cache
        labels = None if cache is None else self._labels(cache)
        try:
            batches = loader_batches(self._unlabeled, "reader.workers")
            while True:
                with signals_first():
                    batch = next(batches, None)
                if batch is None:
                    break
                if labels is not None:
                    batch = self._dataset.join(batch, next(labels))
                if (order.epoch, order.step) != place:
                    raise RuntimeError(
                        f"loader: the order was moved from epoch {place[0]}, step {place[1]} to epoch {order.epoch}, step "
                        f"{order.step} while it was iterated; start a new iteration after load_state_dict"
                    )
                order.step += 1
                place = order.epoch, order.step
                yield batch
        finally:
            if labels is not None:
                labels.close()
        order.epoch, order.step = order.epoch + 1, 0

    def _open(self) -> DataLoader:
        follow = shield_loaders() if self._workers else None
        return DataLoader(
            self._dataset.unlabeled_dataset,
            batch_sampler=self._order,  # type: ignore[arg-type]
            collate_fn=_only_batch,
            num_workers=self._workers,
            multiprocessing_context="forkserver" if self._workers else None,
            persistent_workers=self._workers > 0,
            worker_init_fn=follow,
            pin_memory=self._pin_memory,
            # A loader draws a number whenever it starts; from torch's own stream, a resumed run's dropout would differ.
            generator=torch.Generator(),
        )

    def _labels(self, cache: Cache) -> _Labels:
        order = self._order
        requests = iter(order)
        first = next(requests, None)
        mapped = first is not None and cache.memmap(first.view) is not None
        return _Labels(
            partial(self._read, cache),
            requests if first is None else chain([first], requests),
            ahead=0 if mapped else self._ahead,
            coming=None if mapped or order.window_blocks is None else self._coming(),
        )

    def _read(self, cache: Cache, request: Request, windows: list[Request] | None) -> CachedBatch:
        if windows:
            cache.prefetch([(window.view, window.samples) for window in windows])
        stored = self._dataset.read(request.samples, request.view)
        if self._pin_memory:
            stored = stored._replace(labels=stored.labels.to_torch().pin_memory())
        return stored

    def _coming(self) -> Iterator[list[Request] | None]:
        """Yields for each step from here on the window that it begins in and the next two; None where already announced."""
        previous = -1
        for step in count(self._order.step):
            window = self._order.window_of(step)
            yield self._order.windows(window, ANNOUNCED_WINDOWS) if window != previous else None
            previous = window

    def close(self) -> None:
        """Ends the loader processes, and what the cache decodes ahead; iterating again starts them anew."""
        self._unlabeled = None
        if self._dataset.cache is not None:
            self._dataset.cache.prefetch([])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Labels:
    """What the cache holds of one request after the other, read by a thread, `ahead` of them at most; 0: by no thread.

    The caller's thread walks the order and asks; the other only reads, and holds nothing that has to be waited for.
    """

    def __init__(
        self,
        read: Callable[[Request, list[Request] | None], CachedBatch],
        requests: Iterator[Request],
        *,
        ahead: int,
        coming: Iterator[list[Request] | None] | None,
    ) -> None:
        self._read, self._requests, self._ahead = read, requests, ahead
        self._windows = coming
        self._pool = ThreadPoolExecutor(1, "softcache-labels") if ahead else None
        self._coming: deque[Future[CachedBatch]] = deque()
        self._fill()

    def __next__(self) -> CachedBatch:
        if self._pool is None:
            return self._read(next(self._requests), None)
        stored = self._coming.popleft().result()
        self._fill()
        return stored

    def _fill(self) -> None:
        while self._pool is not None and len(self._coming) < self._ahead:
            request = next(self._requests, None)
            if request is None:
                return
            # Said to the cache by the thread, when it comes to this request: before, it would forget what it still needs.
            windows = None if self._windows is None else next(self._windows)
            self._coming.append(self._pool.submit(self._read, request, windows))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _only_batch(batches: list[Any]) -> Any:
    return batches[0]
