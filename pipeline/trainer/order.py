"""The order of an epoch's samples, by blocks of the cache, and the callback that tells it the epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch.utils.data import Sampler
from transformers import TrainerCallback

from pipeline.cache import DEFAULT_WINDOW_BLOCKS
from pipeline.shuffle import BlockShuffle

if TYPE_CHECKING:
    from pipeline.cache import Cache


__all__ = ["BlockOrder", "SetEpoch"]


class BlockOrder(Sampler[int]):
    """The samples of an epoch, shuffled by blocks: a pure function of (seed, epoch), so a resumed run finds its place."""

    def __init__(self, cache: Cache, seed: int) -> None:
        self._num_samples, self.epoch = len(cache), 0
        self._shuffle = BlockShuffle(
            cache.samples_in,
            batch_size=1,
            view_of=lambda epoch: 0,
            block_samples=cache.manifest.plan.chunk_samples,
            window_blocks=None if cache.fits_thawed else DEFAULT_WINDOW_BLOCKS,
            seed=seed,
        )

    def __len__(self) -> int:
        return self._num_samples

    def __iter__(self) -> Iterator[int]:
        return iter(self._shuffle.order(self.epoch).tolist())

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class SetEpoch(TrainerCallback):
    """Tells the order its epoch; accelerate does too, except where a run of several ranks is resumed in mid-epoch."""

    def __init__(self, order: BlockOrder) -> None:
        self._order = order

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._order.set_epoch(int(state.epoch or 0))
