"""What every store promises: units whole or not at all, the same bytes for the same columns, no silent damage."""

import signal

import numpy as np
import pytest

from softcache.cache.codecs import OpenCodec
from softcache.cache.manifest import Plan, marker_path
from softcache.cache.storage.open import open_objects
from softcache.cache.units import check_unit, finished_units, open_store, publish_unit, read_marker
from softcache.errors import CorruptionError, ManifestError
from softcache.hashing.digests import digest_bytes
from tests.support.manifests import bare_manifest
from tests.support.programs import run_program

STORES = ["zarr", "parquet"]


def manifest_of(store, *, num_classes=12, k=3, values="float16", **geometry):
    codec = OpenCodec(num_classes=num_classes, k=k, temperatures=(1.0, 2.0, 8.0), values=values)
    plan = {"num_samples": 37, "num_views": 2, "unit_samples": 16, "chunk_samples": 8} | geometry
    return bare_manifest(codec, Plan(**plan), store)


def columns_of(manifest, unit, seed=0):
    """Random but legal columns of a unit, with the values that stores tend to lose."""
    random, codec = np.random.default_rng([seed, unit.number]), manifest.build_codec()
    out = {}
    for column in codec.columns:
        shape, kind = (unit.stop - unit.start, *column.shape), np.dtype(column.dtype)
        if kind.kind == "u":
            out[column.name] = random.integers(0, codec.num_classes + 1, shape).astype(kind)
        else:
            out[column.name] = (-random.exponential(3, shape)).astype(kind)
            out[column.name].flat[0] = -np.inf
            out[column.name].flat[-1] = -0.0
    out["fingerprint"] = random.integers(0, 2**64, unit.stop - unit.start, dtype=np.uint64)
    return out


@pytest.fixture(params=STORES)
def cache(request, tmp_path):
    """(objects, manifest, digest, store) of an empty cache."""
    manifest = manifest_of(request.param)
    objects = open_objects(str(tmp_path / "cache"), create=True)
    store = open_store(manifest, objects)
    store.create()
    return objects, manifest, digest_bytes(manifest.to_bytes()), store


def publish_all(objects, manifest, digest, store):
    return [
        publish_unit(objects, store, digest, unit, columns_of(manifest, unit))
        for unit in manifest.plan.units()
    ]


def assert_unit(store, manifest, unit):
    found = store.read(unit, unit.start, unit.stop)
    for name, values in columns_of(manifest, unit).items():
        assert found[name].dtype == values.dtype, name
        assert found[name].tobytes() == values.tobytes(), name


def test_what_is_read_is_what_was_written_bit_for_bit(cache):
    objects, manifest, digest, store = cache
    publish_all(objects, manifest, digest, store)
    for unit in manifest.plan.units():
        assert_unit(open_store(manifest, objects), manifest, unit)


def test_any_range_of_any_columns(cache):
    objects, manifest, digest, store = cache
    publish_all(objects, manifest, digest, store)
    unit = manifest.plan.unit(1)
    whole = columns_of(manifest, unit)
    for start, stop in [(16, 17), (17, 23), (20, 32), (24, 32), (31, 32)]:
        found = store.read(unit, start, stop, ["ids", "fingerprint"])
        assert set(found) == {"ids", "fingerprint"}
        assert np.array_equal(found["ids"], whole["ids"][start - 16 : stop - 16])
        assert np.array_equal(found["fingerprint"], whole["fingerprint"][start - 16 : stop - 16])


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(
    "geometry",
    [
        {"num_samples": 1, "num_views": 1, "unit_samples": 1, "chunk_samples": 1},
        {"num_samples": 5, "num_views": 3, "unit_samples": 100, "chunk_samples": 100},
        {"num_samples": 64, "num_views": 1, "unit_samples": 16, "chunk_samples": 16},
        {"num_classes": 70_000, "k": 1, "values": "float32"},
        {"num_classes": 1, "k": 1},
    ],
)
def test_geometries_at_the_edges(tmp_path, store, geometry):
    manifest = manifest_of(store, **geometry)
    objects = open_objects(str(tmp_path), create=True)
    opened = open_store(manifest, objects)
    opened.create()
    publish_all(objects, manifest, "0" * 64, opened)
    for unit in manifest.plan.units():
        assert_unit(opened, manifest, unit)


def test_the_same_columns_give_the_same_bytes(cache):
    _, manifest, _, store = cache
    unit = manifest.plan.unit(2)
    assert store.encode(unit, columns_of(manifest, unit)) == store.encode(unit, columns_of(manifest, unit))


def test_columns_of_another_shape_or_dtype_are_refused(cache):
    _, manifest, _, store = cache
    unit = manifest.plan.unit(0)
    good = columns_of(manifest, unit)
    for name, bad in {"ids": good["ids"][:-1], "log_tail": good["log_tail"].astype(np.float64)}.items():
        with pytest.raises(CorruptionError, match=f"column {name}"):
            store.encode(unit, good | {name: bad})


def test_a_unit_of_nothing_but_fill_values_is_still_there(cache):
    objects, manifest, digest, store = cache
    unit = manifest.plan.unit(0)
    fill = {
        name: np.full_like(v, manifest.num_classes if name == "ids" else np.nan if v.dtype.kind == "f" else 0)
        for name, v in columns_of(manifest, unit).items()
    }
    marker = publish_unit(objects, store, digest, unit, fill)
    check_unit(objects, marker)
    assert (store.read(unit, 0, 16)["ids"] == manifest.num_classes).all()


def test_an_unwritten_unit_is_not_read_as_fill_values(cache):
    objects, manifest, digest, store = cache
    publish_unit(objects, store, digest, manifest.plan.unit(0), columns_of(manifest, manifest.plan.unit(0)))
    with pytest.raises(CorruptionError, match="unit 1"):
        open_store(manifest, objects).read(manifest.plan.unit(1), 16, 32)


def test_creating_twice_changes_nothing(cache):
    objects, _, _, store = cache
    before = {path: objects.get(path) for path in _all(objects)}
    store.create()
    store.check_metadata()
    assert {path: objects.get(path) for path in _all(objects)} == before


def _all(objects):
    return sorted(p.relative_to(objects.root).as_posix() for p in objects.root.rglob("*") if p.is_file())


# -- damage ------------------------------------------------------------------------------------------------


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 1
    elif how == "truncate":
        del data[-3:]
    elif how == "extend":
        data += b"\0"
    elif how == "empty":
        data.clear()
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("how", ["flip", "truncate", "extend", "empty", "remove"])
def test_damage_to_any_object_of_a_unit_is_found(cache, how):
    objects, manifest, digest, store = cache
    markers = publish_all(objects, manifest, digest, store)
    for shard in markers[3].shards:
        path = objects.root / shard.path
        good = path.read_bytes()
        path.unlink() if how == "remove" else damage(path, how)
        with pytest.raises(CorruptionError, match=r"unit 3 .*" + shard.path.replace(".", r"\.")):
            check_unit(objects, markers[3])
        path.write_bytes(good)
    check_unit(objects, markers[3])


def test_every_flipped_bit_is_caught_by_the_stores_own_checksums(cache):
    """A reader that skips the sha256 is still protected: crc32c in Zarr's chunks, page checksums in Parquet."""
    objects, manifest, digest, store = cache
    unit = manifest.plan.unit(0)
    marker = publish_unit(objects, store, digest, unit, columns_of(manifest, unit))
    random = np.random.default_rng(0)
    wrong = 0
    for shard in marker.shards:
        path = objects.root / shard.path
        good = path.read_bytes()
        for place in random.integers(0, len(good), 40):
            bad = bytearray(good)
            bad[place] ^= 1 << int(random.integers(8))
            path.write_bytes(bytes(bad))
            try:
                found = open_store(manifest, objects).read(unit, 0, 16)
            except CorruptionError:
                continue
            # An unused bit (a file's own statistics, a column's description) may pass; data may not.
            wrong += any(
                found[name].tobytes() != v.tobytes() for name, v in columns_of(manifest, unit).items()
            )
        path.write_bytes(good)
    assert wrong == 0


def test_two_units_with_swapped_shards_are_found(cache):
    objects, manifest, digest, store = cache
    markers = publish_all(objects, manifest, digest, store)
    one, other = (objects.root / markers[n].shards[0].path for n in (0, 1))
    a, b = one.read_bytes(), other.read_bytes()
    one.write_bytes(b)
    other.write_bytes(a)
    for number in (0, 1):
        with pytest.raises(CorruptionError, match=f"unit {number}"):
            check_unit(objects, markers[number])


def test_metadata_that_other_tools_read_is_checked(tmp_path):
    manifest, objects = manifest_of("zarr"), open_objects(str(tmp_path), create=True)
    store = open_store(manifest, objects)
    store.create()
    path = tmp_path / "labels.zarr" / "ids" / "zarr.json"
    path.write_text(path.read_text().replace('"uint16"', '"int16"'))
    with pytest.raises(CorruptionError, match=r"labels\.zarr/ids/zarr\.json"):
        store.check_metadata()


# -- markers -----------------------------------------------------------------------------------------------


def test_a_unit_without_its_marker_does_not_count(cache):
    objects, manifest, digest, store = cache
    publish_all(objects, manifest, digest, store)
    objects.delete(marker_path(1))
    assert set(finished_units(objects, manifest, digest)) == {0, 2, 3, 4, 5}
    assert read_marker(objects, manifest, digest, 1) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"unit": 1', '"unit": 2'), "unit"),
        (('"start": 16', '"start": 0'), "unit"),
        (("manifest_sha256", "manifest_sha"), "manifest_sha"),
        (('"num_rows": 16', '"num_rows": -1'), "num_rows"),
        (('"num_bytes": ', '"num_bytes": 1'), None),
        (('"num_bytes": ', '"num_bytes": 999999'), "at most"),
        (("{", "["), "not JSON"),
    ],
)
def test_a_wrong_marker_is_refused_or_does_not_match(cache, change, message):
    objects, manifest, digest, store = cache
    publish_all(objects, manifest, digest, store)
    path = objects.root / marker_path(1)
    path.write_text(path.read_text().replace(*change))
    if message is None:
        with pytest.raises(CorruptionError, match="bytes expected"):
            check_unit(objects, read_marker(objects, manifest, digest, 1))
        return
    with pytest.raises(ManifestError, match=message):
        read_marker(objects, manifest, digest, 1)


def test_a_marker_cannot_name_an_object_outside_of_its_unit(cache):
    objects, manifest, digest, store = cache
    markers = publish_all(objects, manifest, digest, store)
    path = objects.root / marker_path(1)
    good, own = path.read_text(), markers[1].shards[0].path
    for other in ("../../secret", "/etc/passwd", markers[2].shards[0].path, "samples.parquet"):
        path.write_text(good.replace(own, other))
        with pytest.raises(ManifestError, match=r"unit|path"):
            read_marker(objects, manifest, digest, 1)


def test_a_marker_of_no_unit_is_refused(cache):
    objects, manifest, digest, _ = cache
    objects.put("units/00099.json", b"{}")
    with pytest.raises(ManifestError, match="no unit of the plan"):
        finished_units(objects, manifest, digest)


@pytest.mark.parametrize("name", ["1.json", "x.json", "-0001.json", "._00000.json"])
def test_a_file_that_is_no_marker_is_left_out(cache, name):
    objects, manifest, digest, store = cache
    before = publish_all(objects, manifest, digest, store)
    objects.put(f"units/{name}", b"{}")
    assert len(finished_units(objects, manifest, digest)) == len(before)


# -- kills -------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import softcache.cache.units as units
from softcache.cache.storage.open import open_objects
from tests.contracts.test_stores import manifest_of, columns_of, digest_bytes
left = int(sys.argv[4])
def die(name):
    global left
    if name == sys.argv[3]:
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
units._failpoint = die
objects, manifest = open_objects(sys.argv[1]), manifest_of(sys.argv[2])
unit = manifest.plan.unit(1)
units.publish_unit(objects, units.open_store(manifest, objects), digest_bytes(manifest.to_bytes()), unit, columns_of(manifest, unit))
"""


@pytest.mark.slow
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(
    ("point", "skip"), [("before_shards", 0), ("after_shard", 0), ("before_marker", 0), ("after_marker", 0)]
)
def test_a_kill_at_any_step_of_the_commit_leaves_a_whole_unit_or_none(tmp_path, store, point, skip):
    manifest, objects = manifest_of(store), open_objects(str(tmp_path), create=True)
    digest, opened = digest_bytes(manifest.to_bytes()), open_store(manifest, objects)
    opened.create()
    done = run_program(KILLED, tmp_path, store, point, skip)
    assert done.returncode == -signal.SIGKILL, done.stderr
    marker = read_marker(objects, manifest, digest, 1)
    assert (marker is not None) == (point == "after_marker")
    unit = manifest.plan.unit(1)
    marker = publish_unit(objects, opened, digest, unit, columns_of(manifest, unit))
    check_unit(objects, marker)
    assert_unit(opened, manifest, unit)
    assert not list((tmp_path / ".staging").iterdir()), "nothing half-written is left behind"
