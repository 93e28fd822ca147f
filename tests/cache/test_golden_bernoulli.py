"""Caches of independent classes that were frozen stay readable; if one of these fails, mend the code, not tests/golden."""

import numpy as np
import pytest

from softcache.cache.manifest import diff_manifests
from softcache.labels import BernoulliLabels
from softcache.reader.open import open_cache
from softcache.runs import open_data, open_teacher, train_student
from softcache.teacher.capture.plan import plan_manifest
from softcache.tools.verify.checksums import verify_units
from tests.golden.make import (
    BERNOULLI_COLUMNS,
    NUM_SAMPLES,
    NUM_VIEWS,
    K,
    bernoulli_config,
    main,
    read_plainly,
)
from tests.support.caches import ROOT

GOLDEN = ROOT / "tests" / "golden" / "v1-bernoulli"


@pytest.fixture(params=["zarr", "parquet"])
def store(request):
    return request.param


@pytest.fixture
def expected(store):
    with np.load(GOLDEN / "expected_bernoulli.npz") as file:
        return {name: file[f"{store}/{name}"] for name in BERNOULLI_COLUMNS}


def test_what_was_frozen_is_read_number_for_number(store, expected):
    cache = open_cache(str(GOLDEN / store))
    assert list(verify_units(cache)) == []
    for view in range(NUM_VIEWS):
        record = cache.read(np.arange(NUM_SAMPLES), view)
        assert isinstance(record, BernoulliLabels)
        assert record.ids.shape == (NUM_SAMPLES, K)
        for name in BERNOULLI_COLUMNS[:-1]:
            np.testing.assert_array_equal(getattr(record, name), expected[name][view], err_msg=name)


def test_other_tools_still_find_the_frozen_numbers(store, expected):
    for name, values in read_plainly(GOLDEN / store, BERNOULLI_COLUMNS).items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


def test_a_frozen_manifest_is_written_again_byte_for_byte(store):
    cache = open_cache(str(GOLDEN / store))
    assert cache.manifest.to_bytes() == (GOLDEN / store / "manifest.json").read_bytes()


def test_todays_run_has_the_identity_of_the_frozen_one_and_its_students_learn(store, tmp_path):
    run = bernoulli_config(store)
    data, cache = open_data(run), open_cache(str(GOLDEN / store))
    today, _ = plan_manifest(data.train, open_teacher(run, data), run.labels, run.capture)
    assert diff_manifests(today, cache.manifest) == []
    metrics = train_student(run, data, model="linear", labels="cache", cache=cache, out=tmp_path / "student")
    assert metrics["epochs"] == 2


def test_what_is_frozen_is_small_and_never_written_again(monkeypatch):
    files = [path for path in GOLDEN.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 100_000
    monkeypatch.setattr("tests.golden.make.capture", lambda *_: pytest.fail("it labels"))
    with pytest.raises(SystemExit, match="never written again"):
        main(["bernoulli"])
