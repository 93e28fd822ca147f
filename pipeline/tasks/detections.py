"""Detection: the module's own loss and the soft loss of the cells that a cache holds, mean average precision.

    loss = (1 - alpha) * hard + alpha * soft
    soft = (class_weight * T^2 * sum L_class(p) + box_weight * sum s_p L_box(p) + centerness_weight * sum s_p BCE(p)) / S

over the labelled cells p of the batch; s_p is the teacher's highest class probability (without the background)
at the cell, and S the sum of s_p, at least 1: as the module's own losses are divided by the number of cells
that answer for a box, the soft one is by how many the teacher sees. Boxes and centerness are distilled where
the head is of the same form, at T = 1.

Shape suffixes: `B` images, `P` labelled cells, `V` classes of the head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics import MeanMetric

from pipeline.detection import DetectionBatch
from pipeline.detection.detector import CellOutputs, Detector
from pipeline.detection.scenes import ViewedScenes
from pipeline.errors import LabelError, SpecError
from pipeline.labels import BernoulliLabels, CellLabels
from pipeline.losses import LossSettings, Mix, forward_kl
from pipeline.losses.cells import CellLossSettings, box_giou, box_l1, quality_bce
from pipeline.models import Normalize
from pipeline.tasks.serving import Serving
from pipeline.tasks.task import my_share

__all__ = ["DetectionTask", "mean_average_precision"]


@dataclass(frozen=True)
class DetectionTask:
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
    label: Callable[[DetectionBatch], CellLabels] | None = None

    metric = "map"
    larger_is_better = True

    def build(self) -> nn.Module:
        return self.build_model()

    def loss(
        self,
        model: nn.Module,
        batch: DetectionBatch,
        *,
        label_share: float | None = None,
        mix: Mix | None = None,
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
        self, model: nn.Module, outputs: CellOutputs, labels: CellLabels, temperature: Any
    ) -> torch.Tensor:
        """Returns the soft loss of a batch's labelled cells, a scalar; see the module docstring.

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
            detector = _detector(model)
            student_P4, teacher_P4 = outputs.boxes[image_P, cell_P].float(), labels.columns["boxes"].float()
            if how.box == "giou":
                anchors_P4 = outputs.anchors[0][cell_P]
                boxes_P = box_giou(
                    detector.decode(student_P4, anchors_P4), detector.decode(teacher_P4, anchors_P4)
                )
            else:
                boxes_P = box_l1(student_P4, teacher_P4)
            total = total + how.box_weight * (score_P * boxes_P).sum()
        if "centerness" in labels.columns and outputs.centerness is not None and how.centerness_weight:
            wanted_P = labels.columns["centerness"].float().sigmoid()
            student_P = outputs.centerness[image_P, cell_P].float()
            bce_P = binary_cross_entropy_with_logits(student_P, wanted_P, reduction="none")
            total = total + how.centerness_weight * (score_P * bce_P).sum()
        return total / score_P.sum().clamp(min=1)

    def _classes(self, student_PV: torch.Tensor, labels: CellLabels, temperature: Any) -> torch.Tensor:
        if isinstance(labels.labels, BernoulliLabels):
            return quality_bce(student_PV, labels.labels, temperature=temperature, focus=self.cells.focus)
        return forward_kl(student_PV, labels.labels, temperature=temperature)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, accelerator: Accelerator, batch_size: int) -> dict[str, float]:
        device, model = accelerator.device, accelerator.unwrap_model(model)
        metric, mean_loss = _metric().to(device), MeanMetric().to(device)
        for samples in my_share(len(self.evaluation), batch_size, accelerator):
            mean_loss.update(score_batch(model, self.evaluation, samples, self.normalize, metric, device))
        found = metric.compute()
        return {
            "map": float(found["map"]),
            "map50": float(found["map_50"]),
            "eval_loss": float(mean_loss.compute()),
        }

    def finish(self, model: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """Nothing: all that is scored is scored every epoch."""
        return {}

    def weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return model.state_dict()

    def export(self, model: nn.Module, out: Path) -> None:
        """Nothing: `model.safetensors` and the spec are all that is needed."""

    def serve(self, model: nn.Module) -> Serving:
        """Refuses: what a detector gives is boxes, which exported files are not compared by.

        Raises:
            SpecError: always.
        """
        raise SpecError(
            "export: a detector's boxes cannot be compared with those of an exported file; expected a classifier or a "
            "language model; use the run's model.safetensors with its spec"
        )


def mean_average_precision(
    model: nn.Module,
    data: ViewedScenes,
    normalize: Normalize,
    *,
    device: torch.device,
    batch_size: int,
    progress: Callable[[int], None] = lambda samples: None,
) -> dict[str, float]:
    """Returns "map" (mean of IoU 0.5 to 0.95) and "map50" of a detector on the plain view of a split."""
    metric = _metric().to(device)
    for start in range(0, len(data), batch_size):
        samples = range(start, min(start + batch_size, len(data)))
        score_batch(model, data, samples, normalize, metric, device)
        progress(len(samples))
    found = metric.compute()
    return {"map": float(found["map"]), "map50": float(found["map_50"])}


@torch.no_grad()
def score_batch(
    model: nn.Module,
    data: ViewedScenes,
    samples: range,
    normalize: Normalize,
    metric: Any,
    device: torch.device,
) -> torch.Tensor:
    """Adds the detections of some images to a metric; returns the images' own losses, their sum [].

    A detection inside of a crowd is neither right nor wrong.
    """
    batch = data.load(samples, 0, fingerprints=False).to(device)
    outputs, losses = model(normalize.to(device)(batch.images), batch.targets)
    height, width = batch.images.shape[-2:]
    found = _detector(model).detections(outputs, (height, width))
    truths = [
        {
            "boxes": torch.from_numpy(truth.boxes).to(device),
            "labels": torch.from_numpy(truth.classes).to(device),
            "iscrowd": torch.from_numpy(truth.crowd).long().to(device),
        }
        for truth in data.truths(batch.samples, 0)
    ]
    metric.update(found, truths)
    return torch.stack(list(losses.values())).sum()


def _scores(labels: CellLabels) -> torch.Tensor:
    """The teacher's highest class probability at each cell, [P]; of a softmax, without the background (class 0)."""
    record = labels.labels
    if isinstance(record, BernoulliLabels):
        return record.logits[:, 0].float().sigmoid()
    background_PK = record.ids == 0
    return record.log_probs.float().masked_fill(background_PK, -torch.inf).amax(1).exp()


def _detector(model: nn.Module) -> Detector:
    inner = getattr(model, "module", model)  # as DistributedDataParallel wraps it
    if not isinstance(inner, Detector):
        raise SpecError(f"student: expected a detector; found {type(inner).__name__}; see docs/detection.md")
    return inner


def _metric() -> Any:
    try:
        import faster_coco_eval  # noqa: F401
        from torchmetrics.detection import MeanAveragePrecision
    except ImportError as error:
        raise SpecError(
            f"mean average precision: {error}; install the extra: pip install 'softcache[detection]'"
        ) from error
    return MeanAveragePrecision(box_format="xyxy", iou_type="bbox", backend="faster_coco_eval")
