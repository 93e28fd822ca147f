"""Common interface to torchvision's one-stage detectors: outputs of every cell, the module's own loss, detections.

    fcos | retinanet | ssdlite [?width=…&depth=…&convs=…&bins=…]   small ones with the backbone below, for any image size
    torchvision:NAME[?arg=…]                                 torchvision.models.detection.NAME
    torchvision:NAME?backbone=SPEC[&channels=…&convs=…]      the same with another backbone (`backbone`)
    package.module:factory[?arg=…]                           your own; returns one of torchvision's modules

Heads, anchors, matching, losses, decoding and NMS are torchvision's; here is only the order in which they are called,
so that the head's raw outputs are at hand.

A *cell* is a place with an output of the head: a location of FCOS, an anchor of the
others. Cells are numbered as torchvision concatenates them: level by level, row by row, anchor by anchor.

The sigmoid heads (FCOS, RetinaNet) have a logit per class. SSD's softmax has the background as class 0, so that V is one
more than the source's classes, and class c of the source is c + 1. Of a head with other classes than the source's, such as
torchvision's COCO heads of 91, `select_outputs` chooses those that stand for them; all else here is then of the chosen ones.

Shape suffixes: `B` images, `A` cells, `V` classes of the head, `P` cells that were chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from softcache.errors import IdentityError, SpecError
from softcache.hashing.digests import digest_json

__all__ = ["CellOutputs", "Detector", "Grid", "check_same_grid", "num_outputs"]

Targets = Sequence[dict[str, torch.Tensor]]


@dataclass(frozen=True, eq=False)
class Grid:
    """The cells of a detector for images of one size, which give its raw box outputs their meaning.

    Attributes:
        anchors: [A, 4] float32, left, top, right, bottom in pixels (of FCOS: a square around the location).
        levels: how many cells each level has; they sum to A.
        strides: (down, right) of each level, pixels of the image per step of the map.
        coder: how boxes are written: "linear" (distances to the edges, FCOS), "bins/N" (distributions over N + 1 distances)
            or "deltas/WEIGHTS" (of centre and log size).
    """

    anchors: torch.Tensor
    levels: tuple[int, ...]
    strides: tuple[tuple[float, float], ...]
    coder: str

    @property
    def digest(self) -> str:
        """Names anchors, levels, strides and coder; equal where cell i means the same in both."""
        anchors = [[round(value, 4) for value in box] for box in self.anchors.cpu().tolist()]
        return digest_json([anchors, self.levels, self.strides, self.coder])


@dataclass(frozen=True, eq=False)
class CellOutputs:
    """Outputs of a detector at all cells of some images.

    Attributes:
        class_logits: [B, A, V], of the chosen outputs.
        boxes: [B, A, 4], raw regression outputs.
        bins: [B, A, 4, n + 1], logits of each edge's distance, where the head has them (`distribution_head`); `boxes` are
            their means.
        centerness: [B, A], logits, where the head has them.
        raw: what torchvision's head returned.
        images: torchvision's ImageList, as transformed.
        map_sizes: (height, width) of the feature map of each level.
        anchors: of each image, as torchvision's own functions want them.
    """

    class_logits: torch.Tensor
    boxes: torch.Tensor
    bins: torch.Tensor | None
    centerness: torch.Tensor | None
    raw: dict[str, torch.Tensor]
    images: Any
    map_sizes: tuple[tuple[int, int], ...]
    anchors: list[torch.Tensor]


class Detector(nn.Module):
    """One of torchvision's one-stage detectors; see the module docstring.

    Attributes:
        net: torchvision's module. It normalises nothing: its images come normalised, by [views].
        num_classes: V of the head, or of its chosen outputs.
        background: 1 where the head's class 0 is the background, else 0: the source's class c is the head's c + background.
        kind: the distribution of a cell, "bernoulli" or "categorical".
        bins: n of a head with distributions over edges, else 0.
        has_centerness: whether the head has an output for how central a cell is in its box.
    """

    _outputs: torch.Tensor | None

    def __init__(self, net: nn.Module, *, num_classes: int | None = None, grey: bool = False) -> None:
        """
        Args:
            num_classes: that the head is to have, without a background; None: those that it has.
            grey: whether images have one channel, which is shown to all three of the module's.

        Raises:
            SpecError: a module of another kind, or a head of another number of classes.
        """
        from torchvision.models.detection import FCOS, RetinaNet  # takes seconds; only detectors need it
        from torchvision.models.detection.ssd import SSD

        super().__init__()
        if not isinstance(net, FCOS | RetinaNet | SSD):
            raise SpecError(
                f"detector: expected torchvision's FCOS, RetinaNet or SSD; found {type(net).__name__}; two-stage detectors "
                "have no grid of cells that a cache could hold"
            )
        self.net, self._grey = net, grey
        self.background = int(isinstance(net, SSD))
        self.num_classes = num_outputs(net)
        if num_classes is not None and self.num_classes != num_classes + self.background:
            raise SpecError(
                f"detector: its head has {self.num_classes} outputs, and the source has {num_classes} classes"
                f"{' and a background' * self.background}; give the head as many, or set teacher.class_map (which outputs "
                "are the source's classes)"
            )
        transform: Any = net.transform
        transform.image_mean, transform.image_std = [0.0], [1.0]
        self.register_buffer("_outputs", None, persistent=False)
        self.has_centerness = isinstance(net, FCOS)
        self.bins = int(getattr(net.head, "bins", 0))
        self.kind: Literal["bernoulli", "categorical"] = "categorical" if self.background else "bernoulli"

    def select_outputs(self, outputs: Sequence[int]) -> None:
        """Makes the outputs of the head that stand for the source's classes, in their order, the only ones.

        Of a softmax the background is kept as well.

        Raises:
            SpecError: one of them is the background.
        """
        if self.background and 0 in outputs:
            raise SpecError(
                "detector: output 0 of an SSD's head is the background, which is no class of a source; give each class "
                "another output"
            )
        chosen = torch.tensor([*([0] * self.background), *outputs], dtype=torch.int64)
        self._outputs, self.num_classes = chosen.to(next(self.net.parameters()).device), len(chosen)

    def forward(
        self, images_BCHW: torch.Tensor, targets: Targets | None = None
    ) -> tuple[CellOutputs, dict[str, torch.Tensor]]:
        """Returns what all cells say, and the module's own losses by name (scalars; none without targets).

        Args:
            images_BCHW: normalised float images.
            targets: of each image its "boxes" [M, 4] and "labels" [M], the source's classes.
        """
        if self._grey:
            images_BCHW = images_BCHW.expand(-1, 3, -1, -1)
        copies = None if targets is None else [self._shifted(target) for target in targets]
        images, copies = self.net.transform(list(images_BCHW), copies)
        features = list(self.net.backbone(images.tensors).values())
        # Under autocast both would come in half precision, in which pixels and distances are no numbers to decode by.
        raw = {name: values.float() for name, values in self.net.head(features).items()}
        anchors = self.net.anchor_generator(images, [feature.float() for feature in features])
        centerness = raw.get("bbox_ctrness")
        sizes = tuple((int(feature.shape[-2]), int(feature.shape[-1])) for feature in features)
        class_logits = raw["cls_logits"]
        outputs = CellOutputs(
            class_logits if self._outputs is None else class_logits[..., self._outputs],
            raw["bbox_regression"],
            raw.get("bins"),
            None if centerness is None else centerness.squeeze(-1),
            raw,
            images,
            sizes,
            anchors,
        )
        return outputs, {} if copies is None else self._losses(outputs, copies)

    def _shifted(self, target: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        labels = target["labels"] + self.background
        return {
            "boxes": target["boxes"],
            "labels": labels if self._outputs is None else self._outputs[labels],
        }

    def _losses(
        self, outputs: CellOutputs, targets: list[dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        net: Any = self.net
        if self.has_centerness:  # FCOS
            return net.compute_loss(targets, outputs.raw, outputs.anchors, self._levels(outputs))
        if self.background:  # SSD
            return net.compute_loss(targets, outputs.raw, outputs.anchors, self._matched(outputs, targets))
        return net.compute_loss(targets, outputs.raw, outputs.anchors)

    def _matched(self, outputs: CellOutputs, targets: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        """Which box each anchor of an SSD answers for, by its own matcher; -1 for none."""
        from torchvision.ops import box_iou

        return [
            self.net.proposal_matcher(box_iou(target["boxes"], anchors))
            if len(target["boxes"])
            else torch.full((len(anchors),), -1, device=anchors.device)
            for anchors, target in zip(outputs.anchors, targets, strict=True)
        ]

    def _levels(self, outputs: CellOutputs) -> list[int]:
        per_place = self.net.anchor_generator.num_anchors_per_location()
        return [high * wide * count for (high, wide), count in zip(outputs.map_sizes, per_place, strict=True)]

    def detections(self, outputs: CellOutputs, size: tuple[int, int]) -> list[dict[str, torch.Tensor]]:
        """Returns the decoded, NMS-ed boxes of each image: "boxes" [D, 4] in pixels, "scores" [D], "labels" [D] (source's).

        Args:
            size: (height, width) of the images that the outputs are of.
        """
        net, image_sizes = self.net, outputs.images.image_sizes
        raw = outputs.raw | {"cls_logits": outputs.class_logits}
        if self.background:  # SSD
            found = net.postprocess_detections(raw, outputs.anchors, image_sizes)
        else:
            levels = self._levels(outputs)
            parts = {name: list(value.split(levels, dim=1)) for name, value in raw.items()}
            anchors = [list(boxes.split(levels)) for boxes in outputs.anchors]
            found = net.postprocess_detections(parts, anchors, image_sizes)
        training, net.transform.training = net.transform.training, False
        found = net.transform.postprocess(found, image_sizes, [size] * len(image_sizes))
        net.transform.training = training
        return [{**image, "labels": image["labels"] - self.background} for image in found]

    def grid(self, outputs: CellOutputs) -> Grid:
        """Returns the cells, which are the same for all images of one size."""
        height, width = outputs.images.tensors.shape[-2:]
        strides = tuple((height / high, width / wide) for high, wide in outputs.map_sizes)
        coder = self.net.box_coder
        if self.bins:
            how = f"bins/{self.bins}"
        else:
            how = "linear" if self.has_centerness else "deltas/" + "-".join(map(str, coder.weights))
        return Grid(outputs.anchors[0].detach(), tuple(self._levels(outputs)), strides, how)

    def decode(self, boxes_P4: torch.Tensor, anchors_P4: torch.Tensor) -> torch.Tensor:
        """Returns raw regression outputs [P, 4] as boxes in pixels (of the transformed image), differentiably."""
        if self.has_centerness:
            return self.net.box_coder.decode(boxes_P4, anchors_P4)
        return self.net.box_coder.decode_single(boxes_P4, anchors_P4)

    def cells_of(self, outputs: CellOutputs, targets: Targets, size: tuple[int, int]) -> list[torch.Tensor]:
        """Returns, for each image, the cells [M] that stand for its boxes: for each box the one whose anchor's centre is
        nearest to the box's, among the anchors of the most fitting size; ascending, each once.

        Args:
            size: (height, width) of the images that the boxes are in.
        """
        height, width = outputs.images.image_sizes[0]
        scale = torch.tensor([width / size[1], height / size[0]] * 2, device=outputs.boxes.device)
        anchors_A4 = outputs.anchors[0]
        centre_A2, side_A = (anchors_A4[:, :2] + anchors_A4[:, 2:]) / 2, anchors_A4[:, 2:] - anchors_A4[:, :2]
        area_A = side_A.prod(-1).sqrt()
        found: list[torch.Tensor] = []
        for target in targets:
            boxes = target["boxes"] * scale
            if not len(boxes):
                found.append(torch.zeros(0, dtype=torch.int64, device=anchors_A4.device))
                continue
            middle = (boxes[:, :2] + boxes[:, 2:]) / 2
            extent = (boxes[:, 2:] - boxes[:, :2]).prod(-1).sqrt()
            far_MA = torch.cdist(middle, centre_A2)
            # FCOS's squares are an eighth to a sixteenth of what their level looks for; anchors are as large as that.
            factor = 6.0 if self.has_centerness else 1.0
            misfit_MA = (extent[:, None] / (factor * area_A)).log().abs()
            found.append((far_MA + 1000 * misfit_MA).argmin(1).unique())
        return found


def num_outputs(net: nn.Module) -> int:
    """Returns how many classes the head of one of torchvision's one-stage detectors has, a background among them."""
    head: Any = net.head.classification_head  # type: ignore[union-attr]
    return int(getattr(head, "num_columns", None) or head.num_classes)


def check_same_grid(name: str, found: str, expected: str) -> None:
    """Raises unless two grids' digests are one.

    Raises:
        IdentityError: cell i of one is another cell in the other.
    """
    if found != expected:
        raise IdentityError(
            f"student {name}: its cells (grid {found[:12]}…) are not those of the labels (grid {expected[:12]}…): "
            "a label would be learnt at another place; give it the teacher's anchors, strides and image size (of "
            "torchvision:NAME the same name and arguments, with &backbone=…), or make a cache with a teacher of its grid"
        )
