"""Units on many workers: the same bytes as in a plain run, whatever dies, and every failure by name.

The scheduler's rules are tested with a cluster of made-up answers; the rest with one real Dask cluster of two processes.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from multiprocessing import forkserver
from types import SimpleNamespace

import dask
import psutil
import pytest

from benchmarks import scheduling
from softcache import __version__
from softcache.cache.storage.open import open_objects
from softcache.errors import ConfigError, IdentityError, RunError, UnitsFailedError
from softcache.reader.open import open_cache
from softcache.runs import capture_labels, open_data, open_teacher, prepare_cache
from softcache.runs.dask import capture_on_dask, worker
from softcache.runs.dask.capture import _prepared
from softcache.runs.dask.cluster import (
    DaskCluster,
    LocalWorkers,
    check_workers,
    open_client,
    redirect_dask_logs,
)
from softcache.runs.dask.scheduler import (
    MAX_ATTEMPTS,
    MAX_CONSECUTIVE_FAILURES,
    MAX_WORKER_FAULTS,
    Scheduler,
    WorkerDied,
)
from softcache.runs.dask.worker import Job, Outcome, Prepared, Step, label
from softcache.teacher.capture.run import UnitMetrics
from tests.support.caches import ROOT, digits_config, make_cache
from tests.support.text_caches import make_text_cache, text_config

# -- the scheduler's rules, without a cluster --------------------------------------------------------------


class Answers:
    """A cluster that answers by a function; `answer(unit, try, avoid)` gives an Outcome, None or an exception."""

    def __init__(self, answer, threads=2):
        self.answer, self.threads, self.open, self.most = answer, threads, {}, 0
        self.tries, self.order, self.alone, self.cancelled = Counter(), [], [], []
        self.by_sample, self.restarted, self.calls = [], [], {}

    def submit(self, unit, *, last, avoid, alone=False):
        self.tries[unit] += 1
        self.by_sample += [unit] * alone
        self.order.append((unit, last, avoid))
        self.open[unit] = self.answer(unit, self.tries[unit], avoid)
        self.most = max(self.most, len(self.open))
        if len(self.open) == 1:
            self.alone.append(unit)
        return unit

    def on_done(self, handle, call):
        call()

    def result(self, handle):
        answer = self.open.pop(handle)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def cancel(self, handles):
        self.cancelled += list(handles)

    def num_threads(self):
        return self.threads

    def is_alive(self):
        return True

    def steps(self):
        return []

    def restart(self, worker):
        self.restarted.append(worker)


def made(unit):
    return Outcome(unit, "w0", UnitMetrics(unit, 0, 1, 1, 1.0, 1.0, 0))


def schedule(answer, units, **how):
    cluster, came = Answers(answer, **how), []
    scheduler = Scheduler(cluster, units, came.append)
    return cluster, scheduler, came


def test_a_million_units_are_never_all_in_flight():
    cluster, scheduler, came = schedule(lambda unit, *_: made(unit), iter(range(5000)), threads=3)
    assert scheduler.run() == []
    assert sorted(outcome.unit for outcome in came) == list(range(5000))
    assert cluster.most == 6


def test_a_unit_is_tried_three_times_on_other_workers_and_the_rest_goes_on():
    def answer(unit, number, avoid):
        return Outcome(unit, f"w{number}", error="bad") if unit == 4 else made(unit)

    cluster, scheduler, came = schedule(answer, range(10))
    (failure,) = scheduler.run()
    assert (failure.unit, failure.error, failure.workers) == (4, "bad", ["w1", "w2", "w3"])
    assert len(came) == 9
    tries = [(last, sorted(avoid)) for unit, last, avoid in cluster.order if unit == 4]
    assert tries == [(False, []), (False, ["w1"]), (True, ["w1", "w2"])]


def test_a_unit_that_succeeds_at_its_second_try_is_no_failure():
    def answer(unit, number, avoid):
        return made(unit) if number == 2 else Outcome(unit, "w1", error="bad")

    _, scheduler, came = schedule(answer, range(20))
    assert scheduler.run() == []
    assert len(came) == 20


def test_a_worker_that_cannot_write_gets_no_more_units_and_costs_none(capsys):
    """w1 is first at everything that it is not kept from."""

    def answer(unit, number, avoid):
        if "w1" not in avoid:
            return Outcome(unit, "w1", error="read-only file system")
        return made(unit)

    cluster, scheduler, came = schedule(answer, range(30))
    assert scheduler.run() == []
    assert sorted(outcome.unit for outcome in came) == list(range(30))
    assert sum(number == 2 for number in cluster.tries.values()) <= 2 * MAX_WORKER_FAULTS + 1
    logged = [line for line in capsys.readouterr().err.splitlines() if "gets no more" in line]
    assert len(logged) == 1
    assert "worker w1 failed on 3 units that others made" in logged[0]
    assert "read-only file system" in logged[0]


def test_a_worker_that_fails_and_makes_units_is_kept():
    def answer(unit, number, avoid):
        fails = number == 1 and unit % 2
        made_here = Outcome(unit, "w1", UnitMetrics(unit, 0, 1, 1, 1.0, 1.0, 0))
        return (
            Outcome(unit, "w1", error="now and then") if fails else made(unit) if number == 2 else made_here
        )

    cluster, scheduler, _ = schedule(answer, range(40))
    assert scheduler.run() == []
    assert all("w1" not in avoid for unit, _, avoid in cluster.order if unit % 2 == 0)


class Handle:
    def __init__(self, workers):
        self.workers, self.status = workers, "pending"


class Client:
    """Stands in for Dask's client: what is submitted stays pending, `run` gives what each worker has."""

    def __init__(self, workers, versions=None):
        self.workers, self.versions, self.scheduler = workers, versions, None

    def submit(self, function, job, unit, *, workers, allow_other_workers, **how):
        assert not allow_other_workers
        return Handle(workers)

    def scheduler_info(self, n_workers):
        return {"workers": {worker: {"nthreads": 2} for worker in self.workers}}

    def cancel(self, handles, force):
        for handle in handles:
            handle.status = "cancelled"

    def wait_for_workers(self, number):
        assert len(self.workers) >= number

    def run(self, function, *args, on_error):
        assert function.__module__ == "builtins"
        return self.versions


def test_a_unit_is_bound_to_other_workers_and_freed_when_they_are_gone():
    client = Client(["w1", "w2", "w3"])
    cluster = DaskCluster(client, Job("{}", "nowhere"))
    assert cluster.submit(1, last=False, avoid=frozenset()).workers is None
    bound = cluster.submit(1, last=False, avoid=frozenset({"w1"}))
    kept = cluster.submit(2, last=False, avoid=frozenset({"w2"}))
    assert (bound.workers, kept.workers) == (["w2", "w3"], ["w1", "w3"])
    client.workers, cluster._asked = ["w1"], -1e9
    cluster.num_threads()
    assert (bound.status, kept.status) == ("cancelled", "pending")
    assert cluster.result(bound) is None
    assert cluster.submit(1, last=False, avoid=frozenset({"w1"})).workers is None, "there are no others"


def test_workers_without_softcache_or_with_another_version_are_named():
    missing = ModuleNotFoundError("No module named 'softcache'")
    check_workers(Client(["w1"], {"w1": __version__}))
    with pytest.raises(
        RunError, match=r"2 of 3 workers cannot label.*w2: ModuleNotFoundError: No module.*w3: 9\.9"
    ):
        check_workers(Client(["w1"], {"w1": __version__, "w2": missing, "w3": "9.9"}))


def test_another_worker_begins_where_the_first_cannot_write(shared_cache, capsys):
    cache, bound = shared_cache[2], []

    class Beginning(Client):
        def submit(self, function, job, *, pure, workers):
            bound.append(workers)
            failed = Prepared("w1", error="read-only file system", is_storage=True)
            return SimpleNamespace(
                result=lambda: Prepared("w2", cache.manifest_sha256) if workers else failed
            )

    found = _prepared(Beginning(["w1", "w2"]), Job("{}", cache.url))
    assert found[2] == cache.manifest_sha256
    assert bound == [None, ["w2"]]
    assert "worker w1 could not begin: read-only file system; another one is asked" in capsys.readouterr().err
    with pytest.raises(RunError, match="could not begin: read-only"):
        _prepared(Beginning(["w1"]), Job("{}", cache.url))


def test_workers_that_die_as_they_begin_are_said_to_lack_memory(shared_cache):
    class KilledWorker(Exception):
        pass

    class Dying(Client):
        def submit(self, function, job, *, pure, workers):
            raise KilledWorker("all those workers died")

    with pytest.raises(
        RunError, match=r"KilledWorker: all those workers died; .*memory: start workers with --memory-limit 0"
    ):
        _prepared(Dying(["w1"]), Job("{}", shared_cache[2].url))


def test_no_logger_of_dask_prints_a_traceback_of_its_own(capsys):
    import distributed  # noqa: F401  sets up its loggers

    client = logging.getLogger("distributed.client")
    before = client.handlers[:], client.propagate
    with redirect_dask_logs():
        try:
            raise ConnectionRefusedError("the scheduler")
        except ConnectionRefusedError:
            client.exception("")
        client.warning("a worker is slow")
    assert capsys.readouterr().err == "dask: a worker is slow\n"
    assert (client.handlers, client.propagate) == before


def test_where_everything_fails_the_run_ends_soon():
    cluster, scheduler, _ = schedule(lambda unit, *_: Outcome(unit, "w0", error="no disk"), range(10_000))
    with pytest.raises(RunError, match=r"10 units failed one after the other.*no disk"):
        scheduler.run()
    assert len(cluster.tries) <= MAX_CONSECUTIVE_FAILURES + 4
    assert set(cluster.tries.values()) <= set(range(MAX_ATTEMPTS + 1))


def test_a_neighbour_of_a_unit_that_kills_its_worker_is_not_blamed():
    def answer(unit, number, avoid):
        if unit == 3 or (unit == 5 and number == 1):
            return WorkerDied()
        return made(unit)

    cluster, scheduler, came = schedule(answer, range(10))
    assert [failure.unit for failure in scheduler.run()] == [3]
    assert 5 in {outcome.unit for outcome in came}
    assert 3 in cluster.alone
    assert cluster.tries[3] == 3, "as many loads of the teacher"


class Hanging(Answers):
    """Unit 3 hangs wherever it runs: at a batch, and at sample 'k7' where each is taken by itself."""

    def on_done(self, handle, call):
        self.calls[handle] = call
        if handle != 3:
            call()

    def cancel(self, handles):
        for handle in handles:
            self.open[handle] = None
            self.calls[handle]()

    def steps(self):
        if 3 not in self.open or self.open[3] is None:
            return
        doing = "sample 'k7', view 0" if 3 in self.by_sample else "view 0, samples 0 to 9"
        yield f"w{self.tries[3]}", Step("c", 3, doing, is_waiting=False, seconds=9.0)
        yield f"w{self.tries[3]}", Step("c", 4, is_waiting=True, seconds=99.0)
        yield "w9", Step("c", 5, "opening", is_waiting=False, is_opening=True, seconds=9.0)


def test_a_unit_that_hangs_costs_its_worker_and_is_named_by_its_sample(monkeypatch, capsys):
    monkeypatch.setattr("softcache.runs.dask.scheduler.STALL_POLL_SECONDS", 0.01)
    monkeypatch.setattr("softcache.runs.dask.scheduler.MIN_STALL_SECONDS", 8.0)
    monkeypatch.setattr("softcache.runs.dask.scheduler.MEDIANS_OF_A_STALL", 2.0)
    cluster, came = Hanging(lambda unit, *_: made(unit), threads=3), []
    (failure,) = Scheduler(cluster, range(10), came.append).run()
    assert (failure.unit, failure.workers) == (3, ["w1", "w2"])
    assert failure.error == "sample 'k7', view 0: no progress for 9 s; the limit is 8 s"
    assert len(came) == 9
    assert cluster.restarted == ["w1", "w2"], "w9 opens its teacher, for which it has an hour"
    assert "worker w1, unit 3, view 0, samples 0 to 9: no progress for 9 s" in capsys.readouterr().err


def test_a_worker_that_hangs_since_an_earlier_run_is_restarted_too():
    cluster = Answers(lambda unit, *_: made(unit))
    cluster.steps = lambda: [("w5", Step("c", 50, "view 0, samples 0 to 9", is_waiting=False, seconds=99.0))]
    scheduler = Scheduler(cluster, range(3), print, stall_seconds=60)
    scheduler._look_for_stalls()
    scheduler._look_for_stalls()
    assert cluster.restarted == ["w5"]
    assert scheduler.run() == []

    def neighbor(unit, number, avoid):
        return WorkerDied(5) if unit == 1 and number == 1 else made(unit)

    scheduler = Scheduler(cluster := Answers(neighbor), range(3), print)
    scheduler._restarting_until = time.monotonic() + 60
    assert scheduler.run() == []
    assert cluster.tries[1] == 2, "a death by a restart counts against no unit"


def test_nothing_hangs_before_three_units_are_made():
    scheduler = Scheduler(Answers(None), [], print)
    assert scheduler._limit() == 3600
    scheduler._seconds += [1.0, 2.0, 60.0]
    assert scheduler._limit() == 300
    scheduler._seconds += [50.0, 60.0]
    assert scheduler._limit() == 500
    assert Scheduler(Answers(None), [], print, stall_seconds=7)._limit() == 7


def test_lost_and_held_units_are_asked_for_again(monkeypatch):
    monkeypatch.setattr("softcache.runs.dask.scheduler.CLAIM_RETRY_SECONDS", 0.01)

    def answer(unit, number, avoid):
        if number <= 4:  # more often than a failure would be tried
            return None if unit % 2 else Outcome(unit, "w0", held=True)
        return made(unit)

    _, scheduler, came = schedule(answer, range(6))
    assert scheduler.run() == []
    assert len(came) == 6


# -- a real cluster ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client():
    forkserver.ensure_running()  # with what the tests preload, not with what Dask would
    with (
        dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}),
        open_client("auto", LocalWorkers(2, gpus=False, torch_threads=1), dashboard=":0") as client,
    ):
        yield client


@pytest.fixture
def address(client):
    return client.scheduler.address


def files(cache, *, below=""):
    """Every byte of a cache, by path; what another run staged, or held when it was killed, is left out."""
    root = cache / below
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and ".staging" not in path.parts and path.suffix != ".lock"
    }


def test_images_have_the_bytes_of_a_plain_run(tmp_path, address, shared_cache):
    report = capture_on_dask(digits_config(), str(tmp_path / "cache"), address)
    assert (report.units_done, report.units_found, report.rows) == (10, 0, 600)
    assert report.workers == 2
    plain = make_cache(tmp_path / "plain")[2]
    assert files(tmp_path / "cache") == files(tmp_path / "plain")
    assert not plain.missing_units
    again = capture_on_dask(digits_config(), str(tmp_path / "cache"), address)
    assert (again.units_done, again.units_found) == (0, 10)


def test_texts_have_the_bytes_of_a_plain_run(tmp_path, address):
    make_text_cache(tmp_path / "plain", tmp_path, capture={"store": "parquet"})
    config = text_config(tmp_path, capture={"store": "parquet"})
    report = capture_on_dask(config, str(tmp_path / "cache"), address, torch_threads=1)
    assert report.units_done > 2
    found, expected = files(tmp_path / "cache"), files(tmp_path / "plain")
    assert [path for path in expected if found.get(path) != expected[path]] == []
    assert found.keys() == expected.keys()


def test_workers_may_have_loader_processes(tmp_path, address):
    few_units = {"unit_samples": 150, "chunk_samples": 50, "evaluate": False}  # each starts a loader process
    config = digits_config(capture=few_units | {"workers": 1})
    report = capture_on_dask(config, str(tmp_path / "cache"), address)
    assert report.units_done == 4
    make_cache(tmp_path / "plain", capture=few_units)
    assert files(tmp_path / "cache") == files(tmp_path / "plain")


def test_loader_processes_of_a_daemon_are_refused_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "_address", lambda: "w1")
    monkeypatch.setattr(worker, "current_process", lambda: SimpleNamespace(daemon=True))
    config = digits_config(capture={"workers": 2})
    found = worker.prepare(Job(config.model_dump_json(exclude_unset=True), str(tmp_path / "cache")))
    assert "capture.workers: 2 loader processes; this Dask worker is a daemon" in found.error
    assert not (tmp_path / "cache").exists()


def test_one_unit_asked_for_twice_at_once_is_made_once(tmp_path, client):
    config = digits_config(teacher={"model": "tests.fakes:slow"}, capture={"evaluate": False})
    url, data = str(tmp_path / "cache"), open_data(config)
    sha256 = prepare_cache(config, data, open_teacher(config, data), url)[2]
    job = Job(config.model_dump_json(exclude_unset=True), url, sha256)
    for unit in range(3):
        twice = [client.submit(label, job, unit, pure=False) for _ in range(4)]
        outcomes = [future.result() for future in twice]
        assert [outcome.error for outcome in outcomes] == [None] * 4
        assert sum(outcome.metrics is not None for outcome in outcomes) == 1
    assert sorted(open_cache(url).markers) == [0, 1, 2]


def test_a_worker_that_is_killed_in_a_unit_costs_nothing_but_time(tmp_path, address):
    lives = tmp_path / "lives"
    lives.mkdir()
    (lives / "one").touch()
    model = f"tests.fakes:dying?lives={lives}"
    config = digits_config(teacher={"model": model}, capture={"evaluate": False})
    report = capture_on_dask(config, str(tmp_path / "cache"), address)
    assert not list(lives.iterdir()), "a worker did die"
    assert report.units_done + report.units_found == 10
    capture_labels(config, data := open_data(config), open_teacher(config, data), str(tmp_path / "plain"))
    assert files(tmp_path / "cache") == files(tmp_path / "plain")


def poisonous_config(sample, view):
    config = digits_config()
    data = open_data(config)
    logit = open_teacher(config, data).logits(data.train.load([sample], view).images)[0, 0]
    return digits_config(
        teacher={"model": f"tests.fakes:poisoned?poison={float(logit)!r}"},
        capture={"evaluate": False},
    ), data.train.source.key(sample)


def test_a_sample_that_the_teacher_cannot_digest_is_named_and_the_rest_is_done(tmp_path, address):
    config, key = poisonous_config(137, view=1)
    unit = 5 + 137 // 64
    expected = rf"1 of 10 units failed and were given up, the other 9 are done:\n  unit {unit} \(view 1, samples 128 to 191\): "
    expected += rf"sample '{key}', view 1: teacher .*: RuntimeError: cannot digest this image; .* \(tried on tcp://.*, tcp://.*, tcp://"
    with pytest.raises(UnitsFailedError, match=expected):
        capture_on_dask(config, str(tmp_path / "cache"), address)
    assert list(open_cache(tmp_path / "cache").missing_units) == [unit]
    assert not list((tmp_path / "cache/units").glob("*.lock"))


def test_the_command_joins_a_cluster_and_fails_with_one_message(tmp_path, address, monkeypatch, capsys):
    from softcache.stages.cli import main

    monkeypatch.chdir(tmp_path)
    config = digits_config(teacher={"model": "tests.fakes:nan_teacher"}, capture={"evaluate": False})
    (tmp_path / "small.toml").write_text(
        '[source]\nname = "digits"\nmax_train_samples = 300\n[views]\nmean = [0.3]\nstd = [0.4]\n'
        f'[teacher]\nmodel = "{config.teacher.model}"\n[labels]\nk = 4\n'
        '[capture]\nunit_samples = 100\nchunk_samples = 50\ndevice = "cpu"\nevaluate = false\n'
    )
    monkeypatch.setattr(
        sys, "argv", ["softcache", "teacher-logits", "--config", "small.toml", "--dask", address]
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert "3 of 3 units failed and were given up" in err
    for unit in range(3):
        assert (
            f"unit {unit} (view 0, samples {100 * unit} to {100 * unit + 99}): teacher logits of sample"
            in err
        )


def test_a_plain_capture_and_workers_share_a_cache(tmp_path, address):
    config = digits_config(teacher={"model": "tests.fakes:slow"}, capture={"evaluate": False})
    data, url = open_data(config), str(tmp_path / "cache")
    plain, found = threading.Event(), []

    def capture():
        plain.set()
        found.append(capture_labels(config, data, open_teacher(config, data), url)[1])

    thread = threading.Thread(target=capture)
    thread.start()
    plain.wait()
    report = capture_on_dask(config, url, address)
    thread.join()
    assert report.units_done + found[0].units_done == 10
    assert report.units_done + report.units_found == 10
    capture_labels(config, data, open_teacher(config, data), str(tmp_path / "alone"))
    assert files(tmp_path / "cache") == files(tmp_path / "alone")


def test_workers_refuse_a_cache_of_something_else(tmp_path, address):
    make_cache(tmp_path / "cache")
    other = digits_config(teacher={"model": "tests.fakes:known_scaled"})
    with pytest.raises(
        RunError, match=r"(?s)could not begin: .*made from something else.*\(worker tcp://.*, in its folder /"
    ):
        capture_on_dask(other, str(tmp_path / "cache"), address)


def test_a_worker_whose_weights_differ_from_the_caches_refuses_its_units(tmp_path, monkeypatch):
    config = digits_config(capture={"evaluate": False})
    cache = make_cache(tmp_path / "cache", capture={"evaluate": False})[2]
    job = Job(config.model_dump_json(exclude_unset=True), cache.url, cache.manifest_sha256)
    monkeypatch.setattr("softcache.teacher.base.digest_weights", lambda state: "0" * 64)
    outcome = label(job, 0)
    assert outcome.error is not None
    assert "teacher.weights_digest" in outcome.error
    assert IdentityError.__name__ not in outcome.error


def test_what_is_no_address_and_where_nobody_answers_is_said(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"--dask 4: expected auto, or a scheduler's address"):
        capture_on_dask(digits_config(), str(tmp_path / "cache"), "4")
    monkeypatch.setattr("softcache.runs.dask.cluster.CONNECT_SECONDS", "1s")
    with pytest.raises(RunError, match="no scheduler answers there"):
        capture_on_dask(digits_config(), str(tmp_path / "cache"), "tcp://127.0.0.1:1")


def test_the_scheduling_benchmark_gives_the_slope_of_both_roads(client):
    rates = scheduling.rates_on(client, 3, 9, rounds=1)
    assert set(rates) == {"plain, 3", "plain, 9", "dask, 3", "dask, 9"}
    made_up = {
        "plain, 3": [3.0],
        "plain, 9": [3.0],
        "dask, 3": [1.0],
        "dask, 9": [1.5],
    }  # 1, 3, 3 and 6 seconds
    rows, overheads = scheduling.figures(made_up, 3, 9)
    assert overheads == pytest.approx([0.5 - 2 / 6])
    assert [row.per_second for row in rows] == pytest.approx([3.0, 2.0])


# -- the driver dies ---------------------------------------------------------------------------------------

DRIVER = """
import sys
from tests.support.caches import digits_config
from softcache.runs.dask import capture_on_dask
from softcache.runtime.signals import Interrupted, handle_signals
if __name__ == "__main__":
    config = digits_config(teacher={"model": "tests.fakes:slow"}, capture={"evaluate": False, "unit_samples": 32})
    with handle_signals():
        try:
            capture_on_dask(config, sys.argv[1], "auto", workers=1, dashboard=":0")
        except Interrupted as stopped:
            sys.exit(stopped.exit_code)
"""


def test_a_sample_that_hangs_is_named_and_the_rest_is_done(tmp_path, address):
    config, key = poisonous_config(137, view=1)
    config = digits_config(
        teacher={"model": config.teacher.model.replace("poisoned", "hanging")}, capture={"evaluate": False}
    )
    with pytest.raises(
        UnitsFailedError, match=rf"1 of 10 units.*\n  unit 7 .*sample '{key}', view 1: no progress"
    ):
        capture_on_dask(config, str(tmp_path / "cache"), address, stall_seconds=15)
    assert list(open_cache(tmp_path / "cache").missing_units) == [7]
    with open_objects(str(tmp_path / "cache")).claim("units/00007.lock") as is_free:
        assert is_free, "the worker that hung is gone"


@pytest.mark.chaos
def test_workers_fill_a_bucket(tmp_path, bucket):
    report = capture_on_dask(digits_config(), f"{bucket}/cache", "auto", workers=2, dashboard=":0")
    assert (report.units_done, report.rows, report.workers) == (10, 600, 2)
    make_cache(tmp_path / "plain")
    objects = open_objects(f"{bucket}/cache")
    found = {path: objects.get(path) for path in objects.list("")}
    assert found == files(tmp_path / "plain"), "and no claim is left"


@pytest.mark.chaos
def test_an_adaptive_cluster_grows_from_nothing(tmp_path):
    config = digits_config(teacher={"model": "tests.fakes:slow"}, capture={"evaluate": False})
    with open_client("auto", LocalWorkers(1, gpus=False, torch_threads=1), dashboard=":0") as client:
        client.cluster.scale(0)
        while client.scheduler_info(n_workers=-1)["workers"]:
            time.sleep(0.05)
        client.cluster.adapt(minimum=0, maximum=2, interval="200ms")
        report = capture_on_dask(config, str(tmp_path / "cache"), client.scheduler.address)
    assert report.units_done == 10


@pytest.mark.chaos
def test_a_unit_that_kills_every_worker_is_named_and_no_neighbour_is_blamed(tmp_path, address):
    config, _ = poisonous_config(137, view=1)
    model = config.teacher.model.replace("poisoned", "deadly")
    config = digits_config(teacher={"model": model}, capture={"evaluate": False})
    with pytest.raises(
        UnitsFailedError, match=r"1 of 10 units failed.*\n  unit 7 \(view 1.*worker process died 3 times"
    ):
        capture_on_dask(config, str(tmp_path / "cache"), address)
    assert list(open_cache(tmp_path / "cache").missing_units) == [7]


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGKILL, -9), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.chaos)],
)
def test_a_driver_that_is_stopped_leaves_no_process_and_a_rerun_finishes(tmp_path, signum, code):
    url = tmp_path / "cache"
    (tmp_path / "driver.py").write_text(DRIVER)
    driver = subprocess.Popen(
        [sys.executable, tmp_path / "driver.py", url],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    end = time.monotonic() + 120
    while not list((url / "units").glob("*.json")):
        assert time.monotonic() < end, "the capture did not begin"
        assert driver.poll() is None
        time.sleep(0.02)
    workers = psutil.Process(driver.pid).children(recursive=True)
    assert workers
    driver.send_signal(signum)
    assert driver.wait(60) == code
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive, f"orphans: {alive}"
    config = digits_config(
        teacher={"model": "tests.fakes:slow"}, capture={"evaluate": False, "unit_samples": 32}
    )
    data = open_data(config)
    done = len(open_cache(url).markers)
    assert 0 < done < 20
    _, report = capture_labels(config, data, open_teacher(config, data), str(url))
    assert (report.units_done, report.units_found) == (20 - done, done)
    capture_labels(config, data, open_teacher(config, data), str(tmp_path / "plain"))
    assert files(url) == files(tmp_path / "plain")
