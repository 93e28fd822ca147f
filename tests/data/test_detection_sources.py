"""Images with boxes: composed scenes and COCO folders."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

from softcache.data.boxes import ViewedScenes
from softcache.data.masks import Cells, ViewedMasks
from softcache.data.sources import open_source
from softcache.data.sources.detection.base import BoxAnnotations, BoxSource
from softcache.data.sources.detection.synthetic import MAX_IOU
from softcache.data.transforms import Views, ViewSettings
from softcache.errors import SourceError


def scenes(split="train", **over):
    settings = {"modality": "detection", "name": "scenes", "train_scenes": 12, "eval_scenes": 12} | over
    return open_source(settings, split=split)


def test_scenes_are_a_function_of_their_number():
    few, many = scenes(train_scenes=5), scenes()
    assert isinstance(few, BoxSource)
    for sample in range(5):
        assert torch.equal(few.image(sample), many.image(sample))
        assert np.array_equal(few.truth(sample).boxes, many.truth(sample).boxes)
        assert few.key(sample) == many.key(sample)
    assert pickle.loads(pickle.dumps(many)).digest == many.digest == scenes().digest
    assert scenes(seed=1).digest != many.digest != few.digest


def test_every_box_of_a_scene_frames_something_bright_and_overlaps_little():
    source = scenes()
    for sample in range(len(source)):
        truth, image = source.truth(sample), source.image(sample)[0].numpy()
        assert source.target(sample) == len(truth)
        assert 1 <= len(truth) <= 6
        for left, top, right, bottom in truth.boxes.astype(int):
            assert 0 <= left < right <= 64
            assert 0 <= top < bottom <= 64
            assert image[top:bottom, left:right].max() >= 130
        overlap = box_iou(*2 * [torch.from_numpy(truth.boxes)]).fill_diagonal_(0)
        assert overlap.max() <= MAX_IOU


def test_splits_draw_from_disjoint_originals(monkeypatch):
    from softcache.data.sources.detection import synthetic as module

    seen = {}

    def noted(settings, *, split):
        source = open_images(settings, split=split)
        seen[split] = set(source.keys())
        return source

    open_images = module.open_source
    monkeypatch.setattr(module, "open_source", noted)
    train, held_out = scenes("train"), scenes("eval")
    assert not seen["train"] & seen["eval"]
    assert not set(train.keys()) & set(held_out.keys())
    assert not torch.equal(train.image(0), held_out.image(0))


def coco_folder(root, *, annotations, images=None, categories=None):
    (root / "images").mkdir(exist_ok=True)
    images = images or [
        {"id": 7, "file_name": "b.png", "width": 20, "height": 10},
        {"id": 3, "file_name": "a.png", "width": 20, "height": 10},
    ]
    for entry in images:
        Image.new("RGB", (20, 10), (9, 8, 7)).save(root / "images" / entry["file_name"])
    tables = {
        "images": images,
        "categories": categories or [{"id": 90, "name": "dog"}, {"id": 4, "name": "cat"}],
        "annotations": annotations,
    }
    for split in ("train", "val"):
        (root / f"{split}.json").write_text(json.dumps(tables))
    return root


def note(box, image=7, category=90, **more):
    return {"id": 1, "image_id": image, "category_id": category, "bbox": box, **more}


def coco(root, split="train", **over):
    return open_source({"modality": "detection", "name": "coco", "root": str(root)} | over, split=split)


def test_coco_folder_keeps_crowds_empty_images_and_ids_with_gaps(tmp_path):
    root = coco_folder(
        tmp_path, annotations=[note([1, 2, 3, 4]), note([15, 5, 50, 50], category=4, iscrowd=1)]
    )
    source = coco(root)
    assert list(source.keys()) == ["a.png", "b.png"]
    assert source.class_names == ("cat", "dog")
    assert len(source.truth(0)) == 0
    assert source.truth(0).boxes.shape == (0, 4)
    truth = source.truth(1)
    assert truth.boxes.tolist() == [[1, 2, 4, 6], [15, 5, 20, 10]]  # the second is cut at the edge
    assert truth.classes.tolist() == [1, 0]
    assert truth.crowd.tolist() == [False, True]
    assert source.image(1).shape == (3, 10, 20)
    assert source.targets().tolist() == [0, 2]
    assert len(coco(root, "eval", max_eval_samples=1)) == 1
    moved = coco_folder(tmp_path, annotations=[note([1, 2, 3, 5])])
    assert coco(moved).digest != source.digest


@pytest.mark.parametrize(
    ("annotations", "match"),
    [
        ([note([1, 2, 3, 4], iscrowd="2")], "annotation 1: iscrowd '2' is neither 0 nor 1"),
        ([note([1, 2, 3])], "not COCO's instances format .*four finite numbers"),
        ([note([1, 2, 3, 4], image=8)], "annotation 1: image_id 8 is not in the file"),
        ([note([1, 2, 3, 4], category=5)], "annotation 1: category_id 5 is not in the file"),
        ([{"id": 1, "bbox": [1, 2, 3, 4]}], "not COCO's instances format .*image_id"),
    ],
)
def test_coco_annotation_that_cannot_be_is_named(tmp_path, annotations, match):
    with pytest.raises(SourceError, match=match):
        coco(coco_folder(tmp_path, annotations=annotations))


def test_coco_images_that_are_not_what_was_annotated_are_named(tmp_path):
    entry = {"id": 7, "file_name": "b.png", "width": 21, "height": 10}
    with pytest.raises(
        SourceError, match=r"b.png: 20x10 pixels as stored; its annotations say 21x10.*use the images that"
    ):
        coco(coco_folder(tmp_path, annotations=[], images=[entry])).image(0)
    (tmp_path / "images/b.png").unlink()
    with pytest.raises(SourceError, match=r"1 of 1 images of train.json are missing, the first is 'b.png'"):
        coco(tmp_path)
    for images, match in [
        ([entry, entry], "image id 7 comes twice"),
        ([entry, entry | {"id": 8, "file_name": "./b.png"}], "file_name 'b.png' comes twice"),
        ([entry | {"file_name": "../images/b.png"}], "leaves the images' folder"),
    ]:
        with pytest.raises(SourceError, match=match):
            coco(coco_folder(tmp_path, annotations=[], images=images))
    with pytest.raises(SourceError, match="no annotations of the train split"):
        coco(tmp_path / "nowhere")


def test_boxes_without_area_are_dropped_and_counted(tmp_path, caplog):
    """COCO's train2017 has two of height 0."""
    caplog.set_level("INFO", logger="softcache")
    boxes = [[1, 2, 3, 0], [1, 2, 3, 4], [25, 2, 3, 4], [1, 2, -3, 4]]
    source = coco(coco_folder(tmp_path, annotations=[note(box) for box in boxes]))
    assert source.truth(1).boxes.tolist() == [[1, 2, 4, 6]]
    assert "coco/train: 3 of 4 annotations have no area inside of their image and are dropped" in caplog.text
    assert "annotation 1, bbox [1.0, 2.0, 3.0, 0.0] of a 20x10 image" in caplog.text


def test_coco_boxes_in_the_form_of_other_formats_are_refused(tmp_path):
    shares = [note([0.1, 0.2, 0.5, 0.25]), note([0.5, 0.5, 0.5, 0.5], image=3)]
    with pytest.raises(
        SourceError, match=r"all 2 boxes are within one pixel, .*such as \[0\.1, .*width, height\] in pixels"
    ):
        coco(coco_folder(tmp_path, annotations=shares))
    corners = [note([10 + n % 3, 4, 18, 9]) for n in range(8)]
    with pytest.raises(
        SourceError, match=r"8 of 8 boxes reach out of .*none would as \[left, top, right, bottom\]"
    ):
        coco(coco_folder(tmp_path, annotations=corners))
    # Sizes, of which many reach out.
    wide = [*corners, note([12, 4, 9, 3])]
    assert len(coco(coco_folder(tmp_path, annotations=wide)).truth(1)) == 9
    small = [note([0, 0, 1, 1]), note([3, 4, 0.5, 0.5])]
    assert len(coco(coco_folder(tmp_path, annotations=small)).truth(1)) == 2


@pytest.mark.parametrize(
    ("held_out", "annotations", "images"),
    [
        ("val", "annotations/instances_{}.json", "images/{}"),  # CVAT
        ("valid", "{}/_annotations.coco.json", "{}"),  # Roboflow
        ("validation", "{}/labels.json", "{}/data"),  # FiftyOne
        ("test", "{}/labels.json", "{}/data"),
    ],
)
def test_exports_of_other_tools_are_read_as_they_are(tmp_path, held_out, annotations, images):
    notes = [note([1, 2, 3, 4]), note([1, 2, 3, 4], image=3, category=4)]
    (tmp_path / "plain").mkdir()
    plain = coco_folder(tmp_path / "plain", annotations=notes)
    for split in ("train", held_out):
        shutil.copytree(plain / "images", tmp_path / images.format(split), dirs_exist_ok=True)
        (tmp_path / annotations.format(split)).parent.mkdir(exist_ok=True)
        shutil.copy(plain / "train.json", tmp_path / annotations.format(split))
    for split in ("train", "eval"):
        found, expected = coco(tmp_path, split), coco(plain, split)
        assert (found.digest, found.class_names) == (expected.digest, expected.class_names)
        assert torch.equal(found.image(1), expected.image(1))


def test_a_folder_without_annotations_says_what_is_expected(tmp_path):
    with pytest.raises(
        SourceError, match=r"no annotations of the train split; expected .*labels\.json \(FiftyOne\)"
    ):
        coco(tmp_path)


def test_annotations_of_an_image_as_it_is_seen_say_what_to_do_with_its_orientation(tmp_path):
    entry = {"id": 7, "file_name": "b.png", "width": 10, "height": 20}
    with pytest.raises(
        SourceError, match=r"20x10 pixels as stored; .* 10x20, .*; save it turned, without an EXIF"
    ):
        coco(coco_folder(tmp_path, annotations=[], images=[entry])).image(0)


def test_cocos_own_folders_are_read_as_they_are(tmp_path):
    annotations = [note([1, 2, 3, 4]), note([1, 2, 3, 4], image=3, category=4)]
    expected = coco(coco_folder(tmp_path, annotations=annotations), "eval")
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"{split}.json").rename(tmp_path / f"annotations/instances_{split}2017.json")
    (tmp_path / "images").rename(tmp_path / "train2017")
    with pytest.raises(SourceError, match=r"val2017: 2 of 2 images of instances_val2017.json are missing"):
        coco(tmp_path, "eval")
    (tmp_path / "train2017").rename(tmp_path / "val2017")
    found = coco(tmp_path, "eval")
    assert (found.digest, found.class_names) == (expected.digest, expected.class_names)
    (tmp_path / "annotations/instances_val2014.json").write_text("{}")
    with pytest.raises(
        SourceError,
        match=r"instances_val2014.json, .*instances_val2017.json; expected one file of annotations for val",
    ):
        coco(tmp_path, "eval")


def test_textual_ids_and_flags_and_missing_sizes_are_those_of_numbers(tmp_path):
    annotations = [note([1, 2, 3, 4], iscrowd=0), note([4, 2, 30, 4], image=3, category=4, iscrowd=1)]
    (tmp_path / "numbers").mkdir()
    (tmp_path / "texts").mkdir()
    expected = coco(coco_folder(tmp_path / "numbers", annotations=annotations))
    found = coco(
        coco_folder(
            tmp_path / "texts",
            annotations=[
                {
                    **one,
                    "image_id": str(one["image_id"]),
                    "category_id": str(one["category_id"]),
                    "iscrowd": str(one["iscrowd"]),
                }
                for one in annotations
            ],
            images=[
                {"id": "7", "file_name": "b.png"},
                {"id": "3", "file_name": "a.png", "width": None, "height": None},
            ],
            categories=[{"id": "90", "name": "dog"}, {"id": "4", "name": "cat"}],
        )
    )
    assert found.digest == expected.digest
    assert found.class_names == ("cat", "dog")
    assert found.truth(0).crowd.tolist() == [True]
    assert found.image(0).shape == (3, 10, 20)
    (tmp_path / "words").mkdir()
    words = coco_folder(
        tmp_path / "words",
        annotations=[note([1, 2, 3, 4], image="scene/1", category="dog")],
        images=[{"id": "scene/1", "file_name": "b.png", "width": 20, "height": 10}],
        categories=[{"id": "dog", "name": "dog"}, {"id": "ant", "name": "ant"}],
    )
    assert coco(words).class_names == ("ant", "dog")


class Photos:
    """Four gray images of the user's with one box each, and a mask."""

    name, num_classes, class_names, digest = "photos", 2, ("a", "b"), "00"
    box, classes, values = (20, 10, 50, 30), (0,), (0, 1)

    def __init__(self, split):
        self.split = split

    def __len__(self):
        return 4

    def key(self, sample):
        return f"{self.split}/{sample}"

    def keys(self):
        return [self.key(sample) for sample in range(4)]

    def target(self, sample):
        return 1

    def targets(self):
        return np.ones(4, np.int64)

    def image(self, sample):
        return torch.full((3, 40, 60), sample, dtype=torch.uint8)

    def truth(self, sample):
        return BoxAnnotations.of([self.box], self.classes)

    def mask(self, sample):
        return torch.tensor(self.values, dtype=torch.int16).repeat(40, 30)


@pytest.mark.parametrize("size", [None, 32])
@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"box": (30, 25, 20, 20)}, r"box \[30.0, 25.0, 20.0, 20.0\] has no area; .*not width and height"),
        ({"box": (20, 10, 90, 30)}, r"reaches out of the image of 60x40 pixels; .*cut it at the edge"),
        ({"box": (0.2, 0.1, 0.5, 0.3)}, r"is within one pixel; .*not shares of the image"),
        ({"box": (20, 10, float("nan"), 30)}, r"has no area"),
        ({"classes": (2,)}, r"sample 'train/0': classes 2 to 2 of boxes; expected 0 to 1"),
        ({"classes": (0, 1)}, r"boxes of shape \(1, 4\), 2 classes"),
    ],
)
def test_boxes_of_ones_own_that_cannot_be_are_refused_in_every_view(members, message, size):
    views = Views(ViewSettings(size=size, flip=0.5, fit="letterbox" if size else "crop"))
    assert len(ViewedScenes(Photos("train"), views, rows_per_sample=4).load([0], 1)) == 1
    source = type("Wrong", (Photos,), members)("train")
    for view in (0, 1):
        with pytest.raises(SourceError, match=message):
            ViewedScenes(source, views, rows_per_sample=4).load([0], view)


def miscounted(split):
    return type(
        "Wrong", (Photos,), {"target": lambda self, sample: 2, "targets": lambda self: np.full(4, 2)}
    )(split)


def photos(split):
    return Photos(split)


def test_boxes_of_ones_own_are_as_many_as_the_source_counts():
    name = f"{__name__}:photos"
    assert len(open_source({"modality": "detection", "name": name}, split="train")) == 4
    with pytest.raises(SourceError, match=r"truth\(0\) has 1 boxes, and target\(0\) is 2"):
        open_source({"modality": "detection", "name": f"{__name__}:miscounted"}, split="train")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"values": (0, 255)}, r"mask of 'train/0' has the values \[255\]; expected 0 to 1, and -100"),
        ({"values": (-1, 0)}, r"has the values \[-1\]"),
        (
            {"mask": lambda self, sample: np.zeros((40, 60), np.int16)},
            r"is a ndarray of int16; .*torch tensor",
        ),
        ({"mask": lambda self, sample: torch.zeros(40, 60)}, r"is a Tensor of torch.float32"),
    ],
)
def test_masks_of_ones_own_that_are_no_classes_are_refused(members, message):
    views = Views(ViewSettings(size=32))
    cells = Cells.of(32, 32, 4)
    assert len(ViewedMasks(Photos("train"), views, cells=cells).load([0], 0)) == 1
    with pytest.raises(SourceError, match=message):
        ViewedMasks(type("Wrong", (Photos,), members)("train"), views, cells=cells).load([0], 0)
