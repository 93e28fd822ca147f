"""The registry of losses: custom ones from a user's own file, refused names and keys, and fast paths that can be off."""

import copy
import inspect
import pickle
import sys

import pytest
import torch
from pydantic import ValidationError

from softcache import losses
from softcache.config.load import load_config
from softcache.errors import ConfigError, LabelError
from softcache.labels.sparsify import top_k
from softcache.losses import LOSSES, LossSettings, distillation_loss, make_loss
from softcache.losses.fused import fused_distillation_loss
from tests.losses.test_functional import make_logits
from tests.support.losses_dense import COMPARING

CUSTOM = """
from pydantic import Field

from softcache.losses import divergence
from softcache.settings import Settings


class RenyiSettings(Settings):
    order: float = Field(0.5, gt=0, lt=1)


@divergence(RenyiSettings)
def renyi(log_p_PB, log_s_PB, *, order):
    return (order * log_p_PB + (1 - order) * log_s_PB).logsumexp(dim=1) / (order - 1)
"""
NAME = "renyi_of_a_user:renyi"


@pytest.fixture
def custom(tmp_path, monkeypatch):
    (tmp_path / "renyi_of_a_user.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(tmp_path)
    yield NAME
    sys.modules.pop("renyi_of_a_user", None)


def config(tmp_path, tables):
    path = tmp_path / "run.toml"
    path.write_text(f'[source]\nname = "digits"\n[loss]\n{tables}\n')
    return load_config(path)


def renyi(p, s, order):
    return (p**order * s ** (1 - order)).sum(1).log() / (order - 1)


def test_a_custom_loss_is_that_of_its_formula(custom):
    teacher, student = make_logits(5, 9, 0), make_logits(5, 9, 1).requires_grad_()
    labels, targets = top_k(teacher, k=9), torch.arange(5)
    expected = 4 * renyi((teacher / 2).softmax(1), (student / 2).softmax(1), 0.3).mean()
    how = {"temperature": 2.0, "alpha": 1.0, "loss": make_loss(custom, order=0.3)}
    found = distillation_loss(student, labels, targets, **how)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(x, student, retain_graph=True)[0] for x in (found, expected))
    )
    hidden, weight = student.detach(), torch.eye(9, dtype=torch.float64)
    torch.testing.assert_close(
        fused_distillation_loss(hidden, weight, labels, targets, **how), expected.detach()
    )


def test_a_config_names_a_custom_loss_and_its_parameters(custom, tmp_path):
    loss = config(tmp_path, f'name = "{custom}"\norder = 0.3').loss
    assert loss.loss == make_loss(custom, order=0.3)
    assert loss.identity()["order"] == 0.3
    assert LossSettings.model_validate(loss.model_dump(mode="json")) == loss
    with pytest.raises(ConfigError, match=r"loss\.order: input should be less than 1; found 1\.5"):
        config(tmp_path, f'name = "{custom}"\norder = 1.5')
    with pytest.raises(ConfigError, match=r"loss\.beta: unknown key with name = .*known keys: .*order"):
        config(tmp_path, f'name = "{custom}"\nbeta = 0.5')


@pytest.mark.parametrize("name", ["nowhere_at_all:x", "math:nothing", "forward_kll"])
def test_unknown_names_are_refused(name, tmp_path):
    with pytest.raises(ConfigError, match=rf"loss\.name: loss '{name}'"):
        config(tmp_path, f'name = "{name}"')
    with pytest.raises(ValidationError, match=f"loss '{name}'"):
        LossSettings(name=name)
    with pytest.raises(LabelError, match=rf"loss\.name: loss '{name}'"):
        make_loss(name)


def test_settings_of_any_loss_are_copied_pickled_and_read():
    for name in COMPARING:
        settings = LossSettings(name=name, temperature=2.0)
        for other in (
            pickle.loads(pickle.dumps(settings)),
            copy.deepcopy(settings),
            LossSettings.model_validate({"name": name, "temperature": 2.0}),
        ):
            assert other == settings
            assert type(other) is type(settings)
            assert other.model_fields_set == {"name", "temperature"}


def test_nulls_of_earlier_resolved_configs_are_read():
    earlier = LossSettings(name="jsd").identity()
    assert earlier["skew"] is None
    assert LossSettings.model_validate(earlier) == LossSettings(name="jsd")


@pytest.mark.parametrize("name", [name for name, spec in LOSSES.items() if spec.formula is not None])
def test_public_functions_have_the_name_the_parameters_and_the_maths_of_their_formula(name):
    spec = LOSSES.get(name)
    function = getattr(losses, spec.formula.__name__)
    assert function.__name__ == spec.formula.__name__
    assert {*spec.parameters} <= inspect.signature(function).parameters.keys()
    assert ("targets" in inspect.signature(function).parameters) == spec.needs_target
    for part in (".. math::", "Args:", "Returns:", "Raises:", "References:"):
        assert part in function.__doc__


@pytest.mark.parametrize("name", COMPARING)
@pytest.mark.parametrize("alpha", [0.7, 1.0])
def test_fast_paths_can_be_off_and_change_nothing(name, alpha, monkeypatch):
    """Values and gradients of both losses, with SOFTCACHE_COMPILED at 1 and at 0."""
    teacher, targets = make_logits(6, 9, 0).float(), torch.arange(6)
    labels, hidden, weight = (
        top_k(teacher, k=3, targets_P=targets),
        make_logits(6, 4, 1).float(),
        make_logits(9, 4, 2).float(),
    )
    how = {"temperature": 3.0, "alpha": alpha, "loss": name}

    def values_and_gradients(on):
        monkeypatch.setenv("SOFTCACHE_COMPILED", on)
        x = hidden.clone().requires_grad_()
        plain = distillation_loss(x @ weight.T, labels, targets, **how)
        fused = fused_distillation_loss(x, weight, labels, targets, **how)
        return [part for y in (plain, fused) for part in (y.detach(), *torch.autograd.grad(y, x))]

    torch.testing.assert_close(values_and_gradients("1"), values_and_gradients("0"), rtol=2e-5, atol=2e-6)


def test_fast_paths_are_taken_unless_off(monkeypatch):
    labels, z, taken = top_k(make_logits(4, 6, 0).float(), k=3), make_logits(4, 6, 1).float(), []
    monkeypatch.setattr("softcache.losses.distillation.direct_loss", lambda *_, **how: taken.append(how))
    for on in ("1", "0"):
        monkeypatch.setenv("SOFTCACHE_COMPILED", on)
        distillation_loss(z, labels, None, temperature=2.0, alpha=1.0)
    assert len(taken) == 1
