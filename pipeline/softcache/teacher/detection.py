"""Frozen torchvision detector: per-anchor outputs, matched anchors, mean average precision."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch

from softcache.cache.codecs import CODECS, CellCodec, CodecSettings
from softcache.data.boxes import DetectionBatch
from softcache.errors import ConfigError, LabelError
from softcache.hashing.digests import digest_json
from softcache.labels import DetectionLabels
from softcache.labels.sparsify import DenseOutputs, LabelSettings, cell_faults, sparsify_cells
from softcache.models.detection.build import build_detector
from softcache.models.detection.detector import Detector, Grid
from softcache.models.detection.mean_average_precision import mean_average_precision
from softcache.models.detection.weights import head_outputs, load_detector_weights, read_detector_state
from softcache.models.image import Normalize
from softcache.models.spec import parse_spec
from softcache.models.torchvision_weights import published_weights
from softcache.teacher.base import Dtype, RowScores, Teacher, TeacherSettings
from softcache.teacher.class_map import read_class_map
from softcache.teacher.image import check_repeatable

__all__ = ["DenseTeacher", "DetectionTeacher", "load_detection_teacher"]


class DenseTeacher(Teacher):
    """A detector in evaluation mode.

    Attributes:
        distribution: of a cell: "bernoulli" of a sigmoid head; "categorical" of a softmax whose class 0 is the background.
        grid: the digest of its cells (anchors or locations, strides, how boxes are coded).
        num_cells: A.
        columns: the head's other outputs by the names of `DetectionLabels.columns`, with their inner shapes.
        num_classes: V of the head; of a softmax with the background.
    """

    has_row_scores = False
    distribution: Literal["bernoulli", "categorical"]
    grid: str
    num_cells: int
    columns: Mapping[str, tuple[int, ...]]

    def identity(self) -> dict[str, dict[str, Any]]:
        return super().identity() | {"grid": {"digest": self.grid, "num_cells": self.num_cells}}

    def class_names(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return ("background",) * (self.num_classes - len(names)) + names

    def codec(self, k: int, labels: LabelSettings, settings: CodecSettings) -> CellCodec:
        if labels.statistics != "all":
            raise ConfigError(
                f"labels.statistics: {labels.statistics!r} is of one distribution over all classes of an image or a token; "
                f"teacher {self.spec} has other labels; drop the setting"
            )
        if not labels.labels_detections:
            raise ConfigError(
                f'labels.policy: {labels.policy!r}; of a detector\'s cells "top_k" or "dense" is kept; choose one of them'
            )
        if not CODECS.get(settings.name).captures_detections:
            raise ConfigError(
                f'capture.codec: {settings.name!r}; a detector\'s cells are kept as plain columns; set codec = "open"'
            )
        coins = self.distribution == "bernoulli"
        if coins and "temperatures" in labels.model_fields_set:
            raise ConfigError(
                f"labels.temperatures: the head of teacher {self.spec} is sigmoids, one for each class, with no tail whose "
                "mass were to be kept at temperatures; drop the setting: any temperature is served"
            )
        if labels.positions.top > self.num_cells:
            raise LabelError(
                f"labels.positions.top: {labels.positions.top} is more than the {self.num_cells} cells that teacher "
                f"{self.spec} has for an image; lower it"
            )
        return CellCodec(
            num_classes=self.num_classes,
            k=k,
            distribution=self.distribution,
            num_cells=self.num_cells,
            head_columns=tuple(sorted(self.columns.items())),
            temperatures=() if coins else labels.temperatures,
            **settings.parameters(),
        )

    @abstractmethod
    def outputs(self, batch: DetectionBatch) -> DenseOutputs:
        """Returns the detector's outputs of a batch, on the teacher's device, and the cells matched to its boxes."""

    @torch.inference_mode()
    def chunks(self, batch: DetectionBatch) -> Iterator[Any]:
        """Yields the `DenseOutputs` of the whole batch.

        Raises:
            LabelError: they are of another shape than the teacher declares.
        """
        outputs = self.outputs(batch)
        expected = {"logits": (len(batch), self.num_cells, self.num_classes)} | {
            name: (len(batch), self.num_cells, *shape) for name, shape in self.columns.items()
        }
        found = {name: tuple(x.shape) for name, x in {"logits": outputs.logits, **outputs.columns}.items()}
        if found != expected or len(outputs.truth) != len(batch):
            raise LabelError(
                f"teacher {self.spec}: expected outputs of shape {expected} and the truth of {len(batch)} images; found "
                f"{found} and {len(outputs.truth)}; the head must have one output per class and cell of the grid"
            )
        yield outputs

    @torch.inference_mode()
    def label(  # type: ignore[override]
        self, batch: DetectionBatch, settings: LabelSettings
    ) -> tuple[DetectionLabels, torch.Tensor]:
        """Returns the record of the batch's chosen cells, and the faults [P] uint8, on the device.

        Raises:
            LabelError: an image has more ground-truth cells than rows; the sample is named.
        """
        records: list[DetectionLabels] = []
        faults: list[torch.Tensor] = []
        for outputs in self.chunks(batch):
            try:
                records.append(sparsify_cells(outputs, settings, distribution=self.distribution))
            except LabelError as error:
                if error.position is None:
                    raise
                sample = int(batch.samples[error.position])
                raise LabelError(f"sample {sample}, view {batch.view}: {error}") from error
            faults.append(cell_faults(outputs, distribution=self.distribution))
        faults_P = torch.cat(faults).repeat_interleave(settings.positions.top)
        return DetectionLabels.concat(records), faults_P

    def score(self, batch: Any) -> RowScores:
        """Raises: a detector's quality is its mean average precision, and not a sum over rows.

        Raises:
            LabelError: always.
        """
        raise LabelError(
            f"teacher {self.spec}: a detector has no accuracy of its rows, only a mean average precision; set "
            "capture.evaluate = false"
        )


class DetectionTeacher(DenseTeacher):
    """A detector of the source's classes for images of one size, with its normalisation; see `DenseTeacher`."""

    model: Detector

    def __init__(
        self,
        model: Detector,
        *,
        normalize: Normalize,
        grid: Grid,
        class_map: tuple[int, ...] | None = None,
        **common: Any,
    ) -> None:
        """
        Args:
            class_map: the output of each class; None: they are the same.
        """
        super().__init__(model, num_classes=model.num_classes, **common)
        self._class_map = class_map
        self._normalize = normalize.to(self.device)
        self.distribution, self.grid, self.num_cells = model.kind, grid.digest, len(grid.anchors)
        self.columns = {"bins": (4, model.bins + 1)} if model.bins else {"boxes": (4,)}
        if model.has_centerness:
            self.columns |= {"centerness": ()}

    def identity(self) -> dict[str, dict[str, Any]]:
        found = super().identity()
        if self._class_map is not None:
            found["teacher"]["class_map"] = digest_json(list(self._class_map))
        return found

    @torch.inference_mode()
    def outputs(self, batch: DetectionBatch) -> DenseOutputs:
        batch = batch.to(self.device)
        with self.autocast():
            found, _ = self.model(self._normalize(batch.images))
        height, width = batch.images.shape[-2:]
        columns = {"boxes": found.boxes, "bins": found.bins, "centerness": found.centerness}
        return DenseOutputs(
            found.class_logits.float(),
            {name: values.float() for name in self.columns if (values := columns[name]) is not None},
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
        precision = {f"eval_{name}": found[name] for name in ("map", "map50")}
        shown: dict[str, float | None] = {
            name: None if math.isnan(value) else value for name, value in precision.items()
        }
        return {**shown, "eval_loss": found["eval_loss"]}


def load_detection_teacher(
    settings: TeacherSettings,
    *,
    num_classes: int,
    input_shape: tuple[int, int, int],
    normalize: Normalize,
    class_names: Sequence[str] = (),
    device: torch.device,
    dtype: Dtype,
) -> DetectionTeacher:
    """Returns the detector of a config, its weights loaded.

    Raises:
        ConfigError: no weights are named; `teacher.class_map` does not fit.
        SpecError: the model or its weights cannot be loaded, or the head has other classes than the source.
    """
    parsed = parse_spec(settings.model)
    if settings.weights is None and parsed.family != "factory" and not parsed.args.get("weights"):
        raise ConfigError(
            f"teacher.weights: missing, and {settings.model} would be random; give a weights file (safetensors or a state "
            "dict of the whole detector), torchvision:NAME?weights=COCO_V1, or a [train_teacher] table to "
            "train it by"
        )
    build = partial(
        build_detector, settings.model, input_shape=input_shape, pretrained=settings.weights is None
    )
    model = build(num_classes=None if settings.class_map else num_classes)
    published = published_weights(parsed, settings.weights)
    if settings.weights is None:
        if parsed.family == "factory":
            check_repeatable(
                model, build(num_classes=None if settings.class_map else num_classes), settings.model
            )
    else:
        state = read_detector_state(settings.weights)
        is_open = settings.class_map is not None and "num_classes" not in parsed.args
        if is_open and (found := head_outputs(model, state)) != model.num_classes:
            model = build(num_classes=found - model.background)
        load_detector_weights(model, state, settings.weights)
        if (
            str(published) == "RetinaNet_ResNet50_FPN_Weights.COCO_V1"
        ):  # torchvision does so when it loads them
            for layer in model.modules():
                if isinstance(layer, torch.nn.BatchNorm2d):
                    layer.eps = 0.0
    class_map = None
    if settings.class_map is not None:
        class_map = read_class_map(
            settings.class_map,
            class_names,
            num_outputs=model.num_classes,
            names=published.meta["categories"] if published is not None else [],
            spec=settings.model,
        )
        model.select_outputs(class_map)
    model.eval()
    with torch.no_grad():
        grid = model.grid(model(torch.zeros(1, *input_shape))[0])
    return DetectionTeacher(
        model,
        normalize=normalize,
        grid=grid,
        spec=settings.model,
        device=device,
        dtype=dtype,
        class_map=class_map,
    )
