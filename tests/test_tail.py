"""The tail between its grid points: against sums over all dropped classes, and the shape that convexity demands."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import TemperatureError
from pipeline.labels import DEFAULT_TEMPERATURES
from pipeline.tail import check_temperatures, interpolate_log_tail, log_sum_exp

GRID = DEFAULT_TEMPERATURES
BETWEEN = [*np.geomspace(1.0, 50.0, 30), 1000.0]


def reference_log_tail(dropped_log_probs: list[float], temperature: float) -> float:
    peak = max(dropped_log_probs)
    return peak / temperature + math.log(sum(math.exp((x - peak) / temperature) for x in dropped_log_probs))


def stored(dropped_PV: np.ndarray) -> dict:
    """Grid values, count and slopes of dropped log-probabilities [P, V], by loops."""
    rows = dropped_PV.tolist()
    weights = np.exp(dropped_PV - dropped_PV.max(axis=1, keepdims=True))
    return {
        "log_tail_PG": np.array([[reference_log_tail(row, t) for t in GRID] for row in rows]),
        "log_support_P": np.full(len(rows), math.log(dropped_PV.shape[1])),
        "end_slopes_P": (dropped_PV.mean(axis=1), (weights * dropped_PV).sum(axis=1) / weights.sum(axis=1)),
    }


def interpolate(record: dict, temperature, **changes):
    record = {**record, **changes}
    return interpolate_log_tail(record.pop("log_tail_PG"), GRID, temperature, **record)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    peak = logits.max(axis=1, keepdims=True)
    return logits - peak - np.log(np.exp(logits - peak).sum(axis=1, keepdims=True))


def make_logits(shape: str, num_classes: int) -> np.ndarray:
    rng = np.random.default_rng(num_classes)
    logits = rng.normal(0, 1, (4, num_classes))
    if shape == "flat":
        logits *= 0.3
    elif shape == "zipf":
        logits = 0.1 * logits - 1.5 * np.log(np.arange(1, num_classes + 1))
    elif shape == "peaky":
        logits[:, :3] += rng.uniform(5, 12, (4, 3))
    elif shape == "bimodal":
        logits[:, : num_classes // 4] += 10
    elif shape == "near one-hot":
        logits[:, 0] += 30
    return logits


@pytest.mark.parametrize("num_classes", [10, 300, 32768])
@pytest.mark.parametrize("shape", ["flat", "zipf", "peaky", "bimodal", "near one-hot"])
def test_mass_of_the_tail_is_right_at_every_temperature(shape, num_classes):
    log_probs = -np.sort(-log_softmax(make_logits(shape, num_classes)), axis=1)
    for num_kept in (1, 3, 64):
        if num_kept >= num_classes:
            continue
        kept, dropped = log_probs[:, :num_kept], log_probs[:, num_kept:]
        weights = np.exp(dropped - dropped.max(axis=1, keepdims=True))
        slopes = (dropped.mean(axis=1), (weights * dropped).sum(axis=1) / weights.sum(axis=1))
        grid = np.stack([log_sum_exp(dropped / t) for t in GRID], axis=1).astype(np.float32)
        support = np.full(4, math.log(num_classes - num_kept))
        for temperature in BETWEEN:
            found = interpolate_log_tail(
                grid, GRID, float(temperature), log_support_P=support, end_slopes_P=slopes
            )
            log_kept = log_sum_exp(kept / temperature)
            true_mass = 1 / (1 + np.exp(log_kept - log_sum_exp(dropped / temperature)))
            np.testing.assert_allclose(1 / (1 + np.exp(log_kept - found)), true_mass, atol=2e-3)


def test_grid_points_give_the_stored_value_exactly():
    log_tail = stored(log_softmax(np.random.default_rng(0).normal(0, 4, (5, 40)))[:, 3:])
    log_tail["log_tail_PG"] = log_tail["log_tail_PG"].astype(np.float32)
    log_tail["log_support_P"] = log_tail["log_support_P"].astype(np.float32)
    for index, temperature in enumerate(GRID):
        found = interpolate(log_tail, temperature)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, log_tail["log_tail_PG"][:, index])
        per_position = interpolate(log_tail, np.full(5, temperature, dtype=np.float32))
        np.testing.assert_allclose(per_position, log_tail["log_tail_PG"][:, index], rtol=2e-6, atol=2e-6)


def test_temperatures_per_position_and_torch_agree_with_one_number():
    record = stored(log_softmax(np.random.default_rng(1).normal(0, 3, (7, 30)))[:, 2:])
    temperatures = np.array([1.0, 1.07, 1.3, 2.0, 4.0, 9.0, 200.0])
    one_by_one = [interpolate(record, float(t))[i] for i, t in enumerate(temperatures)]
    np.testing.assert_allclose(interpolate(record, temperatures), one_by_one, rtol=1e-13)
    tensors = {
        "log_tail_PG": torch.from_numpy(record["log_tail_PG"]),
        "log_support_P": torch.from_numpy(record["log_support_P"]),
        "end_slopes_P": tuple(torch.from_numpy(x) for x in record["end_slopes_P"]),
    }
    found = interpolate(tensors, torch.from_numpy(temperatures))
    np.testing.assert_allclose(found.numpy(), one_by_one, rtol=1e-13)
    scalar = interpolate(tensors, torch.tensor(2.0, dtype=torch.float64))
    np.testing.assert_allclose(scalar.numpy(), interpolate(record, 2.0), rtol=1e-13)


def test_gradient_agrees_with_finite_differences():
    record = stored(log_softmax(np.random.default_rng(2).normal(0, 3, (6, 30)))[:, 2:])
    grid = torch.from_numpy(record["log_tail_PG"]).requires_grad_()
    support = torch.from_numpy(record["log_support_P"]).requires_grad_()
    temperatures = torch.tensor([1.05, 1.4, 2.0, 3.0, 6.0, 20.0], dtype=torch.float64, requires_grad=True)

    def function(grid, support, temperatures):
        return interpolate_log_tail(grid, GRID, temperatures, log_support_P=support)

    assert torch.autograd.gradcheck(function, (grid, support, temperatures), eps=1e-7)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_rows_with_nothing_dropped_give_minus_infinity_and_no_nan_gradient(as_tensor):
    grid = torch.stack([torch.full((8,), -torch.inf), torch.linspace(-5.0, 0.0, 8)]).requires_grad_()
    support = torch.tensor([-torch.inf, 1.0], requires_grad=True)
    slopes = (torch.tensor([torch.nan, -3.0]), torch.tensor([torch.nan, -2.0]))
    temperature = torch.tensor([3.0, 3.0], requires_grad=True)
    found = interpolate_log_tail(
        grid, GRID, temperature if as_tensor else 3.0, log_support_P=support, end_slopes_P=slopes
    )
    assert found[0] == -torch.inf
    assert torch.isfinite(found[1])
    (found.exp().sum()).backward()
    for leaf in (grid, support, *([temperature] if as_tensor else [])):
        assert torch.isfinite(leaf.grad).all()
    assert (grid.grad[0] == 0).all()
    assert (grid.grad[1] != 0).any()


def test_a_nan_in_the_grid_stays_visible():
    grid = np.zeros((1, 8))
    grid[0, 3] = np.nan
    assert np.isnan(interpolate_log_tail(grid, GRID, 1.6, log_support_P=np.ones(1)))[0]


@pytest.mark.parametrize("bad", [0.5, 0.0, -1.0, math.inf, -math.inf, math.nan, 1.0 - 1e-12])
def test_temperatures_out_of_range_raise(bad):
    grid, support = np.zeros((2, 8)), np.ones(2)
    with pytest.raises(TemperatureError, match=r"expected a finite number of at least 1\.0"):
        interpolate_log_tail(grid, GRID, bad, log_support_P=support)
    with pytest.raises(TemperatureError, match=r"expected a finite number of at least 1\.0"):
        interpolate_log_tail(grid, GRID, np.array([2.0, bad]), log_support_P=support)


@pytest.mark.parametrize("bad", [np.ones(3), np.ones((2, 1)), torch.ones(2), "2", [1.0, 2.0], None])
def test_temperatures_of_another_kind_or_shape_raise(bad):
    with pytest.raises(TemperatureError, match="one temperature, or one per position"):
        interpolate_log_tail(np.zeros((2, 8)), GRID, bad, log_support_P=np.ones(2))


@pytest.mark.parametrize(
    "bad", [(), (2.0, 4.0), (1.0, 4.0, 2.0), (1.0, 1.0), (1.0, math.inf), (1.0, math.nan)]
)
def test_malformed_grids_raise(bad):
    with pytest.raises(TemperatureError, match=r"expected 1\.0 first"):
        check_temperatures(bad)


def test_any_grid_length_works():
    dropped = log_softmax(np.random.default_rng(3).normal(0, 3, (3, 50)))[:, 5:]
    for grid, tolerance in [
        ((1.0,), 1.5),
        ((1.0, 3.0), 0.6),
        (tuple(np.geomspace(1, 20, 25).tolist()), 1e-3),
    ]:
        values = np.array([[reference_log_tail(row, t) for t in grid] for row in dropped.tolist()])
        for temperature in (1.0, 1.5, 7.0, 100.0):
            found = interpolate_log_tail(values, grid, temperature, log_support_P=np.full(3, math.log(45)))
            truth = np.array([reference_log_tail(row, temperature) for row in dropped.tolist()])
            np.testing.assert_allclose(found, truth, atol=tolerance)


@settings(max_examples=150, deadline=None)
@given(
    dropped=st.lists(st.floats(min_value=-300.0, max_value=-0.7), min_size=1, max_size=30),
    with_slopes=st.booleans(),
)
def test_falls_in_beta_and_keeps_to_the_bounds_of_convexity(dropped, with_slopes):
    record = stored(np.array([dropped]))
    if not with_slopes:
        record["end_slopes_P"] = None
    betas = np.unique(np.concatenate([np.linspace(1e-4, 1.0, 200), [1 / t for t in GRID]]))
    nodes = np.array([0.0, *(1 / t for t in reversed(GRID))])
    values = np.array([record["log_support_P"][0], *reversed(record["log_tail_PG"][0])])
    found = np.array([interpolate(record, min(max(1.0 / b, 1.0), 1e6))[0] for b in betas])
    tolerance = 1e-9 * (1 + np.abs(values).max())
    assert (np.diff(found) <= tolerance).all()
    assert (found <= np.interp(betas, nodes, values) + tolerance).all()
    for j in range(len(nodes) - 1):  # no chord, extended, may lie above the curve
        outside = (betas < nodes[j]) | (betas > nodes[j + 1])
        near = outside & (betas >= nodes[max(j - 1, 0)]) & (betas <= nodes[min(j + 2, len(nodes) - 1)])
        chord = values[j] + (values[j + 1] - values[j]) / (nodes[j + 1] - nodes[j]) * (betas - nodes[j])
        assert (found[near] >= chord[near] - tolerance).all()


@settings(max_examples=100, deadline=None)
@given(
    falls=st.lists(st.floats(min_value=0.0, max_value=50.0), min_size=8, max_size=8),
    slopes=st.tuples(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4)),
)
def test_falls_in_beta_even_for_values_that_no_teacher_makes(falls, slopes):
    values = 3.0 - np.cumsum([0.0, *falls])  # at beta = 0 and up
    found = [
        interpolate_log_tail(
            values[None, :0:-1],
            GRID,
            1.0 / beta,
            log_support_P=values[:1],
            end_slopes_P=tuple(np.array([s]) for s in slopes),
        )[0]
        for beta in np.linspace(1e-3, 1.0, 300)
    ]
    assert np.isfinite(found).all()
    assert (np.diff(found) <= 1e-9 * (1 + np.abs(values).max())).all()


def test_log_sum_exp_of_empty_rows_has_zero_gradient():
    x = torch.tensor([[-torch.inf, -torch.inf], [0.0, -torch.inf], [1.0, 2.0]], requires_grad=True)
    found = log_sum_exp(x)
    torch.testing.assert_close(found, torch.tensor([-torch.inf, 0.0, math.log(math.e + math.e**2)]))
    found[1:].sum().backward(retain_graph=True)
    found[:1].sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.26894143, 0.73105857]]))
