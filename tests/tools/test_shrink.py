"""A shrunk cache is the cache that a capture with the smaller settings makes: row by row, and by its manifest."""

import shutil

import numpy as np
import pytest

from softcache import open_cache
from softcache.cache.manifest import diff_manifests
from softcache.errors import ConfigError, CorruptionError, IdentityError, LabelError, TemperatureError
from softcache.labels import SoftLabels, truncate_labels
from softcache.labels.sparsify import dense, top_k, top_p
from softcache.runs import capture_labels, open_teacher
from softcache.tools.shrink import ShrinkSettings, shrink_cache, shrink_manifest
from tests.support.caches import make_cache
from tests.support.text_caches import make_text_cache

EXACT = {
    "labels": {"policy": "dense", "num_views": 2},
    "capture": {"codec": {"values": "float32"}, "unit_samples": 128},
}
GRID = (1.0, 2.0, 4.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("small")


@pytest.fixture(scope="module")
def images(folder):
    """A cache of every class in float32."""
    return make_cache(folder / "images", **EXACT)[2]


@pytest.fixture(scope="module")
def texts(folder):
    return make_text_cache(
        folder / "texts",
        folder,
        labels={"k": 40, "positions": {"policy": "every", "every": 3}},
        capture={"codec": {"values": "float32"}},
    )[2]


def captured(folder, cache, url, *, values="float32", codec=None, **labels):
    """What the cache's teacher gives with other `[labels]`."""
    make = (
        make_cache
        if cache.manifest.kind == "image"
        else lambda url, **more: make_text_cache(url, folder, **more)
    )
    capture = {"codec": codec or {"values": values}} | (
        {"unit_samples": 128} if cache.manifest.kind == "image" else {}
    )
    if cache.manifest.kind == "tokens":
        labels = {"positions": {"policy": "every", "every": 3}} | labels
    return make(url, labels={"num_views": cache.num_views} | labels, capture=capture)[2]


def rows(cache, view=0):
    return cache.read_stored(cache.samples_in(view), view)


def assert_same(found, expected, tail=2e-6):
    """Same identity; and of the rows everything to the bit, but the tail's sum."""
    assert diff_manifests(found.manifest, expected.manifest) == []
    assert found.manifest.samples_sha256 == expected.manifest.samples_sha256
    assert found.missing_units == expected.missing_units == []
    for view in range(expected.num_views):
        here, there = rows(found, view), rows(expected, view)
        np.testing.assert_array_equal(here.fingerprints, there.fingerprints)
        np.testing.assert_array_equal(here.counts, there.counts)
        if there.positions is not None:
            np.testing.assert_array_equal(here.positions, there.positions)
        for name in ("ids", "log_probs", "target_log_prob", "stats", "counts"):
            np.testing.assert_array_equal(
                getattr(here.labels, name), getattr(there.labels, name), err_msg=name
            )
        np.testing.assert_allclose(here.labels.log_tail, there.labels.log_tail, rtol=0, atol=tail)


# -- records -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_numpy", [True, False])
@pytest.mark.parametrize("k", [1, 7, 60])
def test_a_truncated_record_is_the_record_of_fewer_classes(as_numpy, k):
    import torch

    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) * 4
    logits[3, 10:] = -torch.inf
    logits[4] = 0.0  # all ties
    convert = SoftLabels.to_numpy if as_numpy else SoftLabels.to_torch
    for big in (dense(logits, temperatures=GRID), top_k(logits, k=60, temperatures=GRID)):
        for found, expected in (
            (truncate_labels(convert(big), k), top_k(logits, k=k, temperatures=GRID)),
            (truncate_labels(convert(big), k, p=0.8), top_p(logits, p=0.8, max_k=k, temperatures=GRID)),
            (
                truncate_labels(convert(big), k, temperatures=(1.0, 4.0)),
                top_k(logits, k=k, temperatures=(1.0, 4.0)),
            ),
        ):
            expected = convert(expected)
            assert found.temperatures == expected.temperatures
            for name in ("ids", "log_probs", "stats"):
                np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
            assert found.log_tail.dtype == expected.log_tail.dtype
            np.testing.assert_allclose(found.log_tail, expected.log_tail, rtol=0, atol=2e-6)


def test_the_tail_at_an_unstored_temperature_is_known_only_if_nothing_was_dropped():
    import torch

    logits = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    found = truncate_labels(dense(logits, temperatures=(1.0,)), 3, temperatures=GRID)
    np.testing.assert_allclose(found.log_tail, top_k(logits, k=3, temperatures=GRID).log_tail, atol=2e-6)
    with pytest.raises(
        TemperatureError, match="found 2, at which the mass of the dropped classes was not stored"
    ):
        truncate_labels(top_k(logits, k=5, temperatures=(1.0,)), 3, temperatures=GRID)
    with pytest.raises(LabelError, match="expected k from 1 to 5"):
        truncate_labels(top_k(logits, k=5), 6)
    with pytest.raises(LabelError, match=r"mass p in \(0, 1\]"):
        truncate_labels(top_k(logits, k=5), 5, p=1.5)


# -- caches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "labels", "values"),
    [
        ({"k": 3}, {"k": 3}, "float32"),
        ({"k": 3, "values": "float16"}, {"k": 3}, "float16"),
        ({"policy": "top_p", "k": 6, "p": 0.7}, {"policy": "top_p", "k": 6, "p": 0.7}, "float32"),
        ({"k": 2, "temperatures": (1.0, 4.0, 8.0)}, {"k": 2, "temperatures": [1.0, 4.0, 8.0]}, "float32"),
        ({"k": 2, "num_views": 1}, {"k": 2, "num_views": 1}, "float32"),
        ({"num_views": 1}, {"policy": "dense", "num_views": 1}, "float32"),
    ],
)
def test_images_are_shrunk_to_what_a_capture_makes(images, folder, tmp_path, asked, labels, values):
    found = shrink_cache(images, tmp_path / "small", ShrinkSettings(**asked))
    assert found.manifest.slimmed_from == images.manifest_sha256
    assert_same(found, captured(folder, images, tmp_path / "captured", values=values, **labels))


@pytest.mark.parametrize("store", ["zarr", "parquet"])
def test_texts_are_shrunk_to_what_a_capture_makes(texts, folder, tmp_path, store):
    found = shrink_cache(texts, tmp_path / "small", ShrinkSettings(k=6, store=store))
    assert found.manifest.store == store
    expected = captured(folder, texts, tmp_path / "captured", k=6)
    if store == "parquet":
        found = shrink_cache(found, tmp_path / "back", ShrinkSettings(store="zarr"))
    assert_same(found, expected)


@pytest.mark.parametrize("store", ["zarr", "parquet"])
def test_the_rows_of_a_chunk_may_change(texts, folder, tmp_path, store):
    """They are read as before, and are those that a capture with this setting makes."""
    shard_rows = texts.manifest.rows.shard_rows
    chunk_rows = next(rows for rows in range(2, shard_rows) if shard_rows % rows == 0)
    found = shrink_cache(texts, tmp_path / "small", ShrinkSettings(chunk_rows=chunk_rows, store=store))
    assert found.manifest.rows.chunk_rows == chunk_rows < texts.manifest.rows.chunk_rows
    for name in ("ids", "log_probs", "log_tail"):
        np.testing.assert_array_equal(getattr(rows(found).labels, name), getattr(rows(texts).labels, name))
    expected = make_text_cache(
        tmp_path / "captured",
        folder,
        labels={"k": 40, "positions": {"policy": "every", "every": 3}},
        capture={"codec": {"values": "float32"}, "chunk_rows": chunk_rows, "store": store},
    )[2]
    assert expected.manifest.rows == found.manifest.rows
    assert_same(found, expected, tail=0)


@pytest.mark.parametrize(
    "labels",
    [
        {"policy": "sample", "num_samples": 5, "seed": 3},
        {"policy": "sample", "num_samples": 5, "proposal_temperature": 2.0, "temperatures": (1.0, 2.0, 4.0)},
        {"policy": "hybrid", "k": 2, "num_samples": 3, "seed": 7},
    ],
)
def test_a_cache_of_every_class_is_drawn_from_as_a_capture_would(images, folder, tmp_path, labels):
    found = shrink_cache(images, tmp_path / "small", ShrinkSettings(**labels))
    listed = labels | ({"temperatures": list(labels["temperatures"])} if "temperatures" in labels else {})
    expected = captured(folder, images, tmp_path / "captured", **listed)
    assert_same(found, expected)
    if labels["policy"] == "hybrid":
        here, there = rows(found).labels.log_threshold, rows(expected).labels.log_threshold
        np.testing.assert_allclose(here, there, rtol=0, atol=2e-6)


def test_the_codec_may_change(images, folder, tmp_path):
    packed = shrink_cache(images, tmp_path / "packed", ShrinkSettings(k=4, codec="packed", step=1 / 32))
    labels, expected = rows(packed).labels, rows(images).labels
    assert packed.manifest.codec["name"] == "packed"
    assert np.abs(labels.log_probs - expected.log_probs[:, :4]).max() <= 1 / 64 + 1e-6
    codec = {"name": "packed", "step": 1 / 32}
    assert_same(packed, captured(folder, images, tmp_path / "captured", codec=codec, k=4), tail=1 / 32 + 1e-6)
    thinner = shrink_cache(packed, tmp_path / "thinner", ShrinkSettings(k=2))
    np.testing.assert_array_equal(rows(thinner).labels.log_probs, labels.log_probs[:, :2])
    with pytest.raises(LabelError, match=r"steps of 0.03125.*its rounded values cannot become float16"):
        shrink_cache(packed, tmp_path / "no", ShrinkSettings(codec="open"))


def test_drawn_classes_are_copied_whole_or_refused(images, tmp_path):
    drawn = shrink_cache(images, tmp_path / "drawn", ShrinkSettings(policy="hybrid", k=2, num_samples=3))
    found = shrink_cache(drawn, tmp_path / "copy", ShrinkSettings(store="parquet", temperatures=(1.0, 4.0)))
    np.testing.assert_array_equal(rows(found).labels.ids, rows(drawn).labels.ids)
    np.testing.assert_array_equal(rows(found).labels.log_tail, rows(drawn).labels.log_tail[:, [0, 6]])
    for asked in ({"k": 1}, {"num_samples": 2}, {"policy": "top_k", "k": 2}):
        with pytest.raises(LabelError, match="drawn at random, and other draws, or fewer, are not in it"):
            shrink_cache(drawn, tmp_path / "no", ShrinkSettings(**asked))


def test_it_goes_on_where_it_was_stopped(images, folder, tmp_path, monkeypatch):
    whole = shrink_cache(images, tmp_path / "whole", ShrinkSettings(k=3))
    steps = iter(range(100))

    def stop(name):
        if name == "before_marker" and next(steps) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("softcache.cache.units._failpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        shrink_cache(images, tmp_path / "small", ShrinkSettings(k=3))
    assert len(open_cache(tmp_path / "small").markers) == 2
    done = []
    found = shrink_cache(images, tmp_path / "small", ShrinkSettings(k=3), progress=done.append)
    assert sum(done) == 600
    assert {n: m.shards for n, m in found.markers.items()} == {n: m.shards for n, m in whole.markers.items()}


def test_missing_units_stay_missing_and_a_capture_fills_them(images, tmp_path):
    config, data, _ = make_cache(tmp_path / "joined", **EXACT | {"labels": {"k": 3, "num_views": 2}})
    shutil.rmtree(tmp_path / "joined")
    shutil.copytree(images.url, tmp_path / "torn")
    (tmp_path / "torn/units/00001.json").unlink()
    found = shrink_cache(open_cache(tmp_path / "torn"), tmp_path / "joined", ShrinkSettings(k=3))
    assert found.missing_units == [1]
    filled, done = capture_labels(config, data, open_teacher(config, data), str(tmp_path / "joined"))
    assert (done.units_done, filled.missing_units) == (1, [])
    assert_same(filled, shrink_cache(images, tmp_path / "whole", ShrinkSettings(k=3)))


def test_a_damaged_unit_and_another_cache_are_refused(images, tmp_path):
    shutil.copytree(images.url, tmp_path / "torn")
    shard = tmp_path / "torn/labels.zarr/log_probs/c/0/1/0"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(CorruptionError, match="unit 1"):
        shrink_cache(open_cache(tmp_path / "torn"), tmp_path / "small", ShrinkSettings(k=3))
    with pytest.raises(IdentityError, match=r"labels\.k: 2; 3"):
        shrink_cache(images, tmp_path / "small", ShrinkSettings(k=2))
    with pytest.raises(IdentityError, match=r"labels\.k"):
        shrink_cache(images, images.url, ShrinkSettings(k=2))


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"k": 41}, LabelError, "41 slots asked for.*40 at most"),
        ({"policy": "sample", "num_samples": 4}, LabelError, "draws from every class as it was computed"),
        ({"policy": "dense"}, LabelError, "300 slots asked for"),
        ({"temperatures": (1.0, 3.0)}, TemperatureError, "choose among them"),
        ({"temperatures": (2.0,)}, LabelError, "1.0 first"),
        ({"p": 0.5}, LabelError, "p is given, but policy 'top_k' reads k only"),
        ({"num_views": 2}, LabelError, "2 views asked for, it has 1"),
        ({"step": 0.1}, LabelError, "step is given, but codec 'open' does not read it"),
        ({"chunk_rows": 999_983}, LabelError, "chunks of 999,983 rows asked for.*ask for a divisor of"),
    ],
)
def test_what_is_not_in_a_cache_is_refused(texts, asked, error, message):
    with pytest.raises(error, match=message):
        shrink_manifest(texts, ShrinkSettings(**asked))


def test_chunks_of_rows_are_refused_where_samples_have_one_row(images, tmp_path):
    with pytest.raises(LabelError, match=r"one row each, in chunks of capture\.chunk_samples"):
        shrink_manifest(images, ShrinkSettings(chunk_rows=64))
    with pytest.raises(ConfigError, match=r"capture.chunk_rows = 64: samples of source .* have one row each"):
        make_cache(tmp_path / "cache", capture={"chunk_rows": 64})


def test_digits_that_are_not_there_are_not_promised(images, tmp_path):
    half = shrink_cache(images, tmp_path / "half", ShrinkSettings(k=5, values="float16"))
    with pytest.raises(LabelError, match="float32 would promise digits that it has not"):
        shrink_cache(half, tmp_path / "no", ShrinkSettings(values="float32"))
    cut = shrink_cache(images, tmp_path / "cut", ShrinkSettings(policy="top_p", k=6, p=0.7))
    with pytest.raises(LabelError, match=r"rows end where p = 0.7 is held"):
        shrink_cache(cut, tmp_path / "no", ShrinkSettings(policy="top_k", k=2))
    less = shrink_cache(cut, tmp_path / "less", ShrinkSettings(p=0.5, k=3))
    direct = shrink_cache(images, tmp_path / "direct", ShrinkSettings(policy="top_p", k=3, p=0.5))
    assert_same(less, direct)
