"""The writing half: what it writes, what it refuses, and what a kill leaves behind."""

import random
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from softcache.cache import units
from softcache.cache.finished import UnitIndex
from softcache.cache.storage.open import open_objects
from softcache.errors import IdentityError, LabelError, StorageError
from softcache.labels import sparsify
from softcache.reader.open import open_cache
from softcache.runs import capture_labels, make_teacher, open_data, open_teacher
from softcache.teacher.capture.writer import PendingUnit
from tests.support.caches import digits_config, make_cache
from tests.support.programs import Program


def run(url, **tables):
    return make_cache(url, **tables)[2]


def contents(cache):
    """Every array of a cache, by (view, name)."""
    out = {}
    for view in range(cache.num_views):
        labels, prints = cache.read_rows(np.arange(len(cache)), view)
        for name in ("ids", "log_probs", "log_tail", "target_log_prob", "stats"):
            out[view, name] = getattr(labels, name)
        out[view, "fingerprint"] = prints
    return out


def assert_same(one, other):
    a, b = contents(one), contents(other)
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=str(key))


@pytest.mark.parametrize("store", ["zarr", "parquet"])
def test_the_cache_holds_what_the_teacher_says_of_every_view(tmp_path, store):
    config, data, cache = make_cache(tmp_path / "cache", capture={"store": store})
    teacher = open_teacher(config, data)
    assert len(cache) == 300
    assert cache.num_views == 2
    assert not cache.missing_units
    for view in range(2):
        batch = data.train.load(range(300), view)
        dense_PV = torch.log_softmax(teacher.logits(batch.images).double(), -1)
        labels, prints = cache.read_rows(range(300), view)
        record = labels.to_torch()
        assert np.array_equal(prints, batch.fingerprints)
        assert torch.equal(record.ids.long(), dense_PV.topk(4).indices)
        assert torch.allclose(record.log_probs.double(), dense_PV.topk(4).values, atol=4e-3)
        dropped = dense_PV.exp().sum(-1) - dense_PV.topk(4).values.exp().sum(-1)
        assert torch.allclose(record.log_tail[:, 0].double().exp(), dropped, atol=1e-6)
        assert torch.allclose(
            record.target_log_prob.double(), dense_PV[torch.arange(300), batch.targets], atol=1e-5
        )


def test_a_second_run_makes_nothing_and_changes_nothing(tmp_path):
    config, data, first = make_cache(tmp_path / "cache")
    before = {
        p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "cache").rglob("*") if p.is_file()
    }
    _, report = capture_labels(config, data, open_teacher(config, data), first.url)
    assert (report.units_done, report.units_found) == (0, 10)
    assert {
        p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "cache").rglob("*") if p.is_file()
    } == before


def test_batch_size_does_not_reach_the_contents_beyond_float_rounding(tmp_path, shared_cache):
    other = run(tmp_path / "cache", capture={"batch_size": 7})
    a, b = contents(shared_cache[2]), contents(other)
    assert np.array_equal(a[0, "ids"], b[0, "ids"])
    np.testing.assert_allclose(a[1, "log_tail"], b[1, "log_tail"], atol=1e-5)


@pytest.mark.parametrize(
    ("tables", "field"),
    [
        ({"teacher": {"model": "tests.fakes:known_scaled"}}, "teacher.architecture"),
        ({"labels": {"k": 3}}, "labels.k"),
        ({"labels": {"num_views": 3}}, "views.num_views"),
        ({"views": {"padding": 2}}, "views.digest"),
        ({"source": {"max_train_samples": 200}}, "source.digest"),
        ({"capture": {"codec": {"values": "float32"}}}, "codec"),
        ({"capture": {"store": "parquet"}}, "store"),
        ({"capture": {"unit_samples": 32}}, "unit_samples"),
        ({"capture": {"dtype": "bfloat16"}}, "teacher.dtype"),
    ],
)
def test_another_identity_is_refused_field_by_field(tmp_path, tables, field):
    cache = run(tmp_path / "cache")
    config = digits_config(**tables)
    data = open_data(config)
    with pytest.raises(IdentityError, match=field):
        capture_labels(config, data, open_teacher(config, data), cache.url)
    assert_same(open_cache(cache.url), cache)


def test_other_weights_of_the_same_model_are_refused(tmp_path, monkeypatch):
    cache = run(tmp_path / "cache")
    config = digits_config()
    data = open_data(config)
    teacher = open_teacher(config, data)
    teacher.weights_digest = "0" * 64
    with pytest.raises(IdentityError, match=r"teacher\.weights_digest"):
        capture_labels(config, data, teacher, cache.url)


@pytest.mark.parametrize(("model", "what"), [("nan_teacher", "NaN"), ("inf_teacher", r"\+inf")])
def test_a_bad_logit_names_its_sample_and_its_unit_stays_undone(tmp_path, model, what):
    with pytest.raises(LabelError, match=rf"sample 'digits/\d+', view 0 \(unit \d+\): .*{what}"):
        run(tmp_path / "cache", teacher={"model": f"tests.fakes:{model}"})
    cache = open_cache(tmp_path / "cache")
    assert cache.missing_units
    assert 0 in cache.missing_units


def test_masked_classes_are_legal(tmp_path):
    cache = run(tmp_path / "cache", teacher={"model": "tests.fakes:masking_teacher"})
    assert not cache.missing_units
    assert np.isfinite(cache.read(range(300)).log_tail).all()


def test_a_wrong_head_is_refused(tmp_path):
    with pytest.raises(LabelError, match=r"expected logits of shape \(40, 10\).*found \(40, 12\)"):
        run(
            tmp_path / "cache",
            teacher={"model": "tests.fakes:wrong_head"},
            capture={"evaluate": False},
        )


def test_k_larger_than_v_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(LabelError, match=r"labels.k: 11 is more than the 10 classes"):
        run(tmp_path / "cache", labels={"k": 11})
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_dense_keeps_every_class(tmp_path):
    cache = run(tmp_path / "cache", labels={"policy": "dense", "num_views": 1})
    labels = cache.read([5, 3])
    assert labels.ids.shape == (2, 10)
    assert np.isneginf(labels.log_tail).all()


def test_an_unwritable_place_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="file"):
        run(tmp_path / "file" / "cache")


def test_a_dead_writer_stops_the_run_with_its_error(tmp_path, monkeypatch):
    real, calls = units.publish_unit, []

    def full_disk(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise StorageError("disk full")
        return real(*args, **kwargs)

    monkeypatch.setattr("softcache.teacher.capture.run.publish_unit", full_disk)
    with pytest.raises(StorageError, match="disk full"):
        run(tmp_path / "cache")
    monkeypatch.undo()
    assert len(open_cache(tmp_path / "cache").markers) == 2, "what was published before stays valid"
    assert_same(run(tmp_path / "cache"), run(tmp_path / "other"))


def test_at_most_so_many_units_wait_for_the_writer(tmp_path, monkeypatch):
    """The writer is held up until the teacher cannot go on; then only the queue, its unit and one more were labeled."""
    released, batches = threading.Event(), []
    real_publish, real_add = units.publish_unit, PendingUnit.add

    def slow(*args, **kwargs):
        released.wait(30)
        return real_publish(*args, **kwargs)

    def counted(self, batch, labels):
        batches.append(self.unit.number)
        real_add(self, batch, labels)

    monkeypatch.setattr("softcache.teacher.capture.run.publish_unit", slow)
    monkeypatch.setattr(PendingUnit, "add", counted)
    found = []

    def release():
        seen = -1
        while seen != len(batches) or not batches:  # nothing new for half a second: everything is full
            seen = len(batches)
            time.sleep(0.5)
        found.append(len(set(batches)))
        released.set()

    thread = threading.Thread(target=release)
    thread.start()
    cache = run(tmp_path / "cache", capture={"queue_units": 1})
    thread.join()
    assert not cache.missing_units
    assert found == [3], "one that is published, one that waits, one that does not fit; of ten"


def test_an_error_while_labels_are_made_is_the_runs_own_and_frees_every_claim(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("labels cannot be made")

    monkeypatch.setattr("softcache.labels.sparsify.TopK.apply", broken)
    before = threading.enumerate()
    with pytest.raises(RuntimeError, match="labels cannot be made"):
        run(tmp_path / "cache")
    assert not list((tmp_path / "cache" / "units").glob("*"))
    left = [
        thread for thread in threading.enumerate() if thread not in before
    ]  # other tests have caches open
    assert not [thread for thread in left if thread.name.startswith("softcache")]


def test_a_lookup_that_fails_frees_its_claim_while_the_error_is_kept(tmp_path, monkeypatch):
    def refuse(*_):
        raise StorageError("no answer")

    monkeypatch.setattr(UnitIndex, "marker", refuse)
    with pytest.raises(StorageError, match="no answer") as kept:
        make_cache(tmp_path / "cache")
    with open_objects(str(tmp_path / "cache")).claim("units/00000.lock") as ours:
        assert ours
    del kept


def test_loader_processes_give_the_same_cache(tmp_path, shared_cache):
    assert_same(run(tmp_path / "cache", capture={"workers": 2}), shared_cache[2])


# -- kills -------------------------------------------------------------------------------------------------

CAPTURE = """
import sys, time
from tests.support.caches import make_cache
import softcache.cache.units as units
units._failpoint = lambda name: time.sleep({pause})
make_cache(sys.argv[1])
"""


def start_capture(url, pause=0.0):
    return Program(CAPTURE.format(pause=pause), url)


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the capture did not get there"
        if process.poll() is not None:
            return
        time.sleep(0.005)


def test_killed_at_many_moments_and_rerun_it_equals_an_uninterrupted_run(tmp_path, shared_cache):
    url, moments = tmp_path / "cache", random.Random(0)
    for wanted in (1, 3, 6):
        process = start_capture(url, pause=0.02)
        wait_for(lambda wanted=wanted: len(list((url / "units").glob("*.json"))) >= wanted, process)
        time.sleep(moments.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = set(open_cache(url).markers)
    assert done, "finished units outlive the kill"
    assert len(done) < 10, "and the kills came before the end"
    before = {number: (url / "units" / f"{number:05d}.json").stat().st_mtime_ns for number in done}
    config = digits_config()
    data = open_data(config)
    cache, report = capture_labels(config, data, open_teacher(config, data), str(url))
    assert report.units_done == 10 - len(done), "only what was missing is made"
    assert {number: (url / "units" / f"{number:05d}.json").stat().st_mtime_ns for number in done} == before
    assert_same(cache, shared_cache[2])


def test_two_runs_at_once_share_the_units(tmp_path, shared_cache):
    url = tmp_path / "cache"
    processes = [start_capture(url, pause=0.01) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert_same(open_cache(url), shared_cache[2])
    assert not list((url / "units").glob("*.lock"))


def test_a_run_takes_over_from_one_that_dies_while_holding_a_unit(tmp_path, shared_cache):
    url = tmp_path / "cache"
    stuck = start_capture(url, pause=3600)
    wait_for(lambda: bool(list((url / "units").glob("*.lock"))), stuck)
    threading.Timer(1.5, stuck.kill).start()
    assert_same(run(url), shared_cache[2])
    stuck.wait()


@pytest.mark.gpu
def test_cuda_gives_the_record_of_the_cpu(tmp_path, shared_cache):
    cache = run(tmp_path / "cache", capture={"device": "cuda"})
    a, b = contents(shared_cache[2]), contents(cache)
    assert np.array_equal(a[1, "fingerprint"], b[1, "fingerprint"])
    np.testing.assert_allclose(a[0, "log_tail"], b[0, "log_tail"], atol=1e-3)


def test_the_record_does_not_bake_a_temperature_in(shared_cache):
    config, data, cache = shared_cache
    logits_PV = open_teacher(config, data).logits(data.train.load(range(50), 0).images)
    labels = cache.read(range(50)).to_torch()
    for temperature in (1.0, 2.0, 3.3, 8.0):
        expected = torch.log_softmax(logits_PV / temperature, -1).gather(1, labels.ids.long())
        assert torch.allclose(labels.at_temperature(temperature).log_probs, expected, atol=5e-3)
    assert sparsify.dense(logits_PV).k == 10


def test_a_k_that_is_too_large_is_refused_before_a_teacher_is_trained(in_tmp):
    weights = "runs/small/teacher/model.safetensors"
    tables = {
        "teacher": {"model": "linear", "weights": weights},
        "train_teacher": {"epochs": 1},
        "labels": {"k": 11},
    }
    config = digits_config(**tables)
    with pytest.raises(LabelError, match=r"labels.k: 11 is more than the 10 classes"):
        make_teacher(config, open_data(config))
    assert not Path("runs").exists()
