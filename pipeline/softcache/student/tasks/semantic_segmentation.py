"""Semantic segmentation: cross-entropy of pixels, the soft loss of a cache's cells, mean intersection over union.

    loss = (1 - alpha) * hard + alpha * T^2 * soft

hard is the mean over all pixels that have a class, of logits scaled to the image; soft the mean over the labeled cells, of
logits scaled to the grid of the labels. So a student's own grid may be any.

Shape suffixes: `B` images, `V` classes, `Q` labeled cells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from softcache.data.masks import SegmentationBatch, ViewedMasks
from softcache.data.sources.segmentation.base import IGNORED
from softcache.errors import SpecError
from softcache.labels.sparsify import dense
from softcache.losses import LossMix, LossSettings, distillation_loss, row_weights
from softcache.models.image import Normalize, explain_shapes
from softcache.models.mean_iou import confusion_matrix, mask_scores
from softcache.models.segmentation import scaled_logits
from softcache.student.tasks.base import OnlineTeacher, PlainTask, shard_batches
from softcache.student.tasks.inference import Serving

__all__ = ["SegmentationTask"]


@dataclass(frozen=True)
class SegmentationTask(PlainTask):
    """Semantic segmentation.

    Attributes:
        build_model: makes the student.
        num_classes: V.
        teacher: labels all cells of each batch during training (`labels = "online"`); None otherwise.
    """

    build_model: Callable[[], nn.Module]
    evaluation: ViewedMasks
    normalize: Normalize
    num_classes: int
    loss_settings: LossSettings
    teacher: OnlineTeacher | None = None

    metric = "miou"
    larger_is_better = True

    def loss(
        self,
        model: nn.Module,
        batch: SegmentationBatch,
        *,
        label_share: float | None = None,
        mix: LossMix | None = None,
    ) -> torch.Tensor:
        labels, how = batch.labels, self.loss_settings
        if self.teacher is not None:
            labels = dense(torch.cat(list(self.teacher.chunks(batch)))).to_torch(batch.images.device)
            batch = replace(batch, labels=None, labeled=None, label_counts=None)
        temperature, alpha = mix or (how.temperature, how.alpha)
        alpha = alpha if labels is not None else 0.0
        logits = self.logits(model, batch.images)
        loss = torch.zeros((), device=batch.images.device)
        if not (isinstance(alpha, float | int) and alpha == 1):
            loss = (1 - alpha) * self.hard(logits, batch.masks)
        if labels is None:
            return loss
        cells = batch.cells
        maps_BAV = scaled_logits(logits, cells.height, cells.width).flatten(2).transpose(1, 2)
        logits_QV = maps_BAV.reshape(-1, self.num_classes).index_select(0, batch.labeled_rows)
        weights_Q = None
        if how.weights is not None:
            weights_Q = row_weights(how.weights, labels, None, num_student_classes=self.num_classes)
        soft = distillation_loss(
            logits_QV,
            labels,
            None,
            temperature=temperature,
            alpha=1.0,
            loss=how.loss,
            soft_weights=weights_Q,
        )
        return loss + alpha * soft

    def hard(self, logits_BVhw: torch.Tensor, masks_BHW: torch.Tensor) -> torch.Tensor:
        """Returns the mean cross-entropy of the pixels that have a class, a scalar; 0 where none has."""
        total = nn.functional.cross_entropy(
            scaled_logits(logits_BVhw, *masks_BHW.shape[1:]),
            masks_BHW.long(),
            reduction="sum",
            ignore_index=IGNORED,
        )
        return total / (masks_BHW != IGNORED).sum().clamp(min=1)

    def logits(self, model: nn.Module, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Returns a student's logits [B, V, h, w], float32, on its own grid.

        Raises:
            SpecError: it returns something else.
        """
        inputs = self.normalize.to(images_BCHW.device)(images_BCHW)
        with explain_shapes(inputs):
            logits: Any = model(inputs)
        expected = (len(images_BCHW), self.num_classes)
        if not isinstance(logits, torch.Tensor) or logits.ndim != 4 or logits.shape[:2] != expected:
            found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise SpecError(
                f"student: expected logits of shape ({expected[0]}, {expected[1]}, height, width); found {found}; pass "
                f"--student with {self.num_classes} outputs for each cell, or rebuild the cache for its classes"
            )
        return logits.float()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, accelerator: Accelerator, batch_size: int) -> dict[str, float]:
        # Not through DistributedDataParallel, whose ranks would have to call it equally often.
        model, device, size = accelerator.unwrap_model(model), accelerator.device, self.num_classes
        sums = torch.zeros(size**2 + 1, dtype=torch.float64, device=device)
        for samples in shard_batches(len(self.evaluation), batch_size, accelerator):
            batch = self.evaluation.load(samples, 0, fingerprints=False).to(device)
            logits = scaled_logits(self.logits(model, batch.images), *batch.masks.shape[1:])
            sums[:-1] += confusion_matrix(logits.argmax(1), batch.masks, size, ignored=IGNORED).flatten()
            sums[-1] += self.hard(logits, batch.masks).double() * (batch.masks != IGNORED).sum()
        sums = accelerator.reduce(sums, reduction="sum")
        matrix_VV, loss = sums[:-1].view(size, size), float(sums[-1])
        return mask_scores(matrix_VV) | {"eval_loss": loss / max(1.0, float(matrix_VV.sum()))}

    def serve(self, model: nn.Module) -> Serving:
        """Refuses: exported files are compared by one row of logits for each sample.

        Raises:
            SpecError: always.
        """
        raise SpecError(
            "export: masks are not compared with those of an exported file; expected a classifier or a language model; use "
            "the run's model.safetensors with its spec"
        )
