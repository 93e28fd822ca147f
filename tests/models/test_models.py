"""Specs, weights files and normalisation."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from softcache.errors import ConfigError, LabelError, SpecError
from softcache.losses import LossSettings
from softcache.models.image import Normalize, build_model
from softcache.models.spec import architecture_of, is_same_origin, parse_spec
from softcache.models.weight_files import load_weights
from softcache.models.weights import count_parameters, select_device
from softcache.student.tasks import ImageTask
from softcache.teacher.base import TeacherSettings
from softcache.teacher.image import ImageTeacher, load_image_teacher

SHAPE = (1, 8, 8)
SPECS = [
    "linear",
    "mlp?width=8&depth=2",
    "cnn?width=4&stages=3",
    "timm:test_efficientnet",
    "timm:test_vit?img_size=8&patch_size=2",
    "torchvision:squeezenet1_1",
    "tests.models.test_models:tiny?width=3",
]


def tiny(num_classes, input_shape, width=2):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, num_classes))


def just_a_name():
    return "model"


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_builds_a_model_with_one_output_per_class(spec):
    shape = (1, 64, 64) if "torchvision" in spec else SHAPE
    model = build_model(spec, num_classes=7, input_shape=shape).eval()
    assert model(torch.randn(2, *shape)).shape == (2, 7)


def test_arguments_are_json_scalars_or_text():
    assert parse_spec("timm:vit?a=1&b=0.5&c=true&d=gelu").args == {"a": 1, "b": 0.5, "c": True, "d": "gelu"}


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("timm:resnet1800", "unknown name 'resnet1800'; did you mean .*resnet18"),
        ("torchvision:resnett18", "did you mean .*resnet18"),
        ("mpl", "unknown name 'mpl'; did you mean mlp"),
        ("no.such.module:thing", "No module named 'no'"),
        ("tests.models.test_models:missing", "has no attribute 'missing'"),
        ("tests.models.test_models:just_a_name", "expected a torch.nn.Module; found str"),
        ("mlp?widht=3", "cannot be built .*widht"),
        ("timm:", "no model name"),
        ("", "no model name"),
    ],
)
def test_a_wrong_spec_names_what_is_wrong(spec, match):
    with pytest.raises(SpecError, match=match):
        build_model(spec, num_classes=7, input_shape=SHAPE)


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        (
            "timm:vit_tiny_patch16_224",
            r"images of \(3, 32, 32\): AssertionError: Input height \(32\) doesn't match model",
        ),
        ("torchvision:vit_b_32", r"images of \(3, 32, 32\): AssertionError: Wrong image height"),
    ],
)
def test_a_size_that_a_model_does_not_take_is_refused_when_it_is_built(spec, match):
    with pytest.raises(SpecError, match=match):
        build_model(spec, num_classes=5, input_shape=(3, 32, 32))


def test_what_is_built_is_to_be_trained():
    model = build_model("timm:test_resnet", num_classes=5, input_shape=(3, 32, 32))
    assert all(module.training for module in model.modules())
    assert float(model.get_buffer("bn1.running_mean").abs().sum()) == 0
    model(torch.zeros(2, 3, 32, 32)).sum().backward()


def test_auxiliary_heads_are_named():
    task = ImageTask(lambda: None, [], torch.nn.Identity(), 5, LossSettings())
    model = models.googlenet(num_classes=5, init_weights=False)
    with pytest.raises(
        SpecError, match=r"found GoogLeNetOutputs; leave out its auxiliary heads: add aux_logits=false"
    ):
        task.logits(model, torch.zeros(2, 3, 224, 224))
    built = build_model(
        "torchvision:googlenet?aux_logits=false&init_weights=false", num_classes=5, input_shape=(3, 64, 64)
    )
    assert task.logits(built, torch.zeros(2, 3, 64, 64)).shape == (2, 5)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".wrapped.pt"])
def test_weights_come_from_safetensors_or_a_state_dict(tmp_path, suffix):
    model = build_model("mlp", num_classes=3, input_shape=SHAPE)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save({"state_dict": model.state_dict()} if "wrapped" in suffix else model.state_dict(), path)
    other = build_model("mlp", num_classes=3, input_shape=SHAPE)
    load_weights(other, path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_weights_that_run_code_are_refused(tmp_path):
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "pickled.pt")
    with pytest.raises(SpecError, match="cannot be loaded"):
        load_weights(nn.Linear(2, 2), tmp_path / "pickled.pt")


def test_weights_that_do_not_fit_are_named(tmp_path):
    save_file(nn.Linear(2, 2).state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(SpecError, match=r"missing \['0.weight'"):
        load_weights(nn.Sequential(nn.Linear(2, 2)), tmp_path / "a.safetensors")
    with pytest.raises(
        SpecError, match=r"1 of 2 tensors .* as weight: \[2, 2\] in the file, \[2, 3\] in the model"
    ):
        load_weights(nn.Linear(3, 2), tmp_path / "a.safetensors")
    with pytest.raises(SpecError, match="no such file"):
        load_weights(nn.Linear(3, 2), tmp_path / "missing.safetensors")


def teacher(model, num_classes=4):
    return ImageTeacher(
        model,
        spec="test",
        num_classes=num_classes,
        normalize=Normalize((0.5,), (0.25,)),
        device=torch.device("cpu"),
        dtype="float32",
    )


def test_the_teacher_normalises_and_evaluates():
    images = torch.randint(0, 256, (3, 1, 2, 2), dtype=torch.uint8)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(4, 4))
    expected = model[2](((images.double() / 255 - 0.5) / 0.25).flatten(1).float())
    assert torch.allclose(teacher(model).logits(images), expected, atol=1e-6)


def test_a_teacher_with_the_wrong_head_is_refused():
    with pytest.raises(LabelError, match=r"expected logits of shape \(3, 5\) .*; found \(3, 4\)"):
        teacher(nn.Sequential(nn.Flatten(), nn.Linear(4, 4)), num_classes=5).logits(
            torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
        )


def loaded(model, num_classes=4):
    return load_image_teacher(
        TeacherSettings(model=model),
        num_classes=num_classes,
        input_shape=(3, 160, 160),
        normalize=Normalize((0.5,), (0.5,)),
        device=torch.device("cpu"),
        dtype="float32",
    )


def test_a_size_that_a_teacher_does_not_take_is_named():
    teacher = ImageTeacher(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 5)),
        spec="mine",
        num_classes=5,
        normalize=Normalize((0.5,), (0.5,)),
        device=torch.device("cpu"),
        dtype="float32",
    )
    with pytest.raises(
        LabelError, match=r"teacher mine: images of \(2, 1, 9, 9\) .*RuntimeError: .*check views\.size and"
    ):
        teacher.logits(torch.zeros(2, 1, 9, 9, dtype=torch.uint8))


def test_an_error_of_a_teacher_that_is_not_about_shapes_names_its_place_and_no_setting_of_views():
    class Broken(nn.Module):
        def forward(self, images):
            raise RuntimeError(self.text)

    teacher = ImageTeacher(
        Broken(),
        spec="mine",
        num_classes=5,
        normalize=Normalize((0.5,), (0.5,)),
        device=torch.device("cpu"),
        dtype="bfloat16",
    )
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    teacher.model.text = "no license"
    with pytest.raises(
        LabelError, match=r"RuntimeError: no license; raised at .*test_models\.py:\d+; "
    ) as caught:
        teacher.logits(images)
    assert "views" not in str(caught.value)
    teacher.model.text = "expected scalar type Float but found BFloat16"
    with pytest.raises(
        LabelError, match=r'BFloat16; it does not run in bfloat16; set capture\.dtype = "float32"'
    ):
        teacher.logits(images)


def test_a_random_teacher_is_refused():
    with pytest.raises(ConfigError, match=r"teacher.weights: missing, and timm:test_vit would be random"):
        loaded("timm:test_vit")


def test_a_teacher_of_timm_may_name_its_file_itself(tmp_path):
    model = build_model("timm:test_vit", num_classes=4, input_shape=(3, 160, 160))
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    spec = f"timm:test_vit?checkpoint_path={tmp_path / 'vit.safetensors'}"
    images = torch.randint(0, 256, (1, 3, 160, 160), dtype=torch.uint8)
    expected = model.eval()((images / 255 - 0.5) / 0.5)
    torch.testing.assert_close(loaded(spec).logits(images), expected)
    with pytest.raises(SpecError, match="cannot be built for 5 classes"):
        loaded(spec, num_classes=5)


def test_unknown_device():
    with pytest.raises(SpecError, match="device 'warp'"):
        select_device("warp")


def test_parameters_are_counted_without_buffers():
    assert count_parameters(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))) == 3 * 2 + 2 + 4


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("hf:models/qwen?dtype=bfloat16", "hf:/data/models/qwen", True),
        ("hf:Qwen/Qwen3-8B", "hf:/data/Qwen3-8B?revision=main", True),
        ("hf:models/qwen", "hf:models/llama", False),
        ("hf:one/model", "hf:other/model", False),
        ("hf:/data/qwen", "hf:/data/llama", False),
        ("timm:resnet18?pretrained=true", "timm:resnet18", True),
        ("timm:resnet18", "timm:resnet34", False),
        ("mlp?width=8", "mlp?width=9", False),
        ("mlp", "cnn", False),
    ],
)
def test_specs_of_one_model_differ_in_where_it_is_loaded_from(one, other, same):
    assert is_same_origin(one, other) == is_same_origin(other, one) == same


def test_an_architecture_is_the_function_without_its_weights():
    model = torch.nn.Linear(2, 2)
    assert architecture_of(model, "timm:vit?pretrained=true&img_size=32") == "timm:vit?img_size=32"
    assert architecture_of(model, "mlp") == "mlp"
    assert architecture_of(model, "my.models:make?width=3") == "my.models:make?width=3"
