"""The plain view is what timm's and torchvision's own evaluation pipelines make of the same photo."""

import pytest
import timm
import torch
from timm.data import create_transform, resolve_data_config
from torchvision import models

from benchmarks.plain_views import grey_levels, photos
from softcache.data.transforms import Views, ViewSettings
from softcache.errors import SpecError
from softcache.models.preprocessing import pretrained_views
from softcache.models.spec import parse_spec

PHOTOS = list(photos(8))


def assert_same(settings, pipeline):
    """Both passes of scaling are rounded, in the precision of either library: two grey levels, hardly ever."""
    levels = grey_levels(settings, pipeline, PHOTOS)
    assert float(levels.max()) <= 2.01
    assert float((levels > 1.01).float().mean()) < 1e-5
    assert float(levels.mean()) < 0.1


@pytest.mark.parametrize(
    "name",
    [
        *("tf_efficientnet_lite0", "resnet50", "mobilevit_s"),
        *(
            "convnext_base.clip_laion2b_augreg_ft_in12k_in1k_384",
            "dm_nfnet_f0",
            "tf_efficientnetv2_b3.in21k_ft_in1k",
        ),
    ],
)
def test_it_is_timms(name):
    config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    settings = ViewSettings(**pretrained_views(parse_spec(f"timm:{name}")))
    assert_same(settings, create_transform(**config, is_training=False))


@pytest.mark.parametrize("name", ["volo_d4_448", "deepseek_vit_412m.deepseek_v4_1_flash"])
def test_timms_borders_are_refused_unless_the_config_says_what_is_seen(name):
    with pytest.raises(SpecError, match=r"a border on all sides .*; set views\.fit to the nearest"):
        pretrained_views(parse_spec(f"timm:{name}"))
    found = pretrained_views(parse_spec(f"timm:{name}"), {"fit"})
    assert ViewSettings(**found, fit="letterbox").letterboxed


def test_it_is_timms_for_images_that_are_not_square():
    config = {"input_size": (3, 160, 224), "crop_pct": 0.9, "interpolation": "bicubic"}
    pipeline = create_transform(**config, mean=(0.5,) * 3, std=(0.5,) * 3, is_training=False)
    settings = ViewSettings(size=(160, 224), eval_share=0.9, interpolation="bicubic", geometry="torchvision")
    assert_same(settings, pipeline)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "swin_t"])
def test_it_is_torchvisions(name):
    transforms = models.get_model_weights(name)["DEFAULT"].transforms()
    settings = ViewSettings(**pretrained_views(parse_spec(f"torchvision:{name}?weights=DEFAULT")))
    assert_same(settings, transforms)


def test_the_centre_of_an_odd_excess_is_torchvisions():
    image = torch.zeros(3, 256, 383, dtype=torch.uint8)
    image[:, :, 80:] = 255
    made = {
        geometry: Views(ViewSettings(size=224, geometry=geometry)).apply(image, key="a", view=0)
        for geometry in ("torchvision", "floor")
    }
    columns = {name: int((view[0, 0] == 0).sum()) for name, view in made.items()}
    assert columns == {"torchvision": 0, "floor": 1}
