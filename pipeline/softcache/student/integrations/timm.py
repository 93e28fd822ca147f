"""A cache of images for timm: datasets that its `create_loader` takes, and a loss for its training loop.

    train = TimmDataset(source, cache)
    loader = create_loader(train, train.input_size, 64, is_training=True, no_aug=True, mean=train.mean, std=train.std)
    loss_fn = TimmLoss(train, LossSettings(temperature=4, alpha=0.9))
    for epoch in range(epochs):
        train.set_epoch(epoch)
        for images, targets in loader:
            loss = loss_fn(model(images), targets)

For timm's own `train.py` see `softcache.runs.foreign_scripts`.

timm's loop knows a batch as (images, targets). A target is here a row of numbers that holds the ground truth and the whole
label record (`softcache.student.integrations.timm_rows`), so it survives timm's collate, its prefetcher and its loader
processes as it is.

**Pixels must be those that the teacher saw.** timm's own augmentation is therefore off: `create_loader(no_aug=True)`, in
`train.py` `--no-aug`, no mixup, no cutmix, no random erasing. The variety comes from the cache's views, one an epoch, in
turn. `create_loader` sets a dataset's `transform`; one that would change a pixel is refused, and none is ever run.
Normalising stays timm's, in its prefetcher (`use_prefetcher`, the default): pass `mean` and `std` of the dataset.

timm resumes at the beginning of an epoch, in an order of torch's own random state; what is exact is that
every sample meets its own label. Loader processes read labels for themselves, and are forked: open the cache with
`memmap=MemmapSettings()`, or pass `num_workers=0`; else they say so.
In several processes call the sampler's `set_epoch` too: `train.py` calls only the dataset's, where there is one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from softcache.data.images import ImageBatch, ViewedSource
from softcache.errors import ConfigError
from softcache.losses import LossSettings, distillation_loss
from softcache.reader.dataset import HardLabelDataset, SoftLabelDataset, cached_views
from softcache.student.integrations.timm_rows import LabelRows
from softcache.student.integrations.validate import check_arguments, check_images, check_settled

if TYPE_CHECKING:
    from softcache.data.sources.images.base import Source
    from softcache.data.transforms import Views
    from softcache.reader.cache import Cache

__all__ = ["TimmDataset", "TimmImages", "TimmLoss"]

IDENTITY_TRANSFORMS = {"Resize", "CenterCrop", "ToNumpy", "PILToTensor", "MaybePILToTensor"}
"""Steps that leave an image of the right size as it is."""


class TimmImages(torch.utils.data.Dataset[tuple[torch.Tensor, Any]]):
    """A held-out split as the student will see it, with its ground truth: (uint8 [C, H, W], class).

    Args:
        source: the split.
        cache: whose views are applied; view 0, the plain one.
        views: where they are a transform of your own.

    Attributes:
        input_size: (C, H, W), for `create_loader`.
        mean, std: of the views, for `create_loader`.
        classes: the names of the classes.
        loss: of the config, where the dataset was opened by one; what `TimmLoss` takes by default.
    """

    loss: LossSettings | None = None

    def __init__(self, source: Source, cache: Cache, *, views: Views | None = None) -> None:
        check_images(cache, type(self).__name__)
        views = views or cached_views(cache)
        self.classes = list(source.class_names)
        self.mean, self.std = views.settings.mean, views.settings.std
        self._open(source, cache, views)
        image = self._batch([0]).images[0]
        channels, height, width = image.shape
        self.input_size = (channels, height, width)
        if image.dtype != torch.uint8:
            raise ConfigError(
                f"{type(self).__name__}: the views give {image.dtype}; expected uint8, which timm's prefetcher normalises; "
                "leave the normalising out of your transform, or use SoftLabelDataset in a loop of your own"
            )

    def _open(self, source: Source, cache: Cache, views: Views) -> None:
        self._data: Any = HardLabelDataset(ViewedSource(source, views))

    def _batch(self, indices: Any) -> ImageBatch:
        return self._data[indices[0]] if len(indices) == 1 else self._data.fetch(indices)

    def _targets(self, batch: ImageBatch) -> Any:
        return batch.targets

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, Any]]:
        """Returns (image, target) of each; torch's DataLoader calls it once per batch."""
        batch = self._batch(indices)
        return list(zip(batch.images, self._targets(batch), strict=True))

    @property
    def transform(self) -> None:
        """None: views are applied already. `create_loader` sets it, and is refused where it would change pixels."""
        return None

    @transform.setter
    def transform(self, given: Any) -> None:
        for step in getattr(given, "transforms", [] if given is None else [given]):
            name, size = type(step).__name__, getattr(step, "size", None)
            if name not in IDENTITY_TRANSFORMS:
                raise ConfigError(
                    f"{type(self).__name__}: timm's {name} would change the pixels that the teacher labeled; expected no "
                    "augmentation and no second normalisation; call create_loader with no_aug=True (in train.py --no-aug) "
                    "and use_prefetcher=True"
                )
            height, width = self.input_size[1:]
            if name == "CenterCrop" and tuple(size if isinstance(size, tuple | list) else (size, size)) != (
                height,
                width,
            ):
                raise ConfigError(
                    f"{type(self).__name__}: timm wants images of {size}, the cache's views have {height}x{width}; pass "
                    "input_size=dataset.input_size, or make a cache with that views.size"
                )


class TimmDataset(TimmImages):
    """The split that was labeled, each target a row that `TimmLoss` reads: (uint8 [C, H, W], float32 [width]).

    Each image is compared with the fingerprint of what the teacher saw, as everywhere.

    Args:
        source: the training split that was labeled.
        cache: of it, complete.
        views: where they are a transform of your own.

    Attributes:
        rows: what the numbers of a target are.

    Raises (from the constructor and on every fetch):
        AlignmentError: the source or an image is not what was labeled; the sample is named.
        ConfigError: the cache is not one of images, or timm would change the pixels.
        IncompleteCacheError: the cache is not finished.
    """

    def _open(self, source: Source, cache: Cache, views: Views) -> None:
        self._data = SoftLabelDataset(source, cache, views=views)
        labels = self._batch([0]).labels
        assert labels is not None
        self.rows = LabelRows.of(labels, mixed=views.settings.mixes)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the view of an epoch: all of the cache's, in turn. timm's `train.py` calls this."""
        view = epoch % self._data.cache.num_views
        self._data.cache.memmap(
            view
        )  # here: forked loader processes read materialized views, and materialize none themselves
        self._data.view = view

    def _targets(self, batch: ImageBatch) -> torch.Tensor:
        assert batch.labels is not None
        return self.rows.pack(batch.labels, batch.targets)


class TimmLoss(nn.Module):
    """(1 - alpha) * CE(ground truth) + alpha * T^2 * soft loss, the batch's mean; takes the place of timm's `train_loss_fn`.

    Args:
        dataset: whose targets are read.
        loss: any of `[loss]` whose temperature and alpha stay, without weights of rows; None: the dataset's.
        arguments: of timm's `train.py`, where they shall be checked (`check_arguments`).

    Raises:
        ConfigError: the loss has a schedule or weights, or an argument would mix images or be ignored.
        LabelError: (while training) the targets are not the dataset's, as after mixup.
    """

    def __init__(
        self, dataset: TimmDataset, loss: LossSettings | None = None, *, arguments: Any = None
    ) -> None:
        super().__init__()
        check_arguments(arguments, type(self).__name__)
        self._rows, self._loss = dataset.rows, loss or dataset.loss or LossSettings()
        check_settled(self._loss, type(self).__name__)
        if self._loss.weights is not None:
            raise ConfigError(
                f"{type(self).__name__}: loss.weights would be ignored; drop the table, or use SoftLabelModule or "
                "`softcache train-student`"
            )

    def forward(self, logits_BV: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Returns the mean loss, a scalar.

        Args:
            logits_BV: [B, V] of the student.
            targets: [B, width] of the dataset.
        """
        labels, truth_B = self._rows.unpack(targets)
        return distillation_loss(
            logits_BV,
            labels,
            truth_B,
            temperature=self._loss.temperature,
            alpha=self._loss.alpha,
            loss=self._loss.loss,
        )
