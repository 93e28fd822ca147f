"""Frozen caches of drawn classes, tokens, uint32 ids and packed float16: read number for number, by softcache and from the page."""

import json
import shutil

import numpy as np
import pytest

from softcache.reader.dataset import SoftLabelDataset
from softcache.reader.open import open_cache
from softcache.runs import open_data
from softcache.tools.verify.checksums import verify_units
from tests.golden.make import main, read_columns, text_config, wide_codecs, wide_labels
from tests.support import plain_packed
from tests.support.caches import ROOT

GOLDEN = ROOT / "tests" / "golden"
CACHES = [
    *(f"v1-{kind}/{store}" for kind in ("drawn", "tokens", "wide", "steps") for store in ("zarr", "parquet")),
    "v1-wide/zarr-packed",
    "v1-wide/parquet-packed",
]
LABELS = ("ids", "log_probs", "log_tail", "target_log_prob", "stats", "counts", "log_threshold")


@pytest.fixture(params=CACHES)
def place(request):
    return GOLDEN / request.param


def frozen(place):
    with np.load(place.parent / "expected.npz") as file:  # allow_pickle is off unless it is asked for
        return {
            name.removeprefix(f"{place.name}/"): file[name]
            for name in file
            if name.startswith(f"{place.name}/")
        }


def rows_of(place, expected, cache, name):
    """A frozen column as rows of all views: of Zarr its shards hold more than the rows of their units."""
    values = expected[name]
    if place.name.startswith("parquet"):
        return values
    if cache.manifest.rows is None:
        return values.reshape(-1, *values.shape[2:])
    shard = cache.manifest.rows.shard_rows
    return np.concatenate(
        [values[n * shard : n * shard + m.num_rows] for n, m in sorted(cache.markers.items())]
    )


def test_what_was_frozen_is_read_number_for_number(place):
    cache, expected = open_cache(place), frozen(place)
    stored = [cache.read_stored(np.arange(len(cache)), view) for view in range(cache.num_views)]
    names = [name for name in LABELS if getattr(stored[0].labels, name) is not None]
    packed = cache.manifest.codec["name"] == "packed"
    decoded = {}
    if packed:
        records = rows_of(place, expected, cache, "record")
        plain = [plain_packed.decode(cache.manifest.codec, bytes(record)) for record in records]
        decoded = {name: np.array([row[name] for row in plain]) for name in names}
    for name in names:
        found = np.concatenate([getattr(part.labels, name) for part in stored])
        wanted = decoded[name] if packed else rows_of(place, expected, cache, name)
        if packed and name == "log_tail" and cache.manifest.codec["tail"] != "float32":
            np.testing.assert_allclose(found, wanted, rtol=2e-7)
            continue
        np.testing.assert_array_equal(found, wanted.astype(found.dtype), err_msg=name)
        if not packed:
            assert found.dtype == wanted.dtype
    if cache.manifest.rows is not None:
        position = np.concatenate([part.positions for part in stored])
        np.testing.assert_array_equal(position, rows_of(place, expected, cache, "position"))
    assert (
        expected["ids"].dtype == ("uint32" if cache.num_classes > 65535 else "uint16") if not packed else True
    )


def test_other_tools_still_find_the_frozen_columns(place):
    expected = frozen(place)
    for name, found in read_columns(place).items():
        assert found.dtype == expected[name].dtype
        np.testing.assert_array_equal(found, expected[name], err_msg=name)


def test_every_frozen_unit_verifies_and_is_written_again_byte_for_byte(place):
    cache = open_cache(place)
    assert list(verify_units(cache)) == []
    assert cache.missing_units == []
    assert cache.manifest.to_bytes() == (place / "manifest.json").read_bytes()
    for number, marker in cache.markers.items():
        assert marker.to_bytes() == (place / "units" / f"{number:05d}.json").read_bytes()
    assert sum(path.stat().st_size for path in place.rglob("*") if path.is_file()) < 40_000


@pytest.mark.parametrize("name", list(wide_codecs()))
def test_encoding_the_same_labels_today_gives_the_same_columns(name):
    """From labels by NumPy alone but for the softmax, whose last bit is the CPU's."""
    place = GOLDEN / "v1-wide" / name
    cache, codec, expected = open_cache(place), wide_codecs()[name], frozen(place)
    assert cache.manifest.codec == json.loads(json.dumps(codec.to_dict()))
    labels = cache.read(np.arange(len(cache)))
    fresh = codec.decode(codec.encode(wide_labels()))
    np.testing.assert_array_equal(labels.ids, fresh.ids)
    np.testing.assert_allclose(
        labels.log_probs.astype(float), fresh.log_probs.astype(float), rtol=1e-3, atol=0.02
    )
    if name == "zarr":
        again = codec.encode(cache.read(np.arange(len(cache))))
        for column, values in again.items():
            np.testing.assert_array_equal(values, expected[column].reshape(values.shape), err_msg=column)


def test_drawn_classes_weigh_what_the_page_gives():
    """The weights of both schemes by the page's formulas; their expectation is 1, so that sums are about right."""
    for store in ("zarr", "parquet"):
        cache = open_cache(GOLDEN / "v1-drawn" / store)
        sampling = cache.manifest.codec["sampling"]
        labels = cache.read(np.arange(len(cache)))
        p = np.exp(labels.log_probs.astype(np.float64))
        used = labels.ids < 10
        if sampling["replacement"]:
            weight = labels.counts / sampling["draws"] * np.exp(labels.log_tail[:, :1]) / np.where(used, p, 1)
        else:
            weight = np.maximum(1, np.exp(labels.log_threshold)[:, None] / np.where(used, p, 1))
        weight[:, : sampling["exact"]] = 1
        softened = labels.at_temperature(1.0)
        np.testing.assert_allclose(np.exp(softened.log_weights)[used], weight[used], rtol=2e-3)
        assert abs((weight * p * used).sum(1).mean() - 1) < 0.1


def test_the_frozen_tokens_are_joined_with_the_texts_that_are_frozen_with_them(tmp_path, monkeypatch):
    """The tokenizer that is trained on them is that of the library's version, so a cache joins only where it is the same."""
    monkeypatch.chdir(ROOT)
    for store in ("zarr", "parquet"):
        texts = (GOLDEN / "v1-tokens" / "texts.jsonl").relative_to(ROOT)
        data = open_data(text_config(store, texts, tmp_path / store))
        cache = open_cache(GOLDEN / "v1-tokens" / store)
        assert cache.samples_table().keys == data.train.source.keys()
        if cache.manifest.identity["tokenizer"]["digest"] == data.train.source.tokenizer_digest:
            batch = SoftLabelDataset(data.train, cache).load(np.arange(len(cache)), 0)
            assert len(batch.labels) == sum(marker.num_rows for marker in cache.markers.values())


def test_a_number_that_is_touched_no_longer_verifies(tmp_path):
    shutil.copytree(GOLDEN / "v1-drawn/zarr", tmp_path / "cache")
    path = tmp_path / "cache" / open_cache(tmp_path / "cache").markers[3].shards[0].path
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert any("invariant I5" in line for line in verify_units(open_cache(tmp_path / "cache")))


def test_what_is_frozen_is_never_written_again(monkeypatch):
    monkeypatch.setattr("tests.golden.make.capture", lambda *_: pytest.fail("it labels"))
    for kind in ("drawn", "tokens", "wide"):
        with pytest.raises(SystemExit, match="never written again"):
            main([kind])
