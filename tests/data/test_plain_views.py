"""The plain view is what timm's and torchvision's own evaluation pipelines make of the same photo."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_transform, resolve_data_config
from torchvision import models

from softcache.data.transforms import Views, ViewSettings
from softcache.models.preprocessing import pretrained_views
from softcache.models.spec import parse_spec

PHOTOS = [np.array(image) for image in load_sample_images().images]  # 427 x 640


def crops():
    """Photos of many sizes and shapes, odd ones among them."""
    draw = np.random.default_rng(0)
    for number in range(12):
        height, width = draw.integers(181, 428), draw.integers(181, 641)
        yield np.ascontiguousarray(PHOTOS[number % 2][:height, :width])
    yield from PHOTOS


def plain(spec, **more):
    settings = pretrained_views(parse_spec(spec)) | more
    return settings, Views(ViewSettings(**settings))


def differences(spec, pipeline):
    """Returns the largest difference over all photos, in grey levels, their mean, and how often it is above one."""
    settings, views = plain(spec)
    mean, std = (torch.tensor(settings[name]).view(3, 1, 1) for name in ("mean", "std"))
    found = []
    for photo in crops():
        ours = views.apply(torch.from_numpy(photo).permute(2, 0, 1), key="a", view=0).float()
        theirs = (pipeline(Image.fromarray(photo)) * std + mean) * 255
        assert ours.shape == theirs.shape
        found.append((ours - theirs).abs())
    levels = torch.cat([one.flatten() for one in found])
    return float(levels.max()), float(levels.mean()), float((levels > 1.01).float().mean())


@pytest.mark.parametrize(
    "name",
    [
        "tf_efficientnet_lite0",
        "vit_base_patch16_224",
        "resnet50",
        "convnext_base.fb_in22k_ft_in1k",
        "mobilevit_s",
    ],
)
def test_it_is_timms(name):
    config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    largest, mean, more = differences(f"timm:{name}", create_transform(**config, is_training=False))
    assert largest <= 2.01, "both passes are rounded, in this library's own precision"
    assert more < 1e-5
    assert mean < 0.1


def test_it_is_timms_for_images_that_are_not_square():
    config = {"input_size": (3, 160, 224), "crop_pct": 0.9, "interpolation": "bicubic"}
    pipeline = create_transform(**config, mean=(0.5,) * 3, std=(0.5,) * 3, is_training=False)
    _, views = plain(
        "torchvision:resnet18",
        size=(160, 224),
        eval_share=0.9,
        interpolation="bicubic",
        geometry="torchvision",
    )
    for photo in crops():
        ours = views.apply(torch.from_numpy(photo).permute(2, 0, 1), key="a", view=0).float()
        theirs = (pipeline(Image.fromarray(photo)) * 0.5 + 0.5) * 255
        assert float((ours - theirs).abs().max()) <= 2.01


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "swin_t"])
def test_it_is_torchvisions(name):
    transforms = models.get_model_weights(name)["DEFAULT"].transforms()
    largest, mean, more = differences(f"torchvision:{name}?weights=DEFAULT", transforms)
    assert largest <= 2.01
    assert more < 1e-5
    assert mean < 0.1


def test_the_centre_of_an_odd_excess_is_torchvisions():
    """427 x 640 at 224: one pixel further, an edge looks otherwise."""
    image = torch.zeros(3, 256, 383, dtype=torch.uint8)
    image[:, :, 80:] = 255
    made = {
        geometry: Views(ViewSettings(size=224, geometry=geometry)).apply(image, key="a", view=0)
        for geometry in ("torchvision", "floor")
    }
    columns = {name: int((view[0, 0] == 0).sum()) for name, view in made.items()}
    assert columns == {"torchvision": 0, "floor": 1}
