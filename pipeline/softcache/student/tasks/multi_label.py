"""Classification into independent classes: binary cross-entropy and binary KL per class, mean average precision."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from softcache.data.images import ImageBatch
from softcache.labels import BernoulliLabels
from softcache.labels.sparsify import top_k_bernoulli
from softcache.losses import LossMix, binary_distillation_loss
from softcache.losses.binary import binary_cross_entropy
from softcache.models.average_precision import multi_label_scores
from softcache.student.tasks.base import RowMeans, shard_batches
from softcache.student.tasks.image_classification import ImageTask

__all__ = ["MultiLabelTask"]


@dataclass(frozen=True)
class MultiLabelTask(ImageTask):
    """Classification of images that have any number of classes; see `ImageTask`.

    `label_smoothing` moves the truth of each class towards 0.5.
    """

    metric = "map"

    def loss(
        self,
        model: nn.Module,
        batch: ImageBatch,
        *,
        label_share: float | None = None,
        mix: LossMix | None = None,
        size: int | None = None,
    ) -> torch.Tensor:
        labels = cast(BernoulliLabels | None, batch.labels)
        if self.teacher is not None:
            seen = batch if batch.seen is None else replace(batch, images=batch.seen)
            logits_PV = torch.cat(list(self.teacher.chunks(seen)))
            labels = top_k_bernoulli(logits_PV, self.num_classes).to_torch(batch.images.device)
        temperature, alpha = mix or (self.loss_settings.temperature, self.loss_settings.alpha)
        targets_PV = cast(torch.Tensor, batch.targets)
        return binary_distillation_loss(
            self.logits(model, batch.images, size=size),
            labels,
            targets_PV + self.label_smoothing * (0.5 - targets_PV),
            temperature=temperature,
            alpha=alpha if labels is not None else 0.0,
        )

    @torch.no_grad()
    def evaluate(self, model: nn.Module, accelerator: Accelerator, batch_size: int) -> dict[str, float]:
        model = accelerator.unwrap_model(model)
        means, parts = RowMeans(accelerator), []
        for samples in shard_batches(len(self.evaluation), batch_size, accelerator):
            batch: Any = self.evaluation.load(samples, 0, fingerprints=False).to(accelerator.device)
            logits_PV = self.logits(model, batch.images).float()
            means.update(binary_cross_entropy(logits_PV, batch.targets))
            parts.append((logits_PV.cpu().numpy(), batch.targets.cpu().numpy()))
        parts = gather_object(parts)
        logits_NV, targets_NV = (np.concatenate([part[place] for part in parts]) for place in (0, 1))
        return {**multi_label_scores(logits_NV, targets_NV), "eval_loss": means.compute(1)[0]}
