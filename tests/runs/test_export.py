"""Students as files: what is written, what is verified, and what is refused."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from softcache.data.transforms import Views, ViewSettings
from softcache.data.transforms.student import StudentViews, StudentViewSettings
from softcache.errors import CorruptionError, MissingExtraError, RunError, SpecError, StorageError
from softcache.models.image import Normalize
from softcache.runs import train_student
from softcache.runs.export import ExportSettings, check_drop, export_run, load_onnxruntime
from softcache.runs.export import run as running
from softcache.runs.export.benchmark import count_flops, load_onnx, load_pt2
from softcache.runs.export.description import (
    _save_for_timm,
    describe,
    describe_images,
    image_processor,
    write_companions,
)
from softcache.runs.export.folder import ExportFolder
from softcache.runs.export.formats import export_program
from softcache.runs.report import open_report
from softcache.student.tasks.inference import ImageServing, TokenServing
from tests.support.caches import make_cache
from tests.support.text_caches import make_text_cache

FEW = ExportSettings(rounds=2, calibration_samples=40)


def train(folder, model="cnn?width=4", **tables):
    config, data, cache = make_cache(folder / "cache", cache=str(folder / "cache"), **tables)
    out = folder / model.replace("?", "-")
    train_student(config, data, model=model, labels="cache", cache=cache, out=out)
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run on digits, and its export."""
    folder = tmp_path_factory.mktemp("export")
    run = train(folder)
    report = open_report([run])
    figures = export_run(report, report.runs[0], folder / "out", FEW, cost={"teacher_passes": 2})
    return run, folder / "out", figures


def export_again(run, out, **settings):
    report = open_report([run])
    return export_run(report, report.runs[0], out, replace(FEW, **settings))


def copied(out, tmp_path, without=()):
    """A copy of a finished export, as a kill before `without` would have left it."""
    new = tmp_path / "copy"
    new.mkdir()
    for path in Path(out).iterdir():
        if path.name not in without:
            (new / path.name).write_bytes(path.read_bytes())
    state = json.loads((new / "export.json").read_text())
    for name in without:
        state["files"].pop(name)
    (new / "export.json").write_text(json.dumps(state))
    return new


def test_exported_files_say_what_the_student_says(trained):
    run, out, figures = trained
    rows = figures["models"]
    assert set(rows) == {"teacher", "student", "student.onnx", "student.pt2", "student.int8.onnx"}
    for name in ("student.onnx", "student.pt2"):
        assert rows[name]["max_difference"] < 1e-4
        assert rows[name]["same_predictions"] == 1.0
    assert 0 < rows["student.int8.onnx"]["max_difference"] < 5
    metrics = json.loads((run / "metrics.json").read_text())
    assert rows["student"]["accuracy"] == pytest.approx(metrics["accuracy"])
    assert rows["student"]["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-4)
    assert rows["student"]["rows"] == 100
    assert set(rows["teacher"]["latency_seconds"]) == {"1", "32"}
    assert json.loads((out / "distill.json").read_text()) == json.loads(json.dumps(figures))


def test_the_input_is_the_views_uint8_images_of_any_number(trained):
    run, out, _ = trained
    report = open_report([run])
    task, model = report.student(report.runs[0])
    onnx, pt2 = load_onnx(out / "student.onnx", input_name="images", threads=1), load_pt2(out / "student.pt2")
    for rows in (1, 2, 7):
        images = report.data.evaluation.load(range(rows), 0, fingerprints=False).images
        assert images.dtype == torch.uint8
        with torch.no_grad():
            wanted = task.logits(model, images)
        torch.testing.assert_close(onnx(images), wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(pt2(images), wanted, atol=1e-4, rtol=1e-4)


def test_the_int8_file_holds_int8_weights(trained):
    import onnx

    graph = onnx.load(trained[1] / "student.int8.onnx").graph
    convolutions = [node for node in graph.node if node.op_type in ("Conv", "QLinearConv")]
    int8 = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    weights = [t for name, t in int8.items() if not name.endswith("zero_point") and len(t.dims) == 4]
    assert len(weights) == len(convolutions) == 4
    kept = [t.name for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) == 4]
    assert not [name for name in kept if not name.startswith("normalize.")]


def test_files_name_their_classes_and_how_images_are_made(trained):
    import onnx

    _, out, figures = trained
    names = [str(number) for number in range(10)]
    for name in ("student.onnx", "student.int8.onnx"):
        held = {entry.key: entry.value for entry in onnx.load(out / name).metadata_props}
        assert held["student"] == "cnn?width=4"
        assert json.loads(held["class_names"]) == names
        assert json.loads(held["preprocessing"]) == figures["preprocessing"]
    extra = {"metadata.json": ""}
    torch.export.load(out / "student.pt2", extra_files=extra)
    assert json.loads(json.loads(extra["metadata.json"])["class_names"]) == names
    assert figures["class_names"] == names
    made = figures["preprocessing"]
    assert (made["size"], made["mean"], made["std"], made["input_shape"]) == (None, [0.3], [0.4], [1, 8, 8])
    card = (out / "README.md").read_text()
    assert "Classes: 0 0, 1 1, 2 2" in card
    assert "Preprocessing: input_shape [1, 8, 8]" in card
    assert json.loads((out / "preprocessor_config.json").read_text())["image_mean"] == [0.3]


@pytest.mark.parametrize(
    "how",
    [
        {"interpolation": "bicubic", "geometry": "torchvision"},
        {"eval_share": 1.0},
        {"fit": "stretch"},
        {"fit": "stretch_crop", "eval_share": 0.8},
    ],
)
def test_transformers_makes_the_input_of_the_files(how, tmp_path):
    from PIL import Image
    from transformers import AutoImageProcessor

    pixels = np.random.RandomState(0).randint(0, 256, (5, 7, 3), np.uint8)
    photo = Image.fromarray(pixels).resize((90, 60), Image.Resampling.BICUBIC)
    views = Views(ViewSettings(size=32, **how))
    serving = ImageServing(nn.Identity(), nn.Identity(), (3, 32, 32))
    config = image_processor(describe_images(views, serving))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    made = AutoImageProcessor.from_pretrained(tmp_path)(photo, return_tensors="pt")["pixel_values"]
    wanted = views.apply(torch.from_numpy(np.array(photo)).permute(2, 0, 1), key="a", view=0)
    assert made.shape == (1, 3, 32, 32)
    assert (made[0].float() - wanted.float()).abs().max() <= 2


def test_views_that_transformers_has_no_processor_for_are_described(tmp_path):
    serving = ImageServing(nn.Identity(), nn.Identity(), (3, 32, 48))
    for views in (Views(ViewSettings(size=(32, 48))), Views(ViewSettings(size=(32, 48), fit="letterbox"))):
        config = image_processor(describe_images(views, serving))
        assert "image_processor_type" not in config
        assert config["softcache"]["size"] == (32, 48)


def test_a_timm_student_loads_in_timm(tmp_path):
    import timm

    run = train(tmp_path, "timm:test_efficientnet", train={"epochs": 1}, source={"max_train_samples": 100})
    report = open_report([run])
    task, model = report.student(report.runs[0])
    serving = task.serve(model)
    folder = ExportFolder(tmp_path / "out", {})
    write_companions(folder, task, model, "timm:test_efficientnet", describe(report, report.runs[0], serving))
    told = describe(report, report.runs[0], serving)
    told["preprocessing"]["fit"] = "letterbox"  # which timm has not
    write_companions(ExportFolder(tmp_path / "boxed", {}), task, model, "timm:test_efficientnet", told)
    assert [path.name for path in (tmp_path / "boxed").glob("*config.json")] == ["preprocessor_config.json"]
    images = task.normalize(report.data.evaluation.load(range(4), 0).images)
    exported = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    weights = timm.create_model(
        "test_efficientnet", num_classes=10, in_chans=1, checkpoint_path=run / "model.safetensors"
    ).eval()
    with torch.no_grad():
        assert torch.equal(exported(images), model(images))
        assert torch.equal(weights(images), model(images))
    assert exported.pretrained_cfg["mean"] == [0.3]
    assert exported.pretrained_cfg["input_size"] == (1, 8, 8)
    assert exported.pretrained_cfg["label_names"] == [str(number) for number in range(10)]


@pytest.mark.parametrize(("size", "share"), [(48, 0.875), (224, 0.95), (48, 224 / 232)])
@pytest.mark.parametrize("geometry", ["floor", "torchvision"])
def test_timm_scales_images_as_the_student_saw_them(size, share, geometry, tmp_path):
    import timm
    from timm.data import create_transform, resolve_model_data_config

    views = Views(ViewSettings(size=size, eval_share=share, geometry=geometry))
    made = describe_images(views, ImageServing(nn.Identity(), nn.Identity(), (3, size, size)))
    student = timm.create_model("test_efficientnet", num_classes=2)
    _save_for_timm(student, {"preprocessing": made, "class_names": ["a", "b"]}, tmp_path)
    exported = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    resize = create_transform(**resolve_model_data_config(exported)).transforms[0]
    assert resize.size == views.settings.scaled(600, 600)[0]


def test_transformers_sees_what_a_timm_student_saw(tmp_path):
    """Its processor is of the weights next to it, and not of the ONNX file, which normalizes inside."""
    import timm
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    pixels = np.random.RandomState(0).randint(0, 256, (5, 7, 3), np.uint8)
    photo = Image.fromarray(pixels).resize((90, 60), Image.Resampling.BICUBIC)
    settings = ViewSettings(
        size=48, geometry="torchvision", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )
    views, spec, names = Views(settings), "timm:test_efficientnet", ["a", "b", "c"]
    torch.manual_seed(0)
    student = timm.create_model("test_efficientnet", num_classes=3).eval()
    made = describe_images(views, ImageServing(nn.Identity(), nn.Identity(), (3, 48, 48)))
    write_companions(
        ExportFolder(tmp_path, {}), object(), student, spec, {"class_names": names, "preprocessing": made}
    )
    seen = views.apply(torch.from_numpy(np.array(photo)).permute(2, 0, 1), key="a", view=0)
    with torch.no_grad():
        wanted = student(Normalize(settings.mean, settings.std)(seen[None]))
        inputs = AutoImageProcessor.from_pretrained(tmp_path)(photo, return_tensors="pt")
        model = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(
            model(**inputs).logits, wanted, rtol=0, atol=0.02 * float(wanted.abs().max())
        )
    assert list(model.config.id2label.values()) == names


def test_the_processor_of_a_student_with_a_smaller_view_does_not_cut_the_view(tmp_path):
    views = StudentViews(Views(ViewSettings(size=48)), StudentViewSettings(size=32))
    made = describe_images(views, ImageServing(nn.Identity(), nn.Identity(), (3, 32, 32)))
    config = image_processor(made)
    assert config["crop_size"] == {"height": 48, "width": 48}
    assert made["then_shorter_side"] == 32
    assert "image_processor_type" not in config


def test_a_finished_export_is_reported_not_repeated(trained, monkeypatch):
    run, out, figures = trained
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"}
    monkeypatch.setattr(running, "export_program", lambda *a, **k: pytest.fail("exported again"))
    assert export_again(run, out) == json.loads(json.dumps(figures))
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"}


def test_a_killed_export_goes_on_and_keeps_what_is_finished(trained, tmp_path):
    run, out, _ = trained
    half = copied(out, tmp_path, ("student.onnx", "student.int8.onnx", "distill.json", "README.md"))
    (half / "student.onnx").write_bytes(b"half")  # renamed, and killed before it was written down
    (half / ".123.student.onnx").write_bytes(b"staged")
    before = (half / "student.pt2").stat().st_mtime_ns
    figures = export_again(run, half)
    assert (half / "student.pt2").stat().st_mtime_ns == before
    assert figures["models"]["student.onnx"]["same_predictions"] == 1.0
    assert not (half / ".123.student.onnx").exists()
    assert "sha256" in (half / "README.md").read_text()


def test_a_writers_own_error_on_a_full_disk_is_one_message(trained, tmp_path, monkeypatch):
    run, out, _ = trained
    half = copied(out, tmp_path, ("student.int8.onnx", "distill.json", "README.md"))

    def corrupt(source, path, **how):
        path.write_bytes(b"half")
        raise ValueError("Wire format was corrupt")

    monkeypatch.setattr(running, "quantize", corrupt)
    with pytest.raises(ValueError, match=r"^Wire format was corrupt$"):
        export_again(run, half)
    usage = shutil.disk_usage(half)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=4096))
    with pytest.raises(
        StorageError, match=r"int8.onnx: cannot be written: Wire format .* 4,096 bytes left: free some"
    ):
        export_again(run, half)
    monkeypatch.undo()
    assert not (half / "student.int8.onnx").exists()
    assert export_again(run, half)["models"].keys() == export_again(run, out)["models"].keys()


@pytest.mark.parametrize("name", ["student.onnx", "student.pt2", "student.int8.onnx", "distill.json"])
def test_a_tampered_file_is_refused(trained, tmp_path, name):
    new = copied(trained[1], tmp_path)
    data = bytearray((new / name).read_bytes())
    data[len(data) // 2] ^= 1
    (new / name).write_bytes(data)
    with pytest.raises(CorruptionError, match=rf"{name}: sha256 .* export.json has"):
        export_again(trained[0], new)


def test_a_file_that_is_gone_is_named(trained, tmp_path):
    new = copied(trained[1], tmp_path)
    (new / "student.pt2").unlink()
    with pytest.raises(CorruptionError, match=r"student.pt2: gone"):
        export_again(trained[0], new)


def test_another_student_is_refused_and_nothing_is_lost(trained, tmp_path):
    _, out, _ = trained
    other = train(tmp_path, "mlp?width=8")
    before = (out / "student.onnx").read_bytes()
    with pytest.raises(RunError, match=r"holds another student .*student: 'cnn\?width=4'; 'mlp\?width=8'"):
        export_again(other, out)
    assert (out / "student.onnx").read_bytes() == before


def test_files_of_others_are_not_overwritten(trained, tmp_path):
    (tmp_path / "student.onnx").write_text("mine")
    with pytest.raises(RunError, match=r"holds student.onnx, but no export.json"):
        export_again(trained[0], tmp_path)
    assert (tmp_path / "student.onnx").read_text() == "mine"


def test_a_difference_above_the_tolerance_names_both(trained, tmp_path, monkeypatch):
    load = running.load_pt2
    monkeypatch.setattr(running, "load_pt2", lambda path: lambda images: load(path)(images) + 0.5)
    half = copied(trained[1], tmp_path, ("distill.json", "README.md"))
    with pytest.raises(
        RunError, match=r"student.pt2: a logit differs by 0.5 from the torch student cnn\?width=4"
    ):
        export_again(trained[0], half)
    assert (half / "student.pt2").exists()
    assert not (half / "distill.json").exists()


def test_a_tolerance_of_nothing_is_held_against_finished_figures(trained):
    with pytest.raises(RunError, match="a logit differs by"):
        export_again(trained[0], trained[1], tolerance=0.0)


def test_an_int8_model_that_loses_too_much_is_an_error(trained):
    figures = json.loads(json.dumps(trained[2]))
    check_drop(figures, 100.0, trained[1])
    figures["models"]["student.int8.onnx"]["accuracy"] = figures["models"]["student"]["accuracy"] - 0.03
    with pytest.raises(RunError, match=r"student.int8.onnx: .* 3.00 points lost, more than --max-drop 2"):
        check_drop(figures, 2.0, trained[1])


def test_flops_are_those_of_a_hand_count(trained):
    report = open_report([trained[0]])
    task, _ = report.student(report.runs[0])
    mlp = task.serve(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)))
    images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    assert count_flops(mlp, images) == 2 * (64 * 8 + 8 * 10)
    convolution = nn.Sequential(nn.Conv2d(1, 5, 3, padding=1), nn.Flatten(), nn.Linear(320, 10))
    assert count_flops(task.serve(convolution), images) == 2 * (64 * 5 * 9 + 320 * 10)


class Branching(nn.Module):
    def forward(self, images):
        return images.flatten(1)[:, :10] if images.sum() > 0 else images.flatten(1)[:, 10:20]


def test_a_student_that_does_not_export_says_so():
    serving = ImageServing(Branching(), nn.Identity(), (1, 8, 8))
    with pytest.raises(SpecError, match=r"student mine: cannot be exported to torch.export: ") as caught:
        export_program(serving, torch.zeros(2, 1, 8, 8), name="mine")
    assert "\n" not in str(caught.value)


def test_without_the_extra_it_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(
        MissingExtraError, match=r"onnxruntime is not installed; pip install 'softcache\[export\]'"
    ):
        load_onnxruntime()


def test_a_language_model_exports_for_any_batch_and_length(tmp_path):
    config, data, cache = make_text_cache(tmp_path / "cache", tmp_path)
    run = tmp_path / "run"
    model = "gpt2?width=16&depth=1&heads=2"
    train_student(config, data, model=model, labels="cache", cache=cache, out=run)
    report = open_report([run], cache_url=cache.url)
    figures = export_run(report, report.runs[0], tmp_path / "out", FEW)
    rows = figures["models"]
    assert rows["student.onnx"]["same_predictions"] == rows["student.pt2"]["same_predictions"] == 1.0
    metrics = json.loads((run / "metrics.json").read_text())
    # Documents of a packed sample run as rows of their own, and score as they did in training.
    assert rows["student"]["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-4)
    onnx = load_onnx(tmp_path / "out" / "student.onnx", input_name="input_ids", threads=1)
    for shape in ((1, 1), (3, 9), (2, 32)):
        assert onnx(torch.zeros(shape, dtype=torch.int64)).shape[:2] == shape
    assert os.path.getsize(tmp_path / "out" / "student.int8.onnx") > 0
    assert figures["class_names"] is None
    assert figures["preprocessing"]["context"] == 32
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("def f")["input_ids"] == data.tokenizer("def f")["input_ids"]


def test_documents_are_asked_for_one_by_one(tmp_path):
    _, data, _ = make_text_cache(tmp_path / "cache", tmp_path)
    batch = data.evaluation.load(np.arange(3), 0)
    request = TokenServing(nn.Identity(), context=8, cross_documents=False).ask(batch)
    assert request.inputs.shape[1] <= 8
    assert len(request.rows) == batch.num_rows
    assert torch.equal(request.inputs.flatten()[request.rows], batch.tokens.flatten()[batch.rows])
