"""Samples with many rows: both stores keep them whole, in order, without padding, and anyone can find them."""

import shutil

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr

from softcache.errors import CorruptionError, ManifestError
from softcache.labels import concat
from softcache.reader.open import open_cache
from softcache.tools.convert import convert_cache
from tests.support.text_caches import make_text_cache

STORES = ["zarr", "parquet"]
FIELDS = ("ids", "log_probs", "log_tail", "target_log_prob", "stats")


@pytest.fixture(scope="module", params=STORES)
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"ragged-{request.param}")
    return make_text_cache(folder / "cache", folder, capture={"store": request.param})


def assert_same(one, other):
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def test_samples_have_rows_of_their_own_number_and_padding_is_not_stored(made):
    _, data, cache = made
    counts = data.train.source.num_rows()
    assert len(set(counts.tolist())) > 3, "ragged indeed"
    assert cache.manifest.rows.num_rows == counts.sum() == sum(m.num_rows for m in cache.markers.values())
    for sample in range(len(cache)):
        assert len(cache.read([sample])) == counts[sample]


def test_any_order_of_samples_gives_their_rows_in_that_order(made):
    _, _, cache = made
    one_by_one = [cache.read([sample]) for sample in range(len(cache))]
    order = np.random.default_rng(0).permutation(len(cache))
    order = np.concatenate([order, order[:3]])  # some of them twice
    assert_same(open_cache(cache.url, window_blocks=2).read(order), concat([one_by_one[n] for n in order]))
    assert len(cache.read([])) == 0


def test_it_converts_to_the_other_store_and_back_bit_for_bit(made, tmp_path):
    _, _, cache = made
    other = "parquet" if cache.manifest.store == "zarr" else "zarr"
    there = convert_cache(cache, str(tmp_path / "there"), store=other)
    back = convert_cache(there, str(tmp_path / "back"), store=cache.manifest.store)
    everything = np.arange(len(cache))
    for copy in (there, back):
        assert_same(copy.read(everything), cache.read(everything))
        np.testing.assert_array_equal(copy.read_rows(everything)[1], cache.read_rows(everything)[1])
    for number, marker in cache.markers.items():
        assert [s.sha256 for s in back.markers[number].shards] == [s.sha256 for s in marker.shards]


def test_plain_zarr_finds_a_sample_by_the_sample_table(made):
    _, data, cache = made
    if cache.manifest.store != "zarr":
        pytest.skip("of the other store")
    group = zarr.open_group(f"{cache.url}/labels.zarr", mode="r")
    assert group["ids"].metadata.dimension_names == ("row", "rank")
    table = pq.read_table(f"{cache.url}/samples.parquet").to_pylist()
    for sample in (0, 5, len(cache) - 1):
        first, count = table[sample]["first_row"], table[sample]["num_rows"]
        found, wanted = group["ids"][first : first + count], cache.read([sample])
        np.testing.assert_array_equal(found, wanted.ids)
        np.testing.assert_array_equal(group["log_probs"][first : first + count], wanted.log_probs)
        batch = data.train.load([sample])
        np.testing.assert_array_equal(group["position"][first : first + count], batch.positions)
        assert group["fingerprint"][0, sample] == batch.fingerprints[0]
        assert group["num_rows"][0, sample] == count


def test_duckdb_reads_rows_with_their_sample_and_position(made):
    _, _, cache = made
    if cache.manifest.store != "parquet":
        pytest.skip("of the other store")
    rows = duckdb.sql(
        f"SELECT sample, position, ids[1], target_log_prob FROM '{cache.url}/parquet/*.parquet' ORDER BY ALL"
    ).fetchall()
    assert len(rows) == cache.manifest.rows.num_rows
    for sample in (0, 7):
        wanted = cache.read([sample])
        found = [row for row in rows if row[0] == sample]
        assert [row[2] for row in found] == wanted.ids[:, 0].tolist()
        np.testing.assert_allclose([row[3] for row in found], wanted.target_log_prob)


def test_a_sample_table_that_counts_otherwise_is_refused(made, tmp_path):
    _, _, cache = made
    shutil.copytree(cache.url, tmp_path / "cache")
    path = tmp_path / "cache" / "samples.parquet"
    table = pq.read_table(path)
    counts = table["num_rows"].to_pylist()
    counts[0] += 1
    pq.write_table(table.set_column(table.column_names.index("num_rows"), "num_rows", [counts]), path)
    with pytest.raises(CorruptionError, match="is not the table that the manifest names"):
        open_cache(str(tmp_path / "cache")).read([0])


def test_a_marker_of_more_rows_than_a_shard_holds_is_refused(made, tmp_path):
    _, _, cache = made
    shutil.copytree(cache.url, tmp_path / "cache")
    path = tmp_path / "cache" / "units" / "00000.json"
    rows = cache.markers[0].num_rows
    path.write_text(
        path.read_text()
        .replace(f'"num_rows":{rows}', '"num_rows":99999')
        .replace(f'"num_rows": {rows}', '"num_rows": 99999')
    )
    with pytest.raises(ManifestError, match="99999 rows"):
        open_cache(str(tmp_path / "cache")).read([0])


def test_a_flipped_bit_in_any_shard_is_found(made, tmp_path):
    _, _, cache = made
    shutil.copytree(cache.url, tmp_path / "cache")
    for marker in cache.markers.values():
        for shard in marker.shards:
            path = tmp_path / "cache" / shard.path
            good = path.read_bytes()
            path.write_bytes(
                good[: len(good) // 2] + bytes([good[len(good) // 2] ^ 1]) + good[len(good) // 2 + 1 :]
            )
            with pytest.raises(CorruptionError, match=f"unit {marker.unit}"):
                open_cache(str(tmp_path / "cache")).read(np.arange(len(cache)))
            path.write_bytes(good)
