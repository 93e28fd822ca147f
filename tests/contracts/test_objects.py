"""What a place for objects promises, a folder or a bucket: whole or absent, one winner, claims that die with their process."""

import errno
import multiprocessing
import os
import subprocess
import time

import pytest

from softcache.cache.storage.local import LocalObjects
from softcache.cache.storage.open import open_objects
from softcache.errors import StorageError
from softcache.testing import FaultyObjects
from softcache.testing.storage import StorageContract
from tests.support.programs import Program


class Contract(StorageContract):
    """Subclassed once per kind of place; `root` is the URL of an empty one."""

    @pytest.fixture
    def reopen(self, root):
        return lambda: open_objects(root, create=True)

    def test_a_claim_ends_with_its_process(self, objects, root):
        holder = Program(HOLD, root)
        assert holder.stdout.readline().strip() == "True"
        with objects.claim("x.lock") as mine:
            assert not mine
        holder.kill()
        holder.wait()
        end = time.monotonic() + 60
        while True:  # a bucket's lease has to run out first
            with objects.claim("x.lock") as mine:
                if mine:
                    break
            assert time.monotonic() < end
            time.sleep(0.1)


HOLD = """
import sys, time
from softcache.cache.storage import lease as leases
from softcache.cache.storage.open import open_objects
leases.LEASE_SECONDS = 1.0
with open_objects(sys.argv[1]).claim("x.lock") as mine:
    print(mine, flush=True)
    time.sleep(600)
"""


class TestFolder(Contract):
    @pytest.fixture
    def root(self, tmp_path):
        return str(tmp_path / "root")


class TestFolderWithoutLocksOrLinks(TestFolder):
    @pytest.fixture(autouse=True)
    def lacking(self, monkeypatch):
        def refused(*_, **__):
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refused)
        monkeypatch.setenv("SOFTCACHE_LOCKS", "lease")


class TestFolderBehindFaults(TestFolder):
    """The store that injects faults is the store itself where it injects none."""

    @pytest.fixture
    def reopen(self, root):
        return lambda: FaultyObjects(open_objects(root, create=True))


class TestBucket(Contract):
    @pytest.fixture
    def root(self, bucket):
        return f"{bucket}/a/prefix"


# -- of folders alone --------------------------------------------------------------------------------------


@pytest.fixture
def objects(tmp_path):
    return open_objects(str(tmp_path / "root"), create=True)


def test_a_file_url_is_the_same_place(tmp_path):
    open_objects(f"file://{tmp_path}/with%20space", create=True).put("x", b"1")
    assert open_objects(str(tmp_path / "with space")).get("x") == b"1"


@pytest.mark.parametrize("url", ["http://host/cache", "hdfs://host/cache"])
def test_another_scheme_is_refused_by_name(url):
    with pytest.raises(StorageError, match=url.split(":")[0] + ".* is not served"):
        open_objects(url)


def test_writers_leave_nothing_half_written(objects):
    assert [objects.put_if_absent("one", b"1") for _ in range(2)] == [True, False]
    assert not list((objects.root / ".staging").iterdir())


def test_a_link_that_leads_out_is_refused(objects, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "file").write_bytes(b"secret")
    (objects.root / "units").symlink_to(tmp_path / "secret")
    for act in (
        lambda: objects.get("units/file"),
        lambda: objects.put("units/new", b"x"),
        lambda: objects.list("units"),
    ):
        with pytest.raises(StorageError, match="link"):
            act()
    assert sorted(os.listdir(tmp_path / "secret")) == ["file"]


def test_an_unwritable_root_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot be written"):
        open_objects(str(tmp_path / "file" / "cache"), create=True)


def test_a_full_disk_loses_nothing_and_leaves_nothing(objects, monkeypatch):
    objects.put("unit", b"old")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        StorageError, match=r"No space left on device; free some space and rerun: finished units are kept"
    ):
        objects.put("unit", b"new")
    monkeypatch.undo()
    assert objects.get("unit") == b"old"
    assert not list((objects.root / ".staging").iterdir())


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small file system needs root"
)
def test_a_really_full_disk(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mount is not allowed here")
    try:
        objects = open_objects(str(small / "cache"), create=True)
        objects.put("first", b"a" * 100_000)
        with pytest.raises(StorageError, match="free some space and rerun"):
            objects.put("second", b"b" * 400_000)
        assert objects.get("first") == b"a" * 100_000
        assert objects.size("second") is None
        objects.put("third", b"c" * 50_000)
    finally:
        subprocess.run(["umount", str(small)], check=False)


def _contend(root, counter, rounds):
    objects = LocalObjects(root)
    for _ in range(rounds):
        while True:
            with objects.claim("x.lock") as mine:
                if mine:
                    value = counter.value
                    time.sleep(0.0005)
                    counter.value = value + 1
                    break


def test_nobody_ever_holds_a_claim_together_with_another(objects):
    context = multiprocessing.get_context("fork")
    counter = context.Value("i", 0, lock=False)
    workers = [context.Process(target=_contend, args=(str(objects.root), counter, 50)) for _ in range(4)]
    [worker.start() for worker in workers]
    [worker.join(60) for worker in workers]
    assert counter.value == 200
