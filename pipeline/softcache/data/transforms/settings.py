"""The table [views]: what a view may do to an image."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from softcache.settings import Settings

__all__ = ["Floats", "ViewSettings"]

Floats = Annotated[
    tuple[float, ...], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
]
Share = Annotated[float, Field(ge=0, le=1)]


class ViewSettings(Settings):
    """[views]: what a view may do to an image.

    `size` is the side of the square that the model sees (None keeps the image's own size). The plain view
    scales the shorter side to `size / eval_share` and takes the centre. `crop` is "none" (the plain view),
    "resized" (a random rectangle of the image, scaled to `size`) or "padded" (the plain view, moved by up to
    `padding` pixels with zeros behind it). `flip` and `erase` are probabilities. `transform` names the user's own
    function instead: `module:factory`, where factory() returns a callable of uint8 [C, H, W].
    """

    seed: int = Field(0, ge=0, lt=2**64)
    size: int | None = Field(None, ge=1, le=16384)
    eval_share: float = Field(0.875, gt=0, le=1)
    crop: Literal["none", "resized", "padded"] = "none"
    scale: Floats = (0.08, 1.0)
    ratio: Floats = (3 / 4, 4 / 3)
    padding: int = Field(0, ge=0)
    flip: Share = 0.0
    augment: Literal["none", "randaugment", "trivial"] = "none"
    num_ops: int = Field(2, ge=1, le=10)
    magnitude: int = Field(9, ge=0, le=30)
    color_jitter: Floats = (0.0, 0.0, 0.0, 0.0)
    erase: Share = 0.0
    erase_scale: Floats = (0.02, 0.33)
    erase_ratio: Floats = (0.3, 3.3)
    mean: Floats = (0.5,)
    std: Floats = (0.5,)
    transform: str | None = Field(None, pattern=r"^[\w.]+:[\w.]+$")

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
        if not self.std or len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ValueError("mean and std need one number each per channel (or one for all), std above 0")
        if self.crop == "padded" and self.padding == 0:
            raise ValueError('crop = "padded" needs padding of at least 1')
        drawn = self.crop != "none" or self.augment != "none" or any(self.color_jitter)
        if self.transform is not None and (drawn or self.flip or self.erase):
            raise ValueError(
                "transform takes the place of crop, flip, augment, color_jitter and erase; set one or the other"
            )
        return self
