"""From a model spec to a module: the same few names for teachers and students.

    linear | mlp[?width=…&depth=…] | cnn[?width=…&stages=…]   built in, for any image size
    bytes[?width=…&depth=…&heads=…&stride=…]                  built in, for encoded files (`byte_model`)
    timm:NAME[?arg=…]                                         timm.create_model; also timm:hf-hub:OWNER/NAME and
                                                              timm:local-dir:FOLDER, with their weights
    torchvision:NAME[?arg=…]                                  torchvision.models.get_model
    hf:NAME_OR_FOLDER, hf-config:NAME_OR_FOLDER               transformers' AutoModelForImageClassification
    hf-zero-shot:NAME_OR_FOLDER[?template=…]                  CLIP or SigLIP as a classifier of class names
    package.module:factory[?arg=…]                            your own; called with the arguments you
                                                              give, plus num_classes and input_shape
                                                              where its signature takes them

Arguments are JSON scalars (`true`, `3`, `0.1`) or else strings. `module:factory` runs code: a spec
therefore only ever comes from the user's own config or flag, never from a cache.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from softcache.errors import MissingExtraError, SpecError
from softcache.models.byte_classifier import ByteClassifier
from softcache.models.hugging_face import SCHEMES, build_hf_model, hf_scheme
from softcache.models.spec import ModelSpec, parse_spec, unknown_name
from softcache.models.timm_config import has_source
from softcache.runtime.suggest import closest_matches

__all__ = ["GrayAsRgb", "Normalize", "build_model", "call_factory", "explain_shapes", "is_about_shapes"]


def build_model(
    spec: str, *, num_classes: int | None, input_shape: tuple[int, ...], class_names: Sequence[str] = ()
) -> nn.Module:
    """Returns a freshly initialised module for inputs of `input_shape`.

    Args:
        spec: see the module docstring.
        num_classes: V, the width of the logits; None: what the model has by itself, or by its spec's arguments.
        input_shape: (channels, height, width) of one normalised image; (bytes,) of the longest encoded file.
        class_names: [V], of which a zero-shot head makes its texts.

    Raises:
        SpecError: unknown name (the nearest ones are listed) or arguments that the model refuses.
    """
    parsed = parse_spec(spec)
    build = {"builtin": _builtin, "timm": _timm, "torchvision": _torchvision, "factory": call_factory}[
        parsed.family
    ]
    try:
        if hf_scheme(parsed):
            return build_hf_model(parsed, num_classes, input_shape, class_names)
        model = build(spec, parsed, num_classes, input_shape)
        if len(input_shape) > 1 and any(
            isinstance(parameter, UninitializedParameter) for parameter in model.parameters()
        ):
            model(torch.zeros(2, *input_shape))  # lazy modules take their shapes from a first batch
        if parsed.family in ("timm", "torchvision"):
            with torch.no_grad():  # a size that it does not take is refused here
                model.eval()(torch.zeros(1, *input_shape))
            model.train()
        return model
    except (SpecError, MissingExtraError):
        raise
    except Exception as error:
        # A third-party constructor may raise anything; the user needs to know which spec it was.
        raise SpecError(
            f"model {spec!r}: cannot be built for {num_classes or 'its own'} classes and {_described(input_shape)}: "
            f"{type(error).__name__}: {error}; check the arguments after '?'"
        ) from error


def _described(input_shape: tuple[int, ...]) -> str:
    return f"files of {input_shape[0]} bytes" if len(input_shape) == 1 else f"images of {input_shape}"


def _timm(spec: str, parsed: ModelSpec, num_classes: int | None, input_shape: tuple[int, ...]) -> nn.Module:
    import timm

    arguments: dict[str, Any] = _classes(num_classes) | {"in_chans": input_shape[0]} | parsed.args
    if has_source(parsed.name):
        return timm.create_model(parsed.name, **({"pretrained": True} | arguments))
    if not timm.is_model(parsed.name.partition(".")[0]):
        raise unknown_name(f"model {spec!r}", parsed.name, timm.list_models())
    return timm.create_model(parsed.name, **arguments)


def _classes(num_classes: int | None) -> dict[str, int]:
    return {} if num_classes is None else {"num_classes": num_classes}


class GrayAsRgb(nn.Module):
    """A classifier of RGB images, shown a gray one in each channel as its weights saw that channel normalized.

    What the numbers are is a part of the state dict, as the weights are: labels depend on both.

    Args:
        net: takes [B, 3, H, W].
        gray: how the input [B, 1, H, W] is normalized.
        mean, std: of the three channels that the weights saw.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(
        self, net: nn.Module, gray: Normalize, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.net, rgb = net, Normalize(mean, std)
        self.register_buffer("scale", gray.std / rgb.std)
        self.register_buffer("shift", (gray.mean - rgb.mean) / rgb.std)

    @property
    def config(self) -> Any:
        return getattr(self.net, "config", None)

    @property
    def pretrained_cfg(self) -> Any:
        return getattr(self.net, "pretrained_cfg", None)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return self.net(images_BCHW * self.scale + self.shift)  # type: ignore[no-any-return]


class _GrayToRgb(nn.Module):
    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return images_BCHW.expand(-1, 3, -1, -1)


def _torchvision(
    spec: str, parsed: ModelSpec, num_classes: int | None, input_shape: tuple[int, ...]
) -> nn.Module:
    from torchvision import models

    if parsed.name not in (known := models.list_models(module=models)):
        raise unknown_name(f"model {spec!r}", parsed.name, known)
    model = models.get_model(parsed.name, **_classes(num_classes) | parsed.args)
    # torchvision's classifiers have three input channels; a grey image is shown to each of them.
    return nn.Sequential(_GrayToRgb(), model) if input_shape[0] == 1 else model


def _near_family(name: str) -> str:
    """Returns what `torchvison:resnet18` may have meant; empty where the part before the colon is like no family."""
    family, _, rest = name.partition(":")
    near = closest_matches(family, ("timm", "torchvision", *SCHEMES), most=1)
    return f"; did you mean {near[0]}:{rest}?" if near else ""


def call_factory(
    spec: str, parsed: ModelSpec, num_classes: int | None, input_shape: tuple[int, ...]
) -> nn.Module:
    """Returns the module of a spec `package.module:factory`; see the module docstring.

    Raises:
        SpecError: it cannot be imported, or returns something else.
    """
    module_name, _, attribute = parsed.name.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise SpecError(
            f"model {spec!r}: {error}; expected a built-in name ({', '.join(BUILTIN)}), timm:NAME, "
            f"torchvision:NAME, hf:NAME, or an importable module:factory{_near_family(parsed.name)}"
        ) from error
    offered: dict[str, Any] = _classes(num_classes) | {"input_shape": input_shape}
    parameters = inspect.signature(factory).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    offered = {name: value for name, value in offered.items() if takes_any or name in parameters}
    model = factory(**offered | parsed.args)
    if not isinstance(model, nn.Module):
        raise SpecError(f"model {spec!r}: expected a torch.nn.Module; found {type(model).__name__}")
    return model


def _linear(num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    channels, height, width = input_shape
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, num_classes))


def _mlp(num_classes: int, input_shape: tuple[int, ...], width: int = 64, depth: int = 1) -> nn.Module:
    channels, height, columns = input_shape
    sizes = [channels * height * columns, *[width] * depth]
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], num_classes))


def _cnn(num_classes: int, input_shape: tuple[int, ...], width: int = 16, stages: int = 2) -> nn.Module:
    """Stages of two 3x3 convolutions with batch norm; width doubles and the map halves between stages."""
    channels = input_shape[0]
    layers: list[nn.Module] = []
    for stage in range(stages):
        out = width * 2**stage
        if stage > 0:
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        for fan_in in (channels, out):
            layers += [nn.Conv2d(fan_in, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def _bytes(num_classes: int, input_shape: tuple[int, ...], **arguments: Any) -> nn.Module:
    return ByteClassifier(num_classes, input_shape[0], **arguments)


BUILTIN: dict[str, Callable[..., nn.Module]] = {
    "linear": _linear,
    "mlp": _mlp,
    "cnn": _cnn,
    "bytes": _bytes,
}


def _builtin(
    spec: str, parsed: ModelSpec, num_classes: int | None, input_shape: tuple[int, ...]
) -> nn.Module:
    if parsed.name not in BUILTIN:
        others = "timm:NAME, torchvision:NAME, hf:NAME or module:factory"
        raise unknown_name(f"model {spec!r}", parsed.name, BUILTIN, others=others)
    if num_classes is None:
        raise SpecError(
            f"model {spec!r}: has as many outputs as it is asked for; teacher.class_map is for models that have their "
            "own; drop teacher.class_map"
        )
    if (parsed.name == "bytes") != (len(input_shape) == 1):
        raise SpecError(
            f"model {spec!r}: {'reads bytes' if parsed.name == 'bytes' else 'reads images'}, the data are "
            f"{_described(input_shape)}; set student.source.modality, or take another model"
        )
    return BUILTIN[parsed.name](num_classes, input_shape, **parsed.args)


def is_about_shapes(error: Exception) -> bool:
    """Returns whether an error of a model's forward pass is about the shape of its input, by its kind and words."""
    kinds = (AssertionError, RuntimeError, TypeError, ValueError)
    return type(error) in kinds and SHAPE_WORDS.search(str(error)) is not None


SHAPE_WORDS = re.compile(
    r"shape|size|dimension|channels?\b|broadcast|height|width|divisible|elements|mat1|out of range|negative",
    re.IGNORECASE,
)
"""What torch, timm, torchvision and transformers say of inputs of another shape than a model takes."""


@contextmanager
def explain_shapes(inputs: torch.Tensor) -> Iterator[None]:
    """Raises what a student's forward pass raises about the shape of its inputs as SpecError; other errors pass.

    Raises:
        SpecError: it does not take inputs of that shape.
    """
    try:
        yield
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        if not is_about_shapes(error):
            raise
        raise SpecError(
            f"student: inputs of shape {tuple(inputs.shape)}, the batch first: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}; take a student of that size (a factory is given input_shape), or set "
            "views.size, student.views.size or train.image_sizes to what it takes"
        ) from error


class Normalize(nn.Module):
    """uint8 images [B, C, H, W] in 0..255 -> float32 `(x/255 - mean) / std`; float images pass unscaled.

    It runs on the device, so that one byte per pixel crosses the bus. A transform of the user's own that
    already returns floats is taken as normalised.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        if images_BCHW.is_floating_point():
            return images_BCHW.float()
        return (images_BCHW.float() / 255 - self.mean) / self.std
