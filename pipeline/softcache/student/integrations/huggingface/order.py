"""The order of samples in a Trainer's checkpoint: what its steps are counted in, and where that must be the same again."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import TrainerCallback

from softcache.errors import RunError
from softcache.hashing.digests import digest_json
from softcache.reader.sampler import BlockSampler
from softcache.runtime.distributed import check_same
from softcache.student.integrations.huggingface.dataset import labels_digest

__all__ = ["KeepOrder"]

KEY = "softcache_order"
"""Of what is kept, among the states of callbacks in trainer_state.json."""

ROWS_COMPARED = 64


class KeepOrder(TrainerCallback):
    """Keeps the order of a run that goes on from a checkpoint, and gives it its epoch.

    transformers skips as many steps as were made, whatever a step is: of another batch size or another order, samples would
    come twice in the epoch, and others never.

    Args:
        trainer: a DistillTrainer or DistillSFTTrainer.
        order: that is shuffled by blocks; None: the Trainer's own order.
    """

    def __init__(self, trainer: Any, order: BlockSampler | None = None) -> None:
        self._trainer, self._order = trainer, order

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compares the order of the checkpoint with that of this run, and the run with that of the other processes.

        Raises:
            RunError: a step is another one, the labels are of another teacher, or a process has another run.
        """
        here = self._described(args)
        there = state.stateful_callbacks.get(KEY, here)
        labels = labels_digest(self._trainer._cache)
        if (found := there.get("labels", labels)) != labels:
            raise RunError(
                f"checkpoint of step {state.global_step}: labels {found} there, {labels} of cache "
                f"{self._trainer._cache.url}, which has another teacher, tokenizer, label policy or codec; resume with the "
                "cache that the run began with, or begin a run with the weights of the checkpoint as the model"
            )
        if not args.ignore_data_skip:
            found = [name for name in here if there.get(name, here[name]) != here[name]]
            if found:
                name = found[0]
                raise RunError(
                    f"checkpoint of step {state.global_step}: {name} {there[name]!r} there, {here[name]!r} here, so a step "
                    f"of the one is no place in the order of the other, and samples would come twice or never; resume with "
                    f"{name} {there[name]!r}, or set ignore_data_skip=True, which begins the epoch anew"
                )
            if self._order is not None and "blocks" in there:
                self._order.load_state_dict({"epoch": 0, "step": 0, **there["blocks"]})
        blocks = {} if self._order is None else self._order.state_dict()
        kept = here | {
            "labels": labels,
            "blocks": {name: blocks[name] for name in ("block_samples", "window_blocks") if name in blocks},
        }
        # Each takes its part of an order that it makes itself.
        cache, loss = self._trainer._cache, self._trainer._loss
        check_same("the run", kept | {"cache": cache.manifest_sha256, "loss": loss.model_dump(mode="json")})
        state.stateful_callbacks[KEY] = kept

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # accelerate does too, except where a run of several ranks is resumed in mid-epoch.
        if self._order is not None:
            self._order.set_epoch(int(state.epoch or 0))

    def _described(self, args: Any) -> dict[str, Any]:
        trainer, data = self._trainer, self._trainer.train_dataset
        ranks = 1 if args.accelerator_config.split_batches else trainer.accelerator.num_processes
        return {
            "samples of a step": trainer._train_batch_size * ranks * args.gradient_accumulation_steps,
            "samples of an epoch": len(data) if hasattr(data, "__len__") else None,
            "source": trainer._source.digest,
            "rows": self._rows(),
            "seed": args.seed if args.data_seed is None else args.data_seed,
            "train_sampling_strategy": args.train_sampling_strategy,
            "dataloader_drop_last": args.dataloader_drop_last,
        }

    def _rows(self) -> str | None:
        """A digest of rows from all over a dataset that the user chose and ordered; None where the cache has the order."""
        data = self._trainer.train_dataset
        if self._order is not None or not hasattr(data, "__len__"):
            return None
        numbers = np.linspace(0, len(data) - 1, min(len(data), ROWS_COMPARED)).astype(int).tolist()
        return digest_json([np.asarray(data[number]["input_ids"]).tolist() for number in numbers])[:16]
