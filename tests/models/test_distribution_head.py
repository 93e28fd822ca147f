"""An FCOS head with distributions over edges: its means, its loss, its grid."""

import math

import pytest
import torch

from softcache.errors import SpecError
from softcache.models.detection.build import build_detector
from softcache.models.detection.distribution_head import distribution_focal_loss, expected_distances


def build(spec):
    torch.manual_seed(0)
    return build_detector(spec, num_classes=7, input_shape=(1, 48, 64))


def grid(detector):
    with torch.no_grad():
        return detector.grid(detector(torch.zeros(1, 1, 48, 64))[0])


def test_the_loss_of_an_edge_is_the_papers():
    logits = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    distances = torch.tensor([[2.3, 0.0, 5.0, 4.75], [-1.0, 9.0, 1.5, 3.0]], dtype=torch.float64)
    log_p = logits.log_softmax(-1)
    for box in range(2):
        expected = 0.0
        for edge in range(4):
            y = min(max(float(distances[box, edge]), 0.0), 5.0)
            low = min(math.floor(y), 4)
            expected -= (low + 1 - y) * float(log_p[box, edge, low]) + (y - low) * float(
                log_p[box, edge, low + 1]
            )
        assert float(distribution_focal_loss(logits, distances)[box]) == pytest.approx(expected / 4)
    assert torch.autograd.gradcheck(lambda x: distribution_focal_loss(x, distances), logits.requires_grad_())


def test_boxes_are_the_means_of_their_edges_and_every_part_learns():
    detector = build("fcos?bins=8&convs=2")
    images = torch.randn(2, 1, 48, 64)
    box = torch.tensor([[10.0, 8, 30, 30]])
    targets = [
        {"boxes": box, "labels": torch.tensor([2])},
        {"boxes": box[:0], "labels": torch.zeros(0).long()},
    ]
    outputs, losses = detector(images, targets)
    assert outputs.bins.shape == (*outputs.boxes.shape, 9)
    places = torch.arange(9.0)
    torch.testing.assert_close(outputs.boxes, (outputs.bins.softmax(-1) * places).sum(-1))
    torch.testing.assert_close(expected_distances(outputs.bins), outputs.boxes)
    assert float(losses["distribution"].detach()) == pytest.approx(
        0.25 * math.log(9), rel=0.05
    )  # uniform at first
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in detector.parameters())


def test_means_are_not_rounded_under_autocast():
    bins = torch.randn(3, 4, 17, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = expected_distances(bins)
    assert torch.equal(rounded, expected_distances(bins))


def test_bins_are_part_of_the_grid():
    grids = [grid(build(spec)) for spec in ("fcos", "fcos?bins=8", "fcos?bins=8&width=8", "fcos?bins=4")]
    assert [found.coder for found in grids] == ["linear", "bins/8", "bins/8", "bins/4"]
    assert len({found.digest for found in grids}) == 3
    assert grids[1].digest == grids[2].digest


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("fcos?bins=1", r"bins = 1; expected at least 2"),
        ("retinanet?bins=8", r"unexpected keyword argument 'bins'"),
        (
            "torchvision:retinanet_resnet50_fpn?bins=8&backbone=torchvision:resnet18",
            r"convs and bins are of the heads of FCOS; drop them",
        ),
    ],
)
def test_heads_that_have_none_are_refused(spec, match):
    with pytest.raises(SpecError, match=match):
        build(spec)
