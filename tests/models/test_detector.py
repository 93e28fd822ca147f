"""torchvision's detectors behind one face: cells, losses, detections, grids."""

import pytest
import torch

from softcache.errors import IdentityError, SpecError
from softcache.models.detection.build import build_detector
from softcache.models.detection.detector import check_same_grid

SMALL = ["fcos", "retinanet", "ssdlite", "fcos?bins=8"]
SIZE = (48, 64)


def targets():
    boxes = torch.tensor([[3.0, 4, 20, 22], [30, 20, 44, 40]])
    return [
        {"boxes": boxes, "labels": torch.tensor([1, 6])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]


def images():
    return torch.randn(2, 1, *SIZE, generator=torch.Generator().manual_seed(0))


def build(spec):
    torch.manual_seed(0)
    return build_detector(spec, num_classes=7, input_shape=(1, *SIZE))


@pytest.mark.parametrize("spec", SMALL)
def test_losses_and_detections_are_torchvisions_own(spec):
    detector = build(spec).eval()
    outputs, nothing = detector(images())
    assert nothing == {}
    net = detector.net
    ours, theirs = detector.detections(outputs, SIZE), net(list(images()))
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine["boxes"], other["boxes"])
        assert torch.equal(mine["scores"], other["scores"])
        assert torch.equal(mine["labels"] + detector.background, other["labels"])
    detector.train()
    _, losses = detector(images(), targets())
    shifted = [{**target, "labels": target["labels"] + detector.background} for target in targets()]
    expected = net(list(images()), shifted)
    assert losses.keys() == expected.keys()
    for name, value in losses.items():
        assert torch.allclose(value, expected[name])
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in detector.parameters())


@pytest.mark.parametrize("spec", [*SMALL, "torchvision:ssdlite320_mobilenet_v3_large"])
def test_every_cell_says_classes_and_a_box_that_the_grid_decodes(spec):
    detector = build(spec).eval()
    with torch.no_grad():
        outputs, _ = detector(images())
    grid = detector.grid(outputs)
    num_cells = len(grid.anchors)
    assert outputs.class_logits.shape == (2, num_cells, 7 + detector.background)
    assert outputs.boxes.shape == (2, num_cells, 4)
    assert (outputs.centerness is not None) == spec.startswith("fcos")
    assert sum(grid.levels) == num_cells
    boxes = detector.decode(outputs.boxes[0], grid.anchors)
    assert torch.isfinite(boxes).all()
    assert (boxes[:, 2:] >= boxes[:, :2]).all()


@pytest.mark.parametrize("spec", SMALL)
def test_the_cells_of_the_ground_truth_lie_near_their_boxes(spec):
    detector = build(spec).eval()
    with torch.no_grad():
        outputs, _ = detector(images())
    found = detector.cells_of(outputs, targets(), SIZE)
    assert [len(cells) for cells in found] == [2, 0]
    middle = (outputs.anchors[0][found[0], :2] + outputs.anchors[0][found[0], 2:]) / 2
    for wanted in ((11.5, 13.0), (37.0, 30.0)):
        assert (middle - torch.tensor(wanted)).abs().amax(1).min() <= 6


@pytest.mark.parametrize("spec", SMALL)
def test_a_family_shares_one_grid_whatever_its_width(spec):
    spec = spec + ("&" if "?" in spec else "?")
    first, second = build(f"{spec}width=8&depth=0").eval(), build(f"{spec}width=16&depth=2").eval()
    with torch.no_grad():
        grids = [detector.grid(detector(images())[0]) for detector in (first, second)]
        larger = second.grid(second(torch.randn(1, 1, 64, 64))[0]) if not spec.startswith("ssdlite") else None
    assert grids[0].digest == grids[1].digest
    if larger is not None:
        assert larger.digest == grids[0].digest  # images are scaled to the size that the model was built for


def test_another_grid_is_refused():
    with torch.no_grad():
        fcos, retina = (
            detector.grid(detector(images())[0]).digest
            for detector in (build("fcos").eval(), build("retinanet").eval())
        )
    check_same_grid("fcos", fcos, fcos)
    with pytest.raises(IdentityError, match=r"student fcos: its cells \(grid .*teacher of its grid"):
        check_same_grid("fcos", fcos, retina)


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("fcosx", r"unknown name 'fcosx'; did you mean fcos"),
        ("torchvision:fcos_resnet", r"did you mean .*fcos_resnet50_fpn"),
        ("torchvision:fasterrcnn_mobilenet_v3_large_320_fpn", r"two-stage detectors have no grid of cells"),
        ("fcos?widht=3", r"unexpected keyword argument 'widht'.*; check the arguments"),
    ],
)
def test_a_spec_that_is_no_detector_is_refused(spec, match):
    with pytest.raises(SpecError, match=match):
        build(spec)


def test_a_head_of_another_number_of_classes_is_refused():
    with pytest.raises(SpecError, match=r"num_classes = 91 in its spec, and the source has 7 classes; drop"):
        build_detector("torchvision:fcos_resnet50_fpn?num_classes=91", num_classes=7, input_shape=(3, 64, 64))
    with pytest.raises(
        SpecError, match=r"num_classes = 7 in its spec, and the source has 7 classes and a background"
    ):
        build_detector("torchvision:ssd300_vgg16?num_classes=7", num_classes=7, input_shape=(3, 64, 64))
