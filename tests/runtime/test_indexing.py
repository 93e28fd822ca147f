"""Indices of rows are NumPy's: the same rows in the same order, and an error where NumPy has one."""

import numpy as np
import pytest
import torch

from softcache.runtime.indexing import row_numbers


def random_index(rng, length):
    kind = rng.integers(6)
    if kind == 0:
        return int(rng.integers(-length - 3, length + 3))
    if kind == 1:
        start, stop = (
            None if rng.random() < 0.2 else int(n) for n in rng.integers(-length - 3, length + 3, 2)
        )
        return slice(start, stop, [None, 1, 2, 3, -1, -2][rng.integers(6)])
    if kind == 2:
        return rng.integers(-length - 1, length + 1, rng.integers(0, 5)).tolist()
    if kind == 3:
        return rng.integers(-length, length, rng.integers(0, 5)).astype(
            rng.choice(["int8", "int32", "int64"])
        )
    mask = rng.random(length + rng.integers(-1, 2) * (rng.random() < 0.3)) < 0.5
    return mask.tolist() if kind == 4 and len(mask) else mask


def test_every_index_chooses_what_numpy_chooses():
    rng, rows, refused = np.random.default_rng(0), np.arange(100, 109), 0
    for _ in range(3000):
        index = random_index(rng, len(rows))
        try:
            expected = np.atleast_1d(rows[index])
        except IndexError:
            refused += 1
            with pytest.raises(IndexError, match=r"rows: .*; expected"):
                row_numbers(index, len(rows), "rows")
            continue
        found = row_numbers(index, len(rows), "rows")
        assert found.dtype == np.int64
        assert np.array_equal(rows[found], expected), index
    assert 100 < refused < 1500


@pytest.mark.parametrize(
    "index",
    [
        1.0,
        "a",
        None,
        ...,
        (1, 2),
        True,
        np.True_,
        [0.5],
        [[0, 1]],
        ["a"],
        np.zeros(0),
        {},
        object(),
        [[0], [1, 2]],
    ],
)
def test_what_is_no_index_of_rows_is_refused(index):
    with pytest.raises(IndexError, match=r"^rows: "):
        row_numbers(index, 4, "rows")


def test_tensors_and_scalars_of_arrays_are_indices():
    for index in (
        torch.tensor([3, -4]),
        np.array([3, 0], np.uint8),
        torch.tensor([True, False, False, True]),
    ):
        assert sorted(row_numbers(index, 4, "rows").tolist()) == [0, 3]
    for index in (torch.tensor(-1), np.int32(3), np.array(3)):
        assert row_numbers(index, 4, "rows").tolist() == [3]
