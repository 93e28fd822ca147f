"""The table [views]: what a view may do to an image."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from softcache.settings import Settings

__all__ = ["Floats", "ViewSettings"]

Floats = Annotated[
    tuple[float, ...], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
]
Share = Annotated[float, Field(ge=0, le=1)]
Side = Annotated[int, Field(ge=1, le=16384)]
Size = Annotated[
    Side | tuple[Side, Side],
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
]


class ViewSettings(Settings):
    """[views]: what a view may do to an image.

    `size` is the side of the square that the model sees, or (height, width) (None keeps the image's own size). The plain
    view scales the image by `interpolation`: with `fit = "crop"` so that it covers `size / eval_share`, of which it takes
    the centre (`geometry` is how both are rounded, "torchvision" as torchvision and timm do); with "letterbox" so that all
    of it is within `size`, and fills what is left at the right or the bottom with the mean; with "stretch" each side to
    that of `size`, and with "stretch_crop" to `size / eval_share`, of which it takes the centre. `crop` is "none" (the plain
    view), "resized" (a random rectangle of the image, scaled to `size`) or "padded" (the plain view, moved by up to
    `padding` pixels with zeros behind it). `augment` is RandAugment (`num_ops`, `magnitude` of 0 to 30),
    TrivialAugment, AutoAugment's policy for ImageNet, or one of the three ops of DeiT III (grayscale, solarize, blur).
    `flip` and `erase` are probabilities; what is erased is black, of the color `mean` (0 after normalization), or noise
    that is normal after it, as timm's modes "const" and "pixel". `transform` names the user's own
    function instead: `module:factory`, where factory() returns a callable of uint8 [C, H, W].

    A view above 0 is mixed with that of another sample (`softcache.data.transforms.mix`) where `mixup_alpha` or
    `cutmix_alpha`, the parameters of their shares' Beta(alpha, alpha), are above 0: with `mix_probability`, and where both
    are set by CutMix with probability `mix_switch`.

    Attributes:
        seed: of all random parameters of views, with the key of the sample and the number of the view.
        eval_share: share of the resized image that the plain view takes (timm: crop_pct).
        scale, ratio: area as a share of the image, and width / height, of a random rectangle (low, high).
        color_jitter: brightness, contrast, saturation and hue, as torchvision has them.
        erase_scale, erase_ratio: area and width / height of what is erased (low, high).
        erase_fill: what it is filled with.
        mean, std: of the pixels in 0..1, by which they are normalized: one number, or one per channel.
    """

    seed: int = Field(0, ge=0, lt=2**64)
    size: Size | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    geometry: Literal["floor", "torchvision"] = "floor"
    fit: Literal["crop", "letterbox", "stretch", "stretch_crop"] = "crop"
    eval_share: float = Field(0.875, gt=0, le=1)
    crop: Literal["none", "resized", "padded"] = "none"
    scale: Floats = (0.08, 1.0)
    ratio: Floats = (3 / 4, 4 / 3)
    padding: int = Field(0, ge=0)
    flip: Share = 0.0
    augment: Literal["none", "randaugment", "trivial", "autoaugment", "three_augment"] = "none"
    num_ops: int = Field(2, ge=1, le=10)
    magnitude: int = Field(9, ge=0, le=30)
    color_jitter: Floats = (0.0, 0.0, 0.0, 0.0)
    erase: Share = 0.0
    erase_scale: Floats = (0.02, 0.33)
    erase_ratio: Floats = (0.3, 3.3)
    erase_fill: Literal["black", "mean", "noise"] = "black"
    mean: Floats = (0.5,)
    std: Floats = (0.5,)
    transform: str | None = Field(None, pattern=r"^[\w.]+:[\w.]+$")
    mixup_alpha: float = Field(0.0, ge=0, le=32)
    cutmix_alpha: float = Field(0.0, ge=0, le=32)
    mix_probability: Share = 1.0
    mix_switch: Share = 0.5

    @model_validator(mode="after")
    def _check(self) -> ViewSettings:
        for name in ("scale", "ratio", "erase_scale", "erase_ratio"):
            pair = getattr(self, name)
            if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
                raise ValueError(f"{name} must be two numbers, 0 < low <= high")
        if self.scale[1] > 1 or self.erase_scale[1] > 1:
            raise ValueError("scale and erase_scale are shares of the image's area, at most 1")
        if len(self.color_jitter) != 4 or min(self.color_jitter) < 0 or self.color_jitter[3] > 0.5:
            raise ValueError("color_jitter must be brightness, contrast, saturation >= 0 and hue in [0, 0.5]")
        channels = {len(self.mean), len(self.std)}
        if 0 in channels or len(channels - {1}) > 1 or min(self.std) <= 0:
            raise ValueError("mean and std need one number each per channel (or one for all), std above 0")
        if min(self.mean) < 0 or max(*self.mean, *self.std) > 1:
            raise ValueError(
                f"mean {list(self.mean)} and std {list(self.std)} are of pixels scaled to 0..1; expected none above "
                "1; divide those of the scale 0..255 by 255"
            )
        if self.crop == "padded" and self.padding == 0:
            raise ValueError('crop = "padded" needs padding of at least 1')
        drawn = self.crop != "none" or self.augment != "none" or any(self.color_jitter)
        if self.transform is not None and (drawn or self.flip or self.erase):
            raise ValueError(
                "transform takes the place of crop, flip, augment, color_jitter and erase; set one or the other"
            )
        return self

    @property
    def augments(self) -> bool:
        """Whether a view above 0 is another one than the plain view."""
        drawn = self.crop != "none" or self.augment != "none" or any(self.color_jitter)
        return drawn or self.flip > 0 or self.erase > 0 or self.transform is not None or self.mixes

    @property
    def mixes(self) -> bool:
        """Whether a view above 0 may be a mixture of two samples."""
        return self.mix_probability > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)

    def identity(self) -> dict[str, Any]:
        """Returns what identities have of the table: keys that came later are left out where they do nothing."""
        found = self.model_dump(mode="json")
        if self.interpolation == "bilinear":
            del found["interpolation"]
        if self.size is None or self.geometry == "floor":
            del found["geometry"]
        if self.size is None or self.fit == "crop":
            del found["fit"]
        if self.erase == 0 or self.erase_fill == "black":
            del found["erase_fill"]
        if not (self.mixes and self.mixup_alpha and self.cutmix_alpha):
            del found["mix_switch"]
        for key in () if self.mixes else ("mixup_alpha", "cutmix_alpha", "mix_probability"):
            del found[key]
        return found

    @property
    def letterboxed(self) -> bool:
        """Whether the plain view shows the whole image, scaled and filled up."""
        return self.size is not None and self.fit == "letterbox"

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """Returns height and width of a view of an image."""
        if self.size is None:
            return height, width
        return self.size if isinstance(self.size, tuple) else (self.size, self.size)

    def scaled(self, height: int, width: int) -> tuple[int, int]:
        """Returns the height and width that the plain view scales an image to before it takes the centre, or fills it up.

        With `geometry = "torchvision"` as torchvision's `Resize` of the shorter side for squares, and as timm's
        `ResizeKeepRatio` for others.
        """
        if self.size is None:
            return height, width
        rows, columns = self.sides(height, width)
        if self.fit == "stretch":
            return rows, columns
        if self.letterboxed:
            if rows * width <= columns * height:
                return rows, min(max((2 * width * rows + height) // (2 * height), 1), columns)
            return min(max((2 * height * columns + width) // (2 * width), 1), rows), columns
        if self.geometry == "floor" and rows == columns and self.fit == "crop":
            side, shorter = max(rows, round(rows / self.eval_share)), min(height, width)
            return side * height // shorter, side * width // shorter
        # timm rounds down; a share such as 224 / 232 is not to lose a pixel by its last bit.
        around = [max(side, math.floor(side / self.eval_share + 1e-9)) for side in (rows, columns)]
        if self.fit == "stretch_crop":
            return around[0], around[1]
        if around[0] == around[1]:
            shorter = min(height, width)
            return around[0] * height // shorter, around[0] * width // shorter
        ratio = min(height / around[0], width / around[1])
        return max(rows, round(height / ratio)), max(columns, round(width / ratio))

    def center(self, excess: int) -> int:
        """Returns where the centre begins in a side that is longer by `excess`."""
        return excess // 2 if self.geometry == "floor" else round(excess / 2)
