"""A cache of images for torchvision's reference script of classification, and loops like it.

    dataset, dataset_test = TorchvisionDataset(source, cache), TorchvisionImages(held_out, cache)
    criterion = TorchvisionLoss(dataset)
    for epoch in range(epochs):
        dataset.set_epoch(epoch)
        for image, target in DataLoader(dataset, batch_size=64, sampler=RandomSampler(dataset)):
            output = model(image)
            loss = criterion(output, target)
            acc1 = accuracy(output, truth_of(target))

Images are normalized, as that script's own are; a target is a row of numbers that holds the ground truth and the whole label
(`softcache.student.integrations.timm_rows`). The script's crops, flips, mixup and cutmix stay off: the variety is that of
the cache's views, one an epoch, in turn. Loader processes are forked: open the cache with `memmap=MemmapSettings()`. For the
script itself see `softcache.runs.foreign_scripts`.
"""

from __future__ import annotations

from typing import Any

import torch

from softcache.errors import LabelError
from softcache.losses import cross_entropy
from softcache.models.image import Normalize
from softcache.student.integrations.timm import TimmDataset, TimmImages, TimmLoss

__all__ = ["TorchvisionDataset", "TorchvisionImages", "TorchvisionLoss", "truth_of"]


class TorchvisionImages(TimmImages):
    """A held-out split as the student will see it: (float32 [C, H, W] normalized, class)."""

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, Any]]:
        batch = self._batch(indices)
        images = Normalize(self.mean, self.std)(batch.images)
        return list(zip(images, self._targets(batch), strict=True))


class TorchvisionDataset(TimmDataset):
    """The split that was labeled, each target a row that `TorchvisionLoss` reads: (float32 [C, H, W], float32 [width])."""

    __getitems__ = TorchvisionImages.__getitems__


class TorchvisionLoss(TimmLoss):
    """(1 - alpha) * CE(ground truth) + alpha * T^2 * soft loss, the batch's mean; the script's `criterion`.

    Of held-out images, whose targets are classes, it is the cross-entropy.
    """

    def forward(self, logits_BV: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Returns the mean loss, a scalar.

        Raises:
            LabelError: targets of training are classes, or rows of something else.
        """
        if targets.is_floating_point():
            return super().forward(logits_BV, targets)
        if logits_BV.requires_grad:
            raise LabelError(
                f"TorchvisionLoss: targets {targets.dtype} {list(targets.shape)} in training; expected the rows of a "
                "TorchvisionDataset; give its dataset to the loader"
            )
        return cross_entropy(logits_BV, targets).mean()


def truth_of(targets: torch.Tensor) -> torch.Tensor:
    """Returns the ground-truth classes [B] int64 of rows of labels; of a mixed image, the first of its two."""
    return targets[:, 0].long() if targets.ndim == 2 else targets
