"""Block order for plain map-style loops: Lightning, Hugging Face, or a DataLoader of your own.

    sampler = BlockSampler(dataset, seed=0, rank=rank, num_ranks=num_ranks)
    loader = DataLoader(dataset, batch_size=256, sampler=sampler)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for batch in loader: ...

The order is that of `softcache.reader.order`. Ranks take turns in it, sample by sample, so that all of them are in the same
window, and the first n samples of every rank are together the first n * num_ranks of the order. With loader processes each
of them decodes every chunk for itself: `SoftLabelLoader` does not, nor does a memory-mapped cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch.utils.data import Sampler

from softcache.reader.cache import DEFAULT_WINDOW_BLOCKS, Cache
from softcache.reader.order import BlockShuffle

if TYPE_CHECKING:
    from softcache.reader.dataset import SoftLabelDataset

__all__ = ["BlockSampler"]


class BlockSampler(Sampler[int]):
    """The sample numbers of an epoch for one rank, shuffled by blocks: a pure function of (seed, epoch).

    Ranks are disjoint and together complete. Where their number does not divide that of the samples, `uneven` decides what
    becomes of the rest: "keep" gives the first ranks one more; "repeat" gives the others one of the first samples again, and
    "drop" leaves the rest out. A loop that synchronises after every batch needs one of the last two.

    A DataLoader fetches ahead, so a sampler cannot know what was used: say so with `advance`.

    Args:
        data: a cache, or a dataset of one.
        seed: of the order.
        window_blocks: blocks that are mixed with each other; None: all; "auto": all if the cache fits in maps, else 16.
        rank: this process; of `num_ranks`.
        view: whose finished samples are taken; None: the dataset's, or 0.
        uneven: see above.
    """

    def __init__(
        self,
        data: Cache | SoftLabelDataset,
        *,
        seed: int = 0,
        window_blocks: int | Literal["auto"] | None = "auto",
        rank: int = 0,
        num_ranks: int = 1,
        view: int | None = None,
        uneven: Literal["keep", "repeat", "drop"] = "keep",
    ) -> None:
        cache = data if isinstance(data, Cache) else data.cache
        if not 0 <= rank < num_ranks:
            raise ValueError(f"BlockSampler: rank {rank} of {num_ranks}; expected 0 to {num_ranks - 1}")
        if window_blocks == "auto":
            window_blocks = None if cache.fits_in_memmap else DEFAULT_WINDOW_BLOCKS
        chosen = getattr(data, "view", 0) if view is None else view
        self._rank, self._num_ranks, self._uneven = rank, num_ranks, uneven
        # A batch of one sample: a step is a sample of the order, over all ranks.
        self._order = BlockShuffle(
            cache.samples_in,
            batch_size=1,
            view_of=lambda epoch: chosen,
            block_samples=cache.manifest.plan.chunk_samples,
            window_blocks=window_blocks,
            seed=seed,
        )

    @property
    def epoch(self) -> int:
        return self._order.epoch

    def set_epoch(self, epoch: int) -> None:
        """Goes to the beginning of an epoch; in the current one, the place is kept."""
        if epoch != self._order.epoch:
            self._order.epoch, self._order.step = epoch, 0

    def advance(self, num_samples: int) -> None:
        """Says that so many more samples of the epoch were used, over all ranks."""
        self._order.step += num_samples

    def state_dict(self) -> dict[str, int | None]:
        """Returns the place, see `BlockShuffle.state_dict`; it fits any number of ranks."""
        return self._order.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved place: iterating gives this rank's part of the rest of the epoch.

        Raises:
            RunError: the state is of another seed.
        """
        self._order.load_state_dict(state)

    def __len__(self) -> int:
        """Returns how many samples of the epoch are left for this rank."""
        left, ranks = self._order.num_steps(self.epoch) - self._order.step, self._num_ranks
        if self._uneven == "keep":
            return max(0, -(-(left - self._rank) // ranks))
        return left // ranks if self._uneven == "drop" else -(-left // ranks)

    def __iter__(self) -> Iterator[int]:
        order = self._order.order(self.epoch)
        mine = order[self._order.step + self._rank :: self._num_ranks]
        length = len(self)
        if len(mine) < length:  # by one, of "repeat"
            yield from mine.tolist()
            yield int(order[(self._order.step + self._rank + len(mine) * self._num_ranks) % len(order)])
            return
        yield from mine[:length].tolist()
