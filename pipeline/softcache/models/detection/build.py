"""From a spec to a detector: small FCOS, RetinaNet and SSDlite, and torchvision's named ones.

All small ones see levels at strides 4 and 8, so that detectors of one family and image size share a grid whatever their
width and depth. FCOS and RetinaNet have a feature pyramid of 32 channels (their heads normalise by groups of 32).
torchvision.models takes seconds to import and only detectors need it: the functions here import it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from softcache.errors import SpecError
from softcache.models.detection.backbone import LevelBackbone, fill_backbone
from softcache.models.detection.detector import Detector, num_outputs
from softcache.models.image import call_factory
from softcache.models.spec import ModelSpec, parse_spec, unknown_name

__all__ = ["build_detector"]

CHANNELS = 32  # of the pyramid


class _Backbone(nn.Module):
    """Strided 3x3 convolutions with batch norm, `depth` more at each of strides 4 and 8, and a pyramid where wanted."""

    def __init__(self, channels: int, width: int, depth: int, *, pyramid: bool) -> None:
        from torchvision.ops import FeaturePyramidNetwork

        super().__init__()
        self.stem = nn.Sequential(_block(channels, width, 2), _block(width, width, 2))
        self.first = nn.Sequential(*[_block(width, width, 1) for _ in range(depth)])
        self.second = nn.Sequential(
            _block(width, 2 * width, 2), *[_block(2 * width, 2 * width, 1) for _ in range(depth)]
        )
        self.pyramid = FeaturePyramidNetwork([width, 2 * width], CHANNELS) if pyramid else None
        self.out_channels: Any = CHANNELS if pyramid else [width, 2 * width]

    def forward(self, images_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        fine = self.first(self.stem(images_BCHW))
        maps = {"0": fine, "1": self.second(fine)}
        return maps if self.pyramid is None else self.pyramid(maps)


def _block(fan_in: int, out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(fan_in, out, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()
    )


def build_detector(
    spec: str, *, num_classes: int | None, input_shape: tuple[int, int, int], pretrained: bool = True
) -> Detector:
    """Returns a detector as its spec makes it: freshly initialised, but for pretrained parts that the spec names.

    Args:
        spec: see `softcache.models.detection.detector`.
        num_classes: of the source, without a background; None: what the spec gives, of torchvision's 91.
        input_shape: (channels, height, width) of one normalised image.
        pretrained: whether pretrained parts are loaded; not where weights of the whole detector follow.

    Raises:
        SpecError: unknown name (the nearest are listed) or arguments that the model refuses.
    """
    parsed = parse_spec(spec)
    try:
        if parsed.family == "torchvision":
            net = _named(parsed, num_classes, pretrained)
            return Detector(net, num_classes=num_classes, grey=input_shape[0] == 1)
        if parsed.family == "factory":
            net = call_factory(spec, parsed, num_classes, input_shape)
            return Detector(net, num_classes=num_classes)
        if parsed.family != "builtin" or parsed.name not in SMALL:
            others = "torchvision:NAME or package.module:factory"
            raise unknown_name(f"detector {spec!r}", parsed.name, SMALL, others=others)
        if num_classes is None:
            raise SpecError(
                f"model {spec!r}: has as many outputs as the source has classes; teacher.class_map is for detectors that "
                "have their own; drop teacher.class_map"
            )
        return Detector(SMALL[parsed.name](num_classes, input_shape, **parsed.args), num_classes=num_classes)
    except SpecError as error:
        if str(error).startswith("detector: "):  # which one, only this knows
            raise SpecError(f"model {spec!r}: {str(error).removeprefix('detector: ')}") from error
        raise
    except Exception as error:
        # A third-party constructor may raise anything; the user needs to know which spec it was.
        raise SpecError(
            f"model {spec!r}: cannot be built for {num_classes or 'its own'} classes and images of {input_shape}: "
            f"{type(error).__name__}: {error}; check the arguments after '?'"
        ) from error


def _named(parsed: ModelSpec, num_classes: int | None, pretrained: bool) -> nn.Module:
    from torchvision import models

    name, args = parsed.name, parsed.args
    known = models.list_models(module=models.detection)
    if name not in known:
        raise unknown_name(f"detector 'torchvision:{name}'", name, known)
    own = {key: args[key] for key in ("backbone", "backbone_weights", *HEAD_ARGUMENTS) if key in args}
    args = {key: value for key, value in args.items() if key not in own}
    if "backbone" in own and args.keys() & {"weights", "weights_backbone"}:
        raise SpecError(
            f"model 'torchvision:{name}': weights and weights_backbone are of its own backbone, and backbone = "
            f"{own['backbone']} takes its place; drop them, or use backbone_weights"
        )
    if not pretrained:
        args = {key: value for key, value in args.items() if key not in ("weights", "weights_backbone")}
    extra = int(name.startswith("ssd"))
    if (
        num_classes is not None
        and (asked := args.get("num_classes", num_classes + extra)) != num_classes + extra
    ):
        raise SpecError(
            f"model 'torchvision:{name}': num_classes = {asked} in its spec, and the source has {num_classes} classes"
            f"{' and a background' * extra}; drop the argument, for the head has one output for each class of the source "
            "(a teacher with a head of its own needs teacher.class_map)"
        )
    if num_classes is not None and "weights" not in args:
        args["num_classes"] = num_classes + extra
    net = models.get_model(name, **{"weights": None, "weights_backbone": None} | args)
    if "backbone" in own:
        _replace_backbone(name, net, pretrained=pretrained, **own)
    elif own.keys() - {"backbone_weights"}:
        raise SpecError(
            f"model 'torchvision:{name}': {', '.join(sorted(own))} without backbone; they are of detectors with a backbone "
            "of another name, such as backbone=timm:mobilenetv3_small_100"
        )
    elif own and pretrained:
        if not hasattr(body := net.backbone, "body"):
            raise SpecError(
                f"model 'torchvision:{name}': backbone_weights is for backbones with a pyramid, or with backbone=; use "
                "weights_backbone, which torchvision loads"
            )
        fill_backbone(body.body, own["backbone_weights"])
    return net


def _replace_backbone(
    name: str,
    net: Any,
    *,
    backbone: str,
    channels: int = 128,
    convs: int = 4,
    bins: int = 0,
    backbone_weights: str | None = None,
    pretrained: bool,
) -> None:
    """Gives a named detector another backbone and a head for it; anchors, box coding and sizes stay, and so its grid.

    Raises:
        SpecError: the backbone has no maps at the detector's strides.
    """
    from torchvision.models.detection.fcos import FCOSHead
    from torchvision.models.detection.retinanet import RetinaNetHead
    from torchvision.models.detection.ssd import SSDHead
    from torchvision.models.detection.ssdlite import SSDLiteHead

    if not hasattr(net.head, "classification_head"):
        return  # a two-stage detector, which `Detector` refuses
    classes, per_place = num_outputs(net), net.anchor_generator.num_anchors_per_location()
    strides, added = LEVELS.get(name, LEVELS["pyramid"])
    if channels % (2 * CHANNELS):
        raise SpecError(
            f"model 'torchvision:{name}': channels = {channels}; expected a multiple of {2 * CHANNELS}: the head normalises "
            f"{CHANNELS} groups of them, and one channel of a map of one pixel has no variance"
        )
    levels = LevelBackbone(
        backbone,
        strides=strides,
        channels=channels,
        added=added,
        weights=backbone_weights,
        pretrained=pretrained,
    )
    if isinstance(net.head, FCOSHead):
        head: Any = _fcos_head(channels, per_place[0], classes, convs, bins)
    elif convs != 4 or bins:
        raise SpecError(f"model 'torchvision:{name}': convs and bins are of the heads of FCOS; drop them")
    elif isinstance(net.head, RetinaNetHead):
        head = RetinaNetHead(channels, per_place[0], classes, norm_layer=partial(nn.GroupNorm, CHANNELS))
        head.regression_head._loss_type = net.head.regression_head._loss_type
    elif name.startswith("ssdlite"):
        head = SSDLiteHead(
            levels.out_channels, per_place, classes, partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)
        )
    else:
        head = SSDHead(levels.out_channels, per_place, classes)
    net.backbone, net.head = levels, head


HEAD_ARGUMENTS = ("channels", "convs", "bins")
LEVELS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "pyramid": ((8, 16, 32), ()),
    "ssd300_vgg16": ((8, 16), (2, 2, 1, 1)),
    "ssdlite320_mobilenet_v3_large": ((16, 32), (2, 2, 2, 2)),
}
"""Strides of a classifier's maps that a detector's first levels are, and how each level after them is made of the one
before: by stride 2, or by a 3x3 convolution without padding."""


def _plain(input_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Settings of torchvision's own transform that leave images as they come: normalised, and of the size to be seen."""
    channels, height, columns = input_shape
    return {
        "image_mean": [0.0] * channels,
        "image_std": [1.0] * channels,
        "fixed_size": (columns, height),
        "size_divisible": 8,
    }


def _fcos(
    num_classes: int,
    input_shape: tuple[int, int, int],
    width: int = 16,
    depth: int = 1,
    convs: int = 1,
    bins: int = 0,
) -> nn.Module:
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    # Squares of half a stride: FCOS gives a level the boxes whose farthest edge is within 4 to 8 of them, here
    # up to 16 pixels at the fine level and from there on at the coarse one.
    return FCOS(
        _Backbone(input_shape[0], width, depth, pyramid=True),
        num_classes,
        anchor_generator=AnchorGenerator(((2,), (4,)), ((1.0,),) * 2),
        head=_fcos_head(CHANNELS, 1, num_classes, convs, bins),
        score_thresh=0.05,
        **_plain(input_shape),
    )


def _fcos_head(channels: int, num_anchors: int, num_classes: int, convs: int, bins: int) -> nn.Module:
    """Returns FCOS's head, of one number for each edge of a box, or of a distribution over `bins` + 1 distances."""
    from torchvision.models.detection.fcos import FCOSHead

    from softcache.models.detection.distribution_head import DistributionHead

    if bins:
        return DistributionHead(channels, num_anchors, num_classes, convs, bins)
    return FCOSHead(channels, num_anchors, num_classes, num_convs=convs)


def _retinanet(
    num_classes: int, input_shape: tuple[int, int, int], width: int = 16, depth: int = 1
) -> nn.Module:
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.retinanet import RetinaNetHead

    anchors = AnchorGenerator(((10, 14), (20, 28)), ((0.6, 1.0),) * 2)
    return RetinaNet(
        _Backbone(input_shape[0], width, depth, pyramid=True),
        num_classes,
        anchor_generator=anchors,
        head=RetinaNetHead(CHANNELS, 4, num_classes, norm_layer=partial(nn.GroupNorm, 32)),
        **_plain(input_shape),
    )


def _ssdlite(
    num_classes: int, input_shape: tuple[int, int, int], width: int = 16, depth: int = 1
) -> nn.Module:
    from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
    from torchvision.models.detection.ssd import SSD
    from torchvision.models.detection.ssdlite import SSDLiteHead

    channels, height, columns = input_shape
    backbone = _Backbone(channels, width, depth, pyramid=False)
    anchors = DefaultBoxGenerator([[2], [2]], scales=[0.18, 0.3, 0.5])
    head = SSDLiteHead(
        backbone.out_channels, anchors.num_anchors_per_location(), num_classes + 1, nn.BatchNorm2d
    )
    plain = _plain(input_shape)  # SSD sets the size on its own
    mean, std = plain["image_mean"], plain["image_std"]
    return SSD(backbone, anchors, (columns, height), num_classes + 1, mean, std, head)


SMALL = {"fcos": _fcos, "retinanet": _retinanet, "ssdlite": _ssdlite}
