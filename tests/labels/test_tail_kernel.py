"""Interpolation of the tail in compiled code: against float64 in NumPy, which shares no code with it."""

import math
from dataclasses import replace

import pytest
import torch

from softcache.errors import TemperatureError
from softcache.labels import DEFAULT_TEMPERATURES, SoftLabels
from softcache.labels.sparsify import top_k
from softcache.labels.temperature import _is_interpolated, soften, soften_masses

GRIDS = [DEFAULT_TEMPERATURES, (1.0, 2.0, 4.0), (1.0, 1.5, 3.0, 7.0, 30.0)]
HOT = (1.02, 1.2, 1.9, 2.9, 6.0, 9.0, 50.0, 1e6)


def make_labels(rows=300, num_classes=50, k=4, temperatures=DEFAULT_TEMPERATURES, scale=3.0) -> SoftLabels:
    logits = torch.randn(rows, num_classes, generator=torch.Generator().manual_seed(rows)) * scale
    logits[: rows // 3] *= 1e-3  # flat
    logits[rows // 3 : rows // 2, : num_classes // 2] += 8.0  # of two clusters
    logits[-3:, k:] = -math.inf  # nothing dropped
    return top_k(logits, k=k, temperatures=temperatures)


def as_double(labels):
    return labels.map_arrays(lambda x: x.double() if x.is_floating_point() else x)


def tail_mass(labels, T):
    assert _is_interpolated(labels, T)
    log_masses, log_tail = soften_masses(labels, T)
    return torch.cat([log_masses, log_tail[:, None]], dim=1).double().softmax(dim=1)[:, -1]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("has_stats", [True, False])
def test_agrees_with_float64(grid, has_stats):
    labels = make_labels(temperatures=grid)
    labels = labels if has_stats else replace(labels, stats=None)
    for T in HOT:
        wanted = soften(as_double(labels), T).log_tail.exp()
        torch.testing.assert_close(tail_mass(labels, T), wanted, rtol=1e-5, atol=1e-5)


def test_a_few_classes_and_rows_of_half_precision():
    labels = make_labels(rows=20, num_classes=5, k=3)
    labels = replace(labels, log_probs=labels.log_probs.half())
    for T in HOT:
        wanted = soften(as_double(labels), T).log_tail.exp()
        torch.testing.assert_close(tail_mass(labels, T), wanted, rtol=1e-5, atol=1e-5)


def test_a_nan_stays_visible_in_its_row_alone():
    labels = make_labels(rows=8)
    labels.log_tail[2, 3] = math.nan
    found = soften_masses(labels, 2.2)[1].isnan()
    assert found.tolist() == [row == 2 for row in range(8)]


def test_a_temperature_that_is_not_known_is_refused():
    labels = replace(make_labels(rows=8), max_temperature=10.0)
    with pytest.raises(TemperatureError, match="at most 10"):
        soften_masses(labels, 11.0)
    assert not _is_interpolated(labels, 0.99)
    assert not _is_interpolated(as_double(labels), 2.2)


def test_no_rows():
    assert len(soften_masses(make_labels(rows=9).take(slice(0, 0)), 2.2)[1]) == 0
