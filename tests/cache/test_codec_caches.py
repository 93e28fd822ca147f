"""Packed caches from capture to reader, of images and of tokens, in both stores."""

import json

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from click.testing import CliRunner

from softcache.errors import CorruptionError, IdentityError
from softcache.reader.open import open_cache
from softcache.stages.inspect import inspect_command
from softcache.tools.convert import convert_cache
from softcache.tools.verify.teacher import verify_units
from tests.support.caches import make_cache
from tests.support.text_caches import make_text_cache

STEP = 1 / 64


@pytest.fixture(scope="module", params=["zarr", "parquet"])
def store(request):
    return request.param


@pytest.fixture(scope="module", params=["image", "tokens"])
def made(request, store, tmp_path_factory):
    """A packed cache, and one of the same labels in float32."""
    folder = tmp_path_factory.mktemp(f"{request.param}-{store}")

    def make(name, **capture):
        capture = {"store": store, **capture}
        if request.param == "image":
            return make_cache(folder / name, capture=capture)[2]
        return make_text_cache(folder / name, folder, capture=capture)[2]

    return make("packed", codec={"name": "packed", "step": STEP}), make("open", codec={"values": "float32"})


def rows_of(cache, view=0, order=None):
    return cache.read_rows(np.arange(len(cache)) if order is None else order, view)


def test_a_packed_cache_says_what_an_open_one_says(made):
    packed, whole = made
    for view in range(packed.num_views):
        (found, prints), (wanted, same_prints) = rows_of(packed, view), rows_of(whole, view)
        assert np.array_equal(found.ids, wanted.ids)
        assert np.array_equal(prints, same_prints)
        for name, bound in {"log_probs": STEP / 2, "target_log_prob": STEP / 2, "log_tail": STEP / 2}.items():
            np.testing.assert_allclose(
                getattr(found, name), getattr(wanted, name), rtol=0, atol=bound + 1e-5, err_msg=name
            )
        assert np.array_equal(found.log_tail[:, 0], wanted.log_tail[:, 0])
        np.testing.assert_allclose(found.stats, wanted.stats, rtol=2.0**-11)


def test_samples_are_read_in_any_order(made):
    cache = open_cache(made[0].url, window_blocks=1)
    order = np.random.default_rng(0).permutation(len(cache))
    counts = cache.rows.counts(np.arange(len(cache)))
    firsts = np.concatenate([[0], np.cumsum(counts)])
    places = np.concatenate([np.arange(firsts[sample], firsts[sample + 1]) for sample in order])
    shuffled, in_order = rows_of(cache, order=order)[0], rows_of(cache)[0].take(places)
    for name in ("ids", "log_probs", "log_tail", "target_log_prob", "stats"):
        assert np.array_equal(getattr(shuffled, name), getattr(in_order, name)), name
    assert len(cache.read([])) == 0


def test_every_byte_is_verified(made, tmp_path):
    packed, _ = made
    assert list(verify_units(packed)) == []
    copy = convert_cache(packed, str(tmp_path / "copy"), store=packed.manifest.store)
    (shard,) = [shard for shard in copy.markers[0].shards if shard.column in ("record", None)]
    path = tmp_path / "copy" / shard.path
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert [line for line in verify_units(open_cache(copy.url)) if "unit 0" in line]
    with pytest.raises(CorruptionError, match="unit 0"):
        open_cache(copy.url).read([0])
    with pytest.raises(CorruptionError, match="unit 0"):
        open_cache(copy.url, verify=False).read(range(copy.markers[0].stop))  # by the store's own checksums


def test_converting_there_and_back_changes_nothing(made, tmp_path):
    packed, _ = made
    store = packed.manifest.store
    there = convert_cache(packed, str(tmp_path / "there"), store="parquet" if store == "zarr" else "zarr")
    back = convert_cache(there, str(tmp_path / "back"), store=store)
    for number, marker in packed.markers.items():
        assert back.markers[number].shards == marker.shards
    for name in ("ids", "log_probs", "log_tail", "target_log_prob", "stats"):
        assert np.array_equal(getattr(rows_of(there)[0], name), getattr(rows_of(packed)[0], name)), name


def test_other_tools_read_the_records(made):
    packed, _ = made
    codec = packed.manifest.build_codec()
    if packed.manifest.store == "zarr":
        group = zarr.open_group(f"{packed.url}/labels.zarr", mode="r")
        record = group["record"][:] if packed.manifest.rows else group["record"][0]
        assert group["record"].metadata.dimension_names[-1] == "byte"
        first = record[: packed.manifest.plan.chunk_samples if not packed.manifest.rows else 8]
    else:
        name = f"{packed.url}/parquet/00000.parquet"
        values = pq.read_table(name)["record"].to_pylist()[:8]
        # DuckDB does not know bytes split by place; it reads the other columns.
        assert duckdb.sql(f"SELECT sample FROM '{name}'").fetchall()[0] == (0,)
        first = np.frombuffer(b"".join(values), np.uint8).reshape(8, -1)
    found = codec.decode({"record": first})
    assert np.array_equal(found.ids, rows_of(packed)[0].ids[: len(first)])


def test_inspect_shows_the_bytes_of_the_column(made):
    packed, _ = made
    done = CliRunner().invoke(inspect_command, [packed.url, "--json"])
    assert done.exit_code == 0, done.output
    names = set(json.loads(done.output)["bytes_per_row"])
    wanted = {"record", "fingerprint"} if packed.manifest.store == "zarr" else {"all columns"}
    assert wanted <= names
    assert not names & {"ids", "log_probs", "log_tail"}


def test_another_step_is_another_cache(tmp_path):
    make_cache(tmp_path / "cache", capture={"codec": "packed"})
    with pytest.raises(IdentityError, match=r"codec\.step: 0\.03125; 0\.0078125"):
        make_cache(tmp_path / "cache", capture={"codec": {"name": "packed", "step": 0.03125}})
    with pytest.raises(IdentityError, match=r"codec\.name: 'open'; 'packed'"):
        make_cache(tmp_path / "cache")
