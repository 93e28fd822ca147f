"""[sweep]: what a space may hold, what of it is refused, and which run its values make."""

import pytest

from softcache.config.load import load_config
from softcache.config.sweep import Range
from softcache.errors import ConfigError
from softcache.runs.sweep.space import candidate, checked_space, default_space
from softcache.tools.shrink import ShrinkSettings, shrink_cache
from tests.support.caches import ROOT, digits_config, make_cache


def space(**given):
    return digits_config(sweep={"space": given})


def parsed(key, text):
    config = load_config(ROOT / "configs/digits.toml", [f"sweep.space.{key}={text}"])
    return getattr(config.sweep.space, key)


def test_a_parameter_is_a_range_a_log_range_or_a_list():
    assert parsed("alpha", "{ low = 0, high = 1 }") == Range(0.0, 1.0)
    assert parsed("lr", "{ low = 1e-3, high = 1e-2, log = true }") == Range(1e-3, 1e-2, log=True)
    assert parsed("temperature", "[1, 2.5]") == (1.0, 2.5)
    assert parsed("k", "{ low = 1, high = 4 }") == Range(1, 4)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("temprature", "[1]", r"sweep\.space\.temprature: unknown key; did you mean temperature"),
        ("temperature", "[0.5]", r"sweep\.space\.temperature: expected numbers from 1 to 100, not 0\.5"),
        (
            "temperature",
            "{ low = 8, high = 1 }",
            r"sweep\.space\.temperature: low of a range is less than high",
        ),
        (
            "alpha",
            "{ low = 0, high = 1, log = true }",
            r"sweep\.space\.alpha: a logarithmic range begins above 0",
        ),
        ("alpha", "0.5", r"sweep\.space\.alpha: expected a list or .* of numbers from 0 to 1"),
        ("alpha", "[true]", r"sweep\.space\.alpha: expected numbers from 0 to 1, not true"),
        ("alpha", "{ low = nan, high = 1 }", r"sweep\.space\.alpha: expected numbers from 0 to 1, not nan"),
        ("lr", "{ low = 1e-3 }", r"sweep\.space\.lr: a range has the keys low, high"),
        ("lr", "{ low = 1e-3, high = 1, log = 1 }", r"sweep\.space\.lr: log of a range is true or false"),
        ("k", "[1.5]", r"sweep\.space\.k: expected whole numbers of at least 1, not 1\.5"),
        ("k", "[2, 2]", r"sweep\.space\.k: the list has a value twice"),
        ("loss", '["kl"]', r"sweep\.space\.loss: expected some of .*forward_kl, .*, not 'kl'"),
        ("loss", "{ low = 1, high = 2 }", r"sweep\.space\.loss: names have no range"),
        ("student", "[]", r"sweep\.space\.student: the list is empty"),
    ],
)
def test_a_bad_space_is_refused_by_its_key(key, text, message):
    with pytest.raises(ConfigError, match=message):
        parsed(key, text)


def test_a_space_without_parameters_is_refused():
    with pytest.raises(ConfigError, match=r"sweep\.space: names no parameter; expected some of temperature"):
        load_config(ROOT / "configs/digits.toml", ["sweep.space={}"])


def test_a_config_with_a_space_is_written_and_read_alike():
    config = space(alpha={"low": 0.1, "high": 1}, loss=["jsd"])
    again = type(config).model_validate(config.model_dump())
    assert again == config
    assert config.model_dump(mode="json")["sweep"]["space"]["alpha"] == {
        "low": 0.1,
        "high": 1.0,
        "log": False,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"k": [2, 9]}, r"sweep\.space\.k: 9 cannot be tried: .* keeps 4 classes"),
        (
            {"loss": ["forward_kl", "uld"]},
            r"(?s)sweep\.space\.loss: 'uld' cannot be tried: .*use forward_kl for images",
        ),
        ({"student": ["mlp?widht=8"]}, r"sweep\.space\.student: 'mlp\?widht=8' cannot be tried: .*widht"),
    ],
)
def test_what_the_cache_the_data_or_the_students_do_not_allow_costs_no_trial(shared_cache, given, message):
    _, data, cache = shared_cache
    with pytest.raises(ConfigError, match=message):
        checked_space(space(**given), data, cache)


@pytest.mark.slow
def test_drawn_labels_allow_only_the_losses_that_can_be_estimated(tmp_path):
    labels = {"policy": "sample", "num_samples": 6, "num_views": 1}
    config, data, cache = make_cache(tmp_path / "drawn", labels=labels)
    assert default_space(config, data, cache).keys() == {"alpha", "lr"}
    refused = digits_config(labels=labels, sweep={"space": {"loss": ["jsd"]}})
    with pytest.raises(
        ConfigError, match=r"(?s)sweep\.space\.loss: 'jsd' cannot be tried: .*classes drawn at random"
    ):
        checked_space(refused, data, cache)


def test_the_default_space_is_what_the_cache_leaves_open(shared_cache):
    config, data, cache = shared_cache
    found = default_space(config, data, cache)
    assert found["k"] == (1, 2, 4)
    assert found["loss"] == ("forward_kl", "reverse_kl", "jsd", "dkd")
    assert "student" not in found, "the config names one"
    assert found["lr"].low < config.train.lr < found["lr"].high
    ignoring = digits_config(loss={"tail": "ignore"})
    assert "dkd" not in default_space(ignoring, data, cache)["loss"]


def test_a_candidate_has_the_trials_values_and_all_else_of_the_config(shared_cache, tmp_path):
    _, _, cache = shared_cache
    config = digits_config(loss={"name": "jsd", "beta": 0.3}, train={"weight_decay": 0.01})
    params = {"temperature": 2.5, "loss": "dkd", "k": 2, "lr": 0.1, "student": "linear"}
    made = candidate(config, params, cache)
    assert (made.loss.temperature, made.loss.name) == (2.5, "dkd")
    assert made.loss.parameters == {"dkd_alpha": 1.0, "dkd_beta": 8.0}
    assert (made.labels.k, made.train.lr, made.train.weight_decay) == (2, 0.1, 0.01)
    assert made.student.model == "linear"
    assert candidate(config, {"temperature": 2.0}, cache).loss.beta == 0.3
    assert candidate(config, {"k": 4}, cache).labels == config.labels, "the cache as it is"
    smaller = shrink_cache(cache, str(tmp_path / "slim"), ShrinkSettings(k=2))
    assert smaller.manifest.identity["labels"]["k"] == made.labels.k
