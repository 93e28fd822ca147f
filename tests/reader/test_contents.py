"""What a cache answers a person: keys and names, labels by index, tables, its source; and what it shows of itself."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from softcache import SoftLabelDataset, open_cache
from softcache.errors import (
    AlignmentError,
    ConfigError,
    LabelError,
    MissingExtraError,
    SpecError,
    UnknownKeyError,
)
from softcache.labels import STATS, BernoulliLabels
from softcache.labels.sparsify import Sample, TopK
from tests.support.caches import ROOT

GOLDEN = sorted(path.parent for path in (ROOT / "tests/golden").glob("v1*/*/manifest.json"))


@pytest.fixture(scope="module")
def cache(shared_cache):
    return open_cache(shared_cache[2].url)


# -- labels by index ---------------------------------------------------------------------------------------


def test_keys_and_indices_choose_samples(cache):
    keys, wanted = list(cache.keys), [7, 3, 299]
    mask = np.zeros(300, bool)
    mask[sorted(wanted)] = True
    expected = cache.read(wanted, 1)
    for index in (wanted, np.array(wanted), [7, 3, -1], [keys[n] for n in wanted], np.array(keys)[wanted]):
        assert np.array_equal(cache[index, 1].log_probs, expected.log_probs)
        assert np.array_equal(cache[index, -1].ids, expected.ids)
    assert np.array_equal(cache[mask].ids, cache.read(sorted(wanted)).ids)
    assert np.array_equal(cache[::-50].ids, cache.read(range(299, 0, -50)).ids)
    assert len(cache[keys[5]]) == len(cache[5]) == 1
    assert len(cache[[]]) == 0
    assert keys[5] in cache
    assert "digits/none" not in cache
    assert cache.keys[[2, -1]] == [keys[2], keys[-1]]


def test_what_is_not_there_is_refused_by_name(cache):
    with pytest.raises(
        UnknownKeyError, match=r"no sample has the key 'digits/001'; did you mean digits/0"
    ) as caught:
        cache["digits/001"]
    assert isinstance(caught.value, KeyError)
    with pytest.raises(
        KeyError, match=r"'cat\.jpg'; keys are such as 'digits/0000' \(cache\.keys has them\)"
    ):
        cache[["digits/0000", "cat.jpg"]]
    with pytest.raises(IndexError, match=r"cache .*: row 300 is out of range; expected -300 to 299"):
        cache[300]
    with pytest.raises(IndexError, match=r"cache .*, views: row 2 is out of range; expected -2 to 1"):
        cache[0, 2]
    with pytest.raises(IndexError, match=r"2 views; expected one"):
        cache[0, :]
    with pytest.raises(IndexError, match=r"3 among keys; expected all of them to be texts"):
        cache[["digits/0000", 3]]


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_rows_of_labels_are_indexed_as_numpy_indexes(cache, kind):
    labels = cache[:9] if kind == "numpy" else cache[:9].to_torch()
    ids = cache[:9].ids
    for index in (slice(2, 7, 2), slice(None, None, -1), [4, -1], ids[:, 0] > 4, np.array([0, 0])):
        assert np.array_equal(np.asarray(labels[index].ids), ids[index])
    assert np.array_equal(np.asarray(labels[-2].ids), ids[-2:-1])
    assert [int(row.ids[0, 0]) for row in labels] == ids[:, 0].tolist()
    with pytest.raises(IndexError, match=r"SoftLabels: row 9 is out of range"):
        labels[9]


# -- names and distributions -------------------------------------------------------------------------------


def test_the_likeliest_classes_have_names_and_softened_probabilities(cache):
    labels = cache[:4].with_class_names([f"<{number}>" for number in range(10)])
    softened = np.exp(labels.at_temperature(2.0).log_probs)
    for row, classes in enumerate(labels[[3, 0]].top(2, T=2.0)):
        place = [3, 0][row]
        assert [name for name, _ in classes] == [f"<{number}>" for number in labels.ids[place, :2]]
        assert [p for _, p in classes] == pytest.approx(softened[place, :2].tolist())
    coins = BernoulliLabels(np.array([[2, 0]]), np.array([[0.0, -50.0]]), np.array([-60.0]), 3)
    with pytest.raises(LabelError, match=r"n is -1; expected 1 or more"):
        coins.top(-1)
    assert coins.top() == [[("2", 0.5), ("0", pytest.approx(np.exp(-50)))]]


def test_whole_distributions(cache):
    logits = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    exact = (logits / 2).softmax(1).numpy()
    kept = TopK(k=4).apply(logits).probabilities(2.0)
    np.testing.assert_allclose(kept.sum(1), 1, atol=1e-5)
    top = np.argsort(-exact, axis=1)[:, :4]
    np.testing.assert_allclose(np.take_along_axis(kept, top, 1), np.take_along_axis(exact, top, 1), atol=1e-5)
    assert all(
        len(set(row[row < row.max() * 0.9].round(7))) <= 4 for row in kept
    )  # three kept, and one share of the rest
    one = torch.log(torch.tensor([[0.5, 0.3, 0.2]])).repeat(20_000, 1)
    drawn = Sample(num_samples=2).apply(one, seeds_P=torch.arange(20_000)).probabilities()
    np.testing.assert_allclose(drawn.mean(0), [0.5, 0.3, 0.2], atol=0.01)


# -- tables ------------------------------------------------------------------------------------------------


def test_a_table_has_every_row_with_its_key_truth_and_prediction(cache):
    table = cache.to_arrow()
    assert table.num_rows == 600
    assert table["key"].to_pylist() == 2 * list(cache.keys)
    assert table["view"].to_pylist() == [0] * 300 + [1] * 300
    assert table["target"].to_pylist() == 2 * cache.samples.targets.tolist()
    assert table["target_name"].to_pylist() == [str(number) for number in table["target"].to_pylist()]
    for view in (0, 1):
        rows, labels = table.slice(300 * view, 300), cache[:, view]
        assert rows["ids"].to_pylist() == labels.ids.tolist()
        np.testing.assert_array_equal(rows["log_tail"].to_pylist(), labels.log_tail.astype(np.float32))
        np.testing.assert_array_equal(rows["entropy"].to_pylist(), labels.stats[:, STATS.index("entropy")])
        assert rows["prediction"].to_pylist() == labels.ids[:, 0].tolist()
        np.testing.assert_allclose(rows["confidence"].to_pylist(), labels.probabilities().max(1), rtol=1e-5)


def test_pandas_and_xarray_have_the_same_numbers(cache):
    frame, one = cache.to_pandas(), cache.to_pandas([5, 2], view=1)
    assert frame["log_probs"][0].tolist() == cache[0].log_probs[0].astype(np.float32).tolist()
    assert one.key.tolist() == cache.keys[[5, 2]]
    labels, dataset = cache[frame.key[:3], 1], cache.to_xarray(slice(0, 3))
    assert dict(dataset.sizes) == {"view": 2, "sample": 3, "rank": 4, "temperature": 8, "class": 10}
    assert np.array_equal(dataset.ids.sel(view=1), labels.ids)
    assert dataset.key.values.tolist() == frame.key[:3].tolist()
    assert dataset["class"].values[dataset.target].tolist() == dataset.target_name.values.tolist()
    assert dataset.temperature.values.tolist() == list(labels.temperatures)


@pytest.mark.parametrize("url", GOLDEN, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_cache_of_any_kind_is_a_table_and_shows_itself(url):
    cache = open_cache(url)
    rows = sum(len(cache[:, view]) for view in range(cache.num_views))
    table, dataset = cache.to_arrow(), cache.to_xarray()
    assert table.num_rows == rows == cache.manifest.total_rows
    kept = "hidden" if cache.manifest.codec["name"] == "vectors" else "ids"
    assert {"key", "sample", "view", kept} <= set(table.column_names)
    assert dataset[kept].size == np.prod(np.shape(table[kept].to_pylist()))
    drawn_only = cache.manifest.codec.get("sampling") and not cache.manifest.codec["sampling"]["exact"]
    assert ("prediction" in table.column_names) == (kept == "ids" and not drawn_only)
    for shown in (cache, cache[0], cache.samples):
        assert str(len(cache)) in repr(shown) or "rows" in repr(shown)
    assert f" rows, {'K = ' * (kept == 'ids')}" in cache[:3]._repr_html_()


@pytest.mark.parametrize("package", ["pandas", "xarray"])
def test_a_missing_package_names_its_extra(cache, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        MissingExtraError, match=rf"Cache\.to_{package}: {package} is not .*'softcache\[frames\]'"
    ):
        getattr(cache, f"to_{package}")()


# -- the source --------------------------------------------------------------------------------------------


def test_the_source_is_that_which_was_labeled(cache, tmp_path):
    table = {"name": "digits", "max_train_samples": 300}
    config = tmp_path / "run.toml"
    config.write_text('[source]\nname = "digits"\nmax_train_samples = 300\n')
    for settings in (table, str(config), config):
        source = cache.source(settings)
        assert list(source.keys()) == list(cache.keys)
    with pytest.raises(
        AlignmentError, match=r"300 samples were labeled, the source has 1,501; .*\[source\] table"
    ):
        cache.source()
    with pytest.raises(ConfigError, match=r"other\.toml: cannot be read"):
        cache.source(tmp_path / "other.toml")
    config.write_text("source = 3\n")
    with pytest.raises(ConfigError, match=r"it has no \[source\] table"):
        cache.source(config)


def renamed(url, folder, **changes):
    """A copy of a cache whose manifest has other names."""
    copied = Path(shutil.copytree(url, folder))
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["identity"]["source"]["name"] = changes.get("source", manifest["identity"]["source"]["name"])
    manifest["class_names"] = changes.get("class_names", manifest["class_names"])
    (copied / "manifest.json").write_text(json.dumps(manifest))
    return open_cache(copied)


def test_a_cache_names_no_code_to_run(cache, tmp_path):
    with pytest.raises(SpecError, match=r"'os:system', .* a cache names no code to run; give cache\.source"):
        renamed(cache.url, tmp_path / "one", source="os:system/train").source()
    with pytest.raises(SpecError, match=r"'imagefolder', whose other settings a cache does not keep; give"):
        renamed(cache.url, tmp_path / "two", source="imagefolder/train").source()


# -- what is shown -----------------------------------------------------------------------------------------

HOSTILE = "<img src=x onerror=alert(1)>\x1b[2J'\"&" + "a" * 300


def test_names_of_a_hostile_cache_are_text(cache, tmp_path):
    hostile = renamed(cache.url, tmp_path / "cache", source=HOSTILE, class_names=[HOSTILE] * 10)
    labels = cache[:3].with_class_names([HOSTILE] * 10)
    for shown in (hostile, labels):
        text, page = repr(shown), shown._repr_html_()
        assert "\x1b" not in text + page
        assert r"\x1b[2J" in text
        assert "<img" in text
        assert "<img" not in page
        assert "&lt;img src=x onerror=alert(1)&gt;" in page
        assert max(map(len, text.splitlines())) < 400


def test_a_cache_that_grows_is_shown_as_it_is_and_keeps_no_count(cache, tmp_path):
    copied = Path(shutil.copytree(cache.url, tmp_path / "cache"))
    marker = copied / "units/00000.json"
    shown, held = open_cache(copied), marker.read_bytes()
    marker.unlink()
    assert f"{cache.num_units - 1} of {cache.num_units} units are finished" in repr(shown)
    marker.write_bytes(held)
    assert f"{cache.num_units} of {cache.num_units} units are finished" in repr(shown)
    assert shown.is_complete
    marker.write_text("{")
    assert "its units cannot be listed" in repr(open_cache(copied)) or "units are finished" in repr(
        open_cache(copied)
    )


def test_a_dataset_is_one_of_torch_and_its_batches_need_no_collate_function(shared_cache):
    _, data, cache = shared_cache
    dataset = SoftLabelDataset(data.train.source, cache, view=1)
    assert isinstance(dataset, Dataset)
    assert repr(dataset).startswith("SoftLabelDataset: 300 samples, torch Dataset\n  source  digits/train")
    (batch,) = DataLoader(dataset, batch_size=300)
    assert np.array_equal(batch.labels.to_numpy().ids, cache[:, 1].ids)
    assert dataset["digits/0003", 0].samples.tolist() == dataset[3].samples.tolist() == [3]
    assert dataset[-2:].samples.tolist() == [298, 299]
    with pytest.raises(IndexError, match="row 300 is out of range"):
        dataset[300]
