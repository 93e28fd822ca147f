"""Tests of means over rows, batches and ranks."""

import math

import pytest
import torch
from accelerate import Accelerator

from softcache.student.tasks import RowMeans


def test_means_weigh_rows_and_not_batches():
    means = RowMeans(Accelerator(cpu=True))
    means.update(torch.tensor([True, False, True]), torch.tensor([1.0, 2.0, 6.0]))
    means.update(torch.tensor([False]), torch.tensor([3.0]))
    assert means.compute(2) == [0.5, 3.0]


def test_a_small_value_is_not_lost_in_a_large_sum():
    means = RowMeans(Accelerator(cpu=True))
    for value in (2.0**24, *[1.0] * 64):
        means.update(torch.full((1,), value))
    assert means.compute(1) == [(2.0**24 + 64) / 65]


def test_no_row_is_not_a_score():
    (mean,) = RowMeans(Accelerator(cpu=True)).compute(1)
    assert math.isnan(mean)


def test_ranks_add_up_also_one_without_rows():
    shares = []

    class TwoRanks:
        device = torch.device("cpu")

        def reduce(self, total_S, reduction):
            assert reduction == "sum"
            shares.append(total_S)
            return sum(shares)

    ranks = TwoRanks()
    RowMeans(ranks).compute(1)
    other = RowMeans(ranks)
    other.update(torch.tensor([1.0, 4.0]))
    assert other.compute(1) == pytest.approx([2.5])
