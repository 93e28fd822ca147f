"""torchvision's detectors as teachers: plain state dicts, heads of COCO's 91 ids, class maps."""

import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torchvision import models

from softcache.data.transforms import ViewSettings
from softcache.errors import ConfigError, SpecError
from softcache.modalities import open_data
from softcache.models.image import Normalize
from softcache.models.preprocessing import pretrained_views
from softcache.models.spec import parse_spec
from softcache.models.torchvision_weights import published_weights
from softcache.teacher.base import TeacherSettings
from softcache.teacher.detection import load_detection_teacher
from tests.support.cell_caches import cells_config

SMALL = "min_size=64&max_size=64&score_thresh=0.0&topk_candidates=50"
CATEGORIES = models.detection.FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load(spec, names, **settings):
    return load_detection_teacher(
        TeacherSettings(model=spec, **settings),
        num_classes=len(names),
        input_shape=(3, 64, 64),
        normalize=Normalize(MEAN, STD),
        class_names=names,
        device=torch.device("cpu"),
        dtype="float32",
    )


def photos():
    return torch.randint(
        0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
    )


def shaken(net):
    """A fresh network whose classes differ from place to place."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "head" in name and parameter.ndim > 1:
                parameter.mul_(6.0)
    return net.eval()


@pytest.fixture(scope="module")
def fcos(tmp_path_factory):
    """torchvision's network of 91 classes, and its state dict as its training script writes it."""
    torch.manual_seed(0)
    net = shaken(
        models.detection.fcos_resnet50_fpn(
            weights=None,
            weights_backbone=None,
            min_size=64,
            max_size=64,
            score_thresh=0.0,
            topk_candidates=50,
        )
    )
    path = tmp_path_factory.mktemp("fcos") / "model_25.pth"
    torch.save({"model": net.state_dict(), "epoch": 25}, path)
    return net, path


def test_boxes_and_scores_are_those_of_torchvisions_own_module(fcos):
    net, path = fcos
    names = [f"class {number}" for number in range(91)]
    teacher = load(f"torchvision:fcos_resnet50_fpn?{SMALL}", names, weights=str(path))
    with torch.no_grad():
        theirs = net([photo / 255 for photo in photos()])
        found = teacher.model(Normalize(MEAN, STD)(photos()))[0]
        ours = teacher.model.detections(found, (64, 64))
    for mine, other in zip(ours, theirs, strict=True):
        assert len(other["boxes"])
        torch.testing.assert_close(mine["boxes"], other["boxes"], atol=1e-3, rtol=0)
        torch.testing.assert_close(mine["scores"], other["scores"])
        assert torch.equal(mine["labels"], other["labels"])


def test_a_class_map_reads_the_outputs_of_the_sources_classes(fcos, tmp_path):
    net, path = fcos
    (tmp_path / "map.json").write_text(json.dumps({"dog": 18, "person": 1, "toothbrush": 90}))
    names = ["person", "dog", "toothbrush"]
    spec = f"torchvision:fcos_resnet50_fpn?{SMALL}"
    with pytest.raises(SpecError, match=r"expected a head of 3 outputs.*found 91; set teacher.class_map"):
        load(spec, names, weights=str(path))
    teacher = load(spec, names, weights=str(path), class_map=str(tmp_path / "map.json"))
    assert teacher.num_classes == 3
    assert teacher.class_names(tuple(names)) == tuple(names)
    assert "class_map" in teacher.identity()["teacher"]
    with torch.no_grad():
        theirs = net([photo / 255 for photo in photos()])
        found, _ = teacher.model(Normalize(MEAN, STD)(photos()))
    assert teacher.model._shifted({"boxes": None, "labels": torch.tensor([1, 0])})["labels"].tolist() == [
        18,
        1,
    ]
    for mine, other in zip(teacher.model.detections(found, (64, 64)), theirs, strict=True):
        assert set(mine["labels"].tolist()) == {0, 1, 2}
        # Among all 91 classes few of these were kept: each is found with its own class.
        for box, score, label in zip(other["boxes"], other["scores"], other["labels"].tolist(), strict=True):
            if label in (1, 18, 90):
                same = (mine["boxes"] - box).abs().amax(1) + (mine["scores"] - score).abs()
                assert float(same.min()) < 1e-2
                assert (1, 18, 90)[int(mine["labels"][same.argmin()])] == label


def test_names_are_taken_from_published_weights_alone(fcos, tmp_path):
    _, path = fcos
    names = [name for name in CATEGORIES[1:] if name != "N/A"]
    assert len(names) == 80
    spec = f"torchvision:fcos_resnet50_fpn?{SMALL}"
    with pytest.raises(ConfigError, match=r"comes without the names of its 91 outputs"):
        load(spec, names, weights=str(path), class_map="auto")
    with pytest.raises(ConfigError, match=r"teacher.weights: missing, and .* would be random"):
        load(f"{spec}&weights=null", names)
    published = tmp_path / "fcos_resnet50_fpn_coco-99b0c9b7.pth"
    published.symlink_to(path)
    teacher = load(spec, names, weights=str(published), class_map="auto")
    assert teacher.num_classes == 80
    assert teacher.model._outputs.tolist() == [CATEGORIES.index(name) for name in names]
    with pytest.raises(SpecError, match=r"weights = COCO_V7; torchvision has COCO_V1"):
        load(f"{spec}&weights=COCO_V7", names, weights=str(path), class_map="auto")
    with pytest.raises(ConfigError, match=r"class 'people' of the source has no output; nearest: "):
        load(spec, ["people"], weights=str(published), class_map="auto")


def test_a_published_file_is_known_under_another_name(tmp_path, monkeypatch):
    (tmp_path / "mine.pth").write_bytes(b"weights")
    parsed = parse_spec("torchvision:fcos_resnet50_fpn")
    assert published_weights(parsed, str(tmp_path / "mine.pth")) is None
    digest = hashlib.sha256(b"weights").hexdigest()[:8]
    weights = SimpleNamespace(url=f"https://download.pytorch.org/models/fcos-{digest}.pth")
    monkeypatch.setattr(models, "get_model_weights", lambda name: [weights])
    assert published_weights(parsed, str(tmp_path / "mine.pth")) is weights


def test_the_softmax_of_an_ssd_is_over_the_background_and_the_chosen_outputs(tmp_path):
    torch.manual_seed(0)
    net = shaken(models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None))
    save_file(net.state_dict(), tmp_path / "ssd.safetensors")
    spec, names = "torchvision:ssdlite320_mobilenet_v3_large", ["dog", "cat"]
    (tmp_path / "map.json").write_text("[18, 17]")
    where = {"weights": str(tmp_path / "ssd.safetensors")}
    teacher = load(spec, names, class_map=str(tmp_path / "map.json"), **where)
    assert (teacher.num_classes, teacher.class_names(("dog", "cat"))) == (3, ("background", "dog", "cat"))
    with torch.no_grad():
        found = teacher.model(Normalize(MEAN, STD)(photos()))[0]
    assert torch.equal(found.class_logits, found.raw["cls_logits"][..., [0, 18, 17]])
    (tmp_path / "map.json").write_text("[0, 17]")
    with pytest.raises(SpecError, match=r"output 0 of an SSD's head is the background"):
        load(spec, names, class_map=str(tmp_path / "map.json"), **where)


def test_older_names_of_torchvisions_files_are_read(tmp_path):
    torch.manual_seed(0)
    net = models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4)
    frozen = models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4)
    old = {}
    for name, value in net.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue  # a frozen norm has none
        for place in range(4):
            name = name.replace(f"_head.conv.{place}.0.", f"_head.conv.{2 * place}.")
        old[
            name.replace("_blocks.0.0.", "_blocks.0.")
            .replace("_blocks.1.0.", "_blocks.1.")
            .replace("_blocks.2.0.", "_blocks.2.")
        ] = value
    torch.save(old, tmp_path / "old.pth")
    frozen.load_state_dict(torch.load(tmp_path / "old.pth"))
    teacher = load(
        "torchvision:retinanet_resnet50_fpn?min_size=64&max_size=64",
        list("abcd"),
        weights=str(tmp_path / "old.pth"),
    )
    for name, value in frozen.state_dict().items():
        assert torch.equal(value, teacher.model.net.state_dict()[name])


def test_a_teacher_of_91_outputs_labels_a_run(fcos, tmp_path):
    _, path = fcos
    (tmp_path / "map.json").write_text(json.dumps(list(range(1, 11))))
    settings = TeacherSettings(
        model=f"torchvision:fcos_resnet50_fpn?{SMALL}",
        weights=str(path),
        class_map=str(tmp_path / "map.json"),
    )
    config = cells_config(tmp_path).model_copy(update={"teacher": settings, "views": ViewSettings(flip=0.5)})
    data = open_data(config)
    teacher = data.teacher(config, config.teacher)
    labels, _ = teacher.label(data.train.load([0, 1], 1), config.labels)
    assert labels.num_classes == 10
    assert labels.labels.ids.max() < 10
    assert data.views.settings.mean == (
        pytest.approx(sum(MEAN) / 3),
    )  # of grey scenes; as torchvision's detector has it
    assert data.views.settings.std == (pytest.approx(sum(STD) / 3),)


def test_mean_and_std_are_those_that_torchvisions_modules_have():
    for name in ("retinanet_resnet50_fpn_v2", "ssd300_vgg16", "ssdlite320_mobilenet_v3_large"):
        with torch.device("meta"):
            transform = models.get_model(name, weights=None, weights_backbone=None).transform
        expected = {"mean": tuple(transform.image_mean), "std": tuple(transform.image_std)}
        assert pretrained_views(parse_spec(f"torchvision:{name}")) == expected
