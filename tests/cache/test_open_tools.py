"""Caches are files that other tools read: zarr-python, xarray, DuckDB and polars give softcache's own numbers."""

import shutil

import duckdb
import numpy as np
import polars as pl
import pytest
import xarray as xr
import zarr

from softcache.labels import STATS
from softcache.reader.open import open_cache
from tests.support.caches import ROOT, make_cache

NAMES = ("ids", "log_probs", "log_tail", "target_log_prob", "stats")
DIMS = {
    "ids": ("view", "sample", "rank"),
    "log_probs": ("view", "sample", "rank"),
    "log_tail": ("view", "sample", "temperature"),
    "target_log_prob": ("view", "sample"),
    "stats": ("view", "sample", "stat"),
    "fingerprint": ("view", "sample"),
}


@pytest.fixture(scope="module", params=["float16", "float32"])
def values(request):
    return request.param


@pytest.fixture(scope="module")
def zarr_cache(values, tmp_path_factory):
    url = tmp_path_factory.mktemp("zarr") / "cache"
    return make_cache(url, capture={"store": "zarr", "codec": {"values": values}})[2]


@pytest.fixture(scope="module")
def parquet_cache(values, tmp_path_factory):
    url = tmp_path_factory.mktemp("parquet") / "cache"
    return make_cache(url, capture={"store": "parquet", "codec": {"values": values}})[2]


def columns_of(cache, view):
    labels, prints = cache.read_rows(np.arange(len(cache)), view)
    return {name: getattr(labels, name) for name in NAMES} | {"fingerprint": prints}


def files(cache):
    return f"{cache.url}/parquet/*.parquet"


def sql(query, cache):
    places = {"labels": f"'{files(cache)}'", "samples": f"'{cache.url}/samples.parquet'"}
    return duckdb.connect().sql(query.format(**places))


# -- Zarr --------------------------------------------------------------------------------------------------


def test_plain_zarr_gives_the_same_numbers(zarr_cache, values):
    group = zarr.open_group(f"{zarr_cache.url}/labels.zarr", mode="r")
    assert set(group.array_keys()) == {*DIMS, "temperature"}
    for view in range(2):
        for name, expected in columns_of(zarr_cache, view).items():
            assert group[name].dtype == expected.dtype
            np.testing.assert_array_equal(group[name][view], expected, err_msg=name)
    assert group["log_probs"].dtype == values
    assert tuple(group["temperature"][:]) == zarr_cache.read([0]).temperatures
    assert tuple(group.attrs["stats"]) == STATS
    assert group.attrs["units"] == "nats"


def test_xarray_knows_the_axes_and_the_temperatures(zarr_cache):
    ds = xr.open_zarr(f"{zarr_cache.url}/labels.zarr", consolidated=False)
    assert {name: ds[name].dims for name in ds.data_vars} == DIMS
    assert dict(ds.sizes) == {"view": 2, "sample": 300, "rank": 4, "temperature": 8, "stat": 4}
    row = zarr_cache.read([17], view=1)
    np.testing.assert_array_equal(ds.ids.sel(view=1, sample=17), row.ids[0])
    np.testing.assert_array_equal(ds.log_probs.isel(view=1, sample=17, rank=0), row.log_probs[0, 0])
    np.testing.assert_array_equal(ds.log_tail.sel(temperature=4.0)[1, 17], row.log_tail[0, 6])
    for view in range(2):
        for name, expected in columns_of(zarr_cache, view).items():
            found = ds[name].sel(view=view).values
            assert found.dtype == expected.dtype, "a fill value is not taken as missing data"
            np.testing.assert_array_equal(found, expected, err_msg=name)


def test_xarray_softens_to_a_grid_temperature_like_softcache(zarr_cache):
    ds = xr.open_zarr(f"{zarr_cache.url}/labels.zarr", consolidated=False).sel(view=0)
    kept = np.exp(ds.log_probs.astype("float64") / 4.0)
    tail = np.exp(ds.log_tail.sel(temperature=4.0).astype("float64"))
    probs = kept / (kept.sum("rank") + tail)
    softened = zarr_cache.read(range(300)).at_temperature(4.0)
    np.testing.assert_allclose(probs, np.exp(softened.log_probs), rtol=2e-6)
    np.testing.assert_allclose(1 - probs.sum("rank"), np.exp(softened.log_tail), rtol=1e-5, atol=1e-7)


def test_what_is_not_labeled_yet_shows_as_no_class_and_nan(zarr_cache, tmp_path):
    url = tmp_path / "cache"
    shutil.copytree(zarr_cache.url, url)
    for shard in zarr_cache.markers[1].shards:
        (url / shard.path).unlink()
    (url / "units" / "00001.json").unlink()
    assert open_cache(str(url)).missing_units == [1]
    ds = xr.open_zarr(url / "labels.zarr", consolidated=False).sel(view=0)
    assert (ds.ids[64:128] == 10).all()
    assert np.isnan(ds.log_probs[64:128]).all()
    rest = np.r_[0:64, 128:300]
    np.testing.assert_array_equal(ds.ids.values[rest], zarr_cache.read(rest).ids)


# -- Parquet -----------------------------------------------------------------------------------------------


def test_duckdb_gives_the_same_numbers(parquet_cache):
    for view in range(2):
        expected = columns_of(parquet_cache, view)
        found = sql(
            f"SELECT * FROM {{labels}} WHERE view = {view} ORDER BY sample", parquet_cache
        ).fetchnumpy()
        assert found["sample"].tolist() == list(range(300))
        assert set(found) == {"view", "sample", *expected}
        for name, wanted in expected.items():
            rows = np.stack(found[name].tolist()) if wanted.ndim == 2 else found[name]
            # DuckDB has no float16 and reads it as float32, which holds it exactly.
            np.testing.assert_array_equal(rows, wanted, err_msg=name)


def test_sql_takes_elements_of_lists_from_one(parquet_cache):
    (row,) = sql(
        "SELECT ids[1], ids[4], log_probs[2], log_tail[1], stats[1] FROM {labels} WHERE sample = 17 AND view = 1",
        parquet_cache,
    ).fetchall()
    labels = parquet_cache.read([17], view=1)
    assert row[:2] == (labels.ids[0, 0], labels.ids[0, 3])
    assert row[2:] == (labels.log_probs[0, 1], labels.log_tail[0, 0], labels.stats[0, 0])


def test_sql_tells_how_often_the_teacher_is_right(parquet_cache):
    rows = sql(
        """
        SELECT view, avg((ids[1] = target)::INT) AS accuracy, count(*) AS rows
        FROM {labels} JOIN {samples} USING (sample)
        GROUP BY view ORDER BY view
        """,
        parquet_cache,
    ).fetchall()
    keys, targets, _ = parquet_cache.samples_table()
    for row, view in zip(rows, (0, 1), strict=True):
        right = parquet_cache.read(range(300), view).ids[:, 0] == targets
        assert row == (view, pytest.approx(right.mean()), 300)
    assert 0 < rows[0][1] < 1, "the known teacher is right sometimes, so the join is put to the test"
    found = sql("SELECT key, target FROM {samples} ORDER BY sample", parquet_cache).fetchall()
    assert found == list(zip(keys, targets.tolist(), strict=True))


def test_sql_tells_the_mass_of_the_kept_classes(parquet_cache, values):
    query = "SELECT avg(list_sum([exp(x) for x in log_probs])) FROM {labels} WHERE view = 0"
    ((mass,),) = sql(query, parquet_cache).fetchall()
    labels = parquet_cache.read(range(300))
    assert mass == pytest.approx(np.exp(labels.log_probs.astype("float64")).sum(1).mean(), rel=1e-12)
    assert mass == pytest.approx(labels.kept_mass(1.0).mean(), rel=1e-3 if values == "float16" else 1e-6)
    assert mass < 0.99, "something was dropped"


def test_sql_softens_to_a_grid_temperature_like_softcache(parquet_cache):
    ((listed,),) = sql(
        "SELECT DISTINCT value::VARCHAR FROM parquet_kv_metadata({labels}) WHERE key = 'temperatures'",
        parquet_cache,
    ).fetchall()
    place = [float(text) for text in listed.split(",")].index(4.0) + 1
    rows = sql(
        f"""
        WITH softened AS (
            SELECT sample, [exp(x / 4.0) for x in log_probs] AS kept, exp(log_tail[{place}]) AS tail
            FROM {{labels}} WHERE view = 1
        )
        SELECT [x / (list_sum(kept) + tail) for x in kept] AS probs, tail / (list_sum(kept) + tail) AS dropped
        FROM softened ORDER BY sample
        """,
        parquet_cache,
    ).fetchnumpy()
    softened = parquet_cache.read(range(300), view=1).at_temperature(4.0)
    np.testing.assert_allclose(np.stack(rows["probs"].tolist()), np.exp(softened.log_probs), rtol=2e-6)
    np.testing.assert_allclose(rows["dropped"], np.exp(softened.log_tail), rtol=2e-6)


def test_polars_gives_the_same_numbers(parquet_cache):
    for view in range(2):
        found = pl.scan_parquet(files(parquet_cache)).filter(pl.col("view") == view).sort("sample").collect()
        assert found["sample"].to_list() == list(range(300))
        for name, wanted in columns_of(parquet_cache, view).items():
            np.testing.assert_array_equal(found[name].to_numpy(), wanted, err_msg=name)


def test_polars_joins_the_ground_truth(parquet_cache):
    samples = pl.read_parquet(f"{parquet_cache.url}/samples.parquet")
    joined = pl.read_parquet(files(parquet_cache)).join(samples, on="sample").sort("view", "sample")
    right = joined.select(pl.col("ids").arr.first() == pl.col("target")).to_series().to_numpy()
    targets = parquet_cache.samples_table().targets
    first = np.concatenate([parquet_cache.read(range(300), view).ids[:, 0] for view in range(2)])
    np.testing.assert_array_equal(right, first == np.tile(targets, 2))
    assert right.any()
    # The ground truth's own log-probability is the kept one wherever it is the first.
    likely = np.concatenate([parquet_cache.read(range(300), view).log_probs[:, 0] for view in range(2)])
    np.testing.assert_allclose(joined["target_log_prob"].to_numpy()[right], likely[right], rtol=1e-3)


def test_packed_records_are_left_out_by_tools_that_cannot_decode_them():
    """As docs/format.md gives it; their encoding is one that DuckDB and polars lack."""
    paths = str(ROOT / "tests/golden/v1-packed/parquet/parquet/*.parquet")
    others = duckdb.sql(f"SELECT * EXCLUDE (record) FROM '{paths}'")
    assert others.columns == ["view", "sample", "fingerprint"]
    found = pl.scan_parquet(paths).select(pl.exclude("record")).collect()
    assert found.sort("view", "sample").rows() == others.order("view, sample").fetchall()
