"""The order in which a student sees its samples: shuffled by blocks, the same for every number of ranks.

Storage is read in chunks, so the order keeps chunks together: the blocks of an epoch are permuted, a window
of them is opened, and samples are permuted inside the window. The order is a pure function of (seed, epoch)
and of the geometry (block size, window, batch size); all ranks walk the same order and take their slice of
every batch, so a position in it is valid for any number of ranks and loader processes.

A window of all blocks is a full shuffle. How much less a window of a few blocks mixes, and what that costs in
training: `python -m benchmarks.shuffle_quality`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from softcache.errors import RunError

__all__ = ["BlockShuffle", "Request"]


class Request(Sequence[tuple[int, int]]):
    """The samples of a batch, all of one view, as an array: it is made and sent to a loader process at one cost.

    It is also a sequence of pairs (sample, view), for who wants those.

    Attributes:
        samples: [B] int64.
        view: of all of them.
    """

    __slots__ = ("samples", "view")

    def __init__(self, samples: np.ndarray, view: int) -> None:
        self.samples, self.view = samples, view

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return Request(self.samples[place], self.view)
        return int(self.samples[place]), self.view

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((sample, self.view) for sample in self.samples.tolist())

    def __repr__(self) -> str:
        return f"Request({self.samples.tolist()}, view={self.view})"


class _EpochOrder:
    """One epoch's order, of which windows are permuted when they are reached.

    The generator's draws for a window follow those for the windows before it, so they are made from the first on.
    """

    def __init__(
        self,
        samples: np.ndarray,
        shuffle: np.random.Generator,
        *,
        block_samples: int,
        window_blocks: int | None,
    ) -> None:
        firsts = np.flatnonzero(np.diff(samples // block_samples, prepend=-1))
        counts = np.diff(firsts, append=len(samples))
        blocks = shuffle.permutation(len(firsts))
        self._samples, self._shuffle, self._window_blocks = (
            samples,
            shuffle,
            window_blocks or max(len(blocks), 1),
        )
        self._firsts, self._counts = firsts[blocks], counts[blocks]
        ends = np.cumsum(self._counts)
        last = np.arange(self._window_blocks, len(blocks) + self._window_blocks, self._window_blocks)
        self._window_stops: list[int] = (
            ends[np.minimum(last, len(blocks)) - 1] if len(blocks) else ends
        ).tolist()
        self._order, self._num_windows = np.empty(len(samples), np.int64), 0

    def window_at(self, place: int) -> int:
        """Returns the number of the window that a place in the order is in."""
        return bisect_right(self._window_stops, place)  # NumPy would let the threads that decode run first

    @property
    def num_windows(self) -> int:
        return len(self._window_stops)

    def bounds(self, window: int) -> tuple[int, int]:
        """Returns the first place of a window in the order, and that behind its last."""
        return self._window_stops[window - 1] if window else 0, self._window_stops[window]

    def samples_of(self, window: int) -> np.ndarray:
        """Returns the samples of a window, block by block, as they are before they are permuted."""
        blocks = slice(window * self._window_blocks, (window + 1) * self._window_blocks)
        counts = self._counts[blocks]
        ends = np.cumsum(counts)
        return self._samples[
            np.arange(counts.sum()) + np.repeat(self._firsts[blocks] - (ends - counts), counts)
        ]

    def part(self, start: int, stop: int) -> np.ndarray:
        """Returns the samples at these places of the order."""
        stop = min(stop, len(self._order))
        while self._num_windows < self.num_windows and (
            not self._num_windows or self._window_stops[self._num_windows - 1] < stop
        ):
            end = self._window_stops[self._num_windows]
            mixed = self._shuffle.permutation(self.samples_of(self._num_windows))
            self._order[end - len(mixed) : end] = mixed
            self._num_windows += 1
        return self._order[start:stop]


class BlockShuffle:
    """Batches of (sample, view) requests in block-shuffled order; a batch sampler for a DataLoader.

    Every sample of an epoch comes exactly once over all ranks. The last batch of an epoch may be smaller;
    nothing is dropped. Iterating walks the rest of the current epoch, and moves nothing: who uses the batches
    advances `step`, as `softcache.reader.loader` does.

    Args:
        samples_of: view -> the sample numbers [N] of that view that can be had, ascending.
        batch_size: samples per step over all ranks.
        view_of: epoch -> view number.
        block_samples: samples that are contiguous in storage (the cache's chunk).
        window_blocks: blocks that are mixed with each other; None: all, which is a full shuffle.
        seed: of the order.
        rank: this process; of `num_ranks`.
        rows_of: [N] rows of every sample; None where each has one.
        labeled_of: [N] how many of them have a label; None: all.

    Attributes:
        epoch: the current epoch.
        step: how many steps of it were done.
    """

    def __init__(
        self,
        samples_of: Callable[[int], np.ndarray],
        *,
        batch_size: int,
        view_of: Callable[[int], int],
        block_samples: int,
        window_blocks: int | None,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
        rows_of: np.ndarray | None = None,
        labeled_of: np.ndarray | None = None,
    ) -> None:
        self._samples_of, self._view_of = samples_of, view_of
        self._batch_size = batch_size
        self.block_samples, self.window_blocks = block_samples, window_blocks
        self._seed, self._rank, self._num_ranks = seed, rank, num_ranks
        self._rows_of, self._labeled_of = rows_of, labeled_of
        self._orders: dict[int, _EpochOrder] = {}
        self.epoch, self.step = 0, 0

    def state_dict(self) -> dict[str, int | None]:
        """Returns the position (the epoch, and the steps of it that were consumed) and what it is a position in.

        The number of ranks is no part of it.
        """
        return {"epoch": self.epoch, "step": self.step, **self._geometry()}

    def _geometry(self) -> dict[str, int | None]:
        return {
            "seed": self._seed,
            "batch_size": self._batch_size,
            "block_samples": self.block_samples,
            "window_blocks": self.window_blocks,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a position that `state_dict` returned, here or with another number of ranks.

        The blocks and windows of the saved order are taken over: the epoch goes on in the order that it began in. A state
        of epoch and step alone is a position in the order as it is. Other keys are left alone.

        Raises:
            RunError: the state is of another batch size (a step is then another place) or seed; both are named.
        """
        for name, here in (("batch_size", self._batch_size), ("seed", self._seed)):
            if state.get(name, here) != here:
                raise RunError(
                    f"order of samples: {name} {state[name]} in the saved state, {here} here; a step of the one is no "
                    f"place in the other; resume with {name} {state[name]}, or start a new run"
                )
        self.block_samples = state.get("block_samples", self.block_samples)
        self.window_blocks = state.get("window_blocks", self.window_blocks)
        self.epoch, self.step = state["epoch"], state["step"]
        self._orders = {}

    def num_steps(self, epoch: int) -> int:
        return -(-len(self._samples_of(self._view_of(epoch))) // self._batch_size)

    def share(self, step: int | None = None) -> tuple[int, int]:
        """Returns how many rows of a step of this epoch are this rank's, and how many all ranks have.

        Args:
            step: None: the one that comes next.
        """
        samples = self._samples_at(self.step if step is None else step)
        first, last = self._slice(len(samples))
        if self._rows_of is None:
            return last - first, len(samples)
        rows = self._rows_of[samples]
        return int(rows[first:last].sum()), int(rows.sum())

    def num_samples(self, step: int) -> int:
        """Returns how many samples all ranks have in a step of this epoch."""
        return len(self._samples_at(step))

    def label_share(self, step: int | None = None) -> float | None:
        """Returns which share of a step's rows, over all ranks, has a label; None: each has one."""
        if self._labeled_of is None:
            return None
        samples = self._samples_at(self.step if step is None else step)
        num_rows = len(samples) if self._rows_of is None else self._rows_of[samples].sum()
        return float(self._labeled_of[samples].sum() / num_rows)

    def _samples_at(self, step: int) -> np.ndarray:
        """A step's samples, of all ranks."""
        return self._order_of(self.epoch).part(step * self._batch_size, (step + 1) * self._batch_size)

    def _order_of(self, epoch: int) -> _EpochOrder:
        if epoch not in self._orders:
            near = {number: order for number, order in self._orders.items() if abs(number - epoch) == 1}
            self._orders = near | {epoch: self._new_order(epoch)}
        return self._orders[epoch]

    def _new_order(self, epoch: int) -> _EpochOrder:
        return _EpochOrder(
            self._samples_of(self._view_of(epoch)),
            np.random.default_rng([self._seed, epoch]),
            block_samples=self.block_samples,
            window_blocks=self.window_blocks,
        )

    def _slice(self, total: Any) -> tuple[Any, Any]:
        """Returns the first of this rank's places in a batch of so many samples, and that behind its last."""
        return total * self._rank // self._num_ranks, total * (self._rank + 1) // self._num_ranks

    def order(self, epoch: int) -> np.ndarray:
        """Returns the sample numbers [N] of an epoch, for all ranks, in the order of use."""
        order = self._new_order(epoch)
        return order.part(0, len(order._order))

    def window_of(self, step: int) -> int:
        """Returns the number of the window that a step of the current epoch begins in."""
        return self._order_of(self.epoch).window_at(step * self._batch_size)

    def windows(self, first: int, count: int) -> list[Request]:
        """Returns this rank's samples of some windows of the current epoch, in order of use.

        So that a reader can decode them before they are asked for. Past the epoch's last window come the next epoch's.
        """
        epoch, order = self.epoch, self._order_of(self.epoch)
        out: list[Request] = []
        while len(out) < count:
            if first >= order.num_windows:
                first, epoch = first - order.num_windows, epoch + 1
                order = self._order_of(epoch)
                if not order.num_windows:
                    break
                continue
            start, stop = order.bounds(first)
            samples = order.part(start, stop)
            if self._num_ranks > 1:
                samples = samples[self._is_mine(np.arange(start, stop), len(order._order))]
            out.append(Request(samples, self._view_of(epoch)))
            first += 1
        return out

    def _is_mine(self, places: np.ndarray, total: int) -> np.ndarray:
        """Returns which places of an order of so many samples this rank reads, [len(places)] bool."""
        start = places // self._batch_size * self._batch_size
        sizes = np.minimum(self._batch_size, total - start)
        first, last = self._slice(sizes)
        first, last = np.where(last > first, first, 0), np.where(last > first, last, 1)
        return (places - start >= first) & (places - start < last)

    def __iter__(self) -> Iterator[Request]:
        view, order = self._view_of(self.epoch), self._order_of(self.epoch)
        for step in range(self.step, self.num_steps(self.epoch)):
            batch = order.part(step * self._batch_size, (step + 1) * self._batch_size)
            first, last = self._slice(len(batch))
            # A rank without a share of a small last batch still steps with the others; `share()` is 0.
            yield Request(batch[first:last] if last > first else batch[:1], view)
