"""From a model spec to a module of semantic segmentation: normalised images to logits [B, V, h, w].

    unet[?width=…&depth=…]                       built in, for any image size
    torchvision:NAME[?arg=…]                     fcn_*, deeplabv3_* and lraspp_* of torchvision
    hf:NAME_OR_FOLDER, hf-config:NAME_OR_FOLDER  transformers' AutoModelForSemanticSegmentation
    package.module:factory[?arg=…]               your own; called with those of num_classes and input_shape that it takes

Logits are on the grid of the model's own head: torchvision's are taken before they are scaled up to the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from softcache.errors import MissingExtraError, SpecError
from softcache.models.hugging_face import build_hf_model, hf_scheme
from softcache.models.image import call_factory
from softcache.models.spec import ModelSpec, parse_spec, unknown_name

__all__ = ["Segmenter", "build_segmenter", "scaled_logits"]

SCHEMES = ("hf", "hf-config")
BUILT_IN = "unet"


def build_segmenter(
    spec: str, *, num_classes: int | None, input_shape: tuple[int, ...], class_names: Sequence[str] = ()
) -> nn.Module:
    """Returns a freshly initialised module for images of `input_shape`.

    Args:
        spec: see the module docstring.
        num_classes: V; None: what the model has by itself, or by its spec's arguments.
        input_shape: (channels, height, width) of one normalised image.
        class_names: not read; of the signature that image teachers build by.

    Raises:
        SpecError: unknown name (the nearest ones are listed), or arguments that the model refuses.
    """
    parsed, classes = parse_spec(spec), {} if num_classes is None else {"num_classes": num_classes}
    try:
        if hf_scheme(parsed) in SCHEMES:
            return build_hf_model(
                parsed, num_classes, input_shape, (), task="AutoModelForSemanticSegmentation"
            )
        if parsed.family == "torchvision":
            return Segmenter(_torchvision(spec, parsed, classes))
        if parsed.family == "factory" and not hf_scheme(parsed):
            return Segmenter(call_factory(spec, parsed, num_classes, input_shape))
        if (parsed.family, parsed.name) == ("builtin", BUILT_IN) and num_classes is not None:
            return UNet(num_classes, input_shape[0], **parsed.args)
    except (SpecError, MissingExtraError):
        raise
    except Exception as error:  # a constructor of another library raises anything
        raise SpecError(
            f"model {spec!r}: cannot be built for {num_classes or 'its own'} classes and images of {input_shape}: "
            f"{type(error).__name__}: {error}; check the arguments after '?'"
        ) from error
    if (parsed.family, parsed.name) == ("builtin", BUILT_IN):
        raise SpecError(
            f"model {spec!r}: has as many outputs as it is asked for; teacher.class_map is for models that have their own; "
            "drop teacher.class_map"
        )
    raise SpecError(
        f"model {spec!r}: no model of segmentation; expected {BUILT_IN}, torchvision:NAME, hf:NAME_OR_FOLDER or "
        "module:factory"
    )


def _torchvision(spec: str, parsed: ModelSpec, classes: dict[str, int]) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models.segmentation)
    if parsed.name not in known:
        raise unknown_name(f"model {spec!r}", parsed.name, known)
    # Without it, torchvision downloads a backbone's weights.
    backbone = {} if parsed.args.get("weights") else {"weights_backbone": None}
    model: nn.Module = models.get_model(parsed.name, **backbone | classes | parsed.args)
    return model


class Segmenter(nn.Module):
    """A model of torchvision, or of the user's, as a function from images to logits [B, V, h, w]."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        from torchvision.models.segmentation import FCN, LRASPP, DeepLabV3

        net: Any = self.net
        if images_BCHW.shape[1] == 1 and isinstance(net, FCN | DeepLabV3 | LRASPP):
            images_BCHW = images_BCHW.expand(-1, 3, -1, -1)
        if isinstance(net, LRASPP):
            return net.classifier(net.backbone(images_BCHW))  # type: ignore[no-any-return]
        if isinstance(net, FCN | DeepLabV3):
            return net.classifier(net.backbone(images_BCHW)["out"])  # type: ignore[no-any-return]
        found = net(images_BCHW)
        if isinstance(found, dict):
            found = found.get("out", found.get("logits"))
        return getattr(found, "logits", found)  # type: ignore[no-any-return]


def scaled_logits(logits_BVhw: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Returns logits [B, V, height, width] float32, bilinear between the middles of cells, as torchvision scales them."""
    logits_BVhw = logits_BVhw.float()
    if logits_BVhw.shape[2:] == (height, width):
        return logits_BVhw
    return nn.functional.interpolate(logits_BVhw, (height, width), mode="bilinear", align_corners=False)


class UNet(nn.Module):
    """A small U-Net (Ronneberger, Fischer, Brox 2015, arXiv 1505.04597): logits on half of the image's grid.

    Args:
        width: channels at that resolution; they double with each of `depth` halvings.
    """

    def __init__(self, num_classes: int, channels: int, width: int = 16, depth: int = 2) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth + 1)]
        self.stem = _convolutions(channels, width, stride=2)
        self.down = nn.ModuleList(
            _convolutions(before, after, stride=2) for before, after in pairwise(widths)
        )
        self.up = nn.ModuleList(
            _convolutions(below + here, here)
            for below, here in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        maps = [self.stem(images_BCHW)]
        for layer in self.down:
            maps.append(layer(maps[-1]))
        found = maps.pop()
        for layer in self.up:
            skip = maps.pop()
            found = layer(torch.cat([scaled_logits(found, *skip.shape[2:]).to(skip.dtype), skip], 1))
        return self.head(found)  # type: ignore[no-any-return]


def _convolutions(fan_in: int, width: int, stride: int = 1) -> nn.Module:
    layers: list[nn.Module] = []
    for before, step in ((fan_in, stride), (width, 1)):
        layers += [
            nn.Conv2d(before, width, 3, padding=1, stride=step, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)
