"""The index of rows: counts and sums of a few samples give what a sum over all samples before gives."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softcache.cache.manifest import Plan, RaggedRows
from softcache.cache.row_index import RowIndex
from softcache.cache.samples import SCHEMA, encode_samples, read_row_counts
from softcache.errors import CorruptionError


def plan_of(samples: int, unit_samples: int = 10) -> Plan:
    return Plan(num_samples=samples, num_views=1, unit_samples=unit_samples, chunk_samples=5)


@pytest.mark.parametrize("largest", [0, 1, 255, 256, 70_000, 1 << 33])
@pytest.mark.parametrize("samples", [1, 16, 17, 250])
def test_rows_of_samples(samples, largest):
    random = np.random.default_rng(largest + samples)
    num_rows = random.integers(0, largest, samples, endpoint=True)
    plan, before = plan_of(samples), np.concatenate([[0], np.cumsum(num_rows)])
    index = RowIndex(plan, num_rows)
    wanted = random.integers(0, samples, 40)
    np.testing.assert_array_equal(index.counts(wanted), num_rows[wanted])
    np.testing.assert_array_equal(index.starts(wanted, 0), before[wanted])
    np.testing.assert_array_equal(index.starts(wanted, int(wanted[0])), before[wanted] - before[wanted[0]])
    for unit in (plan.unit(number) for number in range(plan.num_units)):
        for start in range(unit.start, unit.stop):
            expected = (before[start] - before[unit.start], before[unit.stop] - before[unit.start])
            assert index.span(unit, start, unit.stop) == expected
    if largest:
        rows = index.geometry(8)
        units = np.arange(samples) // plan.unit_samples
        expected = units * rows.shard_rows + before[:-1] - before[units * plan.unit_samples]
        np.testing.assert_array_equal(index.first_rows(rows), expected)
        assert rows.num_rows == before[-1]
        assert rows.shard_rows >= max(np.bincount(units, num_rows)) > rows.shard_rows - rows.chunk_rows


def test_counts_take_as_few_bytes_as_they_need_in_row_groups_of_another_writer():
    num_rows = np.array([3, 0, 255, 256, 7, 70_000, 1])
    table = pa.table(
        {
            "sample": pa.array(range(7), pa.int64()),
            "key": [str(n) for n in range(7)],
            "target": pa.nulls(7, SCHEMA.field("target").type),
            "num_rows": pa.array(num_rows, pa.int64()),
            "first_row": pa.array(np.cumsum(num_rows) - num_rows, pa.int64()),
        }
    )
    for groups, kind in ((3, np.uint32), (7, np.uint32)):
        file = io.BytesIO()
        pq.write_table(table, file, row_group_size=groups)
        found = read_row_counts(file.getvalue(), 7)
        np.testing.assert_array_equal(found, num_rows)
        assert found.dtype == kind
    small = encode_samples(["a", "b"], None, np.array([3, 255]), np.array([0, 3]))
    assert read_row_counts(small, 2).dtype == np.uint8


def test_counts_below_zero_are_refused():
    stored = encode_samples(["a", "b", "c"], None, np.array([3, -1, 2]), np.array([0, 3, 2]))
    counts = read_row_counts(stored, 3)
    assert counts.tolist() == [3, -1, 2]
    with pytest.raises(CorruptionError, match="rows are not those of the manifest"):
        RowIndex(plan_of(3), counts, RaggedRows(num_rows=4, shard_rows=8, chunk_rows=8))
