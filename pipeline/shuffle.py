"""The order in which a student sees its samples: shuffled by blocks, the same for every number of ranks.

Storage is read in chunks, so the order keeps chunks together: the blocks of an epoch are permuted, a window
of them is opened, and samples are permuted inside the window. The order is a pure function of (seed, epoch);
all ranks walk the same order and take their slice of every batch, so a position in it is valid for any
number of ranks and loader processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

__all__ = ["BlockShuffle"]


class BlockShuffle:
    """Batches of (sample, view) requests in block-shuffled order; a batch sampler for a DataLoader.

    Every sample of an epoch comes exactly once over all ranks. The last batch of an epoch may be smaller;
    nothing is dropped. Iterating walks the rest of the current epoch.

    Args:
        samples_of: view -> the sample numbers [N] of that view that can be had.
        batch_size: samples per step over all ranks.
        view_of: epoch -> view number.
        block_samples: samples that are contiguous in storage (the cache's chunk).
        window_blocks: blocks that are mixed with each other.
        seed: of the order.
        rank: this process; of `num_ranks`.
        rows_of: [N] rows of every sample; None where each has one.
        labelled_of: [N] how many of them have a label; None: all.
    """

    def __init__(
        self,
        samples_of: Callable[[int], np.ndarray],
        *,
        batch_size: int,
        view_of: Callable[[int], int],
        block_samples: int,
        window_blocks: int,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
        rows_of: np.ndarray | None = None,
        labelled_of: np.ndarray | None = None,
    ) -> None:
        self._samples_of, self._view_of = samples_of, view_of
        self._batch_size = batch_size
        self.block_samples, self.window_blocks = block_samples, window_blocks
        self._seed, self._rank, self._num_ranks = seed, rank, num_ranks
        self._rows_of, self._labelled_of = rows_of, labelled_of
        self._last_order: tuple[int, np.ndarray] | None = None
        self.epoch, self.step = 0, 0

    def state_dict(self) -> dict[str, int]:
        """Returns the position: the epoch, and the steps of it that were consumed.

        The caller advances it (`step += 1`) when a batch was *used*: what a loader has fetched ahead does
        not count.
        """
        return {"epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.step = state["epoch"], state["step"]

    def num_steps(self, epoch: int) -> int:
        return -(-len(self._samples_of(self._view_of(epoch))) // self._batch_size)

    def share(self) -> tuple[int, int]:
        """Returns how many rows of the current step are this rank's, and how many all ranks have."""
        if self._rows_of is None:
            num_samples = len(self._samples_of(self._view_of(self.epoch)))
            total = min(self._batch_size, num_samples - self.step * self._batch_size)
            first, last = self._slice(total)
            return last - first, total
        rows = self._rows_of[self._current_samples()]
        first, last = self._slice(len(rows))
        return int(rows[first:last].sum()), int(rows.sum())

    def label_share(self) -> float | None:
        """Returns which share of the current step's rows, over all ranks, has a label; None: each has one."""
        if self._labelled_of is None:
            return None
        samples = self._current_samples()
        num_rows = len(samples) if self._rows_of is None else self._rows_of[samples].sum()
        return float(self._labelled_of[samples].sum() / num_rows)

    def _current_samples(self) -> np.ndarray:
        """The current step's samples, of all ranks."""
        start = self.step * self._batch_size
        return self._current_order()[start : start + self._batch_size]

    def _current_order(self) -> np.ndarray:
        if self._last_order is None or self._last_order[0] != self.epoch:
            self._last_order = (self.epoch, self.order(self.epoch))
        return self._last_order[1]

    def _slice(self, total: int) -> tuple[int, int]:
        return total * self._rank // self._num_ranks, total * (self._rank + 1) // self._num_ranks

    def order(self, epoch: int) -> np.ndarray:
        """Returns the sample numbers [N] of an epoch, for all ranks, in the order of use."""
        samples = self._samples_of(self._view_of(epoch))
        blocks = np.split(samples, np.flatnonzero(np.diff(samples // self.block_samples)) + 1)
        shuffle = np.random.default_rng([self._seed, epoch])
        blocks = [blocks[number] for number in shuffle.permutation(len(blocks))]
        windows = [
            shuffle.permutation(np.concatenate(blocks[start : start + self.window_blocks]))
            for start in range(0, len(blocks), self.window_blocks)
        ]
        return np.concatenate(windows)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        view, order = self._view_of(self.epoch), self._current_order()
        for start in range(self.step * self._batch_size, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            first, last = self._slice(len(batch))
            # A rank without a share of a small last batch still steps with the others; `share()` says 0.
            mine = batch[first:last] if last > first else batch[:1]
            yield [(int(sample), view) for sample in mine]
