"""Caches that were frozen when their format version was new stay readable, and stay joined to their data.

If one of these fails, a user's cache is no longer read or no longer matches: mend the code, not tests/golden.
"""

import json
import shutil

import numpy as np
import pytest

from softcache.cache.manifest import diff_manifests
from softcache.reader.dataset import SoftLabelDataset, cached_views
from softcache.reader.open import open_cache
from softcache.runs import capture_labels, open_data, open_teacher, train_student
from softcache.teacher.capture.plan import plan_manifest
from softcache.tools.verify.teacher import verify_against_teacher, verify_units
from tests.golden.make import COLUMNS, NUM_SAMPLES, NUM_VIEWS, K, config
from tests.support.caches import ROOT

GOLDEN = ROOT / "tests" / "golden" / "v1"


@pytest.fixture(params=["zarr", "parquet"])
def store(request):
    return request.param


@pytest.fixture(scope="module")
def expected():
    with np.load(GOLDEN / "expected.npz") as file:  # allow_pickle is off unless it is asked for
        return dict(file)


def columns_of(cache, view):
    labels, prints = cache.read_rows(np.arange(len(cache)), view)
    return {name: prints if name == "fingerprint" else getattr(labels, name) for name in COLUMNS}


def test_what_was_frozen_is_read_number_for_number(store, expected):
    cache = open_cache(str(GOLDEN / store))
    assert (len(cache), cache.num_views, cache.num_classes) == (NUM_SAMPLES, NUM_VIEWS, 10)
    for view in range(NUM_VIEWS):
        for name, found in columns_of(cache, view).items():
            wanted = expected[f"{store}/{name}"][view]
            assert found.dtype == wanted.dtype, name
            np.testing.assert_array_equal(found, wanted, err_msg=name)
    assert cache.read([0]).ids.shape == (1, K)


def test_the_frozen_numbers_are_those_of_a_teacher(store, expected):
    """So that two files that are wrong alike do not pass."""
    run = config(store)
    data = open_data(run)
    teacher = open_teacher(run, data)
    for view in range(NUM_VIEWS):
        logits_PV = teacher.logits(data.train.load(range(NUM_SAMPLES), view).images).double().numpy()
        probs_PV = np.exp(logits_PV) / np.exp(logits_PV).sum(1, keepdims=True)
        ids = expected[f"{store}/ids"][view].astype(int)
        kept = np.take_along_axis(probs_PV, ids, 1)
        np.testing.assert_allclose(
            np.exp(expected[f"{store}/log_probs"][view].astype(float)), kept, atol=1e-3
        )
        np.testing.assert_allclose(
            np.exp(expected[f"{store}/log_tail"][view, :, 0]), 1 - kept.sum(1), atol=1e-6
        )


def test_every_frozen_unit_still_matches_its_marker(store):
    cache = open_cache(str(GOLDEN / store))
    assert len(cache.markers) == 4
    assert list(verify_units(cache)) == []


def test_a_frozen_row_that_is_touched_no_longer_verifies(store, tmp_path):
    shutil.copytree(GOLDEN / store, tmp_path / "cache")
    (shard,) = open_cache(str(tmp_path / "cache")).markers[3].shards[:1]
    path = tmp_path / "cache" / shard.path
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    (fault,) = verify_units(open_cache(str(tmp_path / "cache")))
    assert "unit 3" in fault


def test_what_later_versions_of_zarr_add_is_no_fault(tmp_path):
    shutil.copytree(GOLDEN / "zarr", tmp_path / "cache")
    path = tmp_path / "cache" / "labels.zarr" / "ids" / "zarr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"added_later": {"must_understand": False}}))
    assert list(verify_units(open_cache(tmp_path / "cache"))) == []


def test_labeling_the_same_data_today_gives_the_same_rows(store, tmp_path, expected):
    run = config(store)
    data = open_data(run)
    fresh, _ = capture_labels(run, data, open_teacher(run, data), str(tmp_path / "cache"))
    for view in range(NUM_VIEWS):
        found = columns_of(fresh, view)
        wanted = {name: expected[f"{store}/{name}"][view] for name in COLUMNS}
        np.testing.assert_array_equal(found["fingerprint"], wanted["fingerprint"])
        for name in ("log_probs", "log_tail", "target_log_prob", "stats"):
            # Another CPU may round the teacher's arithmetic in another way; pixels are exact everywhere.
            np.testing.assert_allclose(found[name], wanted[name], rtol=2e-3, atol=1e-4, err_msg=name)


def test_todays_run_has_the_identity_of_the_frozen_one(store):
    frozen = open_cache(str(GOLDEN / store)).manifest
    run = config(store)
    data = open_data(run)
    today, _ = plan_manifest(data.train, open_teacher(run, data), run.labels, run.capture)
    assert today.identity["views"]["digest"] == frozen.identity["views"]["digest"]
    assert today.identity["source"]["digest"] == frozen.identity["source"]["digest"]
    # The fake teacher's weights are cosines, whose last bit is the CPU's.
    differences = [line for line in diff_manifests(today, frozen) if "weights_digest" not in line]
    assert differences == []


def test_a_frozen_manifest_is_written_again_byte_for_byte(store):
    """Markers name the manifest by its digest, so one added default would orphan every unit."""
    cache = open_cache(str(GOLDEN / store))
    assert cache.manifest.to_bytes() == (GOLDEN / store / "manifest.json").read_bytes()
    for number, marker in cache.markers.items():
        assert marker.to_bytes() == (GOLDEN / store / "units" / f"{number:05d}.json").read_bytes()


@pytest.mark.slow
def test_a_student_still_learns_from_a_frozen_cache(store, tmp_path):
    run = config(store)
    data, cache = open_data(run), open_cache(str(GOLDEN / store))
    assert cached_views(cache).digest == data.train.views.digest
    dataset = SoftLabelDataset(data.train.source, cache)  # the views are rebuilt from the frozen manifest
    for view in range(NUM_VIEWS):
        batch = dataset.fetch([(sample, view) for sample in range(NUM_SAMPLES)])
        assert (batch.images == data.train.load(range(NUM_SAMPLES), view).images).all()
    metrics = train_student(run, data, model="linear", labels="cache", cache=cache, out=tmp_path / "student")
    assert metrics["epochs"] == 2


def test_the_teacher_of_today_confirms_the_frozen_rows(store):
    run = config(store)
    data, cache = open_data(run), open_cache(str(GOLDEN / store))
    faults = verify_against_teacher(
        cache, data.train, open_teacher(run, data), num_rows=48, threshold_nats=1e-4, seed=0
    )
    assert list(faults) == []


def test_frozen_caches_are_small_and_hold_only_what_a_cache_needs(store):
    files = [path for path in (GOLDEN / store).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 50_000
    cache = open_cache(str(GOLDEN / store))
    named = {shard.path for marker in cache.markers.values() for shard in marker.shards}
    others = {path.relative_to(GOLDEN / store).as_posix() for path in files} - named
    metadata = {path for path in others if path.endswith("zarr.json") or "/temperature/c/" in path}
    assert others - metadata == {
        "manifest.json",
        "samples.parquet",
        *(f"units/0000{n}.json" for n in range(4)),
    }
