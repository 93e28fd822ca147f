"""Detection: the module's own loss and the soft loss of the cells that a cache holds, mean average precision.

    loss = (1 - alpha) * hard + alpha * soft
    soft = (class_weight * T^2 * sum L_class(p) + box_weight * sum s_p L_box(p) + centerness_weight * sum s_p BCE(p)) / S

over the labeled cells p of the batch; s_p is the teacher's highest class probability (without the background)
at the cell, and S the sum of s_p, at least 1: as the module's own losses are divided by the number of cells
that answer for a box, the soft one is by how many the teacher sees. Boxes and centerness are distilled where
the head is of the same form, at T = 1; distributions over edges (`fcos?bins=N`) by their KL divergence, at T.

Shape suffixes: `B` images, `P` labeled cells, `V` classes of the head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from softcache.data.boxes import DetectionBatch, ViewedScenes
from softcache.errors import LabelError, SpecError
from softcache.labels import BernoulliLabels, DetectionLabels
from softcache.losses import LossMix, LossSettings, forward_kl
from softcache.losses.detection import CellLossSettings, box_giou, box_l1, edge_kl, quality_bce
from softcache.models.detection.detector import CellOutputs
from softcache.models.detection.mean_average_precision import as_detector, mean_average_precision
from softcache.models.image import Normalize
from softcache.student.tasks.base import PlainTask, shard_batches
from softcache.student.tasks.inference import Serving

__all__ = ["DetectionTask"]


@dataclass(frozen=True)
class DetectionTask(PlainTask):
    """Detection of boxes.

    Attributes:
        build_model: makes the student.
        label: labels a batch on the spot (`labels = "online"`); None otherwise.
    """

    build_model: Callable[[], nn.Module]
    evaluation: ViewedScenes
    normalize: Normalize
    loss_settings: LossSettings
    cells: CellLossSettings = field(default_factory=CellLossSettings)
    label: Callable[[DetectionBatch], DetectionLabels] | None = None

    metric = "map"
    larger_is_better = True

    def loss(
        self,
        model: nn.Module,
        batch: DetectionBatch,
        *,
        label_share: float | None = None,
        mix: LossMix | None = None,
    ) -> torch.Tensor:
        labels = batch.labels if self.label is None else self.label(batch)
        temperature, alpha = mix or (self.loss_settings.temperature, self.loss_settings.alpha)
        images = self.normalize.to(batch.images.device)(batch.images)
        outputs, losses = model(images, batch.targets)
        hard = torch.stack(list(losses.values())).sum()
        if labels is None or alpha == 0:
            return hard
        return (1 - alpha) * hard + alpha * self.soft(model, outputs, labels, temperature)

    def soft(
        self, model: nn.Module, outputs: CellOutputs, labels: DetectionLabels, temperature: Any
    ) -> torch.Tensor:
        """Returns the soft loss of a batch's labeled cells, a scalar; see the module docstring.

        Raises:
            LabelError: the labels are not of these images' number, or their columns are none that this head has.
        """
        num_images = len(outputs.class_logits)
        if len(labels) % num_images:
            raise LabelError(
                f"labels: expected as many cells for each of {num_images} images; found {len(labels)} rows; "
                "take the labels of the batch's own samples"
            )
        cell_P = labels.cells.long()
        image_P = torch.arange(num_images, device=cell_P.device).repeat_interleave(len(labels) // num_images)
        student_PV = outputs.class_logits[image_P, cell_P].float()
        how, score_P = self.cells, _scores(labels)
        total = how.class_weight * temperature**2 * self._classes(student_PV, labels, temperature).sum()
        if "boxes" in labels.columns and how.box_weight:
            detector = as_detector(model)
            student_P4, teacher_P4 = outputs.boxes[image_P, cell_P].float(), labels.columns["boxes"].float()
            if how.box == "giou":
                anchors_P4 = outputs.anchors[0][cell_P]
                boxes_P = box_giou(
                    detector.decode(student_P4, anchors_P4), detector.decode(teacher_P4, anchors_P4)
                )
            else:
                boxes_P = box_l1(student_P4, teacher_P4)
            total = total + how.box_weight * (score_P * boxes_P).sum()
        if "bins" in labels.columns and outputs.bins is not None and how.box_weight:
            student_P4N, teacher_P4N = outputs.bins[image_P, cell_P].float(), labels.columns["bins"].float()
            edges_P = edge_kl(student_P4N, teacher_P4N, temperature=temperature)
            total = total + how.box_weight * (score_P * edges_P).sum()
        if "centerness" in labels.columns and outputs.centerness is not None and how.centerness_weight:
            wanted_P = labels.columns["centerness"].float().sigmoid()
            student_P = outputs.centerness[image_P, cell_P].float()
            bce_P = binary_cross_entropy_with_logits(student_P, wanted_P, reduction="none")
            total = total + how.centerness_weight * (score_P * bce_P).sum()
        return total / score_P.sum().clamp(min=1)

    def _classes(self, student_PV: torch.Tensor, labels: DetectionLabels, temperature: Any) -> torch.Tensor:
        if isinstance(labels.labels, BernoulliLabels):
            return quality_bce(student_PV, labels.labels, temperature=temperature, focus=self.cells.focus)
        return forward_kl(student_PV, labels.labels, temperature=temperature)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, accelerator: Accelerator, batch_size: int) -> dict[str, float]:
        # Not through DistributedDataParallel, whose ranks would have to call it equally often.
        return mean_average_precision(
            accelerator.unwrap_model(model),
            self.evaluation,
            self.normalize,
            device=accelerator.device,
            batches=shard_batches(len(self.evaluation), batch_size, accelerator),
        )

    def serve(self, model: nn.Module) -> Serving:
        """Refuses: what a detector gives is boxes, which exported files are not compared by.

        Raises:
            SpecError: always.
        """
        raise SpecError(
            "export: a detector's boxes cannot be compared with those of an exported file; expected a classifier or a "
            "language model; use the run's model.safetensors with its spec"
        )


def _scores(labels: DetectionLabels) -> torch.Tensor:
    """The teacher's highest class probability at each cell, [P]; of a softmax, without the background (class 0)."""
    record = labels.labels
    if isinstance(record, BernoulliLabels):
        return record.logits[:, 0].float().sigmoid()
    background_PK = record.ids == 0
    return record.log_probs.float().masked_fill(background_PK, -torch.inf).amax(1).exp()
