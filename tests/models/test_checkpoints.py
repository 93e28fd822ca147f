"""Checkpoints of training scripts as teachers: read safely, averaged weights first, prefixes stripped, folders of timm."""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn
from torch.optim.swa_utils import AveragedModel

from softcache.errors import ConfigError, SpecError
from softcache.models.preprocessing import pretrained_views
from softcache.models.spec import parse_spec
from softcache.models.weight_files import load_weights, read_state
from tests.teacher.test_class_map import SHAPE, load


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def same(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def loaded(path):
    model = net(9)
    load_weights(model, path)
    return model


def test_timms_own_checkpoint_gives_its_averaged_weights(tmp_path, caplog):
    """As timm's CheckpointSaver writes it."""
    caplog.set_level("INFO", logger="softcache")
    trained, averaged = net(1), net(2)
    state = {
        "epoch": 3,
        "arch": "net",
        "state_dict": trained.state_dict(),
        "state_dict_ema": averaged.state_dict(),
        "optimizer": torch.optim.SGD(trained.parameters(), 0.1, momentum=0.9).state_dict(),
        "version": 2,
        "args": argparse.Namespace(lr=0.1, data_dir=Path("/data"), opt_betas=None),
        "metric": np.float64(71.5),
    }
    path = tmp_path / "model_best.pth.tar"
    torch.save(state, path)
    assert same(loaded(path), averaged)
    assert f"the averaged ones, state_dict_ema, are taken; others are {path}#state_dict" in caplog.text
    assert same(loaded(f"{path}#state_dict"), trained)
    with pytest.raises(SpecError, match=r"no state dict 'other' in .*; it has state_dict, state_dict_ema"):
        loaded(f"{path}#other")


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "net.", "module._orig_mod.", "model._orig_mod.module."]
)
def test_prefixes_of_wrappers_are_stripped_and_logged(tmp_path, caplog, prefix):
    caplog.set_level("INFO", logger="softcache")
    model = net(1)
    torch.save(
        {"state_dict": {prefix + name: value for name, value in model.state_dict().items()}},
        tmp_path / "a.ckpt",
    )
    assert same(loaded(tmp_path / "a.ckpt"), model)
    assert f"names are without their prefix {prefix!r}" in caplog.text


def test_torchvisions_averaged_model_is_read(tmp_path):
    averaged = AveragedModel(net(1))
    torch.save({"model": net(2).state_dict(), "model_ema": averaged.state_dict()}, tmp_path / "model_9.pth")
    assert same(loaded(tmp_path / "model_9.pth"), net(1))


def test_a_model_inside_of_another_takes_a_plain_state_dict(tmp_path, caplog):
    caplog.set_level("INFO", logger="softcache")
    torch.save(net(1).state_dict(), tmp_path / "a.pt")
    outer = nn.ModuleDict({"net": net(2)})
    load_weights(outer, tmp_path / "a.pt")
    assert same(outer["net"], net(1))
    assert "names are given the prefix 'net.'" in caplog.text


def test_some_names_with_a_prefix_are_another_models(tmp_path):
    state = net(1).state_dict()
    torch.save(
        {"model." + name if "0" in name else name: value for name, value in state.items()}, tmp_path / "a.pt"
    )
    with pytest.raises(
        SpecError, match=r"do not fit the model; missing \['0.weight'.*unexpected \['model.0.weight'"
    ):
        loaded(tmp_path / "a.pt")


def test_the_one_state_dict_of_a_checkpoint_is_taken_and_of_several_one_has_to_be_named(tmp_path):
    state, path = net(1).state_dict(), tmp_path / "a.pt"
    torch.save({"weights": state, "classes": ["a"], "optimizer": {"state": {0: {"m": torch.ones(1)}}}}, path)
    assert same(loaded(path), net(1))
    torch.save({"student": net(2).state_dict(), "teacher": state, "epoch": 3}, path)  # DINO's
    with pytest.raises(
        SpecError, match=r"holds the state dicts student, teacher; name one as .*a\.pt#student"
    ):
        loaded(path)
    assert same(loaded(f"{path}#teacher"), net(1))


@pytest.mark.parametrize("entry", ["ema.module", "ema_model", "EMA", "net_ema"])
def test_averaged_weights_are_found_by_their_name(tmp_path, entry):
    outer, _, inner = entry.partition(".")
    averaged = net(2).state_dict()
    ema = {inner: averaged, "decay": 0.99} if inner else averaged
    torch.save({"model": net(1).state_dict(), "schema": net(3).state_dict(), outer: ema}, tmp_path / "a.pt")
    assert same(loaded(tmp_path / "a.pt"), net(2))
    assert same(loaded(f"{tmp_path}/a.pt#model"), net(1))


def test_what_stands_beside_the_model_in_a_checkpoint_of_lightning_is_left_out(tmp_path, caplog):
    caplog.set_level("INFO", logger="softcache")
    state = {"model." + name: value for name, value in net(1).state_dict().items()}
    torch.save({"state_dict": state | {"criterion.weight": torch.ones(4)}}, tmp_path / "a.ckpt")
    assert same(loaded(tmp_path / "a.ckpt"), net(1))
    assert "1 without it are left out, such as criterion.weight" in caplog.text
    twice = state | {"teacher." + name: value for name, value in net(2).state_dict().items()}
    torch.save({"state_dict": twice}, tmp_path / "a.ckpt")
    with pytest.raises(SpecError, match=r"the model is in it 2 times, as model\., teacher\."):
        loaded(tmp_path / "a.ckpt")


class Code:
    def __reduce__(self):
        return os.system, ("touch /tmp/softcache-was-here",)


def test_code_is_refused_and_a_whole_model_too(tmp_path):
    torch.save({"state_dict": net().state_dict(), "args": Code()}, tmp_path / "bad.pt")
    with pytest.raises(SpecError, match=r"cannot be loaded: UnpicklingError: .*nothing in it was run"):
        read_state(tmp_path / "bad.pt")
    assert not Path("/tmp/softcache-was-here").exists()
    torch.save(net(), tmp_path / "whole.pt")
    with pytest.raises(SpecError, match=r"nothing in it was run; expected safetensors, a state dict"):
        read_state(tmp_path / "whole.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(SpecError, match=r"a Tensor; expected a state dict"):
        read_state(tmp_path / "tensor.pt")


def test_a_folder_of_timms_is_a_teacher_with_its_weights_and_preprocessing(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=4)
    data = {"input_size": (3, 96, 96), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.4, 0.4), "crop_pct": 0.9}
    for name in ("one", "two"):
        save_for_hf(model, tmp_path / name, safe_serialization=True, data_config=data)
    spec = f"timm:local-dir:{tmp_path}/one"
    teacher = load(list("abcd"), model=spec)
    images = torch.randint(0, 256, (2, *SHAPE), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(teacher.logits(images), model.eval()((images.float() / 255 - 0.5) / 0.5))
    views = pretrained_views(parse_spec(spec))
    assert (views["size"], views["mean"], views["eval_share"]) == (96, (0.1, 0.2, 0.3), 0.9)
    elsewhere = load(list("abcd"), model=f"timm:local-dir:{tmp_path}/two").identity()["teacher"]
    assert {**teacher.identity()["teacher"], "spec": ""} == {**elsewhere, "spec": ""}
    with pytest.raises(ConfigError, match=r"has 4 classes, the source has 5: timm would make a random head"):
        load(list("abcde"), model=spec)
    config = tmp_path / "one/config.json"
    config.write_text(json.dumps({"wrong": 1}))
    with pytest.raises(SpecError, match=r"expected a config.json as timm's save_for_hf"):
        load(list("abcd"), model=spec)
    with pytest.raises(SpecError, match=r"FileNotFoundError"):
        load(list("abcd"), model=f"timm:local-dir:{tmp_path}/none")
