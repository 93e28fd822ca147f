"""Augmentation as a pure function of (seed, sample key, view): first parameters, then pixels.

The student replays the very pixels that the teacher saw, and the cache stores no byte for it. View 0 is the
plain evaluation view. Views from 1 on draw their parameters from a counter-based generator:

    raw = numpy.random.Philox(key=[seed, xxh3_64(key utf-8)], counter=[0, view, 0, 0]).random_raw(64)
    u[i] = (raw[i] >> 11) * 2**-53            # uniform in [0, 1)

Every op owns fixed slots of `u`, listed below, so that switching one op on or off, or adding one later,
changes no other. NumPy documents Philox's raw output as stable.

    0 flip                      1, 2 crop area and aspect          3, 4 crop top and left
    8..13 colour jitter: brightness, contrast, saturation, hue, two spare
    16..21 erase: chance, area, aspect, top, left, spare
    24..63 RandAugment or TrivialAugment: (which, strength, sign, spare) per op, at most ten ops

The ops of `view_ops` are applied to uint8 [C, H, W] in the order crop, flip, augment, jitter (brightness,
contrast, saturation, hue), erase. Measured on one core: parameters 10 to 14 microseconds, padded crop and
flip of 1x28x28 with its parameters 20 (1 in a batch), all ops from 3x375x500 to 3x224x224 about 3 milliseconds.
"""

from __future__ import annotations

import importlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import xxhash
from pydantic import BeforeValidator, Field, model_validator

from pipeline import view_boxes, view_ops
from pipeline.errors import SpecError
from pipeline.identity import digest_json
from pipeline.settings import Settings

__all__ = ["ViewParameters", "ViewSettings", "Views"]

STREAM_VERSION = 1
NUM_SLOTS = 64

# name of an op: (strength at level 0, at level 30 of RandAugment, at level 30 of TrivialAugment, either sign).
# RandAugment as in torchvision; TrivialAugment is the wide space of Müller & Hutter 2021 (arXiv:2103.10158), but
# moves by a share of the side where the paper has 32 pixels, which would empty a small image.
_RANGES: dict[str, tuple[float, float, float, bool]] = {
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
_NAMES = tuple(_RANGES)

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


class Views:
    """Replayable views under one policy; picklable.

    Attributes:
        settings: the policy.
        digest: names everything that changes what a model sees: the stream, the policy, mean and std.
    """

    def __init__(self, settings: ViewSettings) -> None:
        self.settings = settings
        self.digest = digest_json({"stream": STREAM_VERSION, **settings.model_dump(mode="json")})
        self._factory = _import_factory(settings.transform) if settings.transform else None

    def __reduce__(self) -> tuple[type[Views], tuple[ViewSettings]]:
        # The user's factory need not be picklable: a loader process imports it anew.
        return Views, (self.settings,)

    def apply(self, image: torch.Tensor, *, key: str, view: int) -> torch.Tensor:
        """Returns the view of an image.

        Args:
            image: uint8 [C, H, W].
            key: the sample's stable key.
            view: 0 for the plain view, else any positive number.

        Returns:
            uint8 [C, H', W']; what the user's own transform returns, where there is one and view > 0. It may
            share memory with `image`, which is never written to.
        """
        if view == 0:
            return self._plain(image)
        if self._factory is not None:
            return self._own(image, key, view)
        return self._draw(image, self.parameters(key, view, *image.shape[1:]))

    def apply_batch(
        self, images: torch.Tensor | Sequence[torch.Tensor], *, keys: Sequence[str], view: int
    ) -> torch.Tensor | list[torch.Tensor]:
        """Returns the same view of many images: what `apply` gives for each, the very same pixels.

        Args:
            images: uint8 [B, C, H, W], or B images of any sizes.
            keys: [B] stable keys.
            view: as in `apply`.

        Returns:
            uint8 [B, C, H', W'] where the images came as one tensor and the view does no more to them than to move,
            mirror or blank; else a list of B images. It may share memory with `images`.
        """
        if view == 0 and self.settings.size is None:
            return images if isinstance(images, torch.Tensor) else list(images)
        if view == 0 or self._factory is not None:
            return [self.apply(image, key=key, view=view) for image, key in zip(images, keys, strict=True)]
        u_BS = self._many_uniforms(keys, view)
        if isinstance(images, torch.Tensor) and self._only_moves:
            return self._move(images, u_BS)
        return [
            self._draw(image, self._parameters(u, *image.shape[1:]))
            for image, u in zip(images, u_BS.tolist(), strict=True)
        ]

    def parameters(self, key: str, view: int, height: int, width: int) -> ViewParameters:
        """Returns what view `view` > 0 does to an image of this key and size."""
        return self._parameters(self._uniforms(key, view), height, width)

    def _parameters(self, u: list[float], height: int, width: int) -> ViewParameters:
        settings = self.settings
        side = (settings.size or height, settings.size or width)
        return ViewParameters(
            crop=_crop(settings, u, (height, width), side),
            flip=u[0] < settings.flip,
            ops=_ops(settings, u),
            jitter=_jitter(settings, u) if any(settings.color_jitter) else None,
            erase=_erase(settings, u, *side) if settings.erase and u[16] < settings.erase else None,
        )

    def apply_boxes(
        self, boxes_M4: np.ndarray, *, key: str, view: int, height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns where the view shows boxes, float32 [M, 4], and which of them it shows enough of to keep, bool [M].

        Args:
            boxes_M4: left, top, right, bottom in pixels of the image.
            key, view: as in `apply`.
            height, width: of the image.

        Raises:
            SpecError: the view's settings move pixels in a way that rectangles do not follow (augment, transform).
        """
        settings, size, erased = self.settings, (height, width), None
        boxes_M4 = np.asarray(boxes_M4, np.float64).reshape(-1, 4)
        if view > 0 and (settings.augment != "none" or settings.transform is not None):
            what = "augment" if settings.transform is None else "transform"
            raise SpecError(
                f"views.{what}: {getattr(settings, what)!r} with boxes: it may shear or turn the image, and boxes would not "
                "follow; use crop, flip, color_jitter and erase"
            )
        if view == 0 or settings.crop != "resized":
            boxes_M4, size = self._plain_boxes(boxes_M4, size)
        # What the centre crop took does not come back when a padded one moves the image: 2M boxes from here, whole and cut.
        boxes_M4 = np.concatenate([boxes_M4, view_boxes.cut(boxes_M4, size)])
        if view > 0:
            does = self.parameters(key, view, height, width)
            erased = does.erase
            if does.crop is not None:
                top, left, rows, columns = does.crop
                margin = settings.padding if settings.crop == "padded" else 0
                side = (settings.size or height, settings.size or width)
                boxes_M4 = view_boxes.moved_boxes(boxes_M4, top - margin, left - margin)
                boxes_M4, size = view_boxes.scaled(boxes_M4, (rows, columns), side), side
            if does.flip:
                boxes_M4 = view_boxes.flipped(boxes_M4, size[1])
        whole_M4, left_M4 = np.split(boxes_M4, 2)
        cut_M4, kept_M = view_boxes.visible(whole_M4, left_M4, size, erased)
        return cut_M4.astype(np.float32), kept_M

    def _plain_boxes(
        self, boxes_M4: np.ndarray, before: tuple[int, int]
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """`_plain` for boxes; returns them and the new (height, width)."""
        size = self.settings.size
        if size is None:
            return boxes_M4, before
        side, shorter = max(size, round(size / self.settings.eval_share)), min(before)
        after = (side * before[0] // shorter, side * before[1] // shorter)
        boxes_M4 = view_boxes.scaled(boxes_M4, before, after)
        return view_boxes.moved_boxes(boxes_M4, (after[0] - size) // 2, (after[1] - size) // 2), (size, size)

    def _raw(self, key: str, view: int) -> np.ndarray:
        philox = np.random.Philox(
            key=np.array([self.settings.seed, xxhash.xxh3_64_intdigest(key.encode())], np.uint64),
            counter=np.array([0, view, 0, 0], np.uint64),
        )
        return philox.random_raw(NUM_SLOTS)

    def _uniforms(self, key: str, view: int) -> list[float]:
        return ((self._raw(key, view) >> np.uint64(11)) * 2.0**-53).tolist()

    def _many_uniforms(self, keys: Sequence[str], view: int) -> np.ndarray:
        """The first slots of each key's stream that any op of these settings reads, float64 [B, slots]."""
        from pipeline import hashes

        settings = self.settings
        few = 8 if self._only_moves and not settings.erase else 24
        slots = NUM_SLOTS if settings.augment != "none" else few
        return hashes.uniforms(settings.seed, hashes.hashes(keys), view, slots)

    @property
    def _only_moves(self) -> bool:
        settings = self.settings
        scaled = settings.size is not None or settings.crop == "resized"
        return not (scaled or settings.augment != "none" or any(settings.color_jitter))

    def _move(self, image_BCHW: torch.Tensor, u_BS: np.ndarray) -> torch.Tensor:
        """`_draw` of every image, where it only crops with padding, mirrors and blanks."""
        from pipeline.moving import moved

        settings, (height, width) = self.settings, image_BCHW.shape[2:]
        flip_B, offset_B = u_BS[:, 0] < settings.flip, np.zeros(len(u_BS), np.int64)
        top_B = left_B = offset_B
        if settings.crop == "padded":
            span = 2 * settings.padding + 1
            top_B, left_B = (u_BS[:, 3] * span).astype(np.int64), (u_BS[:, 4] * span).astype(np.int64)
        padding = settings.padding if settings.crop == "padded" else 0
        images = image_BCHW.contiguous().numpy()
        out_BCHW = torch.from_numpy(moved(images, top_B, left_B, flip_B, padding))
        for row in np.flatnonzero(u_BS[:, 16] < settings.erase).tolist() if settings.erase else ():
            top, left, rows, columns = _erase(settings, u_BS[row].tolist(), height, width)
            out_BCHW[row, :, top : top + rows, left : left + columns] = 0
        return out_BCHW

    def _plain(self, image: torch.Tensor) -> torch.Tensor:
        size = self.settings.size
        if size is None:
            return image
        image = view_ops.resize_shorter(image, max(size, round(size / self.settings.eval_share)))
        top, left = (image.shape[1] - size) // 2, (image.shape[2] - size) // 2
        return image[:, top : top + size, left : left + size].contiguous()

    def _draw(self, image: torch.Tensor, parameters: ViewParameters) -> torch.Tensor:
        image = self._place(image, parameters.crop)
        if parameters.flip:
            image = image.flip(-1)
        for name, strength in parameters.ops:
            image = view_ops.OPS[name](image, strength)
        if parameters.jitter is not None:
            brightness, contrast, saturation, hue = parameters.jitter
            image = view_ops.contrast(view_ops.brightness(image, brightness), contrast)
            image = view_ops.adjust_hue(view_ops.saturation(image, saturation), hue)
        if parameters.erase is not None:
            top, left, height, width = parameters.erase
            image = image.clone()
            image[:, top : top + height, left : left + width] = 0
        return image.contiguous()

    def _place(self, image: torch.Tensor, crop: tuple[int, int, int, int] | None) -> torch.Tensor:
        """Crops and scales."""
        settings = self.settings
        side = (settings.size or image.shape[1], settings.size or image.shape[2])
        if settings.crop != "resized":
            image = self._plain(image)
        if crop is None:
            return image
        if settings.crop == "padded":
            image = torch.nn.functional.pad(image, [settings.padding] * 4)
        top, left, height, width = crop
        return view_ops.resize(image[:, top : top + height, left : left + width], *side)

    def _own(self, image: torch.Tensor, key: str, view: int) -> torch.Tensor:
        """The user's transform, made anew for each view so that it carries nothing over from the last one."""
        assert self._factory is not None
        with _seeded(int(self._raw(key, view)[0])):
            return self._factory()(image.clone())  # it may write in place


# -- parameters --------------------------------------------------------------------------------------------


def _crop(
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


def _jitter(settings: ViewSettings, u: list[float]) -> tuple[float, float, float, float]:
    brightness, contrast, saturation, hue = (
        amount * (2 * u[8 + slot] - 1) for slot, amount in enumerate(settings.color_jitter)
    )
    return max(0.0, 1 + brightness), max(0.0, 1 + contrast), max(0.0, 1 + saturation), hue


def _erase(settings: ViewSettings, u: list[float], height: int, width: int) -> tuple[int, int, int, int]:
    rows, columns = _rectangle(height, width, settings.erase_scale, settings.erase_ratio, u[17], u[18])
    return int(u[19] * (height - rows + 1)), int(u[20] * (width - columns + 1)), rows, columns


def _ops(settings: ViewSettings, u: list[float]) -> tuple[tuple[str, float], ...]:
    if settings.augment == "none":
        return ()
    trivial = settings.augment == "trivial"
    drawn = []
    for number in range(1 if trivial else settings.num_ops):
        which, strength, sign = u[24 + 4 * number : 27 + 4 * number]
        name = _NAMES[int(which * len(_NAMES))]
        low, high, wide, signed = _RANGES[name]
        # TrivialAugment draws the strength anew, RandAugment fixes it (Cubuk et al. 2020, arXiv:1909.13719).
        level = int(strength * 31) / 30 if trivial else settings.magnitude / 30
        value = low + ((wide if trivial else high) - low) * level
        drawn.append((name, -value if signed and sign < 0.5 else value))
    return tuple(drawn)


# -- the user's own transform ------------------------------------------------------------------------------


def _import_factory(spec: str) -> Callable[[], Callable[[torch.Tensor], torch.Tensor]]:
    module, _, attribute = spec.partition(":")
    expected = "expected an importable module:factory, where factory() returns a callable"
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SpecError(f"views.transform {spec!r}: {error}; {expected}") from error
    if not callable(factory):
        raise SpecError(f"views.transform {spec!r}: found {type(factory).__name__}; {expected}")
    return factory


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds the global generators of Python, NumPy and torch (CPU); puts their states back afterwards."""
    # Not torch.manual_seed: it would seed the accelerators' generators as well, and those could not be put back.
    generator = torch.default_generator
    python, array, tensor = random.getstate(), np.random.get_state(), generator.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    generator.manual_seed(seed % 2**63)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(array)  # noqa: NPY002
        generator.set_state(tensor)
