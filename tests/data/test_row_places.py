"""Where stored positions are among the rows of a batch: every label goes to its own row, or nowhere."""

import numpy as np
import pytest
import torch

from softcache.data.tokens import TokenBatch

LENGTH = 6


def batch_of(positions):
    """A batch of samples with rows at these positions."""
    rows = np.array([sample * LENGTH + place for sample, places in enumerate(positions) for place in places])
    counts = np.array([len(places) for places in positions])
    shape = (len(positions), LENGTH)
    return TokenBatch(
        tokens=torch.zeros(shape, dtype=torch.int64),
        segments=torch.zeros(shape, dtype=torch.int64),
        rows=torch.from_numpy(rows.astype(np.int64)),
        targets=torch.zeros(len(rows), dtype=torch.int64),
        lengths=np.full(len(positions), LENGTH),
        row_counts=counts,
        samples=np.arange(len(positions)),
        view=0,
        fingerprints=np.zeros(len(positions), np.uint64),
    )


def one_by_one(positions, stored):
    """The reference: row after row; one that is not in order has none."""
    numbers = [(sample, place) for sample, places in enumerate(positions) for place in places]
    asked = [(sample, place) for sample, places in enumerate(stored) for place in places]
    out = []
    for number, (sample, place) in enumerate(asked):
        found = numbers.index((sample, place)) if (sample, place) in numbers else -1
        flat, before = sample * LENGTH + place, asked[number - 1] if number else None
        in_order = before is None or before[0] * LENGTH + before[1] < flat
        out.append(found if in_order else -1)
    return out


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int64, np.uint64])
@pytest.mark.parametrize(
    "stored",
    [
        [[0, 1, 2], [1, 4], [], [5]],  # all of them
        [[0, 2], [4], [], [5]],
        [[0, 1, 2], [1, 3], [], [5]],  # nothing is predicted there
        [[0, 1, 2], [4, 1], [], [5]],
        [[0, 1, 2], [1, 1], [], [5]],
        [[0, 1, 2, 7], [4], [], [5]],  # as many rows, one of them beyond its sample, where the next one's is
        [[], [], [], []],
    ],
)
def test_each_position_has_its_row(stored, dtype):
    positions = [[0, 1, 2], [1, 4], [], [5]]
    flat = np.array([place for places in stored for place in places], dtype)
    found = batch_of(positions).rows_at(flat, np.array([len(places) for places in stored]))
    assert found.tolist() == one_by_one(positions, stored)


def test_a_position_below_zero_is_of_no_sample():
    found = batch_of([[0, 5], [4]]).rows_at(np.array([0, -1, 4]), np.array([1, 2]))
    assert found.tolist() == [0, -1, 2]
