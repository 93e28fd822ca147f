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

# AutoAugment's policy for ImageNet (Cubuk et al. 2019, arXiv:1805.09501, table 9), as torchvision has it: pairs of
# (op, probability, level of 0 to 9).
AUTOAUGMENT: tuple[tuple[tuple[str, float, int], tuple[str, float, int]], ...] = (
    (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 0)),
    (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
    (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
    (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
    (("equalize", 0.4, 0), ("rotate", 0.8, 8)),
    (("solarize", 0.6, 3), ("equalize", 0.6, 0)),
    (("posterize", 0.8, 5), ("equalize", 1.0, 0)),
    (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
    (("equalize", 0.6, 0), ("posterize", 0.4, 6)),
    (("rotate", 0.8, 8), ("color", 0.4, 0)),
    (("rotate", 0.4, 9), ("equalize", 0.6, 0)),
    (("equalize", 0.0, 0), ("equalize", 0.8, 0)),
    (("invert", 0.6, 0), ("equalize", 1.0, 0)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("rotate", 0.8, 8), ("color", 1.0, 2)),
    (("color", 0.8, 8), ("solarize", 0.8, 7)),
    (("sharpness", 0.4, 7), ("invert", 0.6, 0)),
    (("shear_x", 0.6, 5), ("equalize", 1.0, 0)),
    (("color", 0.4, 0), ("equalize", 0.6, 0)),
    (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 0)),
    (("invert", 0.6, 0), ("equalize", 1.0, 0)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
)
BLUR_SIGMAS = (0.1, 2.0)
SOLARIZE_THRESHOLD = 128.0


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
    if settings.augment == "autoaugment":
        return _autoaugment(u)
    if settings.augment == "three_augment":
        return (_three_augment(u),)
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


def _autoaugment(u: list[float]) -> tuple[tuple[str, float], ...]:
    drawn = []
    for number, (name, probability, level) in enumerate(AUTOAUGMENT[int(u[24] * len(AUTOAUGMENT))]):
        sign, chance = u[26 + 4 * number : 28 + 4 * number]
        if chance < probability:
            low, high, _, signed = RANGES.get(name, (0, 0, 0, False))
            if name == "solarize":
                low = 255  # of the scale that torchvision has
            value = low + (high - low) * level / 9
            drawn.append((name, -value if signed and sign < 0.5 else value))
    return tuple(drawn)


def _three_augment(u: list[float]) -> tuple[str, float]:
    """One of three ops alike (Touvron, Cord, Jégou 2022, DeiT III, arXiv:2204.07118, section 4)."""
    name = ("grayscale", "solarize", "gaussian_blur")[int(u[24] * 3)]
    low, high = BLUR_SIGMAS
    return name, {"grayscale": 0.0, "solarize": SOLARIZE_THRESHOLD}.get(name, low + (high - low) * u[25])
