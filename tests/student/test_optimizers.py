"""[train]'s optimizers, parameter groups and schedules: values by hand, exact resume, and what is refused."""

import json
import sys
import types

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from softcache.errors import ConfigError, MissingExtraError
from softcache.models.image import build_model
from softcache.models.language import build_language_model
from softcache.runs import open_data, train_student
from softcache.student import TrainSettings
from softcache.student.optimizers import OPTIMIZERS, build_optimizer, parameter_groups
from tests.student.test_run import (
    Killed,
    assert_same_run,
    dies_at,
    distance,
    fit,
    one_thread,
    watched,
    weights,
)
from tests.support.text_caches import text_config

__all__ = ["one_thread"]  # a fixture


def first_update(name, gradient, *, weight=2.0, weight_decay=0.0, **arguments):
    """What one step at lr 0.1 adds to a single weight."""
    layer = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(weight)
    optimizer = build_optimizer(
        name, layer, lr=0.1, weight_decay=weight_decay, exempt=False, arguments=arguments
    )
    layer.weight.grad = torch.full((1, 1), gradient)
    optimizer.step()
    return layer.weight.item() - weight


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adamw", -0.1),  # m / sqrt(v) = 1 in the first step
        ("adafactor", -0.1),  # the same of a 1 x 1 matrix, clipped at a root mean square of 1
        ("lion", -0.1),  # a sign
        ("lamb", -0.1),
        ("sgd", -0.1 * 0.25),
        ("torch.optim:SGD", -0.1 * 0.25),
    ],
)
def test_the_first_step_of_each_optimizer(name, expected):
    assert first_update(name, 0.25) == pytest.approx(expected, abs=1e-6)
    decayed = first_update(name, 0.25, weight_decay=0.5)
    # Decoupled decay takes lr * 0.5 of the weight; of SGD it is a part of the gradient.
    assert decayed == pytest.approx(expected - 0.1 * 0.5 * 2.0, abs=1e-6)


def test_momentum_of_sgd_is_nine_tenths_unless_it_is_given():
    layer = nn.Linear(1, 1)
    given = {"lr": 0.1, "weight_decay": 0.0, "exempt": False}
    assert build_optimizer("sgd", layer, arguments={}, **given).defaults["momentum"] == 0.9
    assert build_optimizer("sgd", layer, arguments={"momentum": 0.5}, **given).defaults["momentum"] == 0.5


def test_the_8_bit_optimizer_is_that_of_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        MissingExtraError, match=r"adamw_8bit.*needs the package bitsandbytes.*pip install bitsandbytes"
    ):
        first_update("adamw_8bit", 1.0)
    module = types.ModuleType("bitsandbytes")
    module.optim = types.SimpleNamespace(AdamW8bit=torch.optim.SGD)
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)
    assert first_update("adamw_8bit", 1.0) == pytest.approx(-0.1)


def not_an_optimizer(groups, *, lr, weight_decay):
    return "nothing"


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(
        ConfigError, match=r"not_an_optimizer'.*expected a function that returns a torch\.optim"
    ):
        first_update("tests.student.test_optimizers:not_an_optimizer", 1.0)
    with pytest.raises(ConfigError, match=r"train\.optimizer 'adamw': cannot be built.*beta.*optimizer_args"):
        first_update("adamw", 1.0, beta=3)
    with pytest.raises(ValidationError, match=r"optimizer 'adamv': unknown; did you mean .*adamw"):
        TrainSettings(optimizer="adamv")
    with pytest.raises(ValidationError, match=r"optimizer_args\.lr: not an argument here; set train\.lr"):
        TrainSettings(optimizer_args={"lr": 1.0})
    assert OPTIMIZERS.names() == ["adafactor", "adamw", "adamw_8bit", "lamb", "lion", "sgd"]


# -- parameter groups --------------------------------------------------------------------------------------


def test_norms_biases_and_embeddings_have_no_weight_decay():
    model = build_language_model("gpt2?width=8&depth=1&heads=2", vocab_size=32, context=8)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, exempt = parameter_groups(model, exempt=True)
    assert exempt["weight_decay"] == 0.0
    assert "weight_decay" not in decayed
    assert [names[id(p)].removeprefix("transformer.h.0.") for p in decayed["params"]] == [
        "attn.c_attn.weight",
        "attn.c_proj.weight",
        "mlp.c_fc.weight",
        "mlp.c_proj.weight",
    ]
    found = {names[id(p)] for p in exempt["params"]}
    assert {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight"} <= found
    assert len(decayed["params"]) + len(exempt["params"]) == len(names)


def test_a_head_of_its_own_is_decayed_and_what_a_model_marks_is_not():
    model = build_language_model("llama?width=8&depth=1&heads=2&tied=false", vocab_size=32, context=8)
    model.model.layers[0].mlp.up_proj.weight._no_weight_decay = True
    decayed, exempt = ({id(p) for p in group["params"]} for group in parameter_groups(model, exempt=True))
    assert id(model.lm_head.weight) in decayed
    assert {id(model.model.embed_tokens.weight), id(model.model.layers[0].mlp.up_proj.weight)} <= exempt
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    assert parameter_groups(model, exempt=True) == [{"params": [model.lm_head.weight]}]


def test_an_exempt_weight_keeps_its_value_without_a_gradient():
    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(
        "adamw", model, lr=0.1, weight_decay=0.5, exempt=True, arguments={"betas": [0.9, 0.95]}
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    embedding, weight, bias = model.parameters()
    torch.testing.assert_close(embedding, before[0], atol=0, rtol=0)
    torch.testing.assert_close(bias, before[2], atol=0, rtol=0)
    torch.testing.assert_close(weight, before[1] * (1 - 0.1 * 0.5))


# -- schedules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [  # 20 steps, of which 4 warm up
        ({}, {0: 0.25, 3: 1.0, 4: 1.0, 12: 0.5, 8: 0.8535533905932737, 20: 0.0}),
        ({"min_lr_share": 0.1}, {0: 0.25, 4: 1.0, 12: 0.55, 20: 0.1}),
        ({"schedule": "linear"}, {1: 0.5, 4: 1.0, 8: 0.75, 12: 0.5, 19: 0.0625}),
        ({"schedule": "linear", "min_lr_share": 0.2}, {4: 1.0, 12: 0.6, 20: 0.2}),
        ({"schedule": "constant"}, {0: 0.25, 4: 1.0, 19: 1.0}),
        ({"schedule": "warmup_stable_decay"}, {3: 1.0, 17: 1.0, 18: 1.0, 19: 0.5}),
        ({"schedule": "warmup_stable_decay", "decay_share": 0.4}, {12: 1.0, 13: 0.875, 16: 0.5, 19: 0.125}),
        (
            {"schedule": "warmup_stable_decay", "decay_share": 0.4, "min_lr_share": 0.5},
            {11: 1.0, 12: 1.0, 16: 0.75, 19: 0.5625},
        ),
    ],
)
def test_the_learning_rate_of_a_step(settings, expected):
    settings = TrainSettings(warmup_share=0.2, **settings)
    assert {step: settings.lr_factor(step, 20) for step in expected} == pytest.approx(expected)


def test_a_setting_that_the_schedule_does_not_read_is_refused():
    with pytest.raises(ValidationError, match=r'decay_share: read by schedule = "warmup_stable_decay"'):
        TrainSettings(decay_share=0.1)
    with pytest.raises(ValidationError, match='min_lr_share: schedule = "constant" stays at lr'):
        TrainSettings(schedule="constant", min_lr_share=0.1)
    with pytest.raises(ValidationError, match=r"warm-up and decay are 0\.6 and 0\.5 of the steps"):
        TrainSettings(schedule="warmup_stable_decay", warmup_share=0.6, decay_share=0.5)


# -- runs --------------------------------------------------------------------------------------------------


def test_a_key_is_in_a_runs_identity_where_it_changes_the_run():
    """Folders and checkpoints of runs from before these keys are found."""
    plain = TrainSettings().identity()
    assert sorted(plain) == [
        *("accumulation_steps", "batch_size", "checkpoint_steps", "clip_norm", "epochs", "labels", "lr"),
        *("precision", "seed", "stop_at", "warmup_share", "weight_decay"),
    ]
    same = [
        {"optimizer": "adamw", "optimizer_args": {}, "schedule": "cosine", "min_lr_share": 0.0},
        {"weight_decay_exempt": False},
    ]
    for settings in same:
        assert TrainSettings(**settings).identity() == plain
    assert TrainSettings(weight_decay=0, weight_decay_exempt=True).identity() == plain | {"weight_decay": 0.0}
    changes = [
        {"optimizer": "sgd"},
        {"optimizer_args": {"betas": [0.9, 0.95]}},
        {"weight_decay_exempt": True},
        {"schedule": "linear"},
        {"min_lr_share": 0.1},
    ]
    for settings in changes:
        assert TrainSettings(**settings).identity() == plain | settings
    stable = {"schedule": "warmup_stable_decay"}
    assert TrainSettings(**stable).identity() == plain | stable
    assert TrainSettings(**stable, decay_share=0.1).identity() == plain | stable
    assert TrainSettings(**stable, decay_share=0.2).identity() == plain | stable | {"decay_share": 0.2}


def slow_head(groups, *, lr, weight_decay):
    """A factory of the user's: each group may have a learning rate of its own."""
    (group,) = groups
    *body, weight, bias = group["params"]
    return torch.optim.AdamW(
        [{"params": body}, {"params": [weight, bias], "lr": 0.0}], lr=lr, weight_decay=weight_decay
    )


@pytest.mark.parametrize(
    "train",
    [
        {"optimizer": "adafactor"},
        {"optimizer": "lion", "schedule": "linear"},
        {"optimizer": "sgd", "schedule": "warmup_stable_decay", "decay_share": 0.5},
        {"weight_decay": 0.1, "weight_decay_exempt": True, "min_lr_share": 0.2},
        {"optimizer": "tests.student.test_optimizers:slow_head", "schedule": "constant"},
    ],
    ids=lambda train: "-".join(map(str, train.values())),
)
def test_interrupted_it_ends_with_the_same_weights(tmp_path, shared_cache, monkeypatch, train):
    tables = {"train": train}
    fit(shared_cache[2], tmp_path / "whole", tables=tables)
    for step in (4, 9):
        with watched(monkeypatch, dies_at(step)), pytest.raises(Killed):
            fit(shared_cache[2], tmp_path / "broken", tables=tables)
    fit(shared_cache[2], tmp_path / "broken", tables=tables)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    fit(shared_cache[2], tmp_path / "default")
    assert distance(tmp_path / "whole", tmp_path / "default") > 1e-3


def test_a_factory_may_give_groups_learning_rates_of_their_own(tmp_path, shared_cache):
    given = {"optimizer": "tests.student.test_optimizers:slow_head", "weight_decay": 0.0}
    fit(shared_cache[2], tmp_path, tables={"train": given})
    trained = weights(tmp_path)
    torch.manual_seed(0)
    start = build_model("mlp?width=8", num_classes=10, input_shape=shared_cache[1].input_shape).state_dict()
    names = list(start)
    assert [name for name in names if torch.equal(trained[name], start[name])] == names[-2:]


@pytest.mark.parametrize(("given", "expected"), [(None, True), (True, True), (False, None)])
def test_students_of_texts_decay_their_matrices_alone_unless_asked(tmp_path, given, expected):
    train = {"epochs": 1} | ({} if given is None else {"weight_decay_exempt": given})
    config = text_config(tmp_path, train=train)
    train_student(config, open_data(config), model=config.student.model, labels="ground_truth", out=tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["train"].get("weight_decay_exempt") is expected
    groups = load_optimizer(tmp_path)["param_groups"]
    assert [group["weight_decay"] for group in groups] == ([1e-4, 0.0] if expected else [1e-4])


def load_optimizer(run):
    """The optimizer's state in a run's checkpoint."""
    return torch.load(run / "checkpoint" / "optimizer.bin", weights_only=True)
