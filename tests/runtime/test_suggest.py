"""Errors that refuse a name say the nearest valid one, wherever the name was typed."""

import ast
import sys

import pytest

from softcache.config.load import load_config
from softcache.data.sources import open_source
from softcache.errors import ConfigError, SpecError
from softcache.models.image import build_model
from softcache.runtime.suggest import closest_matches, did_you_mean
from softcache.stages.cli import main
from tests.support.caches import ROOT


def test_the_nearest_comes_first_and_nothing_is_forced():
    assert closest_matches("parqet", ["zarr", "parquet"]) == ["parquet"]
    assert did_you_mean("xyz", ["zarr", "parquet"]) == ""


def test_a_name_that_is_like_none_may_be_a_word_of_one():
    known = ["adaptive_kl", "forward_kl", "tail-kl", "skew kl", "kind"]
    assert closest_matches("kll", known) == ["adaptive_kl", "forward_kl", "tail-kl"]
    assert closest_matches("kinds", known) == ["kind"], "a whole name goes before"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("capture.store=parqet", r"capture\.store: .*found 'parqet'; did you mean parquet\?"),
        ("loss.name=forwrd_kl", r"loss\.name: loss 'forwrd_kl': unknown; did you mean [a-z_ ]*forward_kl"),
        ("labels.policy=topk", r"labels\.policy: .*'topk': unknown; did you mean top_k or top_p\?"),
        (
            "loss.name=kll",
            r"loss\.name: loss 'kll': unknown; did you mean adaptive_kl or forward_kl or reverse_kl\?",
        ),
        ("train.size=3", r"train\.size: unknown key; did you mean batch_size or eval_batch_size"),
        ("trian.epochs=3", r"trian: unknown key; did you mean train\?"),
    ],
)
def test_a_config_value_that_is_no_choice(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(ROOT / "configs/digits.toml", [override])


def test_a_choice_that_is_like_none_only_lists_them():
    with pytest.raises(ConfigError, match=r"'zarr' or 'parquet'; found 'hdf5'$"):
        load_config(ROOT / "configs/digits.toml", ["capture.store=hdf5"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torchvison:resnet18", r"did you mean torchvision:resnet18\?"),
        ("tim:resnet18", r"did you mean timm:resnet18\?"),
        ("timm:resnet81", r"did you mean .*resnet18.*\?$"),
        ("timm:qqqq", r"known: \w+(, \S+){19}, …$"),
        ("torchvision:resnett18", r"did you mean resnet18 .*\?$"),
        ("cnnn", r"did you mean cnn\? \(others are written timm:NAME, .*\)$"),
        ("gpt", r"known: linear, mlp, cnn, bytes \(others"),
    ],
)
def test_a_model_that_is_none(spec, message):
    with pytest.raises(SpecError, match=message):
        build_model(spec, num_classes=3, input_shape=(1, 8, 8))


def test_a_source_that_is_none():
    with pytest.raises(SpecError, match=r"did you mean fashion-mnist"):
        open_source({"name": "fashion-mnst"}, split="train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("trian-student",), "'train-student'"),
        (("inspect", "--jsn", "x"), "Did you mean '--json'?"),
    ],
)
def test_a_command_or_option_that_is_none(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["softcache", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert message in " ".join(capsys.readouterr().err.split())


def test_one_place_knows_what_near_is():
    for path in [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "stages").rglob("*.py")]:
        imported = {
            alias.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        assert "difflib" not in imported or path.name == "suggest.py", (
            f"{path}: use softcache.runtime.suggest"
        )
