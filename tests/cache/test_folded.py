"""Caches whose markers are folded: what they hold is what it was, opening costs a request for each block, damage is refused."""

import shutil
from collections import Counter

import numpy as np
import pytest
from click.testing import CliRunner

from softcache.cache import finished, folded, folding
from softcache.cache.folded import FENCE, RETIRED, block_path, encode_block
from softcache.cache.folding import fold_markers, unmark_units
from softcache.cache.manifest import MAX_UNITS, marker_path
from softcache.cache.storage.open import open_objects
from softcache.cache.units import open_index
from softcache.errors import CorruptionError, IncompleteCacheError, ManifestError
from softcache.hashing.digests import digest_bytes
from softcache.reader.open import open_cache
from softcache.stages.cli import softcache
from softcache.testing.simulation import LateObjects, LateStorage
from softcache.tools.convert import convert_cache
from softcache.tools.garbage import collect_garbage
from softcache.tools.status import read_status
from softcache.tools.verify.checksums import verify_units
from tests.contracts.test_stores import manifest_of
from tests.support.caches import ROOT, make_cache

GOLDEN = ROOT / "tests" / "golden"


def index_of(cache):
    return open_index(open_objects(cache.url), cache.manifest, cache.manifest_sha256)


def names(url):
    return sorted(path.relative_to(url).as_posix() for path in (url / "units").rglob("*") if path.is_file())


@pytest.fixture(params=["zarr", "parquet"])
def caches(request, tmp_path, shared_cache, monkeypatch):
    """The folder of a cache of ten units, all folded into three blocks, and the same cache with markers."""
    whole = shared_cache[2]
    if request.param == "parquet":
        whole = convert_cache(whole, str(tmp_path / "whole"), store="parquet")
    shutil.copytree(whole.url, tmp_path / "cache")
    monkeypatch.setattr(folded, "BLOCK_UNITS", 4)
    monkeypatch.setattr(folded, "PAGE_UNITS", 2)
    monkeypatch.setattr(finished, "MIN_FOLDED_UNITS", 1)
    assert fold_markers(index_of(open_cache(str(tmp_path / "cache")))) == 10
    return tmp_path / "cache", whole


def test_a_folded_cache_is_the_cache_that_it_was(caches):
    url, whole = caches
    assert names(url) == [f"units/{FENCE[6:]}", *(block_path(block, 1) for block in range(3))]
    cache = open_cache(str(url))
    assert dict(cache.markers) == dict(whole.markers)
    for name in ("num_rows_done", "num_samples_done", "missing_units", "is_complete"):
        assert getattr(cache, name) == getattr(whole, name), name
    assert cache.bytes_by_column() == whole.bytes_by_column()
    assert cache.markers.digest() == whole.markers.digest()
    assert cache.markers.digest(3, 7) == whole.markers.digest(3, 7) != whole.markers.digest(3, 6)
    assert np.array_equal(cache.samples_in(1), whole.samples_in(1))
    assert cache.memmap_plan(1).key == whole.memmap_plan(1).key
    one, other = cache.read_stored([5, 299, 64], 1), whole.read_stored([5, 299, 64], 1)
    assert one.labels.log_probs.tobytes() == other.labels.log_probs.tobytes()
    assert list(verify_units(cache)) == []
    report = collect_garbage(open_objects(str(url)), delete=True, older_than=0)
    assert (report.stray, report.foreign, report.held) == ({}, [], [])
    status = read_status(open_objects(str(url)))
    assert (status.state, status.units_done, status.samples_done) == ("complete", 10, 600)
    assert status.quiet_seconds is not None


def test_a_damaged_unit_is_unmarked_and_made_again(caches, tmp_path):
    url, whole = caches
    shard = next(url / shard.path for shard in whole.markers[5].shards)
    good = shard.read_bytes()
    shard.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    with pytest.raises(CorruptionError, match=r"unit 5 .*`softcache verify --repair`"):
        open_cache(str(url)).read(np.arange(300), 1)
    result = CliRunner().invoke(softcache, ["verify", str(url), "--repair"])
    assert result.exit_code == 1
    assert "1 damaged units unmarked" in result.output
    assert block_path(1, 2) in names(url)
    assert (url / block_path(1, 1)).read_bytes() == RETIRED
    cache = open_cache(str(url))
    assert cache.missing_units == [5]
    with pytest.raises(IncompleteCacheError, match="1 of 10 units are missing"):
        cache.read(np.arange(300), 1)
    make_cache(url, capture={"store": whole.manifest.store})
    assert shard.read_bytes() == good
    cache = open_cache(str(url))
    assert dict(cache.markers) == dict(whole.markers)
    assert cache.markers.num_loose == 0, "the run that completes the cache folds what is left"
    assert list(verify_units(cache)) == []


def test_a_rerun_makes_a_folded_unit_without_its_objects(caches):
    url, whole = caches
    for shard in whole.markers[9].shards:
        (url / shard.path).unlink()
    make_cache(url, capture={"store": whole.manifest.store})
    assert list(verify_units(open_cache(str(url)))) == []


def test_a_marker_overrides_its_entry(caches):
    """Of a unit that was made again, on hardware whose last bits differ."""
    url, whole = caches
    marker = whole.markers[2]
    shards = (marker.shards[0].model_copy(update={"num_bytes": 7}), *marker.shards[1:])
    other = marker.model_copy(update={"shards": shards})
    (url / marker_path(2)).write_bytes(other.to_bytes())
    cache = open_cache(str(url))
    assert (cache.markers[2], len(cache.markers)) == (other, 10)
    lost = marker.shards[0].num_bytes - 7
    assert sum(cache.bytes_by_column().values()) == sum(whole.bytes_by_column().values()) - lost
    assert cache.markers.digest() != whole.markers.digest()
    assert fold_markers(index_of(cache)) == 1
    assert open_cache(str(url)).markers[2] == other


def test_a_reader_that_was_open_before_finds_what_was_folded_since(caches, monkeypatch):
    url, whole = caches
    cache = open_cache(str(url))
    assert len(cache.markers) == 10
    for number in (0, 6):  # new generations, whose predecessors are retired
        unmark_units(index_of(cache), [number])
        (url / marker_path(number)).write_bytes(whole.markers[number].to_bytes())
    monkeypatch.setattr(folding, "MIN_LOOSE", 1)
    fold_markers(index_of(cache))
    assert dict(cache.markers) == dict(whole.markers)
    assert np.array_equal(cache.read(np.arange(300), 1).ids, whole.read(np.arange(300), 1).ids)


# -- size ----------------------------------------------------------------------------------------------------


class CountedObjects(LateObjects):
    """Storage in memory that counts requests as a bucket would: a listing has a thousand names."""

    def __init__(self, storage):
        super().__init__(storage)
        self.requests = Counter()

    def _ask(self, request):
        self.requests[request.split()[0]] += 1

    def times(self, prefix):
        found = super().times(prefix)
        self.requests["list"] += len(found) // 1000
        return found


def many_units(num_units):
    """Storage with a cache of `num_units` units in blocks, and its index."""
    manifest = manifest_of("zarr", num_samples=num_units, num_views=1, unit_samples=1, chunk_samples=1)
    storage = LateStorage()
    index = open_index(CountedObjects(storage), manifest, digest_bytes(manifest.to_bytes()))
    for block in range(-(-num_units // folded.BLOCK_UNITS)):
        size = min(folded.BLOCK_UNITS, num_units - block * folded.BLOCK_UNITS)
        records = np.zeros(size, index.dtype)
        records["num_rows"], records["num_bytes"] = 1, 100
        records["sha256"] = np.arange(size)[:, None, None] % 251
        storage.put(block_path(block, 3), encode_block(index.limits, block, np.ones(size, bool), records))
    storage.put("manifest.json", manifest.to_bytes())
    storage.show()
    return storage, index


def test_opening_costs_a_request_for_each_block():
    storage, index = many_units(100_000)
    found = index.snapshot()
    assert index.objects.requests == {"list": 2, "get": 4}
    assert (len(found), found.num_rows, found.num_bytes) == (100_000, 100_000, 60_000_000)
    assert found[70_000].shards[0].sha256 == f"{(70_000 - 2 * 32_768) % 251:02x}" * 32
    assert index.objects.requests["get"] == 5, "one page"
    assert len(found.missing) == 0
    objects = CountedObjects(storage)
    assert read_status(objects).units_done == 100_000
    assert sum(objects.requests.values()) < 10


def test_small_caches_keep_their_markers(tmp_path, shared_cache):
    shutil.copytree(shared_cache[2].url, tmp_path / "cache")
    assert fold_markers(index_of(open_cache(str(tmp_path / "cache")))) == 0
    assert names(tmp_path / "cache") == [marker_path(number) for number in range(10)]


# -- damage --------------------------------------------------------------------------------------------------


def test_a_block_with_any_damage_is_refused(caches):
    """One bit at a time, then its end cut, then another block's bytes: a known error, and never another number."""
    url, whole = caches
    path, expected = url / block_path(0, 1), dict(whole.markers)
    good = path.read_bytes()
    damaged = [bytes([*good[:at], good[at] ^ 1 << at % 8, *good[at + 1 :]]) for at in range(0, len(good), 7)]
    damaged += [good[:-1], good[:40], b"", good + b"x", (url / block_path(1, 1)).read_bytes(), RETIRED]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises((CorruptionError, ManifestError), match=r"00000\.000001\.fold"):
            assert dict(open_cache(str(url)).markers) == expected
    path.write_bytes(good)
    assert dict(open_cache(str(url)).markers) == expected


def test_a_block_that_claims_what_the_plan_does_not_have_is_refused(caches):
    """Its checksums are right: it was made so."""
    url, whole = caches
    index, path = index_of(whole), url / block_path(2, 1)
    good = index_of(open_cache(str(url))).known(2, 1).records()

    def claims(change, *, is_finished=(True, True), limits=index.limits, block=2):
        records = good.copy()
        change(records)
        path.write_bytes(encode_block(limits, block, np.array(is_finished), records))
        cache = open_cache(str(url))
        with pytest.raises((CorruptionError, ManifestError)) as caught:
            dict(cache.markers)
        return str(caught.value)

    assert "1,000,000 rows" in claims(lambda records: records["num_rows"].fill(10**6))
    assert "shards of at most" in claims(lambda records: records["num_bytes"].fill(2**40))
    other = index.limits._replace(manifest_sha256="0" * 64)
    assert "written for another manifest" in claims(lambda records: None, limits=other)
    assert "expected (2," in claims(lambda records: None, block=1)
    other = index.limits._replace(columns=(*index.limits.columns[:-1], "secret"))
    assert "'secret'" in claims(lambda records: None, limits=other)
    (url / block_path(3, 1)).write_bytes(path.read_bytes())
    with pytest.raises(ManifestError, match="is of no unit of the plan"):
        open_cache(str(url)).markers  # noqa: B018


def test_versions_that_know_no_blocks_refuse_the_cache():
    """They refuse a marker whose unit the plan does not have, and no plan has this one."""
    assert marker_path(99_999_999) == FENCE
    assert MAX_UNITS < 99_999_999


# -- frozen --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["zarr", "parquet"])
def test_a_frozen_cache_with_folded_markers_is_read(store):
    """Two units are in a block, whose first generation is retired, and two have markers."""
    url, whole = GOLDEN / "v1-folded" / store, open_cache(str(GOLDEN / "v1" / store))
    assert names(url) == [
        "units/00001.json",
        "units/00003.json",
        f"units/{FENCE[6:]}",
        block_path(0, 1),
        block_path(0, 2),
    ]
    cache = open_cache(str(url))
    assert dict(cache.markers) == dict(whole.markers)
    assert list(verify_units(cache)) == []
    assert np.array_equal(cache.read(np.arange(24), 1).log_probs, whole.read(np.arange(24), 1).log_probs)
