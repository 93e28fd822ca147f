"""Feature levels of a detector from a classifier of timm or torchvision, as `?backbone=SPEC` names it.

    timm:NAME[?pretrained=true&…]              timm's features_only
    torchvision:NAME[?weights=IMAGENET1K_V1]   a ResNet, or a model whose layers are in `features`

A classifier's last maps at some strides are its levels; above them come a feature pyramid with two levels more (FCOS,
RetinaNet) or strided convolutions (SSD), as in torchvision. A file of weights of the whole classifier fills what is used of
it; every tensor of the backbone must be in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from softcache.errors import SpecError
from softcache.models.spec import parse_spec, unknown_name
from softcache.models.timm_config import has_source
from softcache.models.weight_files import PREFIXES, read_state
from softcache.runtime.logging import log_info

__all__ = ["LevelBackbone", "fill_backbone", "read_backbone_state"]

PROBED_SIDE = 64
PRETRAINED = ("pretrained", "weights", "checkpoint_path")


class LevelBackbone(nn.Module):
    """The levels of a classifier; stands where the backbone of a torchvision detector does.

    Attributes:
        body: the classifier without its head and without the layers after the last level.
        out_channels: of every level (FCOS, RetinaNet), or a list of each (SSD).

    Args (of the constructor):
        spec: of the classifier.
        strides: of its levels that are used.
        channels: of the pyramid, or of the added levels of an SSD.
        added: of an SSD, how each further level is made: 2 halves the map, 1 takes a pixel off each side; empty: a pyramid.
        weights: a file of the classifier's.
        pretrained: whether weights are loaded at all; not where others follow.

    Raises:
        SpecError: there is no such classifier, it has no map at one of the strides, or the weights do not fit.
    """

    def __init__(
        self,
        spec: str,
        *,
        strides: Sequence[int],
        channels: int,
        added: Sequence[int] = (),
        weights: str | None = None,
        pretrained: bool = True,
    ) -> None:
        from torchvision.ops import FeaturePyramidNetwork
        from torchvision.ops.feature_pyramid_network import LastLevelP6P7

        super().__init__()
        body, widths = _body(spec, strides, pretrained)
        self.body = body
        if weights is not None and pretrained:
            fill_backbone(body, weights)
        self.fpn = None
        self.extra = nn.ModuleList()
        if not added:
            more = LastLevelP6P7(channels, channels)
            self.fpn = FeaturePyramidNetwork(widths, channels, extra_blocks=more)
            self.out_channels: Any = channels
            return
        for number, halves in enumerate(added):
            before = widths[-1] if number == 0 else channels
            strided = nn.Conv2d(channels // 2, channels, 3, stride=halves, padding=halves - 1)
            self.extra.append(
                nn.Sequential(nn.Conv2d(before, channels // 2, 1), nn.ReLU(), strided, nn.ReLU())
            )
        self.out_channels = [*widths, *[channels] * len(added)]

    def forward(self, images_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = self.body(images_BCHW)
        levels = list(maps.values()) if isinstance(maps, dict) else list(maps)
        for block in self.extra:
            levels.append(block(levels[-1]))
        named = {str(number): level for number, level in enumerate(levels)}
        return named if self.fpn is None else self.fpn(named)


def _body(spec: str, strides: Sequence[int], pretrained: bool) -> tuple[nn.Module, list[int]]:
    """Returns a module that gives a classifier's maps at some strides, and their channels."""
    parsed = parse_spec(spec)
    args = {name: value for name, value in parsed.args.items() if pretrained or name not in PRETRAINED}
    if parsed.family == "timm":
        return _timm_body(parsed.name, args, spec, strides)
    if parsed.family == "torchvision":
        return _torchvision_body(parsed.name, args, spec, strides)
    raise SpecError(
        f"backbone {spec!r}: expected timm:NAME or torchvision:NAME; for a backbone of your own write the whole detector "
        "as package.module:factory"
    )


def _timm_body(
    name: str, args: dict[str, Any], spec: str, strides: Sequence[int]
) -> tuple[nn.Module, list[int]]:
    import timm

    if not has_source(name) and not timm.is_model(name.partition(".")[0]):
        raise unknown_name(f"backbone {spec!r}", name, timm.list_models())
    plain = {key: value for key, value in args.items() if key not in PRETRAINED}
    probe: Any = timm.create_model(name, features_only=True, **plain)
    found = list(probe.feature_info.reduction())
    # The last map of each stride, as torchvision's detectors take them.
    indices = [probe.feature_info.out_indices[_last(found, stride, spec)] for stride in strides]
    if getattr(probe, "output_fmt", "NCHW") != "NCHW":
        raise SpecError(
            f"backbone {spec!r}: its maps have channels last ({probe.output_fmt.value}); take a convolutional one, such as "
            "timm:mobilenetv3_small_100"
        )
    body: Any = timm.create_model(name, features_only=True, out_indices=indices, **args)
    return body, list(body.feature_info.channels())


def _torchvision_body(
    name: str, args: dict[str, Any], spec: str, strides: Sequence[int]
) -> tuple[nn.Module, list[int]]:
    from torchvision import models
    from torchvision.models._utils import IntermediateLayerGetter

    if name not in (known := models.list_models(module=models)):
        raise unknown_name(f"backbone {spec!r}", name, known)
    model = models.get_model(name, **args)
    layers = getattr(model, "features", model)
    names, found, widths = [], [], []
    layers.eval()
    with torch.no_grad():
        maps = torch.zeros(1, 3, PROBED_SIDE, PROBED_SIDE)
        for child, layer in layers.named_children():
            if child in ("avgpool", "fc", "classifier"):
                break
            maps = layer(maps)
            names.append(child)
            found.append(
                PROBED_SIDE // maps.shape[-1] if maps.ndim == 4 and maps.shape[-1] == maps.shape[-2] else 0
            )
            widths.append(maps.shape[1])
    layers.train()
    places = [_last(found, stride, spec) for stride in strides]
    kept = {names[place]: str(number) for number, place in enumerate(places)}
    return IntermediateLayerGetter(layers, kept), [widths[place] for place in places]


def _last(found: list[int], stride: int, spec: str) -> int:
    if stride not in found:
        raise SpecError(
            f"backbone {spec!r}: has maps at strides {', '.join(map(str, dict.fromkeys(found)))}, and the detector needs "
            f"one at {stride}; take a convolutional one, such as timm:mobilenetv3_small_100 or torchvision:resnet18"
        )
    return len(found) - 1 - found[::-1].index(stride)


def read_backbone_state(path: str | Path) -> dict[str, torch.Tensor]:
    """Returns the state dict of a classifier's file; see `softcache.models.weight_files.read_state`.

    Raises:
        SpecError: it is missing or unreadable.
    """
    if not any(Path(place).is_file() for place in (str(path), str(path).partition("#")[0])):
        raise SpecError(
            f"backbone_weights {path}: no such file; give one of the weights of the classifier that backbone names, or "
            "leave it out"
        )
    return read_state(path)


def fill_backbone(body: nn.Module, path: str | Path) -> None:
    """Loads what a backbone has of a classifier's state dict; what else is in the file, such as its head, is not used.

    Args:
        path: as of `softcache.models.weight_files.read_state`.

    Raises:
        SpecError: a tensor of the backbone is not in the file, or of another shape there.
    """
    state = read_backbone_state(path)
    while prefix := next((p for p in PREFIXES if state and all(name.startswith(p) for name in state)), ""):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    # timm's features_only writes some names with underscores, and torchvision's `features` is the backbone itself.
    there = {name.removeprefix("features.").replace(".", "_"): name for name in state}
    own = body.state_dict()
    taken: dict[str, torch.Tensor] = {}
    for name, value in own.items():
        source = there.get(name.removeprefix("model.").replace(".", "_"))
        if source is not None and state[source].shape == value.shape:
            taken[name] = state[source]
        elif not name.endswith("num_batches_tracked"):
            found = "missing" if source is None else f"of shape {list(state[source].shape)}"
            raise SpecError(
                f"backbone_weights {path}: expected {name} of shape {list(value.shape)}; found it {found}; give a file of "
                "weights of the very classifier that backbone names"
            )
    body.load_state_dict(taken, strict=False)
    log_info(f"backbone_weights {path}: {len(taken)} of its {len(state)} tensors are the backbone's")
