"""A card by which the datasets library reads a cache, and what it reads."""

import shutil

import datasets
import numpy as np
import pytest

from softcache.errors import StorageError
from softcache.reader import open_cache
from softcache.tools.card import write_card
from softcache.tools.verify.checksums import verify_units
from tests.support.caches import ROOT


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    datasets.disable_progress_bars()
    shutil.copytree(ROOT / "tests/golden/v1/parquet", tmp_path / "cache")
    return open_cache(tmp_path / "cache")


def test_load_dataset_reads_labels_and_samples(cache):
    write_card(cache.url)
    write_card(cache.url)  # the same card again
    rows = datasets.load_dataset(cache.url, split="train").with_format("numpy")
    assert len(rows) == cache.manifest.total_rows
    for view in range(cache.num_views):
        of_view = rows[:]["view"] == view
        order = np.argsort(rows[:]["sample"][of_view])
        assert np.array_equal(rows[:]["ids"][of_view][order], cache[:, view].ids)
        assert np.array_equal(rows[:]["log_probs"][of_view][order], cache[:, view].log_probs)
    samples = datasets.load_dataset(cache.url, "samples", split="train")
    assert samples["key"] == list(cache.keys)
    assert list(verify_units(open_cache(cache.url))) == []


def test_any_cache_is_a_dataset_in_memory(shared_cache):
    rows = datasets.Dataset(open_cache(shared_cache[2].url).to_arrow(view=1))
    assert rows[7]["key"] == "digits/0007"
    assert rows[7]["ids"] == shared_cache[2].read([7], 1).ids[0].tolist()


def test_what_has_no_card(cache, shared_cache, tmp_path):
    with pytest.raises(
        StorageError, match=r"its store is zarr, .* copy it first: `softcache convert CACHE OUT"
    ):
        write_card(shared_cache[2].url)
    (tmp_path / "cache/README.md").write_text("mine")
    with pytest.raises(StorageError, match=r"another README\.md is there; move it"):
        write_card(cache.url)
    assert (tmp_path / "cache/README.md").read_text() == "mine"
