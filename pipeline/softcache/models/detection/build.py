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
from softcache.models.detection.detector import Detector
from softcache.models.spec import parse_spec
from softcache.runtime.suggest import closest_matches

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


def build_detector(spec: str, *, num_classes: int, input_shape: tuple[int, int, int]) -> Detector:
    """Returns a freshly initialised detector.

    Args:
        spec: see `softcache.models.detection.detector`.
        num_classes: of the source, without a background.
        input_shape: (channels, height, width) of one normalised image.

    Raises:
        SpecError: unknown name (the nearest are listed) or arguments that the model refuses.
    """
    parsed = parse_spec(spec)
    try:
        if parsed.family == "torchvision":
            return _named(parsed.name, parsed.args, num_classes, input_shape)
        if parsed.family != "builtin" or parsed.name not in SMALL:
            near = closest_matches(parsed.name, SMALL) or list(SMALL)
            raise SpecError(
                f"model {spec!r}: not a detector that is known; nearest: {', '.join(near)}; others are written "
                "torchvision:NAME"
            )
        return Detector(SMALL[parsed.name](num_classes, input_shape, **parsed.args), num_classes=num_classes)
    except SpecError:
        raise
    except Exception as error:
        # A third-party constructor may raise anything; the user needs to know which spec it was.
        raise SpecError(
            f"model {spec!r}: cannot be built for {num_classes} classes and images of {input_shape}: "
            f"{type(error).__name__}: {error}; check the arguments after '?'"
        ) from error


def _named(name: str, args: dict[str, Any], num_classes: int, input_shape: tuple[int, int, int]) -> Detector:
    from torchvision import models

    known = models.list_models(module=models.detection)
    if name not in known:
        near = closest_matches(name, known, cutoff=0.4) or known[:3]
        raise SpecError(
            f"model 'torchvision:{name}': not one of torchvision's detectors; nearest: {', '.join(near)}"
        )
    # The images come normalised by [views]; weights come from a file (teacher.weights), never from the net.
    fixed = {"weights": None, "weights_backbone": None, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    extra = 1 if name.startswith("ssd") else 0
    if (asked := args.get("num_classes", num_classes + extra)) != num_classes + extra:
        raise SpecError(
            f"model 'torchvision:{name}': num_classes = {asked} in its spec, and the source has {num_classes} classes"
            f"{' and a background' * extra}; drop the argument, for the head has one output for each class of the source"
        )
    net = models.get_model(name, **fixed | {"num_classes": num_classes + extra} | args)
    return Detector(net, num_classes=num_classes, grey=input_shape[0] == 1)


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
    num_classes: int, input_shape: tuple[int, int, int], width: int = 16, depth: int = 1, convs: int = 1
) -> nn.Module:
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.fcos import FCOSHead

    # Squares of half a stride: FCOS gives a level the boxes whose farthest edge is within 4 to 8 of them, here
    # up to 16 pixels at the fine level and from there on at the coarse one.
    return FCOS(
        _Backbone(input_shape[0], width, depth, pyramid=True),
        num_classes,
        anchor_generator=AnchorGenerator(((2,), (4,)), ((1.0,),) * 2),
        head=FCOSHead(CHANNELS, 1, num_classes, num_convs=convs),
        score_thresh=0.05,
        **_plain(input_shape),
    )


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
