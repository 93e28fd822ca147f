"""One of torchvision's detectors as a teacher: what it says at every cell, which cells stand for boxes, its precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from softcache.data.boxes import DetectionBatch
from softcache.errors import ConfigError
from softcache.labels.sparsify import DenseOutputs
from softcache.models.detection.build import build_detector
from softcache.models.detection.detector import Detector, Grid
from softcache.models.detection.mean_average_precision import mean_average_precision
from softcache.models.image import Normalize
from softcache.models.weights import load_weights
from softcache.teacher.base import Dtype, TeacherSettings
from softcache.teacher.dense import DenseTeacher

__all__ = ["DetectionTeacher", "load_detection_teacher"]


class DetectionTeacher(DenseTeacher):
    """A detector of the source's classes for images of one size, with its normalisation; see `DenseTeacher`."""

    model: Detector

    def __init__(self, model: Detector, *, normalize: Normalize, grid: Grid, **common: Any) -> None:
        super().__init__(model, num_classes=model.num_classes, **common)
        self._normalize = normalize.to(self.device)
        self.distribution, self.grid, self.num_cells = model.kind, grid.digest, len(grid.anchors)
        self.columns = {"boxes": (4,)} | ({"centerness": ()} if model.has_centerness else {})

    @torch.inference_mode()
    def outputs(self, batch: DetectionBatch) -> DenseOutputs:
        batch = batch.to(self.device)
        with self.autocast():
            found, _ = self.model(self._normalize(batch.images))
        height, width = batch.images.shape[-2:]
        beside = {"boxes": found.boxes, "centerness": found.centerness}
        return DenseOutputs(
            found.class_logits.float(),
            {name: values.float() for name in self.columns if (values := beside[name]) is not None},
            self.model.cells_of(found, batch.targets, (height, width)),
        )

    def scores(
        self, data: Any, *, batches: Iterable[range], progress: Callable[[int], None] = lambda samples: None
    ) -> dict[str, Any]:
        """Returns its mean average precision on a split's plain view, and its own loss, in a manifest's names."""
        found = mean_average_precision(
            self.model,
            data,
            self._normalize,
            device=self.device,
            batches=batches,
            progress=progress,
        )
        return {"eval_map": found["map"], "eval_map50": found["map50"], "eval_loss": found["eval_loss"]}


def load_detection_teacher(
    settings: TeacherSettings,
    *,
    num_classes: int,
    input_shape: tuple[int, int, int],
    normalize: Normalize,
    device: torch.device,
    dtype: Dtype,
) -> DetectionTeacher:
    """Returns the detector of a config, its weights loaded.

    Raises:
        ConfigError: no weights are named; they never come from a hub, whose classes are others.
        SpecError: the model or its weights cannot be loaded.
    """
    if settings.weights is None:
        raise ConfigError(
            f"teacher.weights: missing, and {settings.model} would be random; give a weights file (safetensors or a state "
            "dict of the whole detector), or a [train_teacher] table that says how to train it"
        )
    model = build_detector(settings.model, num_classes=num_classes, input_shape=input_shape).eval()
    load_weights(model, settings.weights)
    with torch.no_grad():
        grid = model.grid(model(torch.zeros(1, *input_shape))[0])
    return DetectionTeacher(
        model, normalize=normalize, grid=grid, spec=settings.model, device=device, dtype=dtype
    )
