"""The format of caches as tests for pytest: for those who write them without softcache."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from softcache.cache.folded import FENCE
from softcache.reader.open import open_cache
from softcache.testing.validate import schema, validate
from softcache.tools.convert import convert_cache

__all__ = ["FormatContract"]


class FormatContract:
    """The tests of one finished cache: a subclass whose name begins with Test has the fixture `cache_url`, its folder."""

    def test_its_documents_follow_the_schemas(self, cache_url: str | Path) -> None:
        jsonschema = pytest.importorskip("jsonschema")
        jsonschema.validate(json.loads(Path(cache_url, "manifest.json").read_bytes()), schema("manifest"))
        for path in Path(cache_url, "units").glob("*.json"):
            if path.name != Path(FENCE).name:  # which stands for no unit
                jsonschema.validate(json.loads(path.read_bytes()), schema("marker"))

    def test_it_breaks_no_invariant(self, cache_url: str | Path) -> None:
        assert validate(cache_url) == []

    def test_every_row_is_read(self, cache_url: str | Path) -> None:
        cache = open_cache(str(cache_url))
        for view in range(cache.num_views):
            samples = np.random.default_rng(view).permutation(len(cache))
            stored = cache.read_stored(samples, view)
            assert len(stored.labels) == stored.counts.sum()
            for temperature in (*cache.manifest.codec["temperatures"][:1], 1.0):
                getattr(stored.labels, "labels", stored.labels).at_temperature(temperature)

    @pytest.mark.parametrize("store", ["zarr", "parquet"])
    def test_a_copy_has_its_bytes(self, cache_url: str | Path, tmp_path: Path, store: str) -> None:
        cache = open_cache(str(cache_url))
        copy = convert_cache(cache, str(tmp_path / "copy"), store=store)
        assert validate(copy) == []
        one, other = (c.read_stored(np.arange(len(c)), 0) for c in (cache, copy))
        np.testing.assert_array_equal(one.fingerprints, other.fingerprints)
        first, second = (getattr(part.labels, "labels", part.labels) for part in (one, other))
        np.testing.assert_array_equal(first.ids, second.ids)
