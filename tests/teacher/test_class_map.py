"""Teachers whose head has other classes than the source: refused, or read through `teacher.class_map`."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from softcache.config.load import load_config
from softcache.errors import ConfigError, SpecError
from softcache.models.image import Normalize
from softcache.runs import open_data, open_teacher, train_student
from softcache.teacher.base import TeacherSettings
from softcache.teacher.class_map import read_class_map
from softcache.teacher.image import load_image_teacher
from tests.support.caches import digits_config

SHAPE = (3, 32, 32)
SYNSETS = timm.data.ImageNetInfo("imagenet-1k").label_names()


def load(names, **settings):
    return load_image_teacher(
        TeacherSettings(**settings),
        num_classes=len(names),
        class_names=names,
        input_shape=SHAPE,
        normalize=Normalize((0.5,) * 3, (0.5,) * 3),
        device=torch.device("cpu"),
        dtype="float32",
    )


def random_head(num_classes=5):
    """As a factory of a user's own that puts a new head on a pretrained body."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes))


class OneOutputPerPixel(nn.Module):
    def forward(self, images_BCHW):
        return images_BCHW.flatten(1)[:, :1000]


def pixels():
    """A model of 1,000 outputs that comes without names."""
    return OneOutputPerPixel()


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A checkpoint of timm's with 1,000 classes, its weights in a local file."""
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=1000)
    save_file(model.state_dict(), path)
    return model.eval(), path


def test_a_pretrained_head_of_another_size_is_refused_before_anything_is_loaded():
    with pytest.raises(
        ConfigError, match=r"test_efficientnet has 1,000 classes, the source has 16.*random head.*teacher.class_map"
    ):  # fmt: skip
        load([f"class {n}" for n in range(16)], model="timm:test_efficientnet?pretrained=true")


def test_a_tag_of_another_dataset_has_its_own_number():
    with pytest.raises(ConfigError, match=r"has 21,8\d\d classes, the source has 1,000"):
        load(SYNSETS, model="timm:vit_tiny_patch16_224.augreg_in21k?pretrained=true")


def test_a_factory_that_makes_a_random_head_is_refused():
    with pytest.raises(
        ConfigError, match=r"other weights each time it is built \(2 of 2 tensors, such as 1.weight\)"
    ):
        load(list("abcde"), model=f"{__name__}:random_head")


def test_labels_are_the_softmax_over_the_chosen_outputs(imagenet, tmp_path):
    model, weights = imagenet
    names, outputs = ["springer", "tench", "church"], [217, 0, 497]
    images = torch.randint(0, 256, (4, *SHAPE), dtype=torch.uint8)
    with torch.no_grad():
        expected = model((images.float() / 255 - 0.5) / 0.5)[:, outputs]
    (tmp_path / "list.json").write_text(json.dumps(outputs))
    (tmp_path / "names.json").write_text(json.dumps(dict(zip(names, outputs, strict=True))))
    for file in ("list.json", "names.json"):
        teacher = load(
            names, model="timm:test_efficientnet", weights=str(weights), class_map=str(tmp_path / file)
        )
        torch.testing.assert_close(teacher.logits(images), expected)
        assert teacher.num_classes == 3
    synsets = [SYNSETS[output] for output in outputs]
    auto = load(synsets, model="timm:test_efficientnet", weights=str(weights), class_map="auto")
    torch.testing.assert_close(auto.logits(images), expected)
    assert auto.identity() == teacher.identity()
    other = load(synsets[::-1], model="timm:test_efficientnet", weights=str(weights), class_map="auto")
    assert other.identity() != teacher.identity()


BAD = [
    ([0, 1], r"a list of 3 numbers, one for each class; found a list of 2"),
    ({"a": 0, "b": 1}, r"class 'c' of the source has no output; give each class"),
    ({"a": 0, "b": 1, "c": 2, "d": 3}, r"'d' is no class of the source"),
    ([0, 1, 1000], r"class 'c' has output 1000; .* has outputs 0 to 999"),
    ([True, 1, 2], r"class 'a' has output True"),
    ([0, 1, 1], r"output 1 stands for several classes \('b' is one\)"),
    (3, r"found a int"),
]


@pytest.mark.parametrize(("table", "message"), BAD)
def test_a_map_that_does_not_fit_is_refused(tmp_path, table, message):
    (tmp_path / "map.json").write_text(json.dumps(table))
    with pytest.raises(ConfigError, match=message):
        load(list("abc"), model=f"{__name__}:pixels", class_map=str(tmp_path / "map.json"))


def test_names_are_needed_for_auto_and_a_head_for_any_map(imagenet):
    weights = str(imagenet[1])
    with pytest.raises(ConfigError, match=r"class 'church' of the source has no output"):
        load(["church"], model="timm:test_efficientnet", weights=weights, class_map="auto")
    with pytest.raises(ConfigError, match=r"comes without the names of its 1,000 outputs"):
        load(["a"], model=f"{__name__}:pixels", class_map="auto")
    with pytest.raises(SpecError, match=r"has as many outputs as it is asked for"):
        load(["a"], model="mlp", weights="none", class_map="auto")
    with pytest.raises(ConfigError, match=r"missing.json"):
        load(["a"], model=f"{__name__}:pixels", class_map="missing.json")


def test_other_modalities_have_no_class_map(tmp_path):
    (tmp_path / "run.toml").write_text(
        '[source]\nmodality = "text"\nname = "stdlib"\ntokenizer = "bytes"\n[teacher]\nmodel = "gpt2"\nclass_map = "auto"\n'
    )
    with pytest.raises(ConfigError, match=r"teacher.class_map: of models of images"):
        load_config(tmp_path / "run.toml")


def test_classes_of_one_name_are_told_apart_by_a_list_alone(tmp_path):
    path = tmp_path / "map.json"
    path.write_text("[5, 6, 7]")
    teacher = load(["crane", "crane", "dog"], model=f"{__name__}:pixels", class_map=str(path))
    images = torch.randint(0, 256, (2, *SHAPE), dtype=torch.uint8)
    expected = ((images.float() / 255 - 0.5) / 0.5).flatten(1)[:, 5:8]
    torch.testing.assert_close(teacher.logits(images), expected)
    path.write_text('{"crane": 5, "dog": 6}')
    with pytest.raises(
        ConfigError, match=r"'crane' is the name of several classes.*give a list of 3 numbers"
    ):
        load(["crane", "crane", "dog"], model=f"{__name__}:pixels", class_map=str(path))
    path.write_text('{"crane": 5, "dog": 6, "crane": 7}')
    with pytest.raises(ConfigError, match=r"'crane' comes twice"):
        load(["crane", "dog"], model=f"{__name__}:pixels", class_map=str(path))


def test_a_name_of_two_outputs_is_not_guessed():
    how = {"num_outputs": 3, "names": ["crane", "dog", "crane"], "spec": "model"}
    assert read_class_map("auto", ["dog"], **how) == (1,)
    with pytest.raises(ConfigError, match=r"'crane' is the name of several outputs of model"):
        read_class_map("auto", ["dog", "crane"], **how)


def test_a_student_of_an_online_teacher_with_another_map_is_another_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = []
    for first in (0, 2):
        (tmp_path / "map.json").write_text(json.dumps(list(range(first, first + 10))))
        teacher = {"model": "tests.fakes:wrong_head?num_classes=10", "class_map": "map.json"}
        config = digits_config(teacher=teacher, train={"epochs": 1})
        data = open_data(config)
        online = open_teacher(config, data)
        runs.append(train_student(config, data, model="linear", labels="online", teacher=online)["out"])
    assert runs[0] != runs[1]
