"""Rows of a Parquet cache in another order than that of their samples are refused by readers and found by `verify`."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from softcache.errors import CorruptionError
from softcache.reader.open import open_cache
from softcache.tools.verify.teacher import verify_units
from tests.chaos.forge import Files, make_small, signed, write_files

UNIT = "parquet/00000.parquet"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return {kind: make_small(kind, folder)[2] for kind in ("images-parquet", "tokens-parquet")}


def rewritten(files, change):
    """Returns the files of a cache whose first unit has changed row groups, signed as its writer would."""
    file, sink = pq.ParquetFile(io.BytesIO(files[UNIT])), io.BytesIO()
    with pq.ParquetWriter(sink, file.schema_arrow, compression="zstd", write_page_checksum=True) as writer:
        for number in range(file.num_row_groups):
            group = change(file.read_row_group(number))
            writer.write_table(group, row_group_size=len(group))
    return signed(Files({**files, UNIT: sink.getvalue()}))


def reversed_rows(group):
    return group.take(np.arange(len(group))[::-1])


def reversed_within_samples(group):
    number = np.arange(len(group))
    return group.take(np.lexsort((-number, group["sample"].to_numpy())))


def swapped_samples(group):
    samples = group["sample"].to_numpy()
    return group.take(np.argsort(samples ^ 1, kind="stable"))


def one_fingerprint_changed(group):
    values = group["fingerprint"].to_numpy().copy()
    values[1] += 1
    return replaced(group, "fingerprint", values)


def samples_renamed(group):
    """The labels of one sample under the name of another, in the right order."""
    return replaced(group, "sample", pc.add(group["sample"], pa.scalar(1, pa.int64())))


def replaced(group, name, values):
    place = group.schema.get_field_index(name)
    return group.set_column(
        place,
        group.schema.field(name),
        [pa.array(values) if isinstance(values, np.ndarray) else values.combine_chunks()],
    )


CASES = [
    ("images-parquet", reversed_rows, r"sample \d+ comes after \d+.*sorted by sample"),
    ("tokens-parquet", reversed_rows, r"sample \d+ comes after \d+.*sorted by sample"),
    ("images-parquet", swapped_samples, r"sample 0 comes after 1"),
    ("tokens-parquet", reversed_within_samples, r"not in the order of their positions"),
    ("tokens-parquet", one_fingerprint_changed, r"column fingerprint: the rows of sample 0 differ"),
    ("images-parquet", samples_renamed, r"of other samples than 0 to"),
]


@pytest.mark.parametrize(("kind", "change", "message"), CASES, ids=[f"{k}-{c.__name__}" for k, c, _ in CASES])
def test_rows_in_another_order_are_refused(small, tmp_path, kind, change, message):
    write_files(tmp_path, rewritten(small[kind], change), Files())
    cache = open_cache(tmp_path)
    with pytest.raises(CorruptionError, match=message):
        cache.read(cache.samples_in(0))
    found = verify_units(cache)
    assert any("unit 0" in line for line in found), found


def test_a_file_that_another_tool_writes_in_order_is_read(small, tmp_path):
    """Only its bytes and their checksum differ."""
    for kind, files in small.items():
        write_files(tmp_path / "before" / kind, files, Files())
        write_files(tmp_path / "after" / kind, rewritten(files, lambda group: group), Files())
        before, after = (open_cache(tmp_path / when / kind) for when in ("before", "after"))
        samples = before.samples_in(0)
        one, other = before.read(samples), after.read(samples)
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.log_probs, other.log_probs)
