"""Distillation from a cache of images in Lightning: a module with the loss, and a data module with the labels.

    data = SoftLabelDataModule(source, cache, evaluation=held_out, batch_size=64)
    module = SoftLabelModule(student, cache, loss=LossSettings(temperature=4, alpha=0.9), lr=3e-3)
    Trainer(max_epochs=10).fit(module, data)

Either may be used without the other, and subclassed: `configure_optimizers` is the method that people replace.

Lightning saves the loader's place in every checkpoint, because the loader has a `state_dict`: `fit(..., ckpt_path=…)` goes
on with the next batch of the same order, in the middle of an epoch as well, with weights that are those of a run without
the stop. `CheckpointLoader` is what makes that true; why it is not `SoftLabelLoader` alone stands there.

One process. With several, Lightning averages gradients over processes as if their batches had the same number of samples,
and nothing here was tested with them: `softcache train-student` weighs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from softcache.data.images import ImageBatch, ViewedSource
from softcache.errors import ConfigError, MissingExtraError, RunError
from softcache.losses import LossSettings, cross_entropy
from softcache.reader.cache import DEFAULT_WINDOW_BLOCKS
from softcache.reader.dataset import HardLabelDataset, SoftLabelDataset, cached_views
from softcache.reader.loader import SoftLabelLoader
from softcache.reader.order import BlockShuffle
from softcache.student.integrations.validate import check_images, check_settled, normalize_of
from softcache.student.tasks import ImageTask

try:
    import lightning
except ImportError as error:
    raise MissingExtraError(
        f"softcache.student.integrations.lightning needs lightning ({error}); pip install 'softcache[lightning]'"
    ) from error

if TYPE_CHECKING:
    from softcache.data.sources.images.base import Source
    from softcache.data.transforms import Views
    from softcache.models.image import Normalize
    from softcache.reader.cache import Cache

__all__ = ["CheckpointLoader", "SoftLabelDataModule", "SoftLabelModule"]


class SoftLabelModule(lightning.LightningModule):
    """A student, its loss on a batch of the cache, and its score on a held-out one.

    Logs `train_loss`, `val_loss` (nats) and `val_accuracy`. The optimizer is AdamW.

    Args:
        model: uint8 images, normalised [B, C, H, W] -> logits [B, V].
        cache: that the batches come from; it has V, and how the teacher's pixels were normalised.
        loss: any of `[loss]` whose temperature and alpha stay.
        normalize: in place of the cache's own; needed where the views are a transform of your own.
        lr: learning rate.
        weight_decay: of AdamW.

    Raises:
        ConfigError: the cache is not one of images, or the loss has a schedule.
        IncompleteCacheError: the cache is not finished.
        SpecError: (while training) the model gives something else than [B, V].
    """

    def __init__(
        self,
        model: nn.Module,
        cache: Cache,
        *,
        loss: LossSettings | None = None,
        normalize: Normalize | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        check_images(cache, "SoftLabelModule")
        loss = loss or LossSettings()
        check_settled(loss, "SoftLabelModule")
        self.model = model
        self._lr, self._weight_decay = lr, weight_decay
        self._task = ImageTask(
            build_model=lambda: model,
            evaluation=None,  # type: ignore[arg-type]  # Lightning evaluates
            normalize=normalize or normalize_of(cache, None),
            num_classes=cache.num_classes,
            loss_settings=loss,
        )

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Returns the logits [B, V] of uint8 images."""
        return self._task.logits(self.model, images_BCHW)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> torch.Tensor:
        loss = self._task.loss(self.model, batch)
        self.log("train_loss", loss, batch_size=len(batch), prog_bar=True)
        return loss

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        logits_BV = self(batch.images)
        correct_B = logits_BV.argmax(-1) == batch.targets
        self.log("val_loss", cross_entropy(logits_BV, batch.targets).mean(), batch_size=len(batch))
        self.log("val_accuracy", correct_B.float().mean(), batch_size=len(batch), prog_bar=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self._lr, weight_decay=self._weight_decay)


class SoftLabelDataModule(lightning.LightningDataModule):
    """A cache and its source as Lightning's training batches; a held-out source as its validation batches.

    Args:
        source: the training split that was labeled.
        cache: of it, complete.
        evaluation: a held-out split, shown plainly (view 0); None: no validation.
        batch_size: samples of a batch; the last of an epoch may be smaller.
        views: where they are a transform of your own.
        num_views: of the cache's views, one an epoch, in turn; None: all.
        seed: of the order.
        workers: processes that load pixels.

    Raises:
        AlignmentError: the source is not what was labeled; while training, a sample's pixels.
        ConfigError: the cache is not one of images, has fewer views, or Lightning runs several processes.
        IncompleteCacheError: the cache is not finished.
    """

    def __init__(
        self,
        source: Source,
        cache: Cache,
        *,
        evaluation: Source | None = None,
        batch_size: int,
        views: Views | None = None,
        num_views: int | None = None,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        super().__init__()
        check_images(cache, "SoftLabelDataModule")
        if num_views is not None and not 1 <= num_views <= cache.num_views:
            raise ConfigError(
                f"SoftLabelDataModule: num_views {num_views}; cache {cache.url} holds {cache.num_views}; "
                "ask for at most that"
            )
        views = views or cached_views(cache)
        self._dataset = SoftLabelDataset(source, cache, views=views)
        self._held_out = None if evaluation is None else HardLabelDataset(ViewedSource(evaluation, views))
        self._cache, self._num_views = cache, num_views or cache.num_views
        self._batch_size, self._seed, self._workers = batch_size, seed, workers

    def setup(self, stage: str) -> None:
        if self.trainer is not None and self.trainer.world_size > 1:
            raise ConfigError(
                f"SoftLabelDataModule: Trainer runs {self.trainer.world_size} processes; expected one, Trainer(devices=1); "
                "for several start `torchrun --nproc-per-node=N -m softcache train-student`"
            )

    def train_dataloader(self) -> CheckpointLoader:
        num_views = self._num_views
        order = BlockShuffle(
            self._cache.samples_in,
            batch_size=self._batch_size,
            view_of=lambda epoch: epoch % num_views,
            block_samples=self._cache.manifest.plan.chunk_samples,
            window_blocks=None if self._cache.fits_in_memmap else DEFAULT_WINDOW_BLOCKS,
            seed=self._seed,
        )
        trainer = self.trainer
        if trainer is not None:  # reload_dataloaders_every_n_epochs, and a second fit, ask for another loader
            order.epoch = trainer.current_epoch
        return CheckpointLoader(
            SoftLabelLoader(self._dataset, order, workers=self._workers),
            order,
            num_batches=lambda: float("inf") if trainer is None else trainer.num_training_batches,
            place_of={"cache": self._cache.manifest_sha256, "num_views": num_views},
        )

    def val_dataloader(self) -> Any:
        if self._held_out is None:
            return []
        return DataLoader(
            self._held_out,  # type: ignore[arg-type]
            batch_size=self._batch_size,
            collate_fn=HardLabelDataset.collate,
        )


class CheckpointLoader:
    """A `SoftLabelLoader` that keeps Lightning's rules of what an iteration is.

    Lightning takes `len` for the batches of a whole epoch, also where a checkpoint has it begin in the middle; it calls
    `iter` more often than it uses what it gets; and it asks for no batch after the last, so that the loader would never
    hear that the epoch is over. So here each iteration that is begun is an epoch's, and the first one after
    `load_state_dict` is the rest of the epoch that was saved (or the next epoch, where nothing was left of it).

    Args:
        num_batches: returns how many batches Lightning takes of an epoch at most (`limit_train_batches`).
        place_of: what else the place of a checkpoint is a place in, by name.
    """

    def __init__(
        self,
        loader: SoftLabelLoader,
        order: BlockShuffle,
        *,
        num_batches: Callable[[], float] = lambda: float("inf"),
        place_of: Mapping[str, Any] | None = None,
    ) -> None:
        self._loader, self._order = loader, order
        self._num_batches, self._place_of = num_batches, dict(place_of or {})
        self._goes_on = False

    def __len__(self) -> int:
        """Returns the batches of a whole epoch."""
        return self._order.num_steps(self._order.epoch)

    def __iter__(self) -> Iterator[ImageBatch]:
        # A generator: what stands here happens when the first batch is asked for.
        order = self._order
        is_over = order.step >= min(order.num_steps(order.epoch), self._num_batches())
        if is_over or (order.step and not self._goes_on):
            order.epoch, order.step = order.epoch + 1, 0
        self._goes_on = False
        yield from self._loader

    def state_dict(self) -> dict[str, Any]:
        """Returns the place in the order: the batches that were handed over."""
        return {**self._loader.state_dict(), **self._place_of}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved place.

        Raises:
            RunError: the state is of another seed, batch size, cache or number of views.
        """
        for name, here in self._place_of.items():
            if state.get(name, here) != here:
                raise RunError(
                    f"order of samples: {name} {state[name]} in the saved state, {here} here; expected the same; resume "
                    f"with that {name}, or start a new run from the checkpoint's weights"
                )
        self._loader.load_state_dict(state)
        self._goes_on = True
