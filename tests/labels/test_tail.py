"""The tail between its grid points: against sums over all dropped classes, and the shape that convexity demands."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from softcache.errors import TemperatureError
from softcache.labels.tail import (
    DEFAULT_TEMPERATURES,
    check_temperatures,
    interpolate_log_tail,
    inverse_temperature,
    log_sum_exp,
)
from softcache.labels.tail_bounds import log_tail_bounds_below_one

GRID = DEFAULT_TEMPERATURES
OLD_GRID = (1.0, 1.1, 1.25, 1.5, 1.8, 2.5, 4.0, 8.0)
BETWEEN = [*np.geomspace(1.0, 50.0, 40), 1000.0, 1e6]
FAMILIES = ["flat", "zipf", "peaky", "bimodal", "near one-hot", "N(0, 8^2)"]


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
        "curvature_P": dropped_PV.var(axis=1),
    }


def stored_quickly(dropped_PV: np.ndarray, grid, dtype) -> dict:
    """The same by arrays, for many classes; the grid's values rounded."""
    weights = np.exp(dropped_PV - log_sum_exp(dropped_PV)[:, None])
    return {
        "log_tail_PG": np.stack([log_sum_exp(dropped_PV / t) for t in grid], axis=1).astype(dtype),
        "log_support_P": np.full(len(dropped_PV), math.log(dropped_PV.shape[1])),
        "end_slopes_P": (dropped_PV.mean(axis=1), (weights * dropped_PV).sum(axis=1)),
        "curvature_P": dropped_PV.var(axis=1),
    }


def interpolate(record: dict, temperature, *, grid=GRID, **changes):
    record = {**record, **changes}
    return interpolate_log_tail(record.pop("log_tail_PG"), grid, temperature, **record)


def repeated(record: dict, times: int) -> dict:
    def repeat(x):
        return (
            tuple(repeat(y) for y in x)
            if isinstance(x, tuple)
            else None
            if x is None
            else np.repeat(x, times, axis=0)
        )

    return {name: repeat(x) for name, x in record.items()}


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
    elif shape == "bimodal 20-40":
        logits[:, : num_classes // 4] += rng.uniform(20, 40, (4, 1))
    elif shape == "near one-hot":
        logits[:, 0] += 30
    elif shape == "N(0, 8^2)":
        logits *= 8
    return logits


@pytest.mark.parametrize("temperatures", [GRID, OLD_GRID], ids=["default", "old"])
@pytest.mark.parametrize("num_classes", [10, 300, 32768])
@pytest.mark.parametrize("shape", [*FAMILIES, "bimodal 20-40"])
def test_mass_of_the_tail_is_right_at_every_temperature(shape, num_classes, temperatures):
    log_probs = -np.sort(-log_softmax(make_logits(shape, num_classes)), axis=1)
    for num_kept in (k for k in (1, 3, 64, 256) if k < num_classes):
        kept, dropped = log_probs[:, :num_kept], log_probs[:, num_kept:]
        record = stored_quickly(dropped, temperatures, np.float32)
        for temperature in BETWEEN if num_classes < 1000 else BETWEEN[::4]:
            found = interpolate(record, float(temperature), grid=temperatures)
            log_kept = log_sum_exp(kept / temperature)
            true_mass = 1 / (1 + np.exp(log_kept - log_sum_exp(dropped / temperature)))
            found_mass = 1 / (1 + np.exp(log_kept - found))
            np.testing.assert_allclose(found_mass, true_mass, atol=2e-3)
            assert ((found_mass >= 0) & (found_mass <= 1)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_two_values_are_among_the_dropped_is_found_again(dtype):
    """Two clusters without noise are what the curve assumes, so they come back at every temperature."""
    for high, low, num_high, num_low in [(-1.0, -9.0, 1, 40), (-3.0, -33.0, 5, 7), (-2.0, -2.5, 9, 1)]:
        record = stored(np.array([[high] * num_high + [low] * num_low]))
        slopes = tuple(x.astype(dtype) for x in record.pop("end_slopes_P"))
        record = {name: x.astype(dtype) for name, x in record.items()}
        for temperature in BETWEEN:
            truth = reference_log_tail([high] * num_high + [low] * num_low, temperature)
            found = interpolate(record, float(temperature), end_slopes_P=slopes)
            np.testing.assert_allclose(found, truth, atol=2e-3 if high - low > 20 else 1e-4)


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
    temperatures = np.array([1.0, 1.07, 1.3, 2.0, 4.0, 9.0, 1e6])
    one_by_one = [interpolate(record, float(t))[i] for i, t in enumerate(temperatures)]
    np.testing.assert_allclose(interpolate(record, temperatures), one_by_one, rtol=1e-13)
    tensors = {k: torch.from_numpy(x) for k, x in record.items() if k != "end_slopes_P"}
    tensors["end_slopes_P"] = tuple(torch.from_numpy(x) for x in record["end_slopes_P"])
    found = interpolate(tensors, torch.from_numpy(temperatures))
    np.testing.assert_allclose(found.numpy(), one_by_one, rtol=1e-13)
    scalar = interpolate(tensors, torch.tensor(2.0, dtype=torch.float64))
    np.testing.assert_allclose(scalar.numpy(), interpolate(record, 2.0), rtol=1e-13)


@pytest.mark.parametrize("with_stats", [True, False])
def test_gradient_agrees_with_finite_differences(with_stats):
    record = stored(log_softmax(np.random.default_rng(2).normal(0, 3, (6, 30)))[:, 2:])
    grid = torch.from_numpy(record["log_tail_PG"]).requires_grad_()
    support = torch.from_numpy(record["log_support_P"]).requires_grad_()
    slopes = tuple(torch.from_numpy(x) for x in record["end_slopes_P"])
    curvature = torch.from_numpy(record["curvature_P"])
    temperatures = torch.tensor([1.05, 1.4, 2.0, 3.0, 6.0, 20.0], dtype=torch.float64, requires_grad=True)

    def function(grid, support, temperatures):
        return interpolate_log_tail(
            grid,
            GRID,
            temperatures,
            log_support_P=support,
            end_slopes_P=slopes if with_stats else None,
            curvature_P=curvature,
        )

    assert torch.autograd.gradcheck(function, (grid, support, temperatures), eps=1e-7)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_rows_with_nothing_dropped_give_minus_infinity_and_no_nan_gradient(as_tensor):
    grid = torch.stack(
        [torch.full((len(GRID),), -torch.inf), torch.linspace(-5.0, 0.0, len(GRID))]
    ).requires_grad_()
    support = torch.tensor([-torch.inf, 1.0], requires_grad=True)
    slopes = (torch.tensor([torch.nan, -3.0]), torch.tensor([torch.nan, -2.0]))
    curvature = torch.tensor([torch.nan, 0.5])
    temperature = torch.tensor([30.0, 30.0], requires_grad=True)
    found = interpolate_log_tail(
        grid,
        GRID,
        temperature if as_tensor else 30.0,
        log_support_P=support,
        end_slopes_P=slopes,
        curvature_P=curvature,
    )
    assert found[0] == -torch.inf
    assert torch.isfinite(found[1])
    (found.exp().sum()).backward()
    for leaf in (grid, support, *([temperature] if as_tensor else [])):
        assert torch.isfinite(leaf.grad).all()
    assert (grid.grad[0] == 0).all()
    assert (grid.grad[1] != 0).any()


def test_a_nan_in_the_grid_stays_visible():
    grid = np.zeros((1, len(GRID)))
    grid[0, 3] = np.nan
    assert np.isnan(interpolate_log_tail(grid, GRID, 1.6, log_support_P=np.ones(1)))[0]


@pytest.mark.parametrize("bad", [0.5, 0.0, -1.0, math.inf, -math.inf, math.nan, 1.0 - 1e-12])
def test_temperatures_out_of_range_raise(bad):
    grid, support = np.zeros((2, len(GRID))), np.ones(2)
    with pytest.raises(TemperatureError, match=r"expected a finite number of at least 1\.0"):
        interpolate_log_tail(grid, GRID, bad, log_support_P=support)
    with pytest.raises(TemperatureError, match=r"expected a finite number of at least 1\.0"):
        interpolate_log_tail(grid, GRID, np.array([2.0, bad]), log_support_P=support)


@pytest.mark.parametrize("bad", [np.ones(3), np.ones((2, 1)), torch.ones(2), "2", [1.0, 2.0], None])
def test_temperatures_of_another_kind_or_shape_raise(bad):
    with pytest.raises(TemperatureError, match="one temperature, or one per position"):
        interpolate_log_tail(np.zeros((2, len(GRID))), GRID, bad, log_support_P=np.ones(2))


@pytest.mark.parametrize(
    "bad", [(), (2.0, 4.0), (1.0, 4.0, 2.0), (1.0, 1.0), (1.0, math.inf), (1.0, math.nan)]
)
def test_malformed_grids_raise(bad):
    with pytest.raises(TemperatureError, match=r"expected 1\.0 first"):
        check_temperatures(bad)


def test_any_grid_length_works():
    dropped = log_softmax(np.random.default_rng(3).normal(0, 3, (3, 50)))[:, 5:]
    long = tuple(np.geomspace(1, 20, 25).tolist())
    for grid, tolerance in [((1.0,), 1.5), ((1.0, 3.0), 0.6), (long, 1e-3)]:
        values = np.array([[reference_log_tail(row, t) for t in grid] for row in dropped.tolist()])
        for temperature in (1.0, 1.5, 7.0, 100.0):
            found = interpolate_log_tail(values, grid, temperature, log_support_P=np.full(3, math.log(45)))
            truth = np.array([reference_log_tail(row, temperature) for row in dropped.tolist()])
            np.testing.assert_allclose(found, truth, atol=tolerance)


@given(
    dropped=st.lists(st.floats(min_value=-300.0, max_value=-0.7), min_size=1, max_size=30),
    known=st.sampled_from(["nothing", "slopes", "curvature"]),
)
@example(dropped=[-5.0], known="curvature")
@example(dropped=[-5.0] * 7, known="curvature")
@example(dropped=[-1.0, -1.0, -41.0, -41.0], known="curvature")
def test_falls_in_beta_and_keeps_to_the_bounds_of_convexity(dropped, known):
    record = stored(np.array([dropped]))
    if known == "nothing":
        record["end_slopes_P"] = None
    if known != "curvature":
        record["curvature_P"] = None
    betas = np.unique(np.concatenate([np.linspace(1e-4, 1.0, 200), [1 / t for t in GRID]]))
    nodes = np.array([0.0, *(1 / t for t in reversed(GRID))])
    values = np.array([record["log_support_P"][0], *reversed(record["log_tail_PG"][0])])
    found = interpolate(repeated(record, len(betas)), np.maximum(1.0 / betas, 1.0))
    tolerance = 1e-9 * (1 + np.abs(values).max())
    assert (np.diff(found) <= tolerance).all()
    assert (found <= np.interp(betas, nodes, values) + tolerance).all()
    for j in range(len(nodes) - 1):  # no chord, extended, may lie above the curve
        outside = (betas < nodes[j]) | (betas > nodes[j + 1])
        near = outside & (betas >= nodes[max(j - 1, 0)]) & (betas <= nodes[min(j + 2, len(nodes) - 1)])
        chord = values[j] + (values[j + 1] - values[j]) / (nodes[j + 1] - nodes[j]) * (betas - nodes[j])
        assert (found[near] >= chord[near] - tolerance).all()


@given(
    falls=st.lists(st.floats(min_value=0.0, max_value=50.0), min_size=len(GRID), max_size=len(GRID)),
    slopes=st.tuples(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4)),
    curvature=st.floats(-1.0, 1e6),
)
def test_falls_in_beta_even_for_values_that_no_teacher_makes(falls, slopes, curvature):
    values = 3.0 - np.cumsum([0.0, *falls])  # at beta = 0 and up
    record = {
        "log_tail_PG": values[None, :0:-1],
        "log_support_P": values[:1],
        "end_slopes_P": tuple(np.array([s]) for s in slopes),
        "curvature_P": np.array([curvature]),
    }
    found = interpolate(repeated(record, 300), 1.0 / np.linspace(1e-3, 1.0, 300))
    assert np.isfinite(found).all()
    assert (np.diff(found) <= 1e-9 * (1 + np.abs(values).max())).all()


def bounds_below_one(dropped, temperature, highest=math.inf, *, with_slope=True, grid=GRID, dtype=np.float64):
    record = stored_quickly(np.atleast_2d(dropped), grid, dtype)
    return log_tail_bounds_below_one(
        record["log_tail_PG"],
        grid,
        temperature,
        log_support_P=record["log_support_P"],
        highest_log_prob_P=np.broadcast_to(highest, record["log_support_P"].shape),
        slope_at_one_P=record["end_slopes_P"][1] if with_slope else None,
    )


@given(
    log_weights=st.lists(st.floats(min_value=-60.0, max_value=0.0), min_size=1, max_size=30),
    above=st.floats(0.0, 10.0),
    temperature=st.floats(0.02, 1.0),
    with_slope=st.booleans(),
)
@example(log_weights=[-2.0], above=0.0, temperature=0.5, with_slope=True)
@example(log_weights=[-2.0] * 5, above=0.0, temperature=0.1, with_slope=True)
@example(log_weights=[0.0, -30.0, -30.0], above=0.0, temperature=0.9, with_slope=True)
def test_truth_lies_within_the_bounds_below_one(log_weights, above, temperature, with_slope):
    dropped = [x - 0.7 - math.log(len(log_weights)) for x in log_weights]
    truth = reference_log_tail(dropped, temperature)
    found = bounds_below_one(dropped, temperature, max(dropped) + above, with_slope=with_slope)
    lower, upper, middle = (float(x[0]) for x in found)
    slack = 1e-9 * (1 + abs(truth))
    assert lower - slack <= truth <= upper + slack
    assert lower <= middle <= upper


@pytest.mark.parametrize("num_classes", [10, 300, 32768])
@pytest.mark.parametrize("shape", [*FAMILIES, "bimodal 20-40"])
def test_bounds_below_one_hold_for_rounded_records_and_are_tight_near_one(shape, num_classes):
    log_probs = -np.sort(-log_softmax(make_logits(shape, num_classes)), axis=1)
    for num_kept in (k for k in (1, 3, 64, 256) if k < num_classes):
        kept, dropped = log_probs[:, :num_kept], log_probs[:, num_kept:]
        for temperature in (0.99, 0.95, 0.7, 0.3):
            log_kept = log_sum_exp(kept / temperature)
            bounds = bounds_below_one(dropped, temperature, kept[:, -1], dtype=np.float32)
            tails = (log_sum_exp(dropped / temperature), *bounds)
            truth, *bounds = (np.exp(x - np.logaddexp(x, log_kept)) for x in tails)
            assert (bounds[0] <= truth + 1e-6).all()
            assert (truth <= bounds[1] + 1e-6).all()
            assert temperature < 0.98 or (bounds[1] - bounds[0] < 2e-3).all()


def test_bounds_are_the_stored_value_at_one_and_minus_infinity_where_nothing_was_dropped():
    grid = np.array([[-1.3, *np.linspace(-1.0, 2.0, len(GRID) - 1)], [-np.inf] * len(GRID)], dtype=np.float32)
    known = {
        "log_support_P": np.array([2.5, np.nan], dtype=np.float32),
        "highest_log_prob_P": np.array([np.inf, -np.inf], dtype=np.float32),
        "slope_at_one_P": np.array([-4.0, np.nan], dtype=np.float32),
    }
    for bound in log_tail_bounds_below_one(grid, GRID, 1.0, **known):
        assert bound.dtype == np.float32
        np.testing.assert_array_equal(bound, grid[:, 0])
    for bound in log_tail_bounds_below_one(grid, GRID, np.array([0.5, 0.5], dtype=np.float32), **known):
        assert np.isfinite(bound[0])
        assert bound[1] == -np.inf


def test_bounds_agree_between_torch_and_numpy_and_have_the_right_slope_in_temperature():
    record = stored(log_softmax(np.random.default_rng(4).normal(0, 3, (3, 40)))[:, 2:])
    known = {"log_support_P": record["log_support_P"], "highest_log_prob_P": np.full(3, -0.5)}
    known["slope_at_one_P"] = record["end_slopes_P"][1]
    temperatures = np.array([0.9, 0.5, 0.99])
    tensors = {name: torch.from_numpy(x) for name, x in known.items()}
    grid = torch.from_numpy(record["log_tail_PG"])

    def function(temperatures):
        return log_tail_bounds_below_one(grid, GRID, temperatures, **tensors)

    expected = log_tail_bounds_below_one(record["log_tail_PG"], GRID, temperatures, **known)
    for found, bound in zip(function(torch.from_numpy(temperatures)), expected, strict=True):
        np.testing.assert_allclose(found.numpy(), bound, rtol=1e-12)
    assert torch.autograd.gradcheck(function, (torch.from_numpy(temperatures).requires_grad_(),), eps=1e-7)


def test_bounds_work_for_a_grid_of_one():
    dropped = [-2.0, -3.0, -7.0, -7.0]
    lower, upper, _ = bounds_below_one(dropped, 0.8, -2.0, grid=(1.0,))
    assert lower[0] < reference_log_tail(dropped, 0.8) < upper[0] < lower[0] + 0.1


@pytest.mark.parametrize("bad", [1.5, np.array([1.5])])
def test_bounds_above_one_raise(bad):
    with pytest.raises(TemperatureError, match=r"expected at most 1 for these bounds; found \[?1\.5"):
        bounds_below_one([-2.0, -3.0], bad)


def test_lowest_temperature_may_be_below_the_grid():
    like = np.zeros((2, 3))
    assert inverse_temperature(0.5, GRID, like=like, lowest=0.0) == 2.0
    np.testing.assert_array_equal(
        inverse_temperature(np.array([0.5, 4.0]), GRID, like=like, lowest=0.5), [2.0, 0.25]
    )
    for bad in (0.0, math.nan, math.inf, np.array([1.0, 0.0]), np.array([1.0, math.nan])):
        with pytest.raises(TemperatureError, match="expected a finite number above 0; found"):
            inverse_temperature(bad, GRID, like=like, lowest=0.0)
    with pytest.raises(TemperatureError, match=r"expected a finite number of at least 0\.5; found 0\.4"):
        inverse_temperature(0.4, GRID, like=like, lowest=0.5)


def test_log_sum_exp_of_empty_rows_has_zero_gradient():
    x = torch.tensor([[-torch.inf, -torch.inf], [0.0, -torch.inf], [1.0, 2.0]], requires_grad=True)
    found = log_sum_exp(x)
    torch.testing.assert_close(found, torch.tensor([-torch.inf, 0.0, math.log(math.e + math.e**2)]))
    found[1:].sum().backward(retain_graph=True)
    found[:1].sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.26894143, 0.73105857]]))
