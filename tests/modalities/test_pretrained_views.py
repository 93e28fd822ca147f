"""What a pretrained teacher was trained to see is the default of [views]; what cannot be right is refused."""

import argparse
import json

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torchvision import models

from softcache.config.run import RunConfig
from softcache.data.transforms import ViewSettings
from softcache.errors import ConfigError, SpecError
from softcache.models.preprocessing import pretrained_views
from softcache.models.spec import parse_spec
from softcache.reader import SoftLabelDataset, open_cache
from softcache.runs import capture_labels, open_data, open_teacher, train_student, train_teacher
from softcache.teacher.class_map import output_names


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photos of two classes, and a timm checkpoint with a head for them."""
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for split in ("train", "eval"):
        for number in range(8):
            path = folder / split / f"class{number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = draw.integers(0, 256, (70 + number, 91, 3), np.uint8)
            Image.fromarray(pixels).save(path)
    torch.manual_seed(0)
    save_file(
        timm.create_model("test_efficientnet", num_classes=2).state_dict(), folder / "model.safetensors"
    )
    return folder


def config_of(folder, views=None, **tables):
    return RunConfig.model_validate(
        {
            "name": "photos",
            "source": {"name": "imagefolder", "root": str(folder)},
            "views": views or {},
            "teacher": {"model": "timm:test_efficientnet", "weights": str(folder / "model.safetensors")},
            "labels": {"k": 2},
            "capture": {"batch_size": 4, "device": "cpu"},
            **tables,
        }
    )


def test_the_teachers_preprocessing_is_the_default_and_is_logged(folder, tmp_path, caplog):
    caplog.set_level("INFO", logger="softcache")
    config = config_of(folder)
    data = open_data(config)
    settings = data.views.settings
    assert (settings.size, settings.interpolation, settings.eval_share) == (160, "bicubic", 0.95)
    assert settings.geometry == "torchvision"
    assert settings.mean == (0.485, 0.456, 0.406)
    assert "views: as the weights that timm:test_efficientnet comes with were trained" in caplog.text
    cache, _ = capture_labels(config, data, open_teacher(config, data), str(tmp_path / "cache"))
    model = timm.create_model("test_efficientnet", num_classes=2)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    pipeline = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with Image.open(folder / "train/class0/0.png") as image, torch.no_grad():
        expected = model.eval()(pipeline(image)[None]).log_softmax(-1)[0]
    labels = cache.read([0])
    found = torch.zeros(2).scatter(
        0, torch.from_numpy(labels.ids[0]).long(), torch.from_numpy(labels.log_probs[0]).float()
    )
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    SoftLabelDataset(data.train.source, open_cache(tmp_path / "cache"))[0]
    assert (
        json.loads((tmp_path / "cache/manifest.json").read_text())["identity"]["views"]["settings"]["size"]
        == 160
    )


def test_a_file_of_torchvisions_has_the_preprocessing_of_its_weights(folder, tmp_path, caplog):
    caplog.set_level("INFO", logger="softcache")
    torch.manual_seed(0)
    net = models.resnet18(num_classes=2)
    torch.save(net.state_dict(), tmp_path / "mine.pth")
    config = config_of(
        folder, teacher={"model": "torchvision:resnet18", "weights": str(tmp_path / "mine.pth")}
    )
    data = open_data(config)
    assert (
        "views: as the weights that torchvision:resnet18 comes with were trained (set what yours saw"
        in caplog.text
    )
    cache, _ = capture_labels(config, data, open_teacher(config, data), str(tmp_path / "cache"))
    pipeline = models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    with Image.open(folder / "train/class0/0.png") as image, torch.no_grad():
        expected = net.eval()(pipeline(image)[None]).log_softmax(-1)[0]
    labels = cache.read([0])
    found = torch.zeros(2).scatter(
        0, torch.from_numpy(labels.ids[0]).long(), torch.from_numpy(labels.log_probs[0]).float()
    )
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


def test_what_a_training_script_was_called_with_is_in_its_checkpoint(folder, tmp_path, caplog):
    caplog.set_level("INFO", logger="softcache")
    state, path = load_file(folder / "model.safetensors"), tmp_path / "model_best.pth.tar"
    given = {"img_size": 96, "input_size": None, "mean": [0.1, 0.2, 0.3], "std": None, "crop_pct": None}
    arguments = argparse.Namespace(**given, interpolation="", crop_mode="squash", in_chans=None, lr=0.1)
    torch.save({"state_dict": state, "args": arguments}, path)
    teacher = {"model": "timm:test_efficientnet", "weights": str(path)}
    settings = open_data(config_of(folder, teacher=teacher)).views.settings
    model = timm.create_model("test_efficientnet", num_classes=2)
    expected = timm.data.resolve_data_config(vars(arguments), model=model)
    assert settings.size == expected["input_size"][1] == 96
    assert (settings.mean, settings.std) == (expected["mean"], expected["std"])
    assert (settings.fit, settings.eval_share) == ("stretch_crop", expected["crop_pct"])
    assert "model_best.pth.tar says that it was trained" in caplog.text
    spec = parse_spec("timm:test_efficientnet")
    torch.save(
        {"model": state, "args": argparse.Namespace(input_size=112, eval_crop_ratio=0.8)}, path
    )  # DeiT's
    views = pretrained_views(spec, weights=str(path))
    assert (views["size"], views["eval_share"]) == (112, 0.8)
    arguments = argparse.Namespace(val_crop_size=176, val_resize_size=200, interpolation="bicubic", mean=None)
    torch.save({"model": state, "args": arguments}, path)
    views = pretrained_views(parse_spec("torchvision:resnet18"), weights=str(path))
    assert (views["size"], views["eval_share"], views["interpolation"]) == (176, 0.88, "bicubic")


def test_timms_defaults_of_an_architecture_are_those_of_a_file():
    assert pretrained_views(parse_spec("timm:efficientnet_b8")) == {}
    views = pretrained_views(parse_spec("timm:efficientnet_b8"), weights="mine.pth")
    assert (views["size"], views["mean"]) == (672, (0.485, 0.456, 0.406))


def test_a_published_file_is_known_by_its_name():
    spec, weights = parse_spec("torchvision:resnet50"), models.ResNet50_Weights.IMAGENET1K_V2
    file = "elsewhere/resnet50-11ad3fa6.pth"
    views = pretrained_views(spec, weights=file)
    assert (views["size"], views["eval_share"], views["mean"]) == (224, 224 / 232, (0.485, 0.456, 0.406))
    assert output_names(models.resnet50(), spec, file) == weights.meta["categories"]
    assert pretrained_views(spec) == {}
    detector = parse_spec("torchvision:fasterrcnn_resnet50_fpn")
    assert pretrained_views(detector, weights="mine.pth") == {}  # which is refused for what it is


def test_models_that_scale_images_themselves_do_so_only_where_torchvision_loads_their_weights():
    published = "inception_v3_google-0cc3c7bd.pth"
    net = models.inception_v3(init_weights=False, aux_logits=False)
    image = torch.rand(1, 3, 299, 299)
    for query in ("", "?transform_input=true"):
        views = pretrained_views(parse_spec(f"torchvision:inception_v3{query}"), weights=published)
        mean, std = (torch.tensor(views[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        net.transform_input = bool(query)
        torch.testing.assert_close(net._transform_input((image - mean) / std), image * 2 - 1)


@pytest.mark.parametrize("query", ["?weights=COCO_WITH_VOC_LABELS_V1", ""])
def test_models_of_segmentation_have_mean_and_std(query):
    views = pretrained_views(
        parse_spec(f"torchvision:fcn_resnet50{query}"), weights=None if query else "mine.pth"
    )
    assert views["mean"] == (0.485, 0.456, 0.406)
    assert "size" not in views


def test_what_the_config_gives_stays_and_differences_are_logged(folder, caplog):
    caplog.set_level("INFO", logger="softcache")
    settings = open_data(config_of(folder, {"size": 32, "mean": [0.1, 0.2, 0.3]})).views.settings
    assert (settings.size, settings.mean, settings.std) == (32, (0.1, 0.2, 0.3), (0.229, 0.224, 0.225))
    assert "views.size: 32 in the config, and timm:test_efficientnet was trained with 160" in caplog.text
    assert "views.mean: [0.1, 0.2, 0.3] in the config" in caplog.text


def test_a_teacher_that_is_trained_from_scratch_has_no_preprocessing_of_its_own(folder):
    assert open_data(
        config_of(folder, {"size": 32}, train_teacher={"epochs": 1})
    ).views.settings == ViewSettings(size=32)


def test_a_pretrained_teacher_that_is_fine_tuned_has_it(folder, tmp_path):
    tables = {
        "teacher": {
            "model": f"timm:test_efficientnet?checkpoint_path={folder / 'model.safetensors'}",
            "weights": str(tmp_path / "photos/teacher/model.safetensors"),
        },
        "train_teacher": {"epochs": 1, "device": "cpu", "batch_size": 4},
    }
    before = open_data(config_of(folder, {"mean": [0.4]}, **tables)).views.settings
    assert (before.size, before.mean, before.std) == (160, (0.4,), (0.229, 0.224, 0.225))


def test_a_teacher_that_was_trained_here_sees_what_it_saw_then(folder, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="softcache")
    monkeypatch.chdir(tmp_path)
    weights = "runs/photos/teacher/model.safetensors"
    teacher = {"model": "cnn?width=4", "weights": weights}
    views = {"size": [24, 32], "eval_share": 0.8, "flip": 0.5, "mean": [0.4], "interpolation": "bicubic"}
    first = config_of(
        folder, views, teacher=teacher, train_teacher={"epochs": 1, "device": "cpu", "batch_size": 4}
    )
    data = open_data(first)
    train_teacher(first, data)
    assert open_data(first).views.settings == data.views.settings
    assert "was trained" not in caplog.text  # all of it is in the config
    again = open_data(config_of(folder, teacher=teacher)).views.settings
    assert again.model_dump(exclude={"flip"}) == data.views.settings.model_dump(exclude={"flip"})
    assert (
        "views: as cnn?width=4 was trained: eval_share 0.8, interpolation bicubic, mean [0.4]" in caplog.text
    )
    other = open_data(config_of(folder, {"size": 20}, teacher=teacher)).views.settings
    assert (other.size, other.mean) == (20, (0.4,))
    assert "views.size: 20 in the config, and cnn?width=4 was trained with [24, 32]" in caplog.text
    (tmp_path / "runs/photos/teacher/resolved.json").write_text('{"views": {"size": -1}}')
    with pytest.raises(ConfigError, match=r"resolved\.json: views: .*train the teacher again"):
        open_data(config_of(folder, teacher=teacher))


@pytest.mark.parametrize("views", [{"mean": [123.675, 116.28, 103.53]}, {"std": [58.4]}, {"mean": [-0.1]}])
def test_the_scale_of_255_is_refused(views):
    with pytest.raises(
        ValidationError, match=r"pixels scaled to 0..1; .*divide those of the scale 0..255 by 255"
    ):
        ViewSettings.model_validate(views)


def test_means_of_another_number_of_channels_are_refused(folder):
    with pytest.raises(ConfigError, match=r"views.mean: 2 numbers for images of 3 channels; expected 1 or 3"):
        open_data(config_of(folder, {"mean": [0.5, 0.5], "std": [0.5, 0.5]}))


@pytest.mark.parametrize(
    ("views", "num_views", "is_logged"),
    [({"flip": 0.5}, 1, True), ({"flip": 0.5}, 2, False), ({}, 1, False), ({"crop": "resized"}, 1, True)],
)
def test_augmentation_that_no_view_has_is_logged(folder, caplog, views, num_views, is_logged):
    caplog.set_level("INFO", logger="softcache")
    open_data(config_of(folder, {"size": 32} | views, labels={"k": 2, "num_views": num_views}))
    assert ("labels.num_views is 1: only the plain view is labeled" in caplog.text) is is_logged


GENERATOR = np.random.default_rng()


def own_generator():
    return lambda image: image + int(GENERATOR.integers(1, 255))


def global_generator():
    return lambda image: image + int(torch.randint(1, 255, ()))


def pil():
    return lambda image: Image.fromarray(image.permute(1, 2, 0).numpy())


def test_a_transform_that_no_student_could_repeat_is_refused_before_the_pass(folder):
    for name, message in {
        "own_generator": "two calls give other pixels",
        "pil": "expected a tensor .*found Image",
    }.items():
        with pytest.raises(SpecError, match=message):
            open_data(config_of(folder, {"size": 32, "transform": f"{__name__}:{name}"}))
    open_data(config_of(folder, {"size": 32, "transform": f"{__name__}:global_generator"}))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("torchvision:resnet18?weights=NOPE", r"weights = NOPE; torchvision has IMAGENET1K_V1"),
        ("torchvision:resnet81?weights=DEFAULT", r"unknown name 'resnet81'; did you mean"),
        ("torchvision:raft_large?weights=DEFAULT", r"what its weights were trained to see is not known"),
        ("timm:resnet18.nope", r"what its weights were trained to see is not known"),
        ("timm:resnet18?img_size=a", r"what its weights were trained to see is not known"),
        ("timm:resnet18?pretrained_cfg_overlay=x", r"what its weights were trained to see is not known"),
    ],
)
def test_weights_that_are_not_there_are_named(folder, model, message):
    with pytest.raises(SpecError, match=message):
        open_data(config_of(folder, teacher={"model": model}))


def turned():
    return lambda image: image[:, :20, :20]


def test_a_transform_of_another_size_than_the_plain_view_is_logged(folder, caplog):
    caplog.set_level("INFO", logger="softcache")
    open_data(config_of(folder, {"transform": f"{__name__}:turned"}))
    assert "returns images of (3, 20, 20), and the plain view is of (3, 160, 160)" in caplog.text
    caplog.clear()
    open_data(config_of(folder, {"transform": f"{__name__}:turned", "size": 20}))
    assert "returns images" not in caplog.text


def scaled():
    return lambda image: image / 255


def unscaled():
    return lambda image: image.float()


def normalized():
    return lambda image: (image / 255 - 0.4) / 0.2 + 0.1 * torch.randn(())


def test_floats_on_another_scale_than_the_plain_view_are_refused(folder):
    for name, found in {"scaled": r"0.* to 1|0.* to 0\.\d+", "unscaled": r"\d+ to 2\d\d"}.items():
        with pytest.raises(
            SpecError, match=rf"returns floats from ({found}), taken as normalized; views\.mean and"
        ):
            open_data(
                config_of(
                    folder, {"size": 32, "transform": f"{__name__}:{name}", "mean": [0.4], "std": [0.2]}
                )
            )
    open_data(
        config_of(folder, {"size": 32, "transform": f"{__name__}:normalized", "mean": [0.4], "std": [0.2]})
    )
    open_data(config_of(folder, {"size": 32, "transform": f"{__name__}:scaled", "mean": [0.0], "std": [1.0]}))


def test_a_student_whose_weights_saw_another_normalization_is_told(folder, tmp_path, caplog):
    caplog.set_level("INFO", logger="softcache")
    student = {"model": f"timm:test_efficientnet?checkpoint_path={folder / 'model.safetensors'}"}
    train = {"epochs": 1, "device": "cpu", "batch_size": 4, "labels": "ground_truth"}
    for mean, own, is_told in ((0.4, None, True), (0.4, [0.485, 0.456, 0.406], False)):
        views = {"size": 64, "mean": [mean], "std": [0.229, 0.224, 0.225]}
        tables = {"student": student | ({"views": {"mean": own}} if own else {}), "train": train}
        config = config_of(folder, views, **tables)
        data = open_data(config)
        train_student(
            config, data, model=student["model"], labels="ground_truth", out=str(tmp_path / str(own))
        )
        assert ("whose images had the mean [0.485, 0.456, 0.406], and sees [0.4]" in caplog.text) == is_told
        caplog.clear()


def gray_teacher(kind, folder):
    """A teacher's table, and its own pipeline from a gray picture to logits."""
    torch.manual_seed(1)
    if kind == "torchvision":
        net = models.resnet18(num_classes=10).eval()
        torch.save(net.state_dict(), folder / "net.pth")
        pipeline = models.ResNet18_Weights.IMAGENET1K_V1.transforms(crop_size=32, resize_size=32)
        return {"model": "torchvision:resnet18", "weights": str(folder / "net.pth")}, net, pipeline
    if kind == "hf":
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
        config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=10)
        net = transformers.ViTForImageClassification(config).eval()
        processor = transformers.ViTImageProcessor(
            size={"height": 32, "width": 32}, image_mean=[0.2, 0.4, 0.6], image_std=[0.1, 0.2, 0.3]
        )
        net.save_pretrained(folder), processor.save_pretrained(folder)
        pipeline = lambda image: processor(image, return_tensors="pt")["pixel_values"][0]
        return {"model": f"hf:{folder}"}, lambda images: net(images).logits, pipeline
    net = timm.create_model("test_efficientnet", num_classes=10).eval()
    save_file(net.state_dict(), folder / "net.safetensors")
    config = timm.data.resolve_data_config({"img_size": 32, "crop_pct": 1.0}, model=net)
    pipeline = timm.data.create_transform(**config, is_training=False)
    spec = "timm:test_efficientnet"
    if kind == "timm":
        timm.models.save_for_hf(net, folder / "saved")
        return {"model": f"timm:local-dir:{folder}/saved"}, net, pipeline
    return {"model": f"{spec}?in_chans=3", "weights": f"{folder}/net.safetensors"}, net, pipeline


@pytest.mark.parametrize("kind", ["torchvision", "hf", "timm", "timm file"])
def test_gray_images_are_shown_to_weights_of_rgb_as_their_own_pipelines_show_them(tmp_path, kind):
    teacher, net, pipeline = gray_teacher(kind, tmp_path)
    source = {"name": "digits", "max_train_samples": 4, "max_eval_samples": 4}
    views = {"size": 32, "eval_share": 1.0}
    config = config_of(tmp_path, views, source=source, teacher=teacher)
    data = open_data(config)
    assert len(data.views.settings.mean) == 1  # what students are normalized by
    loaded = open_teacher(config, data)
    pictures = [Image.fromarray(data.train.source.image(n)[0].numpy()).convert("RGB") for n in (0, 1)]
    with torch.no_grad():
        expected = net(torch.stack([pipeline(picture) for picture in pictures]))
    (logits,) = loaded.chunks(data.train.load([0, 1], 0))
    torch.testing.assert_close(logits, expected, atol=0.02 * float(expected.std()), rtol=0)
    # A run keeps the views that it had, as if they were given: its teacher is this one.
    kept = data.views.settings.model_dump(mode="json")
    again = config_of(tmp_path, kept, source=source, teacher=teacher)
    assert open_teacher(again, open_data(again)).weights_digest == loaded.weights_digest
    # Another normalization is another teacher, also where the file of weights is the same.
    config = config_of(tmp_path, views | {"mean": [0.35]}, source=source, teacher=teacher)
    assert open_teacher(config, open_data(config)).weights_digest != loaded.weights_digest


def test_weights_of_one_channel_are_shown_gray_images_as_they_are(tmp_path):
    net = timm.create_model("test_efficientnet", num_classes=10, in_chans=1).eval()
    net.pretrained_cfg.update(input_size=(1, 32, 32), mean=(0.3,), std=(0.2,), crop_pct=1.0)
    timm.models.save_for_hf(net, tmp_path / "saved")
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    for model in ("timm:local-dir:{}/saved", "timm:test_efficientnet?checkpoint_path={}/net.safetensors"):
        config = config_of(
            tmp_path,
            {"size": 32, "mean": [0.3], "std": [0.2]},
            source={"name": "digits", "max_train_samples": 4, "max_eval_samples": 4},
            teacher={"model": model.format(tmp_path)},
        )
        data = open_data(config)
        batch = data.train.load([0, 1], 0)
        (logits,) = open_teacher(config, data).chunks(batch)
        with torch.no_grad():
            torch.testing.assert_close(logits, net((batch.images / 255 - 0.3) / 0.2))


def test_the_size_that_weights_of_ones_own_saw_is_asked_for_where_the_images_are_far_smaller(tmp_path):
    torch.save(models.resnet18(num_classes=10).state_dict(), tmp_path / "net.pth")
    source = {"name": "digits", "max_train_samples": 4, "max_eval_samples": 4}
    teacher = {"model": "torchvision:resnet18", "weights": str(tmp_path / "net.pth")}
    with pytest.raises(
        ConfigError,
        match=r"views\.size: missing; .*saw 224 pixels, the source's first image has 8 x 8, and .*net\.pth",
    ):
        open_data(config_of(tmp_path, source=source, teacher=teacher))
    for size in (8, 224):
        assert (
            open_data(config_of(tmp_path, {"size": size}, source=source, teacher=teacher)).views.settings.size
            == size
        )
    published = {"model": "torchvision:resnet18", "weights": "resnet18-f37072fd.pth"}
    assert open_data(config_of(tmp_path, source=source, teacher=published)).views.settings.size == 224
    arguments = argparse.Namespace(val_crop_size=176, val_resize_size=200, interpolation="bicubic")
    torch.save({"model": torch.load(tmp_path / "net.pth"), "args": arguments}, tmp_path / "net.pth")
    assert open_data(config_of(tmp_path, source=source, teacher=teacher)).views.settings.size == 176
