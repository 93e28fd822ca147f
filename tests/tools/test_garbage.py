"""What gc takes away, and what it never does."""

import os
import shutil

import pytest
from click.testing import CliRunner

from softcache.cache.manifest import UnitMarker
from softcache.cache.storage.open import open_objects
from softcache.errors import CacheNotFoundError, ManifestError
from softcache.reader.open import open_cache
from softcache.stages.cli import softcache
from softcache.tools.convert import convert_cache
from softcache.tools.garbage import collect_garbage
from softcache.tools.verify.teacher import verify_units
from tests.support.caches import make_cache


@pytest.fixture(params=["zarr", "parquet"])
def cache(request, tmp_path, shared_cache):
    url = tmp_path / "cache"
    if request.param == "zarr":
        shutil.copytree(shared_cache[2].url, url)
    else:
        convert_cache(shared_cache[2], str(url), store="parquet")
    return url


def files(url):
    return {path.relative_to(url).as_posix(): path.read_bytes() for path in url.rglob("*") if path.is_file()}


def unmark(url, number):
    """Makes a unit one that was killed before its marker; returns its objects."""
    marker = url / f"units/{number:05d}.json"
    shards = [shard.path for shard in UnitMarker.parse(marker.read_bytes(), where="").shards]
    marker.unlink()
    return shards


def test_a_whole_cache_has_nothing_stray(cache):
    before = files(cache)
    report = collect_garbage(open_objects(str(cache)), delete=True, older_than=0)
    assert (report.stray, report.held, report.foreign) == ({}, [], [])
    assert files(cache) == before


def test_what_the_dead_left_goes_and_nothing_else(cache):
    whole = files(cache)
    strays = unmark(cache, 3)
    (cache / ".staging" / "f00").write_bytes(b"half a sh")
    (cache / "units/00003.lock").write_bytes(b"")
    (cache / "units/00001.lock").write_bytes(b"")
    (cache / "samples-0123456789abcdef.parquet").write_bytes(b"of a run that came second")
    strays += [".staging/f00", "samples-0123456789abcdef.parquet"]
    objects = open_objects(str(cache))

    listed = collect_garbage(objects, delete=False, older_than=0)
    assert sorted(listed.stray) == sorted(strays)
    assert listed.stale_claims == 2
    assert set(strays) <= set(files(cache)), "a look removes nothing"

    assert collect_garbage(objects, delete=True, older_than=0).stray == listed.stray
    assert files(cache) == {
        path: data for path, data in whole.items() if path not in strays and path != "units/00003.json"
    }
    assert collect_garbage(objects, delete=True, older_than=0).stray == {}


def test_a_unit_that_is_being_made_is_left_alone(cache):
    strays = unmark(cache, 3)
    objects = open_objects(str(cache))
    with objects.claim("units/00003.lock") as ours:
        assert ours
        report = collect_garbage(objects, delete=True, older_than=0)
    assert (report.stray, report.held) == ({}, [3])
    assert set(strays) <= set(files(cache))


def test_a_write_under_way_is_left_alone(cache, monkeypatch):
    """gc runs at the moment between flush and rename; the object arrives all the same."""
    objects = open_objects(str(cache))
    real, seen = os.fsync, []

    def collecting(handle):
        real(handle)
        if not seen:
            seen.append(collect_garbage(open_objects(str(cache)), delete=True, older_than=0).stray)

    monkeypatch.setattr(os, "fsync", collecting)
    objects.put("new", b"arrives")
    assert seen == [{}]
    assert objects.get("new") == b"arrives"


def test_foreign_files_are_reported_and_stay(cache, tmp_path):
    (cache / "notes.txt").write_text("mine")
    (cache / "units/99999.lock").write_text("of no unit")
    (tmp_path / "elsewhere").write_text("kept")
    (cache / "samples-ffffffffffffffff.parquet").symlink_to(tmp_path / "elsewhere")
    report = collect_garbage(open_objects(str(cache)), delete=True, older_than=0)
    assert report.foreign == ["notes.txt", "samples-ffffffffffffffff.parquet", "units/99999.lock"]
    assert report.stray == {}
    assert (tmp_path / "elsewhere").read_text() == "kept"


def test_a_damaged_marker_stops_it_before_anything_goes(cache):
    unmark(cache, 2)
    (cache / "units/00004.json").write_bytes(b"{")
    before = files(cache)
    with pytest.raises(ManifestError, match=r"units/00004\.json: not JSON"):
        collect_garbage(open_objects(str(cache)), delete=True, older_than=0)
    assert files(cache) == before


def test_a_place_without_a_manifest_is_no_cache(tmp_path):
    (tmp_path / "labels.zarr").mkdir()
    with pytest.raises(
        CacheNotFoundError, match=r"no manifest\.json there, so stray files cannot be identified"
    ):
        collect_garbage(open_objects(str(tmp_path)), delete=True, older_than=0)


def test_a_rerun_after_gc_makes_the_cache_whole(tmp_path):
    _, _, made = make_cache(tmp_path / "cache")
    whole = files(tmp_path / "cache")
    unmark(tmp_path / "cache", 0)
    collect_garbage(open_objects(made.url), delete=True, older_than=0)
    _, _, again = make_cache(tmp_path / "cache")
    assert files(tmp_path / "cache") == whole
    assert not list(verify_units(again))


def test_a_run_that_died_before_its_manifest_is_not_in_the_way_of_another(tmp_path):
    """Its table of samples is of other samples; ours gets a name of its own, and gc takes the old one."""
    _, _, other = make_cache(tmp_path / "other", source={"max_train_samples": 200})
    (tmp_path / "cache").mkdir()
    table = other.manifest.samples
    shutil.copy(f"{other.url}/{table}", tmp_path / "cache" / table)
    _, _, cache = make_cache(tmp_path / "cache")
    assert cache.manifest.samples != table
    assert not list(verify_units(cache))
    assert list(collect_garbage(open_objects(cache.url), delete=True, older_than=0).stray) == [table]
    _, _, again = make_cache(tmp_path / "cache")
    assert len(again.samples_table().keys) == 300


def test_the_command_lists_first_and_deletes_with_delete(cache):
    unmark(cache, 3)
    listed = CliRunner().invoke(softcache, ["gc", str(cache), "--older-than", "0"])
    assert "delete them with --delete" in listed.output
    removed = CliRunner().invoke(softcache, ["gc", str(cache), "--delete", "--older-than", "0"])
    assert (listed.exit_code, removed.exit_code) == (0, 0)
    assert "deleted" in removed.output
    assert (
        "orphaned 0 objects, 0 bytes"
        in CliRunner().invoke(softcache, ["gc", str(cache), "--older-than", "0"]).output
    )


@pytest.mark.parametrize("is_whole", [False, True])
def test_a_unit_that_is_made_while_its_objects_are_deleted(cache, monkeypatch, is_whole):
    """Its collector was paused for longer than a lease lasts, and another run has made the unit meanwhile."""
    made = files(cache)
    strays = unmark(cache, 3)
    objects = open_objects(str(cache))
    delete, deleted = objects.delete, []

    def delete_late(path):
        (cache / "units/00003.json").write_bytes(made["units/00003.json"])
        delete(path)
        deleted.append(path)
        if is_whole and len(deleted) == len(strays):
            for shard in strays:
                (cache / shard).write_bytes(made[shard])

    monkeypatch.setattr(objects, "delete", delete_late)
    report = collect_garbage(objects, delete=True, older_than=0)
    assert report.unmarked == ([] if is_whole else [3])
    assert list(open_cache(str(cache)).missing_units) == report.unmarked
    assert files(cache).items() <= made.items()
