"""A run whose --out is a bucket: there after every checkpoint, gone on with from anywhere, and one run's only."""

import json
import shutil

import pytest

from softcache.cache.storage import lease
from softcache.cache.storage.cloud.store import CloudObjects
from softcache.cache.storage.open import open_objects
from softcache.errors import CorruptionError, RunError, StorageError
from softcache.runs import open_data, train_student
from softcache.runs.report import open_report, open_run
from softcache.student import bucket_sync
from softcache.student import loop as student
from softcache.student.bucket_sync import BucketSync
from softcache.student.checkpoint import _writing
from tests.support.caches import digits_config


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Returns a function that goes to another machine: one without local copies of any run."""

    def go_to(name):
        monkeypatch.setenv("SOFTCACHE_RUNS_DIR", str(tmp_path / name))

    go_to("first")
    return go_to


def train(cache, out, **settings):
    config = digits_config(train=settings)
    return train_student(config, open_data(config), model="mlp?width=8", labels="cache", cache=cache, out=out)


class Killed(BaseException):
    pass


def stop_after(epochs, monkeypatch):
    """The run dies when it evaluates for the last time of so many, after the checkpoints before that."""
    evaluate, left = student.Trainer.evaluate, [epochs]

    def dying(loop):
        if not left[0]:
            raise Killed
        left[0] -= 1
        return evaluate(loop)

    monkeypatch.setattr(student.Trainer, "evaluate", dying)
    return lambda: monkeypatch.setattr(student.Trainer, "evaluate", evaluate)


def test_a_finished_run_lies_in_the_bucket_as_it_would_in_a_folder(bucket, machine, shared_cache, tmp_path):
    cache, url = shared_cache[2], f"{bucket}/run"
    there, here = train(cache, url), train(cache, tmp_path / "run")
    assert there["history"] == here["history"]
    assert there["out"] == url
    objects = open_objects(url)
    names = sorted(p.name for p in (tmp_path / "run").iterdir() if p.is_file())
    assert objects.list("") == names
    for name in ("model.safetensors", "best.safetensors", "config.json"):
        assert objects.get(name) == (tmp_path / "run" / name).read_bytes()
    assert json.loads(objects.get("metrics.json"))["history"] == here["history"]


def test_another_machine_reports_a_finished_run_and_trains_nothing(
    bucket, machine, shared_cache, monkeypatch
):
    metrics = train(shared_cache[2], f"{bucket}/run")
    machine("second")
    stop_after(0, monkeypatch)
    assert train(shared_cache[2], f"{bucket}/run") == metrics


def test_another_machine_goes_on_from_the_last_checkpoint(
    bucket, machine, shared_cache, tmp_path, monkeypatch
):
    cache, url = shared_cache[2], f"{bucket}/run"
    expected = train(cache, tmp_path / "run", epochs=3)
    again = stop_after(2, monkeypatch)
    with pytest.raises(Killed):
        train(cache, url, epochs=3)
    objects = open_objects(url)
    assert objects.size("metrics.json") is None
    named = json.loads(objects.get("checkpoint.json"))["files"]
    assert len(objects.list("checkpoint")) == len(set(named)), "files of the checkpoint before are gone"
    again()
    machine("second")
    evaluated = []
    evaluate = student.Trainer.evaluate
    monkeypatch.setattr(student.Trainer, "evaluate", lambda loop: evaluated.append(1) or evaluate(loop))
    assert train(cache, url, epochs=3)["history"] == expected["history"]
    assert len(evaluated) == 1, "two of three epochs were done"
    assert objects.get("model.safetensors") == (tmp_path / "run/model.safetensors").read_bytes()
    assert objects.list("checkpoint") == []


def test_another_run_is_refused(bucket, machine, shared_cache):
    train(shared_cache[2], f"{bucket}/run", epochs=1)
    for name in ("first", "second"):
        machine(name)
        with pytest.raises(RunError, match=r"holds another run .*train\.lr"):
            train(shared_cache[2], f"{bucket}/run", epochs=1, lr=0.5)


def test_a_damaged_checkpoint_is_named(bucket, machine, shared_cache, monkeypatch):
    url = f"{bucket}/run"
    stop_after(1, monkeypatch)
    with pytest.raises(Killed):
        train(shared_cache[2], url)
    machine("second")
    objects = open_objects(url)
    path = next(path for path in objects.list("checkpoint") if path.endswith("model.safetensors"))
    good = objects.get(path)
    objects.put(path, good[:-1])
    with pytest.raises(CorruptionError, match=r"model\.safetensors is damaged"):
        train(shared_cache[2], url)
    objects.delete(path)
    with pytest.raises(CorruptionError, match=r"model\.safetensors is missing"):
        train(shared_cache[2], url)
    for bad in (b"[]", b'{"files": {"../x": "00"}}', b'{"files": {"/etc/x": "' + b"0" * 64 + b'"}}'):
        objects.put("checkpoint.json", bad)
        with pytest.raises(CorruptionError, match=r"checkpoint\.json is not a list of files"):
            train(shared_cache[2], url)


def test_a_run_that_stopped_before_its_end_was_sent_is_sent(bucket, machine, shared_cache, monkeypatch):
    url, put = f"{bucket}/run", CloudObjects.put

    def dies(self, path, data):
        if path == "metrics.json":
            raise Killed
        put(self, path, data)

    with monkeypatch.context() as patch:
        patch.setattr(CloudObjects, "put", dies)
        with pytest.raises(Killed):
            train(shared_cache[2], url, epochs=1)
    stop_after(0, monkeypatch)  # nothing is trained again
    metrics = train(shared_cache[2], url, epochs=1)
    objects = open_objects(url)
    assert json.loads(objects.get("metrics.json"))["history"] == metrics["history"]
    assert objects.size("checkpoint.json") is None
    assert objects.list("checkpoint") == []


def test_the_bucket_wins_over_an_older_local_copy(bucket, machine, shared_cache, monkeypatch):
    cache, url, evaluated = shared_cache[2], f"{bucket}/run", []
    evaluate = student.Trainer.evaluate
    for name, epochs in (("first", 1), ("second", 1)):
        machine(name)
        again = stop_after(epochs, monkeypatch)
        with pytest.raises(Killed):
            train(cache, url, epochs=3)
        again()
    machine("first")  # whose copy has one epoch, where the bucket has two
    monkeypatch.setattr(student.Trainer, "evaluate", lambda loop: evaluated.append(1) or evaluate(loop))
    assert train(cache, url, epochs=3)["epochs"] == 3
    assert len(evaluated) == 1


def test_a_run_that_was_deleted_in_the_bucket_is_trained_anew(bucket, machine, shared_cache, monkeypatch):
    url, objects, evaluated = f"{bucket}/run", open_objects(f"{bucket}/run"), []
    train(shared_cache[2], url, epochs=1)
    for path in objects.list(""):
        objects.delete(path)
    evaluate = student.Trainer.evaluate
    monkeypatch.setattr(student.Trainer, "evaluate", lambda loop: evaluated.append(1) or evaluate(loop))
    train(shared_cache[2], url, epochs=1)
    assert len(evaluated) == 1
    assert objects.size("metrics.json") is not None


def test_a_second_run_in_one_place_of_a_bucket_is_refused(bucket, machine, shared_cache, monkeypatch):
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.6)
    monkeypatch.setattr(bucket_sync, "WAIT_SECONDS", 0.1)
    url = f"{bucket}/run"
    with BucketSync(url).lease():
        machine("second")
        with pytest.raises(RunError, match=r"another run works on it \(host .*, process \d+\)"):
            train(shared_cache[2], url, epochs=1)
    # A process that was killed leaves a lease that is not renewed: it is waited for.
    killed = lease.Lease(open_objects(url)._board, "run.lock")
    killed._renew = None
    killed._thread.run = lambda: None
    assert killed.acquire()
    train(shared_cache[2], url, epochs=1)


def test_a_run_that_another_process_went_on_with_is_left_as_it_is(bucket, machine, shared_cache, monkeypatch):
    url, objects, send, seen = f"{bucket}/run", open_objects(f"{bucket}/run"), BucketSync.send, []

    def overtaken(self):
        if seen:
            objects.put("checkpoint.json", b'{"files": {}}')
        send(self)
        seen.append(1)

    monkeypatch.setattr(BucketSync, "send", overtaken)
    with pytest.raises(RunError, match="another process has changed it in the bucket"):
        train(shared_cache[2], url, epochs=2)
    assert objects.get("checkpoint.json") == b'{"files": {}}'


def test_a_folder_that_is_thrown_away_is_made_again(bucket, machine, shared_cache):
    metrics = train(shared_cache[2], f"{bucket}/run", epochs=1)
    shutil.rmtree(BucketSync(f"{bucket}/run").folder)
    assert train(shared_cache[2], f"{bucket}/run", epochs=1) == metrics


def test_report_and_export_read_runs_of_a_bucket(bucket, machine, shared_cache, tmp_path, monkeypatch):
    cache = shared_cache[2]
    train(cache, f"{bucket}/runs/one")
    train(cache, f"{bucket}/runs/two", seed=1)
    again = stop_after(2, monkeypatch)
    with pytest.raises(Killed):
        train(cache, f"{bucket}/runs/half", epochs=3)
    again()
    machine("second")
    report = open_report([f"{bucket}/runs/"], cache_url=cache.url)
    assert [run.config.train.seed for run in report.runs] == [0, 1]
    assert report.unfinished == [f"{bucket}/runs/half"]
    one = open_run(f"{bucket}/runs/one", cache_url=cache.url)
    assert one.student(one.runs[0])[1] is not None
    with pytest.raises(
        RunError, match=r"runs/half/: not finished \(no metrics.json\); run its command again"
    ):
        open_run(f"{bucket}/runs/half/")
    with pytest.raises(RunError, match=r"/nothing: expected a run's directory .* found none"):
        open_report([f"{bucket}/nothing"])
    # The run is trained anew by another machine: what is copied here is not taken for it.
    objects = open_objects(f"{bucket}/runs/one")
    for path in objects.list(""):
        objects.delete(path)
    machine("first")
    train(cache, f"{bucket}/runs/one", seed=2)
    machine("second")
    assert open_run(f"{bucket}/runs/one", cache_url=cache.url).runs[0].config.train.seed == 2


@pytest.mark.parametrize(
    "words", ["PytorchStreamWriter failed writing file data/0", "[enforce fail at inline_container.cc:672]"]
)
def test_a_disk_that_is_full_under_torch_is_one_message(tmp_path, words):
    with (
        pytest.raises(
            StorageError, match=r"cannot be written: .*free some space .* the last checkpoint is kept"
        ),
        _writing(tmp_path),
    ):
        raise RuntimeError(f"{words}: unexpected pos 11008 vs 10900")
