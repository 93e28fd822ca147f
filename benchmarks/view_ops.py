"""How far every operation of a view is from torchvision's and timm's, handed the same parameters, on photos.

    python -m benchmarks.view_ops

Each row has one operation at several strengths on crops of the two photos that come with scikit-learn: the largest
difference in grey levels, the mean one, and the share of values more than one level away. References are torchvision's
functions of uint8 tensors, Pillow's as timm and DeiT III call them, and timm's own `Mixup` with its random numbers
replaced by those of softcache. Whole policies are compared with the same operations in a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import click
import numpy as np
import timm.data.auto_augment as timm_ops
import torch
from PIL import Image, ImageFilter, ImageOps
from timm.data import mixup as timm_mixup
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from benchmarks.plain_views import photos
from softcache.data.images import ViewedSource
from softcache.data.sources.images.base import InMemorySource
from softcache.data.transforms import Views, ViewSettings
from softcache.data.transforms import ops as view_ops
from softcache.data.transforms.mix import SHARES
from softcache.data.transforms.parameters import RANGES

SIDE = 192
Op = Callable[[torch.Tensor, float], torch.Tensor]


def pillow(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _affine(
    image: torch.Tensor, degrees: float, shear: tuple[float, float], move: tuple[int, int] = (0, 0)
) -> torch.Tensor:
    slopes = [math.degrees(math.atan(slope)) for slope in shear]
    return F.affine(image, degrees, list(move), 1.0, slopes, InterpolationMode.NEAREST, [0.0])


TORCHVISION: dict[str, Op] = {
    "shear_x": lambda image, slope: _affine(image, 0.0, (slope, 0.0)),
    "shear_y": lambda image, slope: _affine(image, 0.0, (0.0, slope)),
    "translate_x": lambda image, share: _affine(image, 0.0, (0, 0), (round(share * image.shape[2]), 0)),
    "translate_y": lambda image, share: _affine(image, 0.0, (0, 0), (0, round(share * image.shape[1]))),
    "rotate": lambda image, degrees: F.rotate(image, degrees),
    "brightness": lambda image, change: F.adjust_brightness(image, 1 + change),
    "color": lambda image, change: F.adjust_saturation(image, 1 + change),
    "contrast": lambda image, change: F.adjust_contrast(image, 1 + change),
    "sharpness": lambda image, change: F.adjust_sharpness(image, 1 + change),
    "posterize": lambda image, bits: F.posterize(image, round(bits)),
    "solarize": lambda image, threshold: image if threshold > 255 else F.solarize(image, threshold),
    "autocontrast": lambda image, _: F.autocontrast(image),
    "equalize": lambda image, _: F.equalize(image),
    "invert": lambda image, _: F.invert(image),
    "grayscale": lambda image, _: F.rgb_to_grayscale(image, 3),
    "identity": lambda image, _: image,
}
TIMM: dict[str, Op] = {
    "brightness": lambda image, change: tensor(timm_ops.brightness(pillow(image), 1 + change)),
    "color": lambda image, change: tensor(timm_ops.color(pillow(image), 1 + change)),
    "contrast": lambda image, change: tensor(timm_ops.contrast(pillow(image), 1 + change)),
    "sharpness": lambda image, change: tensor(timm_ops.sharpness(pillow(image), 1 + change)),
    "posterize": lambda image, bits: tensor(timm_ops.posterize(pillow(image), round(bits))),
    "solarize": lambda image, threshold: tensor(timm_ops.solarize(pillow(image), threshold)),
    "autocontrast": lambda image, _: tensor(timm_ops.auto_contrast(pillow(image))),
    "equalize": lambda image, _: tensor(timm_ops.equalize(pillow(image))),
    "rotate": lambda image, degrees: tensor(pillow(image).rotate(degrees)),
    "invert": lambda image, _: tensor(timm_ops.invert(pillow(image))),
    "grayscale": lambda image, _: tensor(ImageOps.grayscale(pillow(image))),
    "gaussian_blur": lambda image, sigma: tensor(pillow(image).filter(ImageFilter.GaussianBlur(sigma))),
}


def strengths_of(name: str) -> list[float]:
    """Returns strengths from all over an operation's range."""
    if name == "gaussian_blur":
        return [0.1, 0.35, 0.8, 1.2, 1.9]
    low, high, wide, signed = RANGES.get(name, (0.0, 0.0, 0.0, False))
    found = sorted({low, low + (high - low) * 0.3, high, wide, low + (wide - low) * 0.4})
    return found + [-value for value in found if signed and value]


class Differences:
    """Absolute differences of pixels in grey levels."""

    def __init__(self) -> None:
        self._levels: list[torch.Tensor] = []

    def add(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        assert ours.shape == theirs.shape, f"{tuple(ours.shape)}; expected {tuple(theirs.shape)}"
        self._levels.append((ours.double() - theirs.double()).abs().flatten())

    def row(self, *cells: str) -> str:
        levels = torch.cat(self._levels)
        figures = f"{float(levels.max()):.0f} | {float(levels.mean()):.3f} | {float((levels > 1.01).double().mean()):.1e}"
        return f"| {' | '.join(cells)} | {figures} |"


def single_ops(images: list[torch.Tensor]) -> Iterator[str]:
    """Yields a row for each operation and reference."""
    for reference, ops in (("torchvision", TORCHVISION), ("Pillow, as timm calls it", TIMM)):
        for name, theirs in ops.items():
            if name == "identity":
                continue
            found = Differences()
            for image in images:
                for strength in strengths_of(name):
                    found.add(view_ops.OPS[name](image, strength), theirs(image, strength))
            yield found.row(name, reference)


def jitter_and_erasing(images: list[torch.Tensor]) -> Iterator[str]:
    """Yields rows of color jitter, hue alone, and random erasing."""
    jitter, floats, hue, erase = Differences(), Differences(), Differences(), Differences()
    jittered = Views(ViewSettings(color_jitter=(0.4, 0.4, 0.4, 0.1)))
    erased = Views(ViewSettings(erase=1.0))
    for number, image in enumerate(images):
        key, size = str(number), image.shape[1:]
        for view in (1, 2, 3):
            brightness, contrast, saturation, shift = jittered.parameters(key, view, *size).jitter  # type: ignore[misc]
            ours = jittered.apply(image, key=key, view=view)
            for found, scale in ((jitter, 1), (floats, 255)):
                theirs = image if scale == 1 else image.double() / scale
                theirs = F.adjust_contrast(F.adjust_brightness(theirs, brightness), contrast)
                theirs = F.adjust_hue(F.adjust_saturation(theirs, saturation), shift)
                found.add(ours, theirs * scale)
            hue.add(view_ops.adjust_hue(image, shift), F.adjust_hue(image, shift))
            top, left, rows, columns = erased.parameters(key, view, *size).erase  # type: ignore[misc]
            empty = torch.zeros(1, dtype=torch.uint8)
            erase.add(
                erased.apply(image, key=key, view=view), F.erase(image, top, left, rows, columns, empty)
            )
    yield hue.row("hue", "torchvision")
    yield jitter.row("color jitter (all four)", "torchvision")
    yield floats.row("color jitter (all four)", "torchvision, of floats")
    yield erase.row("random erasing", "torchvision, timm (const)")


def policies(images: list[torch.Tensor]) -> Iterator[str]:
    """Yields rows of whole policies: the drawn operations, one after the other."""
    names = {
        "randaugment": "RandAugment",
        "trivial": "TrivialAugment",
        "autoaugment": "AutoAugment",
        "three_augment": "three-augment",
    }
    for augment, title in names.items():
        made, found = Views(ViewSettings(augment=augment)), Differences()  # type: ignore[arg-type]
        for number, image in enumerate(images):
            for view in range(1, 9):
                theirs = image
                for name, strength in made.parameters(str(number), view, *image.shape[1:]).ops:
                    ops = TIMM if augment == "three_augment" else TORCHVISION
                    theirs = ops[name](theirs, strength)
                found.add(made.apply(image, key=str(number), view=view), theirs)
        yield found.row(title, "Pillow, as timm calls it" if augment == "three_augment" else "torchvision")


def mixed(images: list[torch.Tensor]) -> Iterator[str]:
    """Yields rows of mixup and CutMix against timm's `Mixup`; its random numbers are those of the view."""
    batch_BCHW = torch.stack([image[:, :SIDE, :SIDE] for image in images])
    keys = [str(number) for number in range(len(images))]
    source = InMemorySource("photos", batch_BCHW, np.arange(len(images)), keys, keys)
    for title, alphas in (("mixup", {"mixup_alpha": 0.8}), ("CutMix", {"cutmix_alpha": 1.0})):
        data, found, shares = ViewedSource(source, Views(ViewSettings(**alphas))), Differences(), 0.0  # type: ignore[arg-type]
        live = timm_mixup.Mixup(0.8, 1.0, mode="elem", label_smoothing=0.0, num_classes=len(images))
        for view in (1, 2, 3):
            batch = data.load(np.arange(len(images)), view)
            mixes: Any = data.views.draw_mixes(keys, np.arange(len(images)), view, len(images))
            for number, row in enumerate(mixes.rows.tolist()):
                pair = [row, int(mixes.seconds[number])]
                share, centers = (
                    mixes.shares[number] / SHARES,
                    (mixes.centers[number] * SIDE).astype(int).tolist() * 2,
                )
                drawn = (np.full(2, share), np.full(2, mixes.cuts[number]))
                with (
                    patch.object(live, "_params_per_elem", return_value=drawn),
                    patch.object(np.random, "randint", side_effect=centers),
                ):
                    theirs, truth = live(batch_BCHW[pair].float(), torch.tensor(pair))
                found.add(batch.images[row], theirs[0])
                shares = max(shares, abs(float(truth[0, row]) - float(batch.targets[row].shares)))  # type: ignore[union-attr]
        yield found.row(f"{title} (share of the first class: {shares:.0e} off)", "timm's Mixup")


@click.command()
def main() -> None:
    """Prints one table."""
    images = [torch.from_numpy(photo).permute(2, 0, 1)[:, :200, :200].contiguous() for photo in photos(8)]
    print("| operation | reference | largest | mean | above one level |\n|---|---|--:|--:|--:|")
    for rows in (single_ops, jitter_and_erasing, policies, mixed):
        for row in rows(images):
            print(row, flush=True)


if __name__ == "__main__":
    main()
