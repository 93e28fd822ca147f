"""A bad network between us and a real S3 server: the cache is the same, or the run ends with one error and goes on later.

`make chaos` runs the long version; `SOFTCACHE_CHAOS_SECONDS` is how long it goes on drawing new networks.
"""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from softcache.cache.storage import lease as leases
from softcache.cache.storage.open import open_objects
from softcache.errors import StorageError
from softcache.reader.open import open_cache
from softcache.runs import capture_labels, open_data, open_teacher, train_student
from softcache.testing.fault_proxy import FAULTS, fault_proxy
from softcache.tools.verify.teacher import verify_units
from tests.support.caches import digits_config, make_cache

STALL = 1.5
SAMPLES = np.random.default_rng(0).permutation(300)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    return {store: make_cache(folder / store, capture={"store": store})[2] for store in ("zarr", "parquet")}


@pytest.fixture
def network(bucket, s3_server, monkeypatch):
    """Returns a function that puts a proxy with a seed between us and the server."""
    monkeypatch.setenv("AWS_READ_TIMEOUT", "500ms")
    monkeypatch.setenv("SOFTCACHE_RETRY_SECONDS", "30")
    monkeypatch.setattr(leases, "LEASE_SECONDS", 2.0)
    opened = []

    def between(seed):
        proxy = fault_proxy(s3_server.port, seed=seed, stall_seconds=STALL)
        opened.append(proxy)
        found = proxy.__enter__()
        monkeypatch.setenv("AWS_ENDPOINT_URL", found.endpoint)
        return found

    yield between
    for proxy in opened:
        proxy.__exit__(None, None, None)


def stored(url, s3_server):
    """All objects of a cache, read past the proxy; a claim whose end got lost runs out by itself."""
    import obstore

    bucket, prefix = url.removeprefix("s3://").split("/", 1)
    store = s3_server.store(bucket)
    paths = [entry["path"] for page in obstore.list(store, prefix) for entry in page]
    return {
        path.removeprefix(prefix + "/"): bytes(obstore.get(store, path).bytes())
        for path in paths
        if not path.endswith(".lock")
    }


def files(url):
    return {p.relative_to(url).as_posix(): p.read_bytes() for p in Path(url).rglob("*") if p.is_file()}


def capture(url, store="zarr"):
    config = digits_config(capture={"store": store})
    data = open_data(config)
    return capture_labels(config, data, open_teacher(config, data), url)


def student(cache, out):
    config = digits_config(train={"epochs": 1})
    return train_student(config, open_data(config), model="mlp?width=8", labels="cache", cache=cache, out=out)


def run_through(proxy, url, local, store, s3_server, folder):
    """Captures, compares every byte, and trains an epoch, all through the proxy."""
    capture(url, store)
    assert stored(url, s3_server) == files(local[store].url)
    cache = open_cache(url)
    for view in range(2):
        assert (
            cache.read(SAMPLES, view).log_probs.tobytes()
            == local[store].read(SAMPLES, view).log_probs.tobytes()
        )
    open_cache(url, verify=False).read(SAMPLES)  # by ranges
    found, expected = (student(c, folder / name) for c, name in ((cache, "there"), (local[store], "here")))
    assert found["history"] == expected["history"]
    assert (folder / "there/model.safetensors").read_bytes() == (
        folder / "here/model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("fault", FAULTS)
def test_every_kind_of_fault_is_got_over(network, bucket, s3_server, fault):
    """The first requests of each kind meet it, and are repeated until they come through."""
    proxy = network(0)
    objects = open_objects(f"{bucket}/x")
    proxy.rates = {fault: 0.4}
    data = bytes(range(256)) * 100
    for number in range(4):
        objects.put(f"a/{number}", data)
        objects.put_if_absent(f"b/{number}", data)
        assert objects.get(f"a/{number}") == data
        assert objects.get_ranges([(f"b/{number}", 10, 300)]) == [data[10:300]]
        assert objects.get_suffixes({f"a/{number}": 5}) == [(data[-5:], len(data))]
        assert objects.size(f"b/{number}") == len(data)
    assert len(objects.list("a")) == 4
    objects.delete("a/0")
    assert list(objects.get_many(["a/0", "a/1"])) == [None, data]
    assert proxy.injected[fault] >= 5


@pytest.mark.parametrize("store", ["zarr", "parquet"])
def test_a_capture_and_an_epoch_on_a_bad_network_are_those_of_a_good_one(
    network, bucket, local, s3_server, tmp_path, store
):
    proxy = network(1)
    proxy.rates = {
        "cut_request": 0.03,
        "cut_answer": 0.04,
        "lost_answer": 0.03,
        "stall": 0.01,
        "500": 0.03,
        "503": 0.05,
    }
    run_through(proxy, f"{bucket}/cache", local, store, s3_server, tmp_path)
    assert sum(proxy.injected.values()) > 10


def test_a_server_that_goes_away_is_one_error_and_the_rerun_goes_on(
    network, bucket, local, s3_server, monkeypatch
):
    monkeypatch.setenv("SOFTCACHE_RETRY_SECONDS", "1")
    proxy, url = network(2), f"{bucket}/cache"
    proxy.dead_after = 60
    with pytest.raises(
        StorageError, match=r"s3://.*: cannot be \w+: no answer.*then rerun: what is finished is kept"
    ):
        capture(url)
    with pytest.raises(StorageError, match="check the network"):
        open_cache(url)
    proxy.dead_after = None
    done = set(open_cache(url).markers)
    assert 0 < len(done) < 10
    assert capture(url)[1].units_done == 10 - len(done)
    assert stored(url, s3_server) == files(local["zarr"].url)


def test_a_server_that_goes_away_while_a_student_reads(network, bucket, local, tmp_path, monkeypatch):
    url = f"{bucket}/cache"
    monkeypatch.setenv("SOFTCACHE_RETRY_SECONDS", "1")
    proxy = network(3)
    capture(url)
    cache = open_cache(url)
    cache.markers  # noqa: B018
    proxy.rates = {"503": 1.0}
    with pytest.raises(StorageError, match=r"cannot be read: 503 .*SlowDown, after .* in .* s;"):
        student(cache, tmp_path / "there")
    proxy.rates = {}
    found, expected = student(open_cache(url), tmp_path / "there"), student(local["zarr"], tmp_path / "here")
    assert found["history"] == expected["history"]


# -- the long version --------------------------------------------------------------------------------------


@pytest.mark.chaos
def test_many_bad_networks(network, bucket, local, s3_server, tmp_path, monkeypatch, chaos_seed):
    """Networks of every badness, some of them too bad to finish on: rerun until done, then every byte is compared."""
    end = time.monotonic() + float(os.environ.get("SOFTCACHE_CHAOS_SECONDS", "180"))
    monkeypatch.setenv("SOFTCACHE_RETRY_SECONDS", "5")
    totals, runs, errors, requests, seed = dict.fromkeys(FAULTS, 0), 0, 0, 0, chaos_seed
    while time.monotonic() < end:
        seed += 1
        draw, store = np.random.default_rng(seed), ["zarr", "parquet"][seed % 2]
        proxy, url = network(seed), f"{bucket}/{seed}"
        badness = float(draw.choice([0.02, 0.1, 0.3, 0.6, 0.85]))
        shares = draw.dirichlet(np.ones(len(FAULTS))) * [1, 1, 1, 0.2, 1, 1]
        proxy.rates = dict(zip(FAULTS, shares * badness, strict=True))
        for attempt in range(60):
            try:
                capture(url, store)
                cache = open_cache(url)
                labels = [cache.read(SAMPLES, view).log_probs.tobytes() for view in range(2)]
                break
            except StorageError:
                errors += 1
                if attempt == 4:  # a network that never lets it through gets better
                    proxy.rates = {name: rate / 4 for name, rate in proxy.rates.items()}
        assert stored(url, s3_server) == files(local[store].url), f"seed {seed}"
        assert labels == [local[store].read(SAMPLES, view).log_probs.tobytes() for view in range(2)]
        for name, count in proxy.injected.items():
            totals[name] += count
        requests += proxy.requests
        proxy.rates = {}
        assert list(verify_units(open_cache(url))) == [], f"seed {seed}"
        runs += 1
    print(
        f"\n{runs} caches, {requests} requests, {errors} runs ended with an error and were rerun; injected: {totals}"
    )
    assert runs
