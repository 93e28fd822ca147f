"""Caches in a bucket: the bytes of a local cache, read in parts and many at once, with one clear error when it fails."""

import itertools
import multiprocessing
import os
import pickle
import re
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr

from softcache.cache.storage import lease as leases
from softcache.cache.storage.cloud import client as cloud_client
from softcache.cache.storage.lease import Lease, LeaseManager
from softcache.cache.storage.open import open_objects
from softcache.cache.units import check_unit, open_store, publish_unit, read_marker
from softcache.errors import (
    CorruptionError,
    MissingExtraError,
    SoftcacheError,
    StorageError,
)
from softcache.hashing.digests import digest_bytes
from softcache.labels import ARRAYS
from softcache.reader.memmap import MemmapSettings
from softcache.reader.open import open_cache
from softcache.runs import capture_labels, open_data, open_teacher
from softcache.stages.cli import main
from softcache.testing.fault_proxy import fault_proxy
from softcache.tools.convert import convert_cache
from softcache.tools.verify.teacher import verify_units
from tests.contracts.test_stores import columns_of, manifest_of
from tests.support.caches import digits_config, make_cache
from tests.support.object_server import environment_of
from tests.support.programs import run_program
from tests.support.text_caches import make_text_cache

STORES = ["zarr", "parquet"]


def objects_in(url):
    """Every object of a cache, by path; without what claims and writers leave for a while."""
    objects = open_objects(url)
    return {path: objects.get(path) for path in objects.list("")}


def assert_same_labels(one, other, samples):
    for view in range(one.num_views):
        a, b = one.read_stored(samples, view), other.read_stored(samples, view)
        assert np.array_equal(a.fingerprints, b.fingerprints)
        for name in ARRAYS:
            x, y = getattr(a.labels, name), getattr(b.labels, name)
            assert (x is None) == (y is None), name
            assert x is None or (x.dtype == y.dtype and x.tobytes() == y.tobytes()), name


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The same cache on the local disk, by store."""
    folder = tmp_path_factory.mktemp("local")
    return {store: make_cache(folder / store, capture={"store": store})[2] for store in STORES}


@pytest.fixture
def remote(bucket, local):
    """Returns a function: the URL of a copy of a local cache in the bucket."""

    def copy(store, place="cache"):
        objects = open_objects(f"{bucket}/{place}")
        for path, data in objects_in(local[store].url).items():
            objects.put(path, data)
        return objects.url

    return copy


# -- the same cache ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", STORES)
def test_a_capture_into_a_bucket_writes_the_bytes_of_a_local_one(bucket, local, store):
    cache = make_cache(f"{bucket}/cache", capture={"store": store})[2]
    assert objects_in(cache.url) == objects_in(local[store].url)
    assert list(verify_units(cache)) == []
    for verify in (True, False):
        assert_same_labels(open_cache(cache.url, verify=verify), local[store], [5, 1, 299, 64, 130, 5])


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("codec", ["open", "packed"])
def test_ragged_rows_of_tokens_in_a_bucket(bucket, tmp_path, store, codec):
    tables = {"capture": {"store": store, "codec": codec}}
    here = make_text_cache(tmp_path / "cache", tmp_path, **tables)[2]
    there = make_text_cache(f"{bucket}/cache", tmp_path, **tables)[2]
    assert objects_in(there.url) == objects_in(here.url)
    samples = np.random.default_rng(0).permutation(len(here))
    for verify in (True, False):
        assert_same_labels(open_cache(there.url, verify=verify), here, samples)


@pytest.mark.parametrize("store", STORES)
def test_a_cache_moves_between_a_bucket_and_a_folder(remote, local, tmp_path, store):
    other = next(name for name in STORES if name != store)
    there = remote(store)
    back = convert_cache(open_cache(there), str(tmp_path / "back"), store=other)
    assert objects_in(back.url) == objects_in(local[other].url)
    again = convert_cache(back, f"{there}-again", store=store)
    assert objects_in(again.url) == objects_in(local[store].url)


def test_other_tools_read_a_bucket_with_no_softcache_code(remote, local, s3_server, s3_bucket):
    from obstore.fsspec import FsspecStore
    from zarr.storage import ObjectStore

    key = remote("zarr").split("/", 3)[3]
    group = zarr.open(
        ObjectStore(s3_server.store(s3_bucket), read_only=True), path=f"{key}/labels.zarr", mode="r"
    )
    expected = local["zarr"].read(np.arange(300), 1)
    assert np.array_equal(group["ids"][1], expected.ids)
    assert np.array_equal(group["log_probs"][1, 100:110], expected.log_probs[100:110])
    key = remote("parquet", "p").split("/", 3)[3]
    files = FsspecStore(
        "s3",
        **dict(zip(("endpoint", "access_key_id", "secret_access_key"), _login(s3_server), strict=True)),
        region="us-east-1",
        client_options={"allow_http": True},
    )
    table = pq.read_table(f"{s3_bucket}/{key}/parquet", filesystem=files, columns=["view", "sample", "ids"])
    chosen = table.filter(np.asarray(table["view"]) == 1).sort_by("sample")
    assert np.array_equal(np.array(chosen["ids"].to_pylist()), expected.ids)


def _login(server):
    environment = environment_of(server.endpoint)
    return [environment[f"AWS_{name}"] for name in ("ENDPOINT_URL", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY")]


# -- the command line --------------------------------------------------------------------------------------

CONFIG = """
name = "small"
[source]
name = "digits"
max_train_samples = 300
max_eval_samples = 100
[views]
crop = "padded"
padding = 1
mean = [0.3]
std = [0.4]
[teacher]
model = "tests.fakes:known"
[labels]
k = 4
num_views = 2
[capture]
unit_samples = 64
chunk_samples = 32
batch_size = 40
device = "cpu"
[student]
model = "mlp?width=8"
[train]
epochs = 2
batch_size = 50
device = "cpu"
"""


@pytest.fixture
def softcache(in_tmp, monkeypatch, capsys):
    (in_tmp / "small.toml").write_text(CONFIG)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["softcache", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


def test_teacher_and_student_by_the_command_line(softcache, bucket, local, in_tmp):
    there, config = f"{bucket}/cache", ("--config", "small.toml")
    for command in (
        ("teacher-logits", *config, "--cache", there),
        ("teacher-logits", *config, "--cache", there, "--reuse"),
        ("inspect", there),
        ("verify", there, *config, "--rows", 20),
        ("train-student", *config, "--cache", there, "--out", "remote"),
        ("train-student", *config, "--cache", local["zarr"].url, "--out", "local"),
    ):
        code, out, err = softcache(*command)
        assert code == 0, (command, out, err)
    weights = [(in_tmp / place / "model.safetensors").read_bytes() for place in ("remote", "local")]
    assert weights[0] == weights[1]


class Expired(BaseHTTPRequestHandler):
    """S3 to a client whose token has expired: 400, with a reason where there is a body."""

    def answer(self):
        body = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
        self.send_response(400)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

    def log_message(self, *words):
        pass


def test_a_token_that_has_expired_is_named_and_not_tried_again(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Expired)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in environment_of(f"http://127.0.0.1:{server.server_port}").items():
        monkeypatch.setenv(name, value)
    objects = open_objects("s3://bucket/cache")
    for request in (
        lambda: objects.size("x"),
        lambda: objects.get("x"),
        lambda: objects.put("x", b"1"),
        lambda: objects.list(""),
    ):
        with pytest.raises(
            StorageError, match=r"refused the request \(400 .*\): the token has expired.*; renew AWS_ACCESS"
        ):
            request()
    server.shutdown()
    server.server_close()


class Listing(BaseHTTPRequestHandler):
    """S3 that lists what it was told to, whatever is asked for."""

    keys: tuple[tuple[str, int], ...] = ()
    asked = 0

    def do_GET(self):
        type(self).asked += 1
        entries = "".join(
            f'<Contents><Key>{key}</Key><LastModified>2024-01-01T00:00:00Z</LastModified><ETag>"x"</ETag><Size>{size}</Size>'
            "</Contents>"
            for key, size in self.keys
        )
        self.send_response(200)
        self.end_headers()
        self.wfile.write(
            f"<ListBucketResult><Name>b</Name><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode()
        )

    def log_message(self, *words):
        pass


def test_folders_of_consoles_and_keys_that_are_no_paths(monkeypatch):
    """A console makes the empty object `prefix/`; another tool may have written `units//x`, which the client cannot list."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Listing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in environment_of(f"http://127.0.0.1:{server.server_port}").items():
        monkeypatch.setenv(name, value)
    objects = open_objects("s3://bucket/c")
    Listing.keys = (("c/", 0), ("c/units", 7))
    assert objects.list("") == ["units"]
    assert list(objects.tags(None)) == ["units"]
    Listing.keys = (("c/units/", 0), ("c/units/00000.json", 7))
    assert objects.list("units") == ["units/00000.json"]
    assert list(objects.times("units")) == ["units/00000.json"]
    for key in ("c/units//x", "c/units/../x", "c/units/a&#10;b"):
        Listing.keys, before = ((key, 1),), Listing.asked
        with pytest.raises(
            StorageError,
            match=r"s3://bucket/c: cannot be listed: there is an object whose key is no path, 'c/units/.*rename",
        ):
            objects.list("units")
        assert Listing.asked == before + 1, "asked again, though the answer stays"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("url", ["s3://bucket//x", "s3://bucket/x//y", "s3://bucket/x//", "s3://bucket/./x"])
def test_a_prefix_that_is_no_path_is_refused_and_not_another_prefix(url):
    """`bucket//x` is another place than `bucket/x` to every other tool."""
    with pytest.raises(StorageError, match="is no path inside of it"):
        open_objects(url)


def test_a_bucket_that_cannot_be_used_is_one_message(softcache, bucket, monkeypatch, s3_server, s3_bucket):
    monkeypatch.setenv("SOFTCACHE_RETRY_SECONDS", "0.5")
    environment = environment_of(s3_server.endpoint)
    for change, url, expected in (
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, bucket, r"server refused \(403.*\); check AWS_ACCESS_KEY_ID"),
        (
            {},
            "s3://no-such-bucket/cache",
            r"there is no bucket s3://no-such-bucket .*; create it, or correct",
        ),
        (
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
            bucket,
            r"no answer.*, after .* in .* s; check the network and AWS_ENDPOINT_URL",
        ),
        ({"AWS_ALLOW_HTTP": "false"}, bucket, r"plain http://, which is off; set AWS_ALLOW_HTTP=true"),
        (
            {},
            f"{bucket}/nothing",
            r"no manifest.json there; run `softcache teacher-logits`, or correct the path",
        ),
    ):
        for name, value in (environment | change).items():
            monkeypatch.setenv(name, value)
        commands = [("inspect", url), ("verify", url)]
        if "nothing" not in url:
            commands.append(("teacher-logits", "--config", "small.toml", "--cache", url))
        for command in commands:
            code, _, err = softcache(*command)
            assert code == 1, err
            last = re.sub(r"^teacher: .*\n", "", err, flags=re.M)
            assert last.startswith("softcache: "), err
            assert last.count("\n") == 1, err
            assert re.search(expected, last), last


@pytest.mark.parametrize(
    "url",
    [
        "s3://",
        "s3:///cache",
        "s3://key:secret@bucket/x",
        "s3://bucket/x?y=1",
        "s3://bucket/a/../b",
        "s3://bucket/a//b",
    ],
)
def test_an_url_that_is_not_bucket_and_prefix(url):
    with pytest.raises(StorageError, match=r"expected s3://BUCKET/PREFIX|no path inside"):
        open_objects(url)


def test_without_obstore_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(
        MissingExtraError, match=r"s3://bucket/x: obstore is not installed; pip install 'softcache\[cloud\]'"
    ):
        open_objects("s3://bucket/x")


def test_a_retry_time_that_is_no_number(bucket, monkeypatch):
    monkeypatch.setenv("SOFTCACHE_RETRY_SECONDS", "soon")
    with pytest.raises(
        StorageError, match="SOFTCACHE_RETRY_SECONDS: expected seconds between 0 and 3600; found 'soon'"
    ):
        open_objects(bucket).get("x")


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_the_other_clouds_are_asked_with_their_own_environment(scheme, monkeypatch):
    """What a bucket of Google or Azure is called, and that it is refused in its own words; no server of theirs is here."""
    for name in ("GOOGLE_SKIP_SIGNATURE", "AZURE_SKIP_SIGNATURE", "GOOGLE_ALLOW_HTTP", "AZURE_ALLOW_HTTP"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("GOOGLE_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("SOFTCACHE_RETRY_SECONDS", "0.5")
    variable = {"gs": "GOOGLE_BASE_URL", "az": "AZURE_STORAGE_ENDPOINT"}[scheme]
    with pytest.raises(StorageError, match=rf"{scheme}://place/a/b/x: cannot be read: .*{variable}"):
        open_objects(f"{scheme}://place/a/b").get("x")


# -- reading in parts, and many at once --------------------------------------------------------------------


@pytest.fixture
def proxy(bucket, s3_server, monkeypatch):
    """A proxy before the server, which the environment now leads to."""
    with fault_proxy(s3_server.port, seed=0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.mark.parametrize("store", STORES)
def test_a_few_rows_cost_a_part_of_the_bytes(bucket, proxy, tmp_path, store):
    table = {"store": store, "unit_samples": 300, "chunk_samples": 10}
    here = make_cache(tmp_path / "cache", capture=table, labels={"k": 10, "num_views": 1})[2]
    there = make_cache(f"{bucket}/cache", capture=table, labels={"k": 10, "num_views": 1})[2]
    whole = sum(shard.num_bytes for shard in there.markers[0].shards)
    cache = open_cache(there.url, verify=False)
    cache.read([0])  # metadata, markers and indexes
    before, requests = proxy.answered_bytes, proxy.requests
    assert cache.read(np.arange(150, 160)).ids.tobytes() == here.read(np.arange(150, 160)).ids.tobytes()
    assert 0 < proxy.answered_bytes - before < whole / 3
    assert proxy.requests - requests <= 7, "one request per column"


def test_a_checked_unit_is_fetched_once(remote, proxy):
    cache = open_cache(remote("zarr"))
    cache.markers  # noqa: B018
    before = proxy.answered_bytes
    cache.read(np.arange(64))
    num_bytes = sum(shard.num_bytes for shard in cache.markers[0].shards)
    assert proxy.answered_bytes - before == num_bytes, "the two chunks come from what was checked"


def test_thousands_of_markers_are_asked_for_many_at_once(remote, proxy):
    cache = open_cache(remote("parquet"))
    proxy.gather, proxy.most_at_once = 8, 0
    assert len(cache.markers) == 10
    assert proxy.most_at_once >= 8
    proxy.gather, proxy.most_at_once = 24, 0
    assert len(list(open_objects(cache.url).get_many(["manifest.json"] * 100))) == 100
    # The proxy counts a request until its answer is sent, a moment longer than the client does.
    assert 24 <= proxy.most_at_once < 2 * cloud_client.CONCURRENT_REQUESTS


@pytest.mark.parametrize("store", STORES)
def test_a_thawed_cache_reads_the_bucket_once(remote, local, proxy, tmp_path, store):
    thaw = MemmapSettings(folder=str(tmp_path / "thaw"), required=True)
    cache = open_cache(remote(store), memmap=thaw)
    assert_same_labels(cache, local[store], np.arange(300))
    requests = proxy.requests
    assert_same_labels(cache, local[store], np.random.default_rng(0).permutation(300))
    assert proxy.requests == requests, "the second epoch reads no bucket"
    again = open_cache(cache.url, memmap=thaw)
    assert_same_labels(again, local[store], np.arange(300))
    assert proxy.requests - requests <= 3 + 10, "manifest and markers tell that the map is of this cache"


# -- processes ---------------------------------------------------------------------------------------------


def _read_elsewhere(pickled, environment, queue):
    os.environ.update(environment)  # the server that forks may have been started before a test set its own
    try:
        queue.put(pickle.loads(pickled).read([3]).ids.tobytes())
    except SoftcacheError as error:
        queue.put(str(error))


def test_another_process_opens_the_bucket_itself_and_a_forked_one_is_told(remote, local):
    cache = open_cache(remote("zarr"))
    cache.read([3])
    for method in ("forkserver", "fork"):
        context = multiprocessing.get_context(method)
        queue = context.SimpleQueue()
        process = context.Process(target=_read_elsewhere, args=(pickle.dumps(cache), dict(os.environ), queue))
        process.start()
        found = queue.get()
        process.join()
        if method == "fork":
            assert re.search("was forked from one that had used a bucket.*forkserver", found)
        else:
            assert found == local["zarr"].read([3]).ids.tobytes()


def test_two_captures_at_once_share_the_units_of_a_bucket(bucket, local):
    url, config = f"{bucket}/cache", digits_config()
    data = open_data(config)

    def run(_):
        return capture_labels(config, data, open_teacher(config, data), url)[1]

    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(run, range(2)))
    assert sum(report.units_done for report in reports) == 10
    assert objects_in(url) == objects_in(local["zarr"].url), "and no claim is left"


KILLED = """
import os, signal, sys
from softcache.cache.storage import lease as leases
from softcache.cache import units
leases.LEASE_SECONDS = 1.0
left = int(sys.argv[2])
def die(name):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
units._failpoint = die
from tests.support.caches import make_cache
make_cache(sys.argv[1])
"""


def test_a_capture_into_a_bucket_that_is_killed_goes_on(bucket, local, monkeypatch):
    url = f"{bucket}/cache"
    killed = run_program(KILLED, url, 13)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    found = set(open_cache(url).markers)
    assert 0 < len(found) < 10
    cache = make_cache(url)[2]
    assert objects_in(cache.url) == objects_in(local["zarr"].url)


# -- leases ------------------------------------------------------------------------------------------------


@pytest.fixture
def place(bucket):
    return open_objects(f"{bucket}/leases")


def lease(objects, seconds):
    return Lease(LeaseManager(objects), "units/00000.lock", seconds=seconds)


def test_a_held_lease_is_renewed_for_as_long_as_it_takes(place):
    holder = lease(place, 0.6)
    assert holder.acquire()
    first = place.get("units/00000.lock")
    time.sleep(1.0)
    assert place.get("units/00000.lock") != first
    assert not lease(place, 0.6).acquire()
    holder.release()
    assert place.size("units/00000.lock") is None


def test_a_lease_whose_holder_died_runs_out_even_for_a_clock_that_is_behind(place, monkeypatch):
    monkeypatch.setattr(leases, "_wall_clock", lambda: time.time() + 3600)  # of who died: an hour ahead
    dead = lease(place, 0.4)
    place.put_where(dead._path, dead._body(), None)
    monkeypatch.undo()
    board = LeaseManager(place)
    assert not Lease(board, "units/00000.lock", seconds=0.4).acquire(), "seen for the first time"
    time.sleep(0.5)
    taker = Lease(board, "units/00000.lock", seconds=0.4)
    assert taker.acquire(), "it was not renewed while we looked"
    taker.release()


def test_a_lease_that_says_nothing_is_taken_over_if_nobody_renews_it(place):
    place.put("units/00000.lock", b"[1]")
    board = LeaseManager(place)
    assert not Lease(board, "units/00000.lock", seconds=0.2).acquire()
    time.sleep(0.3)
    taker = Lease(board, "units/00000.lock", seconds=0.2)
    assert taker.acquire()
    taker.release()


def test_one_of_many_takes_over_a_lease_that_has_run_out(place):
    dead = lease(place, -1)
    place.put_where(dead._path, dead._body(), None)
    takers = [lease(open_objects(place.url), 30) for _ in range(16)]
    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(Lease.acquire, takers)) == 1
    for taker in takers:
        if taker._tag:
            taker.release()


def test_who_lost_the_lease_leaves_the_next_holders_alone(place):
    late = lease(place, 0.3)
    late._thread.start = lambda: None  # paused for longer than its lease
    late._thread.join = lambda timeout: None
    assert late.acquire()
    time.sleep(0.4)
    holder = lease(place, 30)
    assert holder.acquire()
    late.release()
    assert not lease(place, 30).acquire(), "the next holder's lease is still there"
    holder.release()


class _LostAnswers:
    """Objects whose first answer to a write gets lost on the way."""

    def __init__(self, objects):
        self._objects, self.lost = objects, 1

    def put_where(self, path, data, before):
        tag = self._objects.put_where(path, data, before)
        if self.lost:
            self.lost -= 1
            return None  # what a second try finds: there is one already
        return tag

    def __getattr__(self, name):
        return getattr(self._objects, name)


def test_a_lease_whose_creation_was_not_confirmed_is_still_ours(place):
    holder = lease(_LostAnswers(place), 30)
    assert holder.acquire()
    holder.release()
    assert place.size("units/00000.lock") is None


def test_a_clock_far_ahead_costs_work_and_nothing_else(bucket, local, monkeypatch):
    """Every lease looks as if it had run out, so both make every unit; the cache is right."""
    ticks = itertools.count()
    monkeypatch.setattr(leases, "_wall_clock", lambda: time.time() + 1e6 * next(ticks))
    url, config = f"{bucket}/cache", digits_config()
    data = open_data(config)

    def run(_):
        return capture_labels(config, data, open_teacher(config, data), url)[1]

    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(run, range(2)))
    assert sum(report.units_done for report in reports) >= 10
    found = {path: data for path, data in objects_in(url).items() if not path.endswith(".lock")}
    assert found == objects_in(local["zarr"].url)
    assert list(verify_units(open_cache(url))) == []


class _Recorded:
    """Objects that only remember what is put."""

    url = "recorded"

    def __init__(self):
        self.puts = []

    def put(self, path, data):
        self.puts.append((path, data))


@pytest.mark.parametrize("store", STORES)
def test_two_makers_of_one_unit_are_never_read_as_a_mixture(tmp_path, store):
    """Even if they differ, as two kinds of hardware may: the marker names the bytes of one of them."""
    manifest = manifest_of(store, num_views=1)
    digest, unit = digest_bytes(manifest.to_bytes()), manifest.plan.unit(0)
    made = [columns_of(manifest, unit, seed=seed) for seed in (1, 2)]
    puts = []
    for columns in made:
        recorded = _Recorded()
        publish_unit(recorded, open_store(manifest, recorded), digest, unit, columns)
        puts.append(recorded.puts)
    random, outcomes = np.random.default_rng(0), {"refused": 0, "one maker's": 0}
    for attempt in range(12):
        objects = open_objects(str(tmp_path / str(attempt)), create=True)
        turns = random.permutation([0] * len(puts[0]) + [1] * len(puts[1]))
        waiting = [iter(maker) for maker in puts]
        for turn in turns:
            objects.put(*next(waiting[turn]))
            marker = read_marker(objects, manifest, digest, 0)
            if marker is None:
                continue
            try:
                check_unit(objects, marker)
                found = open_store(manifest, objects).read(unit, 0, 16)
            except CorruptionError:
                outcomes["refused"] += 1
                continue
            same = [all(found[n].tobytes() == c.tobytes() for n, c in columns.items()) for columns in made]
            assert any(same)
            outcomes["one maker's"] += 1
    assert outcomes["one maker's"] > 0
    assert outcomes["refused"] > 0


# -- damage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("how", ["flip", "truncate", "empty", "remove"])
def test_damage_in_a_bucket_is_found_when_it_is_read(remote, local, store, how):
    url = remote(store)
    objects, columns = open_objects(url), local[store].markers[1].shards
    for shard in columns[:2]:
        good = objects.get(shard.path)
        middle = len(good) // 3
        bad = {
            "flip": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
            "truncate": good[:-7],
            "empty": b"",
        }
        objects.delete(shard.path) if how == "remove" else objects.put(shard.path, bad[how])
        # Without the sha256, an unused bit (a description in a Parquet file) may pass.
        for verify in (True,) if (how, store) == ("flip", "parquet") else (True, False):
            with pytest.raises(CorruptionError, match="unit 1"):
                open_cache(url, verify=verify).read(np.arange(64, 128))
        objects.put(shard.path, good)
    assert list(verify_units(open_cache(url))) == []
