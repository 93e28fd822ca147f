"""The callback that tells an epoch's order which epoch it is."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from softcache.reader.sampler import BlockSampler

__all__ = ["SetEpoch"]


class SetEpoch(TrainerCallback):
    """Tells the order its epoch; accelerate does too, except where a run of several ranks is resumed in mid-epoch."""

    def __init__(self, order: BlockSampler) -> None:
        self._order = order

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._order.set_epoch(int(state.epoch or 0))
