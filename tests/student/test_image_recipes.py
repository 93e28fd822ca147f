"""What students of images are trained with by the recipes of timm and torchvision: averages, smoothing, layers, sizes."""

import json
from copy import deepcopy

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from softcache.config.run import RunConfig
from softcache.errors import ConfigError, SpecError
from softcache.labels import MixedTargets
from softcache.labels.sparsify import top_k
from softcache.losses import distillation_loss
from softcache.modalities import open_data
from softcache.models.image import build_model
from softcache.student.averaging import WeightAverage
from softcache.student.loop import Trainer
from softcache.student.optimizers import build_optimizer
from softcache.student.tasks import ImageTask
from tests.student.test_run import Killed, assert_same_run, dies_at, fit, one_thread, watched, weights
from tests.support.caches import digits_config
from tests.support.text_caches import text_config

__all__ = ["one_thread"]  # a fixture
CNN = "cnn?width=4&stages=1"


def test_an_average_is_that_of_its_formula():
    model = nn.BatchNorm1d(3)
    average = WeightAverage(model, 0.6)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(1, 31):
        with torch.no_grad():
            model.weight.normal_()
            model.running_mean.normal_()
            model.num_batches_tracked += 1
        average.update(model)
        kept = min(0.6, step / (step + 9))
        for name, value in model.state_dict().items():
            expected[name] = (
                kept * expected[name] + (1 - kept) * value if value.is_floating_point() else value.clone()
            )
    found = average.module.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    again = WeightAverage(nn.BatchNorm1d(3), 0.6)
    again.load_state_dict(average.state_dict())
    for one in (again, average):
        one.update(model)
    torch.testing.assert_close(again.module.state_dict(), average.module.state_dict(), rtol=0, atol=0)


def test_the_average_is_scored_and_saved_and_a_kill_changes_nothing(tmp_path, shared_cache, monkeypatch):
    seen = []
    update = WeightAverage.update

    def watch(self, model):
        update(self, model)
        seen[:] = [deepcopy(one.state_dict()) for one in (self.module, model)]

    monkeypatch.setattr(WeightAverage, "update", watch)
    tables = {"train": {"ema_decay": 0.9}}
    metrics = fit(shared_cache[2], tmp_path / "whole", model=CNN, tables=tables)
    average, last = seen
    torch.testing.assert_close(weights(tmp_path / "whole"), average, rtol=0, atol=0)
    assert not torch.equal(average["0.weight"], last["0.weight"])
    plain = fit(shared_cache[2], tmp_path / "plain", model=CNN)
    assert metrics["eval_loss"] != plain["eval_loss"]
    for step in (5, 4, 7):
        with watched(monkeypatch, dies_at(step)), pytest.raises(Killed):
            fit(shared_cache[2], tmp_path / "broken", model=CNN, tables=tables)
    fit(shared_cache[2], tmp_path / "broken", model=CNN, tables=tables)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_smoothing_is_a_share_of_all_classes(alpha, mixed):
    torch.manual_seed(0)
    student = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    labels, first, second = top_k(torch.randn(5, 7), k=3), torch.arange(5), torch.arange(5).flip(0)
    shares = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    hot = nn.functional.one_hot(first, 7).double()
    if mixed:
        hot = shares[:, None] * hot + (1 - shares)[:, None] * nn.functional.one_hot(second, 7)
    targets = MixedTargets(first, second, shares) if mixed else first
    wanted = 0.8 * hot + 0.2 / 7
    hard = -(wanted * student.log_softmax(-1)).sum(-1).mean()
    soft = distillation_loss(student, labels, None, temperature=2.0, alpha=1.0) if alpha else 0.0

    def loss(logits):
        return distillation_loss(logits, labels, targets, temperature=2.0, alpha=alpha, label_smoothing=0.2)

    torch.testing.assert_close(loss(student), (1 - alpha) * hard + alpha * soft)
    torch.autograd.gradcheck(loss, (student,))


@pytest.mark.parametrize("exempt", [False, True])
def test_layers_have_the_learning_rates_of_timms_groups(exempt):
    model = timm.create_model("test_vit", num_classes=4)
    optimizer = build_optimizer(
        "adamw", model, lr=0.1, weight_decay=0.05, exempt=exempt, layer_decay=0.7, arguments={}
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    by_timm = param_groups_layer_decay(
        model, weight_decay=0.05, layer_decay=0.7, weight_decay_exclude_1d=exempt
    )
    expected = {
        names[id(parameter)]: (pytest.approx(0.1 * group["lr_scale"]), group["weight_decay"])
        for group in by_timm
        for parameter in group["params"]
    }
    assert found == expected
    assert len({lr for lr, _ in found.values()}) > 3


def test_a_model_without_known_layers_is_refused():
    model = build_model("mlp", num_classes=3, input_shape=(1, 4, 4))
    with pytest.raises(ConfigError, match=r"train.layer_decay: the layers of Sequential are not known.*timm"):
        build_optimizer("sgd", model, lr=0.1, weight_decay=0.0, exempt=False, layer_decay=0.5, arguments={})


def test_sizes_follow_one_another_over_the_run_and_scores_are_of_whole_images(
    tmp_path, shared_cache, monkeypatch
):
    heights = []
    logits = ImageTask.logits

    def watch(self, model, images, **size):
        handle = model.register_forward_pre_hook(
            lambda _, inputs: heights.append((model.training, *inputs[0].shape[2:]))
        )
        found = logits(self, model, images, **size)
        handle.remove()
        return found

    monkeypatch.setattr(ImageTask, "logits", watch)
    fit(shared_cache[2], tmp_path, model=CNN, tables={"train": {"image_sizes": [4, 6, 8], "epochs": 2}})
    trained = [height for training, height, width in heights if training]
    assert trained == [4] * 4 + [6] * 4 + [8] * 4
    assert {height for training, height, _ in heights if not training} == {8}
    assert all(height == width for _, height, width in heights)


def test_a_resized_image_is_torchs(shared_cache):
    from torchvision.transforms.v2 import functional

    seen = []
    task = ImageTask(nn.Identity, None, nn.Identity(), 2, None)
    images = torch.randint(0, 256, (2, 3, 12, 20)).float()
    model = lambda inputs: seen.append(inputs) or torch.zeros(2, 2)
    task.logits(model, images, size=6)
    torch.testing.assert_close(seen[0], functional.resize(images, [6, 10], antialias=True))


def test_channels_last_changes_no_result_and_is_saved_as_ever(tmp_path, shared_cache):
    ends = []
    for name, value in (("plain", False), ("last", True)):
        fit(shared_cache[2], tmp_path / name, model=CNN, tables={"train": {"channels_last": value}})
        ends.append(weights(tmp_path / name))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-4)
    assert "channels_last" not in json.loads((tmp_path / "plain/config.json").read_text())["train"]


def test_channels_last_is_the_layout_of_the_weights(monkeypatch, tmp_path, shared_cache):
    layouts = []
    init = Trainer.__init__

    def watch(self, *args, **options):
        init(self, *args, **options)
        weight = next(p for p in self.model.parameters() if p.ndim == 4 and p.shape[1] > 1)
        layouts.append(weight.is_contiguous(memory_format=torch.channels_last))

    monkeypatch.setattr(Trainer, "__init__", watch)
    fit(
        shared_cache[2],
        tmp_path,
        model="cnn?width=4&stages=2",
        tables={"train": {"channels_last": True, "epochs": 1}},
    )
    assert layouts == [True]


@pytest.mark.parametrize("train", [{"label_smoothing": 0.1}, {"image_sizes": [4]}, {"channels_last": True}])
def test_texts_have_no_settings_of_images(train, tmp_path):
    (key,) = train
    with pytest.raises(
        ValueError, match=rf"train.{key}: of image classifiers; found source.modality = 'text'"
    ):
        text_config(tmp_path, train=train)


def test_a_student_that_is_cut_has_no_average():
    tables = digits_config().model_dump(exclude_unset=True)
    tables["train"] = {"parallel": "fsdp", "ema_decay": 0.9}
    with pytest.raises(ValueError, match="ema_decay: does not go with parallel"):
        RunConfig.model_validate(tables)


def test_the_file_that_a_student_starts_from_is_part_of_its_run(tmp_path):
    data, spec = open_data(digits_config()), f"timm:test_vit?checkpoint_path={tmp_path / 'start.pth'}"
    with pytest.raises(SpecError, match=r"checkpoint_path: no such file .*start.pth"):
        data.model_identity(spec)
    found = []
    for content in (b"one", b"other", b"one"):
        (tmp_path / "start.pth").write_bytes(content)
        found.append(data.model_identity(spec))
    assert found[0] == found[2] != found[1]
    assert data.model_identity("timm:test_vit") == data.model_identity("cnn?width=8") == {}


def test_a_student_that_does_not_take_the_size_of_images_is_named_and_other_errors_pass():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2))
    task = ImageTask(lambda: net, None, nn.Identity(), 2, None)
    with pytest.raises(
        SpecError,
        match=r"student: inputs of shape \(4, 1, 8, 8\), .*mat1 and mat2 .*; take a student of that size",
    ):
        task.logits(net, torch.zeros(4, 1, 8, 8))

    def broken(images):
        raise RuntimeError("no license")

    with pytest.raises(RuntimeError, match=r"^no license$"):
        task.logits(broken, torch.zeros(4, 1, 8, 8))
