"""Caches of a detector's cells that were frozen stay readable; if one of these fails, mend the code, not tests/golden."""

import numpy as np
import pytest

from softcache.cache.manifest import diff_manifests
from softcache.labels import BernoulliLabels
from softcache.reader.open import open_cache
from softcache.runs import open_data, open_teacher, train_student
from softcache.teacher.capture.plan import plan_manifest
from softcache.tools.verify.teacher import verify_units
from tests.golden.make import (
    BIN_SPECS,
    CELL_SPECS,
    NUM_CELLS,
    NUM_SCENES,
    NUM_VIEWS,
    K,
    cell_config,
    main,
    read_cells,
)
from tests.support.caches import ROOT
from tests.support.cell_caches import weights

GOLDEN = ROOT / "tests" / "golden"
SPECS = {"cells": CELL_SPECS, "bins": BIN_SPECS}


@pytest.fixture(params=["zarr", "parquet"])
def store(request):
    return request.param


@pytest.fixture(params=list(SPECS))
def kind(request):
    return request.param


@pytest.fixture
def place(kind, store):
    return GOLDEN / f"v1-{kind}" / store


@pytest.fixture
def expected(kind, store):
    with np.load(GOLDEN / f"v1-{kind}" / "expected_cells.npz") as file:
        return {name.removeprefix(f"{store}/"): file[name] for name in file if name.startswith(f"{store}/")}


def test_what_was_frozen_is_read_number_for_number(kind, store, place, expected):
    cache = open_cache(str(place))
    assert (len(cache), cache.num_views) == (NUM_SCENES, NUM_VIEWS)
    for view in range(NUM_VIEWS):
        record = cache.read(np.arange(NUM_SCENES), view)
        assert isinstance(record.labels, BernoulliLabels) == SPECS[kind][store].startswith("fcos")
        assert ("bins" in record.columns) == (kind == "bins")
        assert record.labels.ids.shape == (NUM_SCENES * NUM_CELLS, K)
        found = {"cells": record.cells, **record.columns}
        found |= {name: getattr(record.labels, name) for name in expected if name not in found}
        for name, wanted in expected.items():
            np.testing.assert_array_equal(found[name].reshape(wanted[view].shape), wanted[view], err_msg=name)


def test_other_tools_still_find_the_frozen_numbers(place, expected):
    found = read_cells(place)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


def test_every_frozen_unit_still_matches_its_marker(place):
    cache = open_cache(str(place))
    assert len(cache.markers) == 4
    assert list(verify_units(cache)) == []


def test_a_frozen_manifest_is_written_again_byte_for_byte(place):
    cache = open_cache(str(place))
    assert cache.manifest.to_bytes() == (place / "manifest.json").read_bytes()
    for number, marker in cache.markers.items():
        assert marker.to_bytes() == (place / "units" / f"{number:05d}.json").read_bytes()


def test_todays_run_has_the_identity_of_the_frozen_one(kind, store, place, tmp_path):
    frozen = open_cache(str(place)).manifest
    run = cell_config(store, weights(tmp_path, SPECS[kind][store]), SPECS[kind])
    data = open_data(run)
    today, _ = plan_manifest(data.train, open_teacher(run, data), run.labels, run.capture)
    assert [line for line in diff_manifests(today, frozen) if "weights_digest" not in line] == []


def test_a_student_still_learns_from_a_frozen_cache(kind, store, place, tmp_path):
    run = cell_config(store, tmp_path / "none.safetensors", SPECS[kind])
    data, cache = open_data(run), open_cache(str(place))
    metrics = train_student(
        run, data, model=SPECS[kind][store], labels="cache", cache=cache, out=tmp_path / "student"
    )
    assert metrics["epochs"] == 1


def test_what_is_frozen_is_small_and_never_written_again(kind, monkeypatch):
    files = [path for path in (GOLDEN / f"v1-{kind}").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 100_000
    monkeypatch.setattr("tests.golden.make.capture", lambda *_: pytest.fail("it labels"))
    with pytest.raises(SystemExit, match="never written again"):
        main([kind])
