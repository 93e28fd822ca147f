"""What images a pretrained model was trained to see: the keys of [views] that its weights come with."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from softcache.errors import SpecError
from softcache.models.hugging_face import hf_scheme, num_hf_channels
from softcache.models.hugging_face_views import hf_views
from softcache.models.spec import ModelSpec, unknown_name
from softcache.models.timm_config import has_source, timm_config
from softcache.models.torchvision_weights import published_weights
from softcache.models.weight_files import checkpoint_arguments

__all__ = ["is_pretrained", "pretrained_views", "takes_rgb"]


def is_pretrained(parsed: ModelSpec) -> bool:
    """Returns whether a spec of timm, torchvision or transformers comes with weights of its own."""
    if scheme := hf_scheme(parsed):
        return scheme != "hf-config"
    if parsed.family == "timm":
        return has_source(parsed.name) or bool(
            parsed.args.get("pretrained") or parsed.args.get("checkpoint_path")
        )
    return parsed.family == "torchvision" and bool(parsed.args.get("weights"))


def pretrained_views(
    parsed: ModelSpec, given: Collection[str] = (), weights: str | None = None
) -> dict[str, Any]:
    """Returns what the keys of [views] are for a timm or torchvision model's weights; empty where it is not known.

    Of timm they are those of `timm.data.resolve_model_data_config`, of torchvision's classifiers and segmenters those of the
    weights' transforms (of a file that torchvision did not publish, the first that it has for the model), and of its
    detectors mean and std, which the module itself has whatever its weights;
    of transformers' those of the image processor.

    What a training script of timm, DeiT or torchvision was called with, which its checkpoints hold, comes first.

    Args:
        given: keys of [views] that the config has.
        weights: the file that the model's weights are loaded from, if any.

    Raises:
        SpecError: there are no such weights, they are of no classifier and no detector, or views cannot be what they were
            trained on and the config does not say what they are to be.
    """
    try:
        if hf_scheme(parsed):
            return hf_views(parsed, given)
        if parsed.family == "timm":
            return _of_timm(parsed, given, weights)
        if parsed.family == "torchvision" and parsed.name.startswith(("fcos_", "retinanet_", "ssd")):
            mean, std = DETECTORS.get(parsed.name, IMAGENET)
            return {"mean": mean, "std": std}
        if parsed.family == "torchvision":
            return _of_torchvision(parsed, weights)
    except SpecError:
        raise
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise SpecError(
            f"model {parsed.family}:{parsed.name}: what its weights were trained to see is not known: "
            f"{type(error).__name__}: {error}; name a classifier and weights that it has, and check the arguments after '?'"
        ) from error
    return {}


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DETECTORS = {
    "ssd300_vgg16": ((0.48235, 0.45882, 0.40784), (1 / 255,) * 3),
    "ssdlite320_mobilenet_v3_large": ((0.5,) * 3, (0.5,) * 3),
}
"""Mean and std of torchvision's detectors, where they are not ImageNet's."""


def takes_rgb(parsed: ModelSpec, weights: str | None = None) -> bool:
    """Returns whether the weights of a timm, torchvision or transformers model are of three channels, whatever images are.

    A timm model with a file of its own has as many as images have, unless its spec has `in_chans`; one of the hub those of
    its configuration, which timm would sum up for gray images.
    """
    if hf_scheme(parsed):
        return num_hf_channels(parsed) == 3
    if parsed.family == "timm" and "in_chans" not in parsed.args:
        has_file = weights is not None or bool(parsed.args.get("checkpoint_path"))
        config = timm_config(parsed) if is_pretrained(parsed) and not has_file else None
        return config is not None and config.get("input_size", (3,))[0] == 3
    return parsed.family == "torchvision" or bool(parsed.args.get("in_chans") == 3)


def _of_timm(parsed: ModelSpec, given: Collection[str], weights: str | None) -> dict[str, Any]:
    from timm.data import resolve_data_config

    config = timm_config(parsed, needs_weights=weights is None)
    arguments = _timm_arguments(checkpoint_arguments(weights)) if weights is not None else {}
    if config is None and not arguments:
        return {}
    found = resolve_data_config(arguments, pretrained_cfg=config)
    size = parsed.args.get("img_size") or found["input_size"][1:]
    views = {
        "size": _side(size),
        "geometry": "torchvision",
        "mean": tuple(found["mean"]),
        "std": tuple(found["std"]),
        # "random" stands for either in training; timm's evaluation then takes the one that torchvision has by default.
        "interpolation": "bilinear" if found["interpolation"] == "random" else found["interpolation"],
    }
    share = found["crop_pct"]
    if found["crop_mode"] == "squash":
        return views | ({"fit": "stretch"} if share == 1 else {"fit": "stretch_crop", "eval_share": share})
    has_border = found["crop_mode"] == "border" or share > 1
    if has_border and not set(given) & {"fit", "eval_share"}:
        raise SpecError(
            f"model timm:{parsed.name}: was trained on images with a border on all sides (crop_mode "
            f"{found['crop_mode']!r}, crop_pct {share:g}), which views do not have; set views.fit to the nearest, such as "
            '"letterbox"'
        )
    return views if has_border else views | {"eval_share": share}


def _timm_arguments(called_with: dict[str, Any]) -> dict[str, Any]:
    """Returns what timm's train.py, or DeiT's main.py, was called with, in the names of `resolve_data_config`."""
    size, kept = (
        called_with.get("input_size"),
        ("img_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"),
    )
    arguments = {key: called_with[key] for key in kept if called_with.get(key)}
    if isinstance(size, int):
        arguments["img_size"] = size
    elif size:
        arguments["input_size"] = (3, *size[1:])
    if called_with.get("eval_crop_ratio"):
        arguments.setdefault("crop_pct", called_with["eval_crop_ratio"])
    return arguments


def _of_torchvision(parsed: ModelSpec, file: str | None) -> dict[str, Any]:
    from torchvision import models

    if parsed.name not in (known := models.list_models()):
        raise unknown_name(f"model 'torchvision:{parsed.name}'", parsed.name, known)
    weights = published_weights(parsed, file)
    if weights is None and file is not None:
        first = next(iter(models.get_model_weights(parsed.name)), None)
        weights = first if first is not None and hasattr(first.transforms(), "mean") else None
    if weights is None:
        return {}
    transforms: Any = weights.transforms()
    mean, std = tuple(transforms.mean), tuple(transforms.std)
    if parsed.name in OWN_SCALE and not {"weights", "transform_input"} & parsed.args.keys():
        mean, std = (0.5,) * 3, (0.5,) * 3
    views = {
        "geometry": "torchvision",
        "interpolation": transforms.interpolation.value,
        "mean": mean,
        "std": std,
    }
    if not hasattr(transforms, "crop_size"):  # of segmentation: whole images of any shape
        return views
    size, resized = _side(transforms.crop_size), _side(transforms.resize_size)
    arguments = {} if file is None else checkpoint_arguments(file)  # of the training script
    if isinstance(arguments.get("val_crop_size"), int) and isinstance(arguments.get("val_resize_size"), int):
        size, resized = arguments["val_crop_size"], arguments["val_resize_size"]
        views["interpolation"] = arguments.get("interpolation", views["interpolation"])
    share = size / resized if isinstance(size, int) and isinstance(resized, int) else 1.0
    return views | {"size": size, "eval_share": share}


OWN_SCALE = ("googlenet", "inception_v3")
"""Models that turn ImageNet's normalization into -1..1 themselves, but only where torchvision loads their weights."""


def _side(size: Any) -> int | tuple[int, int]:
    """Returns one number for a square."""
    sides = [size] if isinstance(size, int) else [int(side) for side in size]
    return sides[0] if len(set(sides)) == 1 else (sides[0], sides[1])
