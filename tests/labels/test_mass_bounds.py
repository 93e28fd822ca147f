"""Bounds of the tail's mass from T = 1 up: true of every distribution, narrow on those of models, refused beyond a tolerance."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softcache.cache.codecs.packed.codec import PackedCodec
from softcache.errors import TemperatureError
from softcache.labels.mass_bounds import log_tail_bounds
from softcache.labels.sparsify import dense, hybrid, top_k
from softcache.labels.tail import DEFAULT_TEMPERATURES, log_sum_exp
from softcache.losses import distillation_loss, make_loss
from softcache.losses.fused import fused_distillation_loss

GRIDS = {
    "default": DEFAULT_TEMPERATURES,
    "uneven": (1.0, 1.1, 1.25, 1.5, 1.8, 2.5, 4.0, 8.0),
    "two": (1.0, 3.0),
    "one": (1.0,),
}
BETWEEN = (1.0, 1.07, 1.2, 1.5, 3.0, 3.3, 6.0, 10.0, 30.0, 1e3)


def spread_rows(spread: float, num_classes: int, seed: int) -> np.ndarray:
    """[P, V] float64 logits: normal, two clusters, and heavy-tailed."""
    rng = np.random.default_rng(seed)
    clusters = rng.normal(size=num_classes) + spread * (rng.random(num_classes) < 0.1)
    heavy = rng.standard_t(2, num_classes) * spread
    return np.stack([spread * rng.normal(size=num_classes), clusters, heavy])


@given(
    st.floats(0.0, 30.0),
    st.integers(2, 400),
    st.integers(0, 10**6),
    st.sampled_from(sorted(GRIDS)),
    st.floats(1.0, 200.0),
)
def test_bounds_hold_for_every_distribution(spread, num_classes, seed, grid, temperature):
    """The sum over all dropped classes, in float64, is between the bounds, whatever the logits."""
    log_probs = -np.sort(-spread_rows(spread, num_classes, seed))
    log_probs -= log_sum_exp(log_probs)[:, None]
    kept = 1 + seed % (num_classes - 1)
    dropped = log_probs[:, kept:]
    stored = np.stack([log_sum_exp(dropped / t) for t in GRIDS[grid]], axis=1).astype(np.float32)
    low, high = log_tail_bounds(
        stored,
        GRIDS[grid],
        temperature,
        log_support_P=np.full(3, np.log(dropped.shape[1])),
        highest_log_prob_P=log_probs[:, kept - 1],
    )
    truth = log_sum_exp(dropped / temperature)
    assert (low <= truth + 1e-12).all()
    assert (truth <= high + 1e-12).all()


@pytest.mark.parametrize("grid", sorted(GRIDS))
@pytest.mark.parametrize("policy", ["top_k", "without statistics", "hybrid", "masked"])
def test_mass_of_a_record_is_off_by_less_than_it_says(policy, grid):
    logits = torch.from_numpy(np.concatenate([spread_rows(8.0, 300, seed) for seed in range(8)]))
    if policy == "masked":
        logits[:, ::3] = -torch.inf
    if policy == "hybrid":
        labels = hybrid(logits, k=4, draws=20, seeds_P=torch.arange(len(logits)), temperatures=GRIDS[grid])
    else:
        labels = top_k(logits, k=4, temperatures=GRIDS[grid])
    if policy == "without statistics":
        labels = labels.with_arrays({}).map_arrays(lambda x: x)
        labels = type(labels)(**{**labels.__dict__, "stats": None})
    for temperature in BETWEEN:
        p_PV = (logits / temperature).softmax(dim=1)
        softened = labels.at_temperature(temperature)
        exact = labels.ids[:, : labels.exact(labels.log_probs).shape[1]].long()
        truth = 1.0 - p_PV.gather(1, exact).sum(dim=1).numpy()
        off = np.abs(softened.log_tail.exp().double().numpy() - truth)
        assert (off <= labels.tail_error(temperature) + 2e-6).all(), temperature


def test_bounds_are_narrow_on_logits_like_those_of_models():
    """On the default grid, at temperatures that students use: a Zipf vocabulary, and an image teacher's logits."""
    rng = np.random.default_rng(0)
    text = rng.normal(size=(16, 20_000)) - 1.2 * np.log(np.arange(20_000) + 1.0)
    images = 2.5 * rng.normal(size=(64, 1000)) + 12 * (np.arange(1000) < 2)
    for logits, k in ((text, 64), (images, 10)):
        labels = top_k(torch.from_numpy(logits), k=k)
        for temperature in (1.0, 1.5, 2.0, 3.0, 4.0):
            assert labels.tail_error(temperature).max() < 1e-4


def test_known_values_where_the_promise_does_not_hold():
    """Normal logits of standard deviation 30, one class kept: the interpolation is off by more than 2e-3, and the bound shows it."""
    rng = np.random.default_rng(3)
    logits = torch.from_numpy(30.0 * rng.normal(size=(200, 1000)))
    labels = top_k(logits, k=1)
    p_PV = (logits / 5.5).softmax(dim=1)
    truth = 1.0 - p_PV.gather(1, labels.ids.long()).sum(dim=1).numpy()
    off = np.abs(labels.at_temperature(5.5).log_tail.exp().numpy() - truth)
    bound = labels.tail_error(5.5)
    assert off.max() > 2e-3
    assert (off <= bound + 2e-6).all()
    with pytest.raises(TemperatureError, match=rf"position {bound.argmax()}: .*expected at most 0\.002"):
        labels.at_temperature(5.5, max_tail_error=2e-3)
    labels.at_temperature(4.0, max_tail_error=2e-3)  # of the grid


def test_all_classes_and_the_grid_leave_nothing_open():
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(0)) * 5
    for temperature in BETWEEN:
        assert (dense(logits).tail_error(temperature) == 0).all()
    for temperature in DEFAULT_TEMPERATURES:
        assert top_k(logits, k=3).tail_error(temperature).max() < 5e-6
    rows = torch.linspace(1.0, 9.0, 5)
    each = [top_k(logits, k=3).take([row]).tail_error(float(t))[0] for row, t in enumerate(rows)]
    np.testing.assert_allclose(top_k(logits, k=3).tail_error(rows), each, rtol=1e-6)
    with pytest.raises(TemperatureError, match="at least 1"):
        top_k(logits, k=3).tail_error(0.5)


def test_steps_of_a_codec_are_part_of_the_bound():
    logits = torch.randn(50, 500, generator=torch.Generator().manual_seed(0)) * 4
    labels = top_k(logits, k=5, targets_P=torch.zeros(50, dtype=torch.long)).to_numpy()
    codec = PackedCodec(num_classes=500, k=5, temperatures=labels.temperatures, step=0.25)
    packed = codec.decode(codec.encode(labels))
    assert packed.tail_rounding == (0.0, 0.125)
    for temperature in (2.0, 3.0, 5.0):
        truth = 1.0 - (logits / temperature).softmax(dim=1).gather(
            1, torch.from_numpy(labels.ids).long()
        ).sum(1)
        # Of the same kept classes: what their own rounding does is not the tail's.
        kept = log_sum_exp(packed.log_probs / temperature)
        whole = (truth / (1 - truth)).log().numpy() + log_sum_exp(labels.log_probs / temperature)
        expected = 1 / (1 + np.exp(kept - whole))
        off = np.abs(np.exp(packed.at_temperature(temperature).log_tail) - expected)
        assert (off <= packed.tail_error(temperature)).all()
        assert off.max() > labels.tail_error(temperature).max()


@pytest.mark.parametrize("standardize", [False, True])
def test_a_loss_refuses_what_is_not_known_to_its_tolerance(standardize):
    generator = torch.Generator().manual_seed(0)
    teacher = 30.0 * torch.randn(6, 400, generator=generator)
    labels = top_k(teacher, k=1)
    hidden, weight = torch.randn(6, 4, generator=generator), torch.randn(400, 4, generator=generator)
    temperature = 0.2 if standardize else 5.5
    loss = make_loss("forward_kl", standardize=standardize, max_tail_error=1e-3)
    how = {"temperature": temperature, "alpha": 1.0, "loss": loss}
    with pytest.raises(TemperatureError, match="max_tail_error"):
        distillation_loss(hidden @ weight.T, labels, None, **how)
    with pytest.raises(TemperatureError, match="max_tail_error"):
        fused_distillation_loss(hidden, weight, labels, None, **how)
    mask = torch.zeros(6)  # rows without weight may hold anything
    assert distillation_loss(hidden @ weight.T, labels, None, mask=mask, **how) == 0
    assert fused_distillation_loss(hidden, weight, labels, None, weights_P=mask, **how) == 0
    loose = make_loss("forward_kl", standardize=standardize, max_tail_error=1.0)
    assert distillation_loss(hidden @ weight.T, labels, None, **{**how, "loss": loose}) > 0
