"""What `[views]` are for the image processor that a model of transformers was saved with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch

from softcache.data.transforms import Views, ViewSettings
from softcache.errors import SpecError
from softcache.models.hugging_face import hf_scheme, is_bgr, load_image_processor
from softcache.models.spec import ModelSpec
from softcache.runtime.logging import log_info

__all__ = ["hf_views"]


def hf_views(parsed: ModelSpec, given: Collection[str] = ()) -> dict[str, Any]:
    """Returns what the keys of [views] are for the image processor of a model; empty where it has none.

    The processor is run on a picture, of which the plain view of these keys has to be what it makes.

    Args:
        given: keys of [views] that the config has.

    Raises:
        SpecError: it does what views cannot, and the config does not have all of `STATED`.
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
    views = {"geometry": "floor", **_normalization(processor)}
    if processor.do_resize:
        resizing = _resizing(parsed, processor)
        if not resizing and "size" not in given:
            raise SpecError(
                f"model {parsed.name!r}: its image processor resizes to {_sides(processor.size)}, which views cannot; set "
                "views.size, fit and eval_share"
            )
        resample = int(processor.resample)
        kind = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}.get(resample, str(resample))
        views |= resizing | {"interpolation": kind}
    if not set(given) >= STATED and (fault := _difference(processor, views)):
        raise SpecError(
            f"model {parsed.name!r}: views do not make what its {type(processor).__name__} makes of a picture: {fault}; set "
            "views.size, mean and std (also fit, eval_share, interpolation) to what is nearest"
        )
    return views


STATED = frozenset({"size", "mean", "std"})
"""Keys of [views] by which a config says itself what a teacher is to see."""
NEAR = 0.05
"""How far a plain view may be from what the processor makes, on average, in standard deviations of its values."""


def _normalization(processor: Any) -> dict[str, Any]:
    """Returns mean and std of pixels in 0..1 that give what a processor gives of pixels in 0..255."""
    scale = 255 * (getattr(processor, "rescale_factor", 1 / 255) if processor.do_rescale else 1.0)
    offset = 1.0 if processor.do_rescale and getattr(processor, "rescale_offset", False) else 0.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    if processor.do_normalize:
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    # EfficientNet's divides by it once more where there is a head.
    if getattr(processor, "include_top", False):
        again = tuple(processor.image_std)
        std = tuple(a * b for a, b in zip(std * (len(again) // len(std)), again, strict=True))
        mean *= len(std) // len(mean)
    if abs(scale - 1) > 1e-12 or offset:
        mean = tuple((value + offset) / scale for value in mean)
        std = tuple(value / scale for value in std)
    return {"mean": mean, "std": std}


def _difference(processor: Any, views: Mapping[str, Any]) -> str:
    """Returns how the plain view of a picture is another than what a processor makes of it; empty: it is not.

    A processor that keeps the shape of images is asked for that of a square one.
    """
    kept = {key: value for key, value in views.items() if key != "interpolation"}
    if views.get("interpolation") in ("bilinear", "bicubic"):
        kept["interpolation"] = views["interpolation"]
    settings = ViewSettings.model_validate(kept)
    for columns in (450, 300):
        pixels = _picture(300, columns)
        try:
            made = processor(images=pixels, return_tensors="np", input_data_format="channels_last")
            expected = torch.from_numpy(made["pixel_values"][0].astype("float32"))
        except Exception as error:  # a class of the library raises anything
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        view = Views(settings).apply(image, key="", view=0)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (settings.mean, settings.std))
        found = (view.float() / 255 - mean) / std
        if is_bgr(processor):
            found = found.flip(0)
        if found.shape == expected.shape:
            distance = float((found - expected).abs().mean() / expected.std())
            return "" if distance <= NEAR else f"values that differ by {distance:.2g} standard deviations"
    return f"{tuple(expected.shape)}, and not {tuple(found.shape)}"


def _picture(height: int, width: int) -> np.ndarray:
    """Returns smooth colors that are other at every place, uint8 [H, W, 3]."""
    y, x = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None]
    waves = [np.sin(5 * x + 2 * y), np.sin(9 * y - 3 * x + 1), np.sin(4 * x * x + 6 * y + 2)]
    return np.stack([120 + 100 * wave for wave in waves], axis=-1).astype(np.uint8)


def _resizing(parsed: ModelSpec, processor: Any) -> dict[str, Any]:
    """Returns size, fit and share of a processor's resizing; empty where it is of another kind."""
    size, crop, name = _sides(processor.size), {}, type(processor).__name__
    if getattr(processor, "do_center_crop", False):
        crop = _sides(processor.crop_size)
    shortest, share = size.get("shortest_edge"), getattr(processor, "crop_pct", None)
    if crop:  # what comes before it is scaled by classes of their own
        shortest = getattr(processor, "resize_short", None) or shortest
        if shortest is not None and share is not None:
            shortest = int(shortest / share)
        if shortest is not None and name.startswith("Levit"):
            shortest = int(256 / 224 * shortest)
    if shortest is not None and share is not None and not crop:  # of ConvNeXt and its like
        stretched = {"size": shortest, "fit": "stretch"}
        return stretched if shortest >= 384 else {"size": shortest, "fit": "crop", "eval_share": share}
    if shortest is not None and not crop:
        log_info(
            f"views: {parsed.name} was trained on images of any shape; views take a square of {shortest} pixels"
        )
        return {"size": shortest, "fit": "crop", "eval_share": 1.0}
    if shortest is not None:
        sides = crop["height"], crop["width"]
        covered = min(1.0, sides[0] / shortest) if sides[0] == sides[1] else 1.0
        return {"size": _side(sides), "fit": "crop", "eval_share": covered}
    height, width = size.get("height"), size.get("width")
    if height is None or width is None:
        return {}
    if crop and (crop.get("height"), crop.get("width")) != (height, width):
        return {
            "size": _side((crop["height"], crop["width"])),
            "fit": "stretch_crop",
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
