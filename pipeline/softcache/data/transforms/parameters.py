"""Parameters of one image's operations, from its uniform numbers; the slots are listed in `softcache.data.transforms`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from softcache.data.transforms.settings import ViewSettings

__all__ = ["RANGES", "ViewParameters", "crop_of", "erase_of", "jitter_of", "ops_of"]

# name of an op: (strength at level 0, at level 30 of RandAugment, at level 30 of TrivialAugment, either sign).
# RandAugment as in torchvision; TrivialAugment is the wide space of Müller & Hutter 2021 (arXiv:2103.10158), but
# moves by a share of the side where the paper has 32 pixels, which would empty a small image.
RANGES: dict[str, tuple[float, float, float, bool]] = {
    "identity": (0, 0, 0, False),
    "shear_x": (0, 0.3, 0.99, True),
    "shear_y": (0, 0.3, 0.99, True),
    "translate_x": (0, 150 / 331, 1 / 3, True),
    "translate_y": (0, 150 / 331, 1 / 3, True),
    "rotate": (0, 30, 135, True),
    "brightness": (0, 0.9, 0.99, True),
    "color": (0, 0.9, 0.99, True),
    "contrast": (0, 0.9, 0.99, True),
    "sharpness": (0, 0.9, 0.99, True),
    "posterize": (8, 4, 2, False),
    "solarize": (256, 0, 0, False),
    "autocontrast": (0, 0, 0, False),
    "equalize": (0, 0, 0, False),
}
_NAMES = tuple(RANGES)


@dataclass(frozen=True)
class ViewParameters:
    """What is done to one image; plain numbers, fit for JSON.

    Attributes:
        crop: (top, left, height, width) in the (padded) image, or None.
        flip: mirrored left to right.
        ops: (name, strength) in order.
        jitter: factors of brightness, contrast and saturation, and the shift of hue.
        erase: (top, left, height, width), or None.
    """

    crop: tuple[int, int, int, int] | None = None
    flip: bool = False
    ops: tuple[tuple[str, float], ...] = ()
    jitter: tuple[float, float, float, float] | None = None
    erase: tuple[int, int, int, int] | None = None


def crop_of(
    settings: ViewSettings, u: list[float], image: tuple[int, int], side: tuple[int, int]
) -> tuple[int, int, int, int] | None:
    if settings.crop == "padded":
        span = 2 * settings.padding + 1
        return int(u[3] * span), int(u[4] * span), *side
    if settings.crop == "resized":
        height, width = image
        rows, columns = _rectangle(height, width, settings.scale, settings.ratio, u[1], u[2])
        return int(u[3] * (height - rows + 1)), int(u[4] * (width - columns + 1)), rows, columns
    return None


def _rectangle(
    height: int, width: int, scale: tuple[float, ...], ratio: tuple[float, ...], area: float, aspect: float
) -> tuple[int, int]:
    """Height and width of a rectangle: area uniform in `scale`, width / height log-uniform in `ratio`, cut to fit."""
    target = height * width * (scale[0] + (scale[1] - scale[0]) * area)
    shape = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * aspect)
    rows, columns = round(math.sqrt(target / shape)), round(math.sqrt(target * shape))
    return min(max(rows, 1), height), min(max(columns, 1), width)


def jitter_of(settings: ViewSettings, u: list[float]) -> tuple[float, float, float, float]:
    brightness, contrast, saturation, hue = (
        amount * (2 * u[8 + slot] - 1) for slot, amount in enumerate(settings.color_jitter)
    )
    return max(0.0, 1 + brightness), max(0.0, 1 + contrast), max(0.0, 1 + saturation), hue


def erase_of(settings: ViewSettings, u: list[float], height: int, width: int) -> tuple[int, int, int, int]:
    rows, columns = _rectangle(height, width, settings.erase_scale, settings.erase_ratio, u[17], u[18])
    return int(u[19] * (height - rows + 1)), int(u[20] * (width - columns + 1)), rows, columns


def ops_of(settings: ViewSettings, u: list[float]) -> tuple[tuple[str, float], ...]:
    if settings.augment == "none":
        return ()
    trivial = settings.augment == "trivial"
    drawn = []
    for number in range(1 if trivial else settings.num_ops):
        which, strength, sign = u[24 + 4 * number : 27 + 4 * number]
        name = _NAMES[int(which * len(_NAMES))]
        low, high, wide, signed = RANGES[name]
        # TrivialAugment draws the strength anew, RandAugment fixes it (Cubuk et al. 2020, arXiv:1909.13719).
        level = int(strength * 31) / 30 if trivial else settings.magnitude / 30
        value = low + ((wide if trivial else high) - low) * level
        drawn.append((name, -value if signed and sign < 0.5 else value))
    return tuple(drawn)
