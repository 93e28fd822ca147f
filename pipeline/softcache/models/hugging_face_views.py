"""What `[views]` are for the image processor that a model of transformers was saved with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softcache.errors import SpecError
from softcache.models.hugging_face import hf_scheme, load_image_processor
from softcache.models.spec import ModelSpec
from softcache.runtime.logging import log_info

__all__ = ["hf_views"]


def hf_views(parsed: ModelSpec) -> dict[str, Any]:
    """Returns what the keys of [views] are for the image processor of a model; empty where it has none.

    Raises:
        SpecError: it does what views cannot.
    """
    if hf_scheme(parsed) in ("", "hf-config"):
        return {}
    processor = load_image_processor(parsed)
    if processor is None:
        log_info(
            f"views: {parsed.name} was saved without its image processor, so what it was trained to see is not known"
        )
        return {}
    if type(processor).__name__ == "TimmWrapperImageProcessor":
        name = parsed.name.partition(":")[2]
        raise SpecError(
            f"model {parsed.name!r}: a model of timm; name it timm:hf-hub:{name}, or timm:local-dir:FOLDER"
        )
    views: dict[str, Any] = {"geometry": "floor", "mean": (0.0,), "std": (1.0,)}
    if processor.do_normalize:
        views |= {"mean": tuple(processor.image_mean), "std": tuple(processor.image_std)}
    if (factor := getattr(processor, "rescale_factor", 1 / 255)) != 1 / 255 or not processor.do_rescale:
        scale = 255 * (factor if processor.do_rescale else 1.0)
        views |= {key: tuple(value / scale for value in views[key]) for key in ("mean", "std")}
    if processor.do_resize:
        views |= _resizing(parsed, processor)
        resample = int(processor.resample)
        views["interpolation"] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}.get(
            resample, str(resample)
        )
    return views


def _resizing(parsed: ModelSpec, processor: Any) -> dict[str, Any]:
    size, crop = _sides(processor.size), None
    if getattr(processor, "do_center_crop", False):
        crop = _sides(processor.crop_size)
    shortest, share = size.get("shortest_edge"), getattr(processor, "crop_pct", None)
    if shortest is not None and share is not None and not crop:  # of ConvNeXt and its like
        stretched = {"size": shortest, "fit": "stretch"}
        return stretched if shortest >= 384 else {"size": shortest, "fit": "crop", "eval_share": share}
    if shortest is not None and not crop:
        log_info(
            f"views: {parsed.name} was trained on images of any shape; views take a square of {shortest} pixels"
        )
        return {"size": shortest, "fit": "crop", "eval_share": 1.0}
    if shortest is not None and crop:
        sides = crop["height"], crop["width"]
        covered = min(1.0, sides[0] / shortest) if sides[0] == sides[1] else 1.0
        return {"size": _side(sides), "fit": "crop", "eval_share": covered}
    height, width = size.get("height"), size.get("width")
    if height is None or width is None:
        raise SpecError(
            f"model {parsed.name!r}: its image processor resizes to {size}, which views cannot; set views.size, fit and "
            "eval_share"
        )
    if crop and (crop.get("height"), crop.get("width")) != (height, width):
        log_info(
            f"views: {parsed.name} was trained on images stretched to {height}x{width}, of which the centre is taken; views "
            "keep the shape, which differs where images are not square"
        )
        return {
            "size": _side((crop["height"], crop["width"])),
            "fit": "crop",
            "eval_share": min(1.0, crop["height"] / height),
        }
    return {"size": _side((height, width)), "fit": "stretch"}


def _sides(size: Any) -> dict[str, int]:
    """Returns a processor's size as a plain dict without what is not set."""
    found = (
        dict(size)
        if isinstance(size, Mapping)
        else {key: getattr(size, key, None) for key in ("height", "width", "shortest_edge", "longest_edge")}
    )
    return {key: int(side) for key, side in found.items() if side is not None}


def _side(sides: tuple[Any, Any]) -> int | tuple[int, int]:
    return sides[0] if sides[0] == sides[1] else sides
