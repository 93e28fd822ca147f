"""Images with masks: folders of pairs, views that masks follow, teachers of other libraries, students on another grid."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from softcache.config.load import build_config
from softcache.data.masks import Cells, SegmentationBatch, ViewedMasks
from softcache.data.sources import open_source
from softcache.data.sources.images.base import InMemorySource
from softcache.data.sources.segmentation.base import IGNORED
from softcache.data.transforms import Views, ViewSettings
from softcache.errors import AlignmentError, ConfigError, LabelError, SourceError, SpecError
from softcache.modalities import open_data
from softcache.models.mean_iou import confusion_matrix, mask_scores
from softcache.models.segmentation import build_segmenter, scaled_logits
from softcache.reader.dataset import SoftLabelDataset, as_teacher_saw
from softcache.reader.open import open_cache
from softcache.runs import capture_labels, open_teacher, train_student
from softcache.tools.verify.checksums import verify_units
from softcache.tools.verify.teacher import verify_against_teacher

NAMES = ["ground", "cat", "dog"]


def write_pairs(root, split, sizes, *, seed=0):
    """Photos-like images and masks of three classes and 255."""
    stream = np.random.default_rng([seed, len(split)])
    for folder in ("images", "masks"):
        (root / split / folder).mkdir(parents=True)
    for number, (height, width) in enumerate(sizes):
        image = stream.integers(0, 256, (height, width, 3), np.uint8)
        mask = stream.integers(0, 3, (height, width), np.uint8)
        mask[: height // 4] = 255
        Image.fromarray(image).save(root / split / "images" / f"{number}.png")
        Image.fromarray(mask).save(root / split / "masks" / f"{number}.png")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    write_pairs(root, "train", [(40, 56), (64, 48), (37, 41), (50, 50)])
    write_pairs(root, "val", [(40, 40), (33, 60)])
    return root


def config(root, **tables):
    base = {
        "name": "masks",
        "source": {"modality": "segmentation", "name": "folders", "root": str(root), "class_names": NAMES},
        "views": {"size": 32, "crop": "resized", "scale": [0.3, 1.0], "flip": 0.5},
        "teacher": {"model": "unet?width=4&depth=1", "weights": str(root / "teacher.safetensors")},
        "labels": {"k": 2, "num_views": 2, "positions": {"stride": 4}},
        "capture": {"batch_size": 3, "device": "cpu"},
        "student": {"model": "unet?width=4&depth=1"},
        "train": {"epochs": 1, "batch_size": 2, "device": "cpu", "warmup_share": 0},
    }
    return build_config(base | tables, "test")


@pytest.fixture(scope="module", autouse=True)
def _teacher(root):
    torch.manual_seed(3)
    model = build_segmenter("unet?width=4&depth=1", num_classes=3, input_shape=(3, 32, 32))
    save_file(model.state_dict(), root / "teacher.safetensors")


def capture(config, url):
    data = open_data(config)
    capture_labels(config, data, open_teacher(config, data), str(url))
    return data, open_cache(str(url))


# -- views -----------------------------------------------------------------------------------------------------


class Painted(InMemorySource):
    """Images whose grey level is the class of the pixel."""

    def __init__(self, masks):
        images = (masks * 50).to(torch.uint8)[:, None]
        super().__init__("painted", images, [0] * len(masks), [f"{n}" for n in range(len(masks))], NAMES)
        self._masks = masks.to(torch.int16)

    def mask(self, sample):
        return self._masks[sample]


@pytest.mark.parametrize(
    "settings",
    [
        {"crop": "padded", "padding": 3, "flip": 0.5, "erase": 0.7},
        {"size": 24, "fit": "crop", "eval_share": 0.75, "flip": 0.5},
        {"size": [36, 32], "fit": "letterbox", "crop": "padded", "padding": 2},
    ],
)
def test_masks_move_with_the_pixels(settings):
    masks = torch.randint(0, 3, (6, 32, 32), generator=torch.Generator().manual_seed(1))
    data = ViewedMasks(Painted(masks), Views(ViewSettings(mean=(1.0,), **settings)), cells=Cells(4, 4))
    for view in range(4):
        batch = data.load(range(6), view)
        shown = batch.masks != IGNORED
        assert shown.float().mean() > 0.4
        assert torch.equal(batch.images[:, 0][shown], (batch.masks[shown] * 50).to(torch.uint8))
        hidden = batch.images[:, 0][~shown]
        assert set(hidden.unique().tolist()) <= {0, 255}  # padding, erased, or filled up with the mean
    assert data.load(range(6), 3).masks.shape == batch.masks.shape


def test_masks_are_scaled_to_the_nearest_pixel(root):
    views = Views(ViewSettings(size=24, crop="resized"))
    mask = torch.randint(0, 3, (37, 41), dtype=torch.int16)
    for view in (1, 2, 3):
        top, left, height, width = views.parameters("a", view, 37, 41).crop
        part = mask[None, None, top : top + height, left : left + width].float()
        expected = F.interpolate(part, (24, 24), mode="nearest-exact")[0, 0].short()
        found = views.apply_mask(mask, key="a", view=view, ignored=IGNORED)
        assert torch.equal(found, expected.flip(-1) if views.parameters("a", view, 37, 41).flip else expected)


@pytest.mark.parametrize(("key", "value"), [("augment", "randaugment"), ("transform", "torch.nn:Identity")])
def test_views_that_masks_cannot_follow_are_refused(root, key, value):
    with pytest.raises(SpecError, match=f"views.{key}: .*masks would not follow"):
        open_data(config(root, views={"size": 32, key: value}))
    with pytest.raises(ConfigError, match="a pixel of a mixed image is of two"):
        config(root, views={"mixup_alpha": 1.0})


# -- sources ---------------------------------------------------------------------------------------------------


def test_the_layouts_of_public_datasets_are_read(root, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    for folder in ("a/train/x", "b/train/x", "voc/images", "voc/masks"):
        (tmp_path / folder).mkdir(parents=True)
    for number, image in enumerate(images):
        palette = Image.fromarray(np.full((8, 8), number, np.uint8), mode="L").convert("P")
        palette.putpalette([7, 8, 9] * 256)  # numbers of a palette are classes, whatever its colors
        Image.fromarray(image).save(tmp_path / f"a/train/x/{number}_left.png")
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(tmp_path / f"b/train/x/{number}_ids.png")
        Image.fromarray(image).save(tmp_path / f"voc/images/{number}.jpg")
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(tmp_path / f"voc/masks/{number}.png")
    (tmp_path / "train.txt").write_text("2\n0\n")
    (tmp_path / "val.txt").write_text("1\n")
    common = {"root": str(tmp_path), "ignore": [0], "first_value": 1}
    cityscapes = {
        "images": "a/{split}",
        "masks": "b/{split}",
        "image_suffix": "_left.png",
        "mask_suffix": "_ids.png",
        "eval_split": "train",
    }
    voc = {
        "images": "voc/images",
        "masks": "voc/masks",
        "train_list": "train.txt",
        "eval_list": "val.txt",
    }
    base = config(root).source
    one = base.model_copy(update=common | cityscapes).open("train")
    assert one.keys() == [f"a/train/x/{number}_left.png" for number in range(4)]
    assert [int(one.mask(number)[0, 0]) for number in range(4)] == [IGNORED, 0, 1, 2]
    two = base.model_copy(update=common | voc)
    assert two.open("train").keys() == ["voc/images/2.jpg", "voc/images/0.jpg"]
    assert two.open("eval").keys() == ["voc/images/1.jpg"]
    assert (
        one.digest != base.model_copy(update=common | cityscapes | {"ignore": [0, 255]}).open("train").digest
    )


def test_bad_pairs_are_named(root, tmp_path):
    write_pairs(tmp_path, "train", [(8, 8)] * 5)
    write_pairs(tmp_path, "val", [(8, 8)])
    source = config(tmp_path).source
    masks = tmp_path / "train" / "masks"
    before = source.open("train").digest
    for number, pixels in ((1, np.full((8, 8), 7)), (3, np.full((8, 8), 3))):
        Image.fromarray(pixels.astype(np.uint8)).save(masks / f"{number}.png")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(masks / "4.png")
    opened = source.open("train")
    assert opened.digest != before
    with pytest.raises(SourceError, match=r"3 of 5 masks.*0 to 2 \(3 classes\), and \[255\]") as error:
        opened.mask(1)
    for number, reason in ((1, r"pixels of [7]"), (3, "pixels of [3]"), (4, "pixels of mode RGB")):
        assert f"{masks / f'{number}.png'}: {reason}" in str(error.value)
    Image.fromarray(np.zeros((8, 9), np.uint8)).save(masks / "0.png")
    with pytest.raises(SourceError, match=r"mask of 'train/images/0.png' has 8x9 pixels, its image 8x8"):
        open_data(config(tmp_path))
    (masks / "2.png").unlink()
    with pytest.raises(SourceError, match=r"1 of 5 images have no mask, such as 2.png: expected .*2.png"):
        source.open("train")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"class_names": None}, "source.class_names: missing"),
        ({"masks": "{split}/labels"}, "source.masks: no folder"),
        ({"eval_split": "test"}, "source.images: no folder"),
        ({"train_list": "none.txt"}, "source.train_list: .*No such file"),
    ],
)
def test_folders_that_are_not_there_are_named(root, table, message):
    source = config(root).source.model_copy(update=table)
    split = "eval" if "eval_split" in table else "train"
    with pytest.raises(SourceError, match=message):
        source.open(split)


# -- batches ---------------------------------------------------------------------------------------------------


def test_batches_are_cut_and_joined(root, tmp_path):
    settings = config(root, labels={"k": 2, "positions": {"policy": "random", "share": 0.3}})
    data, cache = capture(settings, tmp_path / "cache")
    dataset, _ = data.train_dataset(settings, cache)
    whole = dataset.load(np.array([3, 0, 2]), 0)
    assert whole.num_rows == 3 * 64
    assert len(whole.labels) == len(whole.labeled_rows) == 3 * 20
    again = SegmentationBatch.merge(whole.split(2))
    for name in ("images", "masks", "rows", "targets", "labeled"):
        assert torch.equal(getattr(again, name), getattr(whole, name))
    assert torch.equal(again.labels.ids, whole.labels.ids)
    assert again.label_counts.tolist() == whole.label_counts.tolist() == [20] * 3
    one = dataset.load(np.array([0]), 0)
    part = whole.split(3)[1]
    assert torch.equal(part.labeled_rows, one.labeled_rows)
    assert torch.equal(part.labels.log_probs, one.labels.log_probs)


def test_an_orientation_that_leaves_the_size_is_refused(root, tmp_path):
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    source = config(tmp_path).source
    exif, path = Image.Exif(), tmp_path / "train/images/1.png"
    for orientation in (3, 6, 1):
        exif[0x0112] = orientation
        with Image.open(path) as image:
            image.save(path, exif=exif)
        opened = source.open("train")
        if orientation == 3:
            with pytest.raises(
                SourceError, match=r"1\.png: its EXIF orientation, 3, turns it, and its size does not show"
            ):
                opened.image(1)
        else:
            assert opened.image(1).shape[1:] == ((48, 64) if orientation == 6 else (64, 48))


def test_one_bit_is_two_classes(root, tmp_path):
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    bits = np.arange(64 * 48).reshape(64, 48) % 2 == 0
    Image.fromarray(bits).save(tmp_path / "train/masks/1.png")
    source = config(tmp_path).source
    with pytest.raises(SourceError, match=r"one bit for each pixel, of 3 classes"):
        source.open("train").mask(1)
    two = source.model_copy(update={"class_names": NAMES[:2]})
    assert np.array_equal(two.open("train").mask(1).numpy(), bits)


def test_masks_of_black_and_white_are_not_taken_for_ignored_pixels(tmp_path):
    def write(white, number=6):
        for split in ("train", "val"):
            for place in ("images", "masks"):
                (tmp_path / split / place).mkdir(parents=True, exist_ok=True)
            for seed in range(number):
                Image.new("RGB", (8, 8)).save(tmp_path / split / f"images/{seed}.png")
                mask = np.zeros((8, 8), np.uint8)
                mask[2:5] = white
                Image.fromarray(mask).save(tmp_path / split / f"masks/{seed}.png")

    table = {"modality": "segmentation", "name": "folders", "root": str(tmp_path)}
    names = ["background", "polyp"]
    write(255)
    with pytest.raises(
        SourceError, match=r"masks of 0 \('background'\) and \[255\] alone, .* none of 'polyp'; .* write 1"
    ):
        open_source(table | {"class_names": names}, split="train")
    assert len(open_source(table | {"class_names": [*names, "dye"]}, split="train")) == 6
    write(1)
    source = open_source(table | {"class_names": names}, split="train")
    assert source.mask(0).unique().tolist() == [0, 1]
    mask = np.full((8, 8), 255, np.uint8)
    mask[0, 0] = 1
    Image.fromarray(mask).save(tmp_path / "train/masks/0.png")
    assert len(open_source(table | {"class_names": names}, split="train")) == 6


def test_a_loader_process_has_the_same_images_and_masks(root):
    data = open_data(config(root)).train
    here, there = (one.load([2, 0], 1) for one in (data, pickle.loads(pickle.dumps(data))))
    assert torch.equal(here.images, there.images)
    assert torch.equal(here.masks, there.masks)
    assert (here.fingerprints == there.fingerprints).all()


# -- teachers of other libraries ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def segformer(tmp_path_factory):
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

    folder = tmp_path_factory.mktemp("segformer")
    torch.manual_seed(0)
    sizes = {
        "hidden_sizes": [8, 8, 16, 16],
        "depths": [1] * 4,
        "num_attention_heads": [1] * 4,
        "decoder_hidden_size": 16,
    }
    names = {0: "wall", 1: "dog", 2: "ground", 3: "cat", 4: "sky"}
    SegformerForSemanticSegmentation(SegformerConfig(**sizes, id2label=names)).save_pretrained(folder)
    SegformerImageProcessor(size={"height": 32, "width": 64}).save_pretrained(folder)
    return folder


def test_a_segformer_labels_its_own_grid_by_the_names_of_its_classes(root, segformer, tmp_path):
    from transformers import SegformerForSemanticSegmentation, SegformerImageProcessor

    teacher = {"model": f"hf:{segformer}", "class_map": "auto"}
    settings = config(root, teacher=teacher, labels={"k": 3}, views={})
    data, cache = capture(settings, tmp_path / "cache")
    assert data.views.settings.size == (32, 64)  # of its image processor
    net = SegformerForSemanticSegmentation.from_pretrained(segformer).eval()
    processor = SegformerImageProcessor.from_pretrained(segformer)
    photo = Image.open(root / "train/images/0.png")
    with torch.no_grad():
        logits = net(**processor(photo, return_tensors="pt")).logits[0, [2, 3, 1]]
    assert logits.shape == (3, 8, 16)
    expected = logits.log_softmax(0).flatten(1).T
    labels = cache.read([0]).to_torch()
    found = torch.zeros(128, 3).scatter(1, labels.ids.long(), labels.log_probs.float())
    assert (found - expected).abs().max() < 2e-2  # the processor rounds pixels otherwise
    assert cache.read_stored([0]).positions.tolist() == list(range(128))
    assert (
        list(
            verify_against_teacher(
                cache, data.train, open_teacher(settings, data), num_rows=4, threshold_nats=1e-5, seed=0
            )
        )
        == []
    )


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "fcn_resnet50"])
def test_torchvision_labels_before_it_scales_up(root, tmp_path, name, monkeypatch):
    from torchvision import models

    torch.manual_seed(0)
    aux = {"aux_loss": True} if name.startswith("fcn") else {}
    net = models.get_model(name, num_classes=3, weights=None, weights_backbone=None, **aux).eval()
    torch.save({"model": net.state_dict()}, tmp_path / "model.pth")  # as the reference script saves it
    teacher = {"model": f"torchvision:{name}", "weights": str(tmp_path / "model.pth")}
    settings = config(
        root,
        teacher=teacher,
        labels={"k": 3, "positions": {"stride": 8}},
        views={"size": 64, "mean": [0.4], "std": [0.3]},
        source={**config(root).source.model_dump(), "max_train_samples": 2},
    )
    data, cache = capture(settings, tmp_path / "cache")
    batch = data.train.load([1], 0)
    inputs = (batch.images.float() / 255 - 0.4) / 0.3
    labels = cache.read([1]).to_torch()
    found = torch.zeros(64, 3).scatter(1, labels.ids.long(), labels.log_probs.float())
    with torch.no_grad():
        whole = net(inputs)["out"]
        logits = build_of(net, inputs)
    assert logits.shape[-1] == 8
    assert (found - logits.log_softmax(1)[0].flatten(1).T).abs().max() < 2e-3  # float16
    assert torch.allclose(
        scaled_logits(logits, 64, 64), whole, atol=1e-5
    )  # so pixels are scored as torchvision's


def build_of(net, inputs):
    features = net.backbone(inputs)
    return net.classifier(features if "high" in features else features["out"])


def test_a_teacher_on_another_grid_is_scaled_between_the_middles_of_cells(root, tmp_path):
    settings = config(root, labels={"k": 3, "num_views": 2, "positions": {"stride": 8}})
    data, cache = capture(settings, tmp_path / "cache")
    with torch.no_grad():
        own = open_teacher(settings, data).logits(data.train.load([1], 1).images)
    assert own.shape == (1, 3, 16, 16)
    # The middle of a cell of 4x4 is the corner of four: their mean.
    expected = F.avg_pool2d(own[..., 1:-1, 1:-1], 2, stride=4)
    labels = cache.read([1], 1).to_torch()
    found = torch.zeros(16, 3).scatter(1, labels.ids.long(), labels.log_probs.float())
    assert (found - expected.log_softmax(1)[0].flatten(1).T).abs().max() < 2e-3


def test_half_precision_keeps_the_sums_of_the_head(root):
    teachers = {}
    for dtype in ("float32", "bfloat16"):
        settings = config(root, capture={"dtype": dtype, "device": "cpu"})
        data = open_data(settings)
        teachers[dtype] = open_teacher(settings, data)
    batch = data.train.load([0], 0)
    logits = teachers["bfloat16"].logits(batch.images)
    assert (logits != logits.bfloat16().float()).float().mean() > 0.9  # not rounded to bfloat16
    assert (logits - teachers["float32"].logits(batch.images)).abs().max() < 0.1


def test_a_head_of_another_size_and_a_classifier_are_refused(root, segformer):
    with pytest.raises(ConfigError, match=r"pretrained head of .* has 5 classes, the source has 3"):
        open_teacher(settings := config(root, teacher={"model": f"hf:{segformer}"}), open_data(settings))
    with pytest.raises(SpecError, match="no model of segmentation"):
        open_teacher(
            settings := config(root, teacher={"model": "timm:resnet18", "weights": "x"}), open_data(settings)
        )
    with pytest.raises(SpecError, match=r"unknown name 'lraspp'; did you mean lraspp_mobilenet_v3_large\?"):
        build_segmenter("torchvision:lraspp", num_classes=3, input_shape=(3, 32, 32))
    settings = config(root, teacher={"model": "tests.modalities.test_segmentation:flat"})
    data = open_data(settings)
    chunks, batch = open_teacher(settings, data).chunks, data.train.load([0], 0)
    with pytest.raises(LabelError, match=r"expected logits of shape \(1, 3, height, width\); found \(1, 3\)"):
        list(chunks(batch))
    with pytest.raises(ConfigError, match=r"labels.positions.stride: of images with masks"):
        config(root, source={"name": "digits"})
    with pytest.raises(ConfigError, match="dkd reads the class of each row"):
        config(root, loss={"name": "dkd"})


def flat(num_classes):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(num_classes))
    model(torch.zeros(1, 3, 32, 32))
    torch.manual_seed(0)
    torch.nn.init.constant_(model[1].weight, 0.1)
    torch.nn.init.zeros_(model[1].bias)
    return model


# -- students ----------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_whole_distributions(root, tmp_path):
    settings = config(
        root,
        labels={"policy": "dense", "num_views": 2, "positions": {"policy": "every", "every": 3}},
        student={"model": "torchvision:lraspp_mobilenet_v3_large"},
        loss={"temperature": 2.0, "alpha": 0.7},
    )
    data, cache = capture(settings, tmp_path / "cache")
    task, teacher = data.task(settings, settings.student.model), open_teacher(settings, data)
    torch.manual_seed(0)
    student = task.build().eval()
    batch = data.train_dataset(settings, cache)[0].load(np.array([2, 0]), 1)
    with torch.no_grad():
        own = student(task.normalize(batch.images))
        there = scaled_logits(teacher.logits(batch.images), 8, 8).flatten(2).transpose(1, 2)[:, ::3]
    assert own.shape[2:] != (8, 8)
    here = F.interpolate(own, (8, 8), mode="bilinear").flatten(2).transpose(1, 2)[:, ::3]
    soft = F.kl_div(
        (here / 2).log_softmax(-1), (there / 2).log_softmax(-1), log_target=True, reduction="none"
    )
    whole = F.interpolate(own, (32, 32), mode="bilinear")
    hard = F.cross_entropy(whole, batch.masks.long(), ignore_index=IGNORED)
    expected = 0.3 * hard + 0.7 * 4 * soft.sum(-1).mean()
    assert torch.allclose(task.loss(student, batch), expected, rtol=1e-3)  # float16 labels
    online = data.task(settings, settings.student.model, teacher)
    everywhere = scaled_logits(teacher.logits(batch.images), 8, 8).flatten(2).transpose(1, 2)
    here = F.interpolate(own, (8, 8), mode="bilinear").flatten(2).transpose(1, 2)
    soft = F.kl_div(
        (here / 2).log_softmax(-1), (everywhere / 2).log_softmax(-1), log_target=True, reduction="none"
    )
    expected = 0.3 * hard + 0.7 * 4 * soft.sum(-1).mean()
    assert torch.allclose(online.loss(student, batch), expected, rtol=1e-5)


def test_pixels_without_a_class_have_labels_and_no_truth(root, tmp_path):
    for codec in ("open", "packed"):
        data, cache = capture(config(root, capture={"codec": codec, "device": "cpu"}), tmp_path / codec)
        batch = data.train.load(range(4), 1)
        truth = cache.read(range(4), 1).target_log_prob
        is_ignored = batch.targets.numpy() == IGNORED
        assert 0.05 < is_ignored.mean() < 0.6
        assert np.isneginf(truth[is_ignored]).all()
        assert np.isfinite(truth[~is_ignored]).all()
        assert list(verify_units(cache)) == []


def test_scores_are_those_of_torchmetrics(root, tmp_path):
    from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

    data = open_data(settings := config(root))
    task, teacher = data.task(settings, "unet?width=4&depth=1"), open_teacher(settings, data)
    batch = data.evaluation.load(range(2), 0)
    with torch.no_grad():
        logits = F.interpolate(teacher.logits(batch.images), (32, 32), mode="bilinear")
    expected = {
        "miou": MulticlassJaccardIndex(3, ignore_index=IGNORED)(logits, batch.masks.long()),
        "accuracy": MulticlassAccuracy(3, average="micro", ignore_index=IGNORED)(logits, batch.masks.long()),
        "eval_loss": F.cross_entropy(logits, batch.masks.long(), ignore_index=IGNORED),
    }
    found = task.evaluate(teacher.model, Accelerator(cpu=True), 1)
    assert found == pytest.approx({key: float(value) for key, value in expected.items()}, abs=1e-6)
    scores = teacher.scores(data.evaluation, batches=[range(1), range(1, 2)])
    assert [scores[key] for key in ("eval_miou", "eval_accuracy", "eval_loss")] == pytest.approx(
        [found[key] for key in ("miou", "accuracy", "eval_loss")], abs=1e-6
    )


def test_a_class_that_is_nowhere_counts_for_nothing():
    truth = torch.tensor([0, 0, 2, 255])
    matrix = confusion_matrix(torch.tensor([0, 2, 2, 1]), truth, 4, ignored=255)
    assert mask_scores(matrix) == {"miou": 0.5, "accuracy": pytest.approx(2 / 3)}
    assert mask_scores(torch.zeros(4, 4)) == {"miou": 0.0, "accuracy": 0.0}


def test_a_student_is_trained_and_finds_its_run_again(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = config(root, labels={"k": 2, "num_views": 2, "positions": {"policy": "entropy", "share": 0.5}})
    data, cache = capture(settings, tmp_path / "cache")
    positions = cache.read_stored([0, 1]).positions
    assert len(positions) == 2 * 32
    assert (np.diff(positions[:32]) > 0).all()
    runs = [
        train_student(settings, data, model="unet?width=4&depth=1", labels="cache", cache=cache),
        train_student(settings, data, model="unet?width=4&depth=1", labels="cache", cache=cache),
        train_student(settings, data, model="unet?width=4&depth=1", labels="ground_truth"),
    ]
    assert runs[0]["out"] == runs[1]["out"] != runs[2]["out"]
    assert 0 <= runs[0]["miou"] <= runs[0]["accuracy"] <= 1
    manifest = json.loads((tmp_path / "cache/manifest.json").read_text())
    assert manifest["format_version"] == 1
    assert (manifest["kind"], manifest["codec"]["name"]) == ("cells", "open")
    assert manifest["identity"]["grid"]["settings"] == {"height": 8, "width": 8}
    assert manifest["teacher"]["eval_miou"] > 0
    # A config without the stride reads the cache's grid; the capture refuses it.
    other = config(
        root, labels={"k": 2, "num_views": 2, "positions": {"policy": "entropy", "share": 0.5, "stride": 16}}
    )
    again = open_data(other)
    assert again.train_dataset(other, cache)[0].load(np.array([0]), 0).num_rows == 64
    with pytest.raises(
        AlignmentError, match=r"its rows are the cells of another grid .*height: 8 there, 2 here"
    ):
        SoftLabelDataset(open_data(other).train, cache)
    assert len(as_teacher_saw(data.train.source, cache).cells) == 64
