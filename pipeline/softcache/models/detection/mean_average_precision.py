"""Mean average precision of a detector on the plain view of a split, by torchmetrics and faster-coco-eval.

With a plain view that shows whole images (`views.fit = "letterbox"`, or no `views.size`) it is the figure that pycocotools
gives for the same detections in pixels of the original images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from softcache.data.boxes import ViewedScenes
from softcache.errors import SpecError
from softcache.models.detection.detector import Detector
from softcache.models.image import Normalize

__all__ = ["as_detector", "mean_average_precision", "new_metric", "score_batch"]


def mean_average_precision(
    model: nn.Module,
    data: ViewedScenes,
    normalize: Normalize,
    *,
    device: torch.device,
    batches: Iterable[range],
    progress: Callable[[int], None] = lambda samples: None,
) -> dict[str, float]:
    """Returns how good a detector is on the plain view of a split, or, of several processes, on all of their shares.

    Args:
        batches: the samples to score, a batch each; of this process.
        progress: called with the number of samples of each batch.

    Returns:
        "map" (mean over IoU 0.5 to 0.95), "map50", both NaN of a split without a box, and "eval_loss": the detector's own
        loss of a batch, mean over images.
    """
    metric = new_metric().to(device)  # first: it names the extra that is missing
    from torchmetrics import MeanMetric

    mean_loss = MeanMetric().to(device)
    for samples in batches:
        mean_loss.update(score_batch(model, data, samples, normalize, metric, device), weight=len(samples))
        progress(len(samples))
    found = {name: float(value) for name, value in metric.compute().items() if name in ("map", "map_50")}
    return {
        "map": found["map"] if found["map"] >= 0 else float("nan"),  # -1: no box
        "map50": found["map_50"] if found["map_50"] >= 0 else float("nan"),
        "eval_loss": float(mean_loss.compute()),
    }


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

    A detection inside of a crowd is neither right nor wrong. Boxes are compared in the pixels of `ViewedScenes.in_original`.
    """
    batch = data.load(samples, 0, fingerprints=False).to(device)
    outputs, losses = model(normalize.to(device)(batch.images), batch.targets)
    height, width = batch.images.shape[-2:]
    found = as_detector(model).detections(outputs, (height, width))
    placed, originals = data.in_original(batch.samples, [image["boxes"].cpu().numpy() for image in found])
    found = [
        {**image, "boxes": torch.from_numpy(boxes).to(image["boxes"])}
        for image, boxes in zip(found, placed, strict=True)
    ]
    truths = [
        {
            "boxes": torch.from_numpy(truth.boxes).to(device),
            "labels": torch.from_numpy(truth.classes).to(device),
            "iscrowd": torch.from_numpy(truth.crowd).long().to(device),
        }
        for truth in originals
    ]
    metric.update(found, truths)
    return torch.stack(list(losses.values())).sum()


def as_detector(model: nn.Module) -> Detector:
    """Returns the detector that a module is, or wraps; raises SpecError where it is none."""
    inner = getattr(model, "module", model)  # as DistributedDataParallel wraps it
    if not isinstance(inner, Detector):
        raise SpecError(f"student: expected a detector; found {type(inner).__name__}; see docs/detection.md")
    return inner


def new_metric() -> Any:
    """Returns torchmetrics' mean average precision over boxes; raises SpecError where the extra is not installed."""
    try:
        import faster_coco_eval  # noqa: F401
        from torchmetrics.detection import MeanAveragePrecision
    except ImportError as error:
        raise SpecError(
            f"mean average precision: {error}; install the extra: pip install 'softcache[detection]'"
        ) from error
    metric = MeanAveragePrecision(box_format="xyxy", iou_type="bbox", backend="faster_coco_eval")
    metric.warn_on_many_detections = False  # COCO's own limit of 100 for an image is meant
    return metric
