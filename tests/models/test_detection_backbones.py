"""Smaller backbones under torchvision's detectors: the same grid, weights of a classifier's file, factories."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision import models
from torchvision.models.detection import FCOS

from softcache.errors import SpecError
from softcache.models.detection.backbone import LevelBackbone, fill_backbone
from softcache.models.detection.build import build_detector
from softcache.models.weights import count_parameters

SMALL = "min_size=64&max_size=64"


def build(spec, num_classes=5, **more):
    torch.manual_seed(0)
    return build_detector(spec, num_classes=num_classes, input_shape=(3, 64, 64), **more).eval()


def grid(detector):
    with torch.no_grad():
        return detector.grid(detector(torch.zeros(1, 3, 64, 64))[0]).digest


@pytest.mark.parametrize(
    ("name", "backbones"),
    [
        (f"fcos_resnet50_fpn?{SMALL}", ["timm:mobilenetv3_small_050&convs=2", "torchvision:resnet18"]),
        (f"retinanet_resnet50_fpn_v2?{SMALL}", ["torchvision:mobilenet_v3_small&channels=64"]),
        ("ssdlite320_mobilenet_v3_large?", ["timm:mobilenetv3_small_050&channels=64"]),
    ],
)
def test_a_smaller_backbone_keeps_the_grid_and_trains(name, backbones):
    teacher = build(f"torchvision:{name}")
    for backbone in backbones:
        student = build(f"torchvision:{name}&backbone={backbone}")
        assert grid(student) == grid(teacher)
        assert count_parameters(student) < 0.75 * count_parameters(teacher)
        targets = [{"boxes": torch.tensor([[3.0, 4, 30, 40]]), "labels": torch.tensor([2])}] * 2
        _, losses = student.train()(torch.randn(2, 3, 64, 64), targets)
        sum(losses.values()).backward()
        assert all(parameter.grad is not None for parameter in student.parameters())


def test_an_ssd300_has_the_levels_of_the_paper():
    levels = LevelBackbone(
        "torchvision:mobilenet_v3_small", strides=(8, 16), channels=32, added=(2, 2, 1, 1)
    ).eval()
    with torch.no_grad():
        maps = levels(torch.zeros(1, 3, 300, 300))
    assert [level.shape[-1] for level in maps.values()] == [38, 19, 10, 5, 3, 1]
    assert [level.shape[1] for level in maps.values()] == levels.out_channels


@pytest.mark.parametrize("family", ["timm", "torchvision"])
def test_weights_of_a_classifier_fill_the_backbone(family, tmp_path):
    torch.manual_seed(1)
    name = "resnet18"
    classifier = timm.create_model(name) if family == "timm" else models.get_model(name, weights=None)
    torch.save(
        {"state_dict": {f"module.{key}": x for key, x in classifier.state_dict().items()}}, tmp_path / "a.pth"
    )
    spec = f"torchvision:fcos_resnet50_fpn?{SMALL}&backbone={family}:{name}&backbone_weights={tmp_path / 'a.pth'}"
    body = build(spec).net.backbone.body
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        last = list(body(images).values())[-1] if family == "torchvision" else body(images)[-1]
        if family == "timm":
            expected = classifier.eval().forward_features(images)
        else:
            expected = torch.nn.Sequential(*list(classifier.eval().children())[:-2])(images)
    torch.testing.assert_close(last, expected)
    fresh = build(spec, pretrained=False).net.backbone.body
    assert not torch.equal(fresh.state_dict()["conv1.weight"], body.state_dict()["conv1.weight"])


def test_features_of_a_mobilenet_are_filled_by_either_librarys_file(tmp_path):
    for family, name in (("timm", "mobilenetv3_small_050"), ("torchvision", "mobilenet_v3_small")):
        torch.manual_seed(1)
        classifier = timm.create_model(name) if family == "timm" else models.get_model(name, weights=None)
        save_file(classifier.state_dict(), tmp_path / "a.safetensors")
        levels = LevelBackbone(
            f"{family}:{name}",
            strides=(8, 16),
            channels=32,
            added=(2,),
            weights=str(tmp_path / "a.safetensors"),
        )
        theirs = {x.double().sum().item() for x in classifier.state_dict().values() if x.ndim == 4}
        assert all(
            x.double().sum().item() in theirs for x in levels.body.state_dict().values() if x.ndim == 4
        )


def test_weights_of_another_classifier_are_refused(tmp_path):
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "other.safetensors")
    body = timm.create_model("resnet18", features_only=True)
    with pytest.raises(
        SpecError, match=r"backbone_weights none.pth: no such file; give one of the weights of the"
    ):
        fill_backbone(body, "none.pth")
    with pytest.raises(
        SpecError, match=r"backbone_weights .*other.safetensors: expected .* of shape .*; found it"
    ):
        fill_backbone(body, tmp_path / "other.safetensors")


def own_fcos(num_classes, input_shape, width=32):
    """A detector as a user writes it: mean and std of its own, which [views] stands for."""
    backbone = LevelBackbone("torchvision:mobilenet_v3_small", strides=(8, 16, 32), channels=width)
    return FCOS(backbone, num_classes, min_size=input_shape[1], max_size=input_shape[2])


def no_detector(num_classes):
    return torch.nn.Linear(3, num_classes)


def test_a_detector_of_ones_own_is_a_student():
    student = build(f"{__name__}:own_fcos?width=64")
    assert student.num_classes == 5
    assert student.net.transform.image_mean == [0.0]
    assert grid(student) == grid(
        build(f"torchvision:fcos_resnet50_fpn?{SMALL}&backbone=torchvision:resnet18")
    )


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        (
            f"{__name__}:no_detector",
            r"no_detector': expected torchvision's FCOS, RetinaNet or SSD; found Linear",
        ),
        (f"{__name__}:own_fcos?num_classes=7", r"its head has 7 outputs, and the source has 5 classes; give"),
        ("torchvision:fcos_resnet50_fpn?convs=2", r"convs without backbone"),
        (
            "torchvision:fcos_resnet50_fpn?backbone=timm:vit_tiny_patch16_224",
            r"maps at strides 16, .*needs one at 8",
        ),
        (
            "torchvision:fcos_resnet50_fpn?backbone=torchvision:resnet",
            r"unknown name 'resnet'; did you mean resnet50",
        ),
        (
            "torchvision:fcos_resnet50_fpn?backbone=timm:resnet8",
            r"unknown name 'resnet8'; did you mean resnet",
        ),
        (
            "torchvision:fcos_resnet50_fpn?backbone=timm:swin_s3_tiny_224",
            r"its maps have channels last \(NHWC",
        ),
        (
            "torchvision:fcos_resnet50_fpn?weights=COCO_V1&backbone=timm:resnet18",
            r"backbone = timm:resnet18 takes its place; drop them",
        ),
        ("torchvision:fcos_resnet50_fpn?backbone=cnn", r"expected timm:NAME or torchvision:NAME"),
        (
            "torchvision:fcos_resnet50_fpn?backbone=torchvision:resnet18&channels=40",
            r"channels = 40; .*multiple of 64",
        ),
    ],
)
def test_what_fits_no_detector_is_refused(spec, match):
    with pytest.raises(SpecError, match=match):
        build(spec)
