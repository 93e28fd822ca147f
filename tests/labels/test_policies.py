"""The registry of label policies: keys of other policies are refused, and a custom policy works by its path."""

import numpy as np
import pytest

from softcache.errors import SpecError
from softcache.labels.sparsify import POLICIES, label_settings
from tests.support.caches import digits_config, make_cache
from tests.support.extend_page import write_example


def test_the_built_in_policies_are_registered():
    assert set(dict(POLICIES.items())) == {"top_k", "top_p", "dense", "sample", "hybrid", "hidden"}
    for name, policy in POLICIES.items():
        assert policy().policy == name


@pytest.mark.parametrize(
    ("policy", "key"),
    [
        ("top_k", "p"),
        ("top_k", "num_samples"),
        ("top_k", "seed"),
        ("top_k", "proposal_temperature"),
        ("top_p", "num_samples"),
        ("dense", "k"),
        ("sample", "k"),
        ("hybrid", "p"),
        ("hidden", "k"),
    ],
)
def test_a_key_that_the_policy_does_not_read_is_refused_by_its_dotted_name(policy, key):
    labels = {"policy": policy, key: 1}
    with pytest.raises(ValueError, match=rf"labels\.{key}\n *unknown key with policy = '{policy}'"):
        digits_config(labels=labels)


def test_an_unknown_policy_is_refused_with_the_nearest():
    with pytest.raises(SpecError, match=r"label policy 'top-k': unknown; did you mean top_k"):
        label_settings("top-k")


@pytest.mark.parametrize("temperature", [1.0, 1.1428571428571428, 1.6, 2.6666666666666665, 3.0, 8.0, 49.0])
def test_a_proposal_temperature_survives_the_identity(temperature):
    settings = label_settings("hybrid", proposal_temperature=temperature)
    identity = settings.identity(100)
    assert identity["proposal_exponent"] == 1 / temperature
    again = type(settings).keys_of_identity(identity)
    assert again["proposal_temperature"] == temperature
    assert "draws" in identity
    assert again["num_samples"] == settings.num_samples


def test_a_custom_policy_by_its_path(tmp_path, monkeypatch):
    tables = write_example("A label policy", tmp_path / "my_policies.py")
    monkeypatch.syspath_prepend(tmp_path)
    _, _, cache = make_cache(tmp_path / "cache", **tables)
    identity = cache.manifest.identity["labels"]
    assert (identity["policy"], identity["k"], identity["min_prob"]) == ("my_policies:Threshold", 4, 0.05)
    labels = cache.read(range(20), 0)
    is_kept = labels.ids < cache.num_classes
    assert (np.exp(labels.log_probs[is_kept].astype(float)) > 0.049).all()
    assert 1 < is_kept.sum(axis=1).max() <= 4
    with pytest.raises(ValueError, match=r"labels\.p\n *unknown key"):
        digits_config(labels={**tables["labels"], "p": 0.5})
