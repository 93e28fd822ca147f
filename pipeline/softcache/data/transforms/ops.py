"""What a view does to pixels: functions of uint8 [C, H, W] that give the same bytes on every CPU.

A student must see the teacher's very pixels, often on another machine. torchvision's own resize, saturation and
sharpness differ between CPUs with and without AVX2 (one grey level here and there, which a fingerprint rightly
rejects), because one of them fuses a multiply with an add or takes another route for uint8. The ops here use
whole numbers, or floats with one correctly rounded operation at a time, and rest on torchvision only where it
counts (`equalize`, `posterize`). None depends on the number of threads.

All ops take grey (C = 1) and RGB (C = 3); what has no meaning for grey (saturation, hue) leaves it alone. Pixels
from outside of the image are 0.

Shape suffixes: C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

__all__ = [
    "OPS",
    "adjust_hue",
    "blend",
    "brightness",
    "contrast",
    "gaussian_blur",
    "grayscale",
    "grey_image",
    "nearest",
    "resize",
    "resize_shorter",
    "saturation",
]


def resize(image_CHW: torch.Tensor, height: int, width: int, *, mode: str = "bilinear") -> torch.Tensor:
    """Returns the image scaled by antialiased bilinear or bicubic weights (fixed-point, so equal on every CPU)."""
    if image_CHW.shape[1:] == (height, width):
        return image_CHW
    # torchvision's resize goes through floats where there is no AVX2; this is its other, integer route.
    return torch.nn.functional.interpolate(
        image_CHW.contiguous().unsqueeze(0), size=(height, width), mode=mode, antialias=True
    ).squeeze(0)


def nearest(values: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Returns numbers [..., H, W] at another size, each that of the pixel in which its middle lies ("nearest-exact")."""
    for axis, (before, after) in ((-2, (values.shape[-2], height)), (-1, (values.shape[-1], width))):
        if before != after:
            values = values.index_select(axis, (2 * torch.arange(after) + 1) * before // (2 * after))
    return values


def resize_shorter(image_CHW: torch.Tensor, side: int) -> torch.Tensor:
    """Returns the image scaled so that its shorter side is `side`; the longer one is rounded down."""
    height, width = image_CHW.shape[1:]
    shorter = min(height, width)
    return resize(image_CHW, side * height // shorter, side * width // shorter)


# -- colour ------------------------------------------------------------------------------------------------


def _to_uint8(image: torch.Tensor) -> torch.Tensor:
    return image.clamp_(0, 255).round_().to(torch.uint8)


def blend(image_CHW: torch.Tensor, other: torch.Tensor | float, factor: float) -> torch.Tensor:
    """Returns factor * image + (1 - factor) * other, rounded and clamped; two products, then a sum."""
    return _to_uint8(image_CHW * float(factor) + other * (1 - float(factor)))


def brightness(image_CHW: torch.Tensor, factor: float) -> torch.Tensor:
    """Returns the image times `factor`."""
    return _to_uint8(image_CHW * float(factor))


def grey_image(image_CHW: torch.Tensor) -> torch.Tensor:
    """Luma of an RGB image (ITU-R BT.601), [1, H, W] int32, rounded down; a grey image as it is."""
    image = image_CHW.to(torch.int32)
    if len(image) != 3:
        return image
    return (299 * image[:1] + 587 * image[1:2] + 114 * image[2:]) // 1000


def contrast(image_CHW: torch.Tensor, factor: float) -> torch.Tensor:
    """Returns the image blended with its mean luma (summed as whole numbers: exact in any order)."""
    luma = grey_image(image_CHW)
    return blend(image_CHW, torch.tensor(int(luma.sum()) / luma.numel()), factor)


def saturation(image_CHW: torch.Tensor, factor: float) -> torch.Tensor:
    """Returns an RGB image blended with its luma."""
    return blend(image_CHW, grey_image(image_CHW), factor) if len(image_CHW) == 3 else image_CHW


def adjust_hue(image_CHW: torch.Tensor, shift: float) -> torch.Tensor:
    """Returns an RGB image with its HSV hue turned by `shift` of the circle, in [-0.5, 0.5]."""
    if len(image_CHW) != 3 or shift == 0:
        return image_CHW
    red, green, blue = image = image_CHW.float()
    high, low = image.amax(0), image.amin(0)
    spread = high - low
    unit = spread.clamp(min=1)  # where the spread is 0 the numerators are, too
    hue = torch.where(
        high == red,
        (green - blue) / unit,
        torch.where(high == green, (blue - red) / unit + 2, (red - green) / unit + 4),
    )
    channels = []
    for offset in (5, 3, 1):
        sector = hue + (offset + 6 * shift)
        sector = sector - 6 * torch.floor(sector / 6)
        channels.append(high - spread * torch.minimum(sector, 4 - sector).clamp(0, 1))
    return _to_uint8(torch.stack(channels))


def _sharpness(image_CHW: torch.Tensor, factor: float) -> torch.Tensor:
    """Blends with the image smoothed by 1/13 [1 1 1; 1 5 1; 1 1 1]; the outermost pixels stay."""
    height, width = image_CHW.shape[1:]
    if height < 3 or width < 3:
        return image_CHW
    image = image_CHW.to(torch.int32)
    total = 4 * image[:, 1:-1, 1:-1]
    for top in range(3):
        for left in range(3):
            total = total + image[:, top : top + height - 2, left : left + width - 2]
    smooth = image.clone()
    smooth[:, 1:-1, 1:-1] = (total + 6) // 13
    return blend(image_CHW, smooth, factor)


def _autocontrast(image_CHW: torch.Tensor) -> torch.Tensor:
    """Stretches each channel to 0..255; a flat channel stays."""
    low, high = image_CHW.amin((1, 2), keepdim=True).int(), image_CHW.amax((1, 2), keepdim=True).int()
    spread = high - low
    stretched = ((image_CHW.int() - low) * 255 // spread.clamp(min=1)).to(torch.uint8)
    return torch.where(spread > 0, stretched, image_CHW)


def _solarize(image_CHW: torch.Tensor, threshold: float) -> torch.Tensor:
    # As int16: 256, which inverts nothing, is no uint8.
    return torch.where(image_CHW.short() >= threshold, 255 - image_CHW, image_CHW)


def grayscale(image_CHW: torch.Tensor) -> torch.Tensor:
    """Returns an RGB image as its luma in every channel."""
    return grey_image(image_CHW).to(torch.uint8).expand_as(image_CHW)


def gaussian_blur(image_CHW: torch.Tensor, sigma: float) -> torch.Tensor:
    """Returns the image blurred as Pillow's `GaussianBlur(radius=sigma)` does: three box blurs along each axis.

    A box has a fractional radius: its outermost pixels on each side count in part (Gwosdek et al. 2011, "Theoretical
    foundations of Gaussian convolution by extended box filtering"). Weights are whole numbers of 2^-24, edges are repeated.
    """
    variance = sigma * sigma / 3
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    inner = int(2**24 / (2 * (whole + part) + 1))
    outer = (2**24 - (2 * whole + 1) * inner) // 2
    image: Any = image_CHW.numpy()
    for axis in (2, 2, 2, 1, 1, 1):
        image = _box_blur(image, axis, whole, inner, outer)
    return torch.from_numpy(image)


def _box_blur(image_CHW: np.ndarray, axis: int, radius: int, inner: int, outer: int) -> np.ndarray:
    """The weighted sum of 2 * radius + 3 neighbors along an axis, of which the outermost have the weight `outer`."""
    length, margin = image_CHW.shape[axis], radius + 1
    places = np.arange(-margin, length + margin).clip(0, length - 1)
    padded = image_CHW.take(places, axis).astype(np.uint32)  # 255 * 2^24 and a half fit

    def shifted(shift: int) -> np.ndarray:
        return padded[:, :, shift : shift + length] if axis == 2 else padded[:, shift : shift + length]

    total = sum((shifted(shift) for shift in range(2, 2 * margin)), shifted(1)) * np.uint32(inner)
    total += (shifted(0) + shifted(2 * margin)) * np.uint32(outer)
    total += np.uint32(2**23)
    return (total >> np.uint32(24)).astype(np.uint8)


# -- geometry ----------------------------------------------------------------------------------------------


def _sample(image_CHW: torch.Tensor, row: tuple[float, float], column: tuple[float, float]) -> torch.Tensor:
    """Returns the image seen through an inverse linear map about its centre, nearest pixel.

    Output pixel (y, x), counted from the centre, shows input pixel (row . (y, x), column . (y, x)).
    """
    height, width = image_CHW.shape[1:]
    # float64 and one operation at a time: a tie would otherwise fall differently on another CPU.
    y = torch.arange(height, dtype=torch.float64).sub_((height - 1) / 2).unsqueeze(1)
    x = torch.arange(width, dtype=torch.float64).sub_((width - 1) / 2).unsqueeze(0)
    rows = _nearest(y * row[0] + x * row[1], height)
    columns = _nearest(y * column[0] + x * column[1], width)
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    places = rows.clamp_(0, height - 1).mul_(width).add_(columns.clamp_(0, width - 1))
    return image_CHW.flatten(1)[:, places.flatten()].view_as(image_CHW) * inside


def _nearest(offsets: torch.Tensor, length: int) -> torch.Tensor:
    # A thousandth of a pixel to one side decides ties, far above what sin and cos differ by between machines.
    return (offsets + ((length - 1) / 2 + 0.5 - 1e-3)).floor_().long()


def _rotate(image_CHW: torch.Tensor, degrees: float) -> torch.Tensor:
    """Turns counter-clockwise."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return _sample(image_CHW, (cosine, sine), (-sine, cosine))


def _translate(image_CHW: torch.Tensor, share: float, *, axis: int) -> torch.Tensor:
    """Moves right or down by a share of the side, rounded to whole pixels."""
    length = image_CHW.shape[axis]
    pixels = max(-length, min(length, round(share * length)))
    out, keep = torch.zeros_like(image_CHW), length - abs(pixels)
    out.narrow(axis, max(pixels, 0), keep).copy_(image_CHW.narrow(axis, max(-pixels, 0), keep))
    return out


def _posterize(image_CHW: torch.Tensor, bits: float) -> torch.Tensor:
    from torchvision.transforms.v2 import functional  # takes a second or two, and few transforms need it

    return functional.posterize(image_CHW, round(bits))


def _equalize(image_CHW: torch.Tensor, _: float) -> torch.Tensor:
    from torchvision.transforms.v2 import functional

    return functional.equalize(image_CHW)


# name: function of (image, strength); the order belongs to the stream of the views: never reorder.
OPS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "identity": lambda image, _: image,
    "shear_x": lambda image, slope: _sample(image, (1.0, 0.0), (slope, 1.0)),
    "shear_y": lambda image, slope: _sample(image, (1.0, slope), (0.0, 1.0)),
    "translate_x": lambda image, share: _translate(image, share, axis=2),
    "translate_y": lambda image, share: _translate(image, share, axis=1),
    "rotate": _rotate,
    "brightness": lambda image, change: brightness(image, 1 + change),
    "color": lambda image, change: saturation(image, 1 + change),
    "contrast": lambda image, change: contrast(image, 1 + change),
    "sharpness": lambda image, change: _sharpness(image, 1 + change),
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": lambda image, _: _autocontrast(image),
    "equalize": _equalize,
    "invert": lambda image, _: 255 - image,
    "grayscale": lambda image, _: grayscale(image),
    "gaussian_blur": gaussian_blur,
}
