"""What a place for objects promises: whole or absent, one winner, claims that die with their process."""

import errno
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.errors import CacheNotFoundError, StorageError
from pipeline.stores.objects import LocalObjects, open_objects
from tests.caches import ROOT


@pytest.fixture
def objects(tmp_path):
    return open_objects(str(tmp_path / "root"), create=True)


def test_put_get_size_list_delete(objects):
    objects.put("a/b.bin", b"one")
    objects.put("a/b.bin", b"three")
    objects.put("c.bin", b"")
    assert objects.get("a/b.bin") == b"three"
    assert (
        objects.size("a/b.bin"),
        objects.size("c.bin"),
        objects.size("a/none"),
        objects.size("c.bin/x"),
    ) == (5, 0, None, None)
    assert objects.list("a") == ["a/b.bin"]
    assert objects.list("nothing") == []
    objects.delete("a/b.bin")
    objects.delete("a/b.bin")
    with pytest.raises(CacheNotFoundError, match=r"a/b\.bin: missing"):
        objects.get("a/b.bin")
    with pytest.raises(CacheNotFoundError, match="missing"):
        objects.open("a/b.bin")


def test_a_file_url_is_the_same_place(tmp_path):
    open_objects(f"file://{tmp_path}/with%20space", create=True).put("x", b"1")
    assert open_objects(str(tmp_path / "with space")).get("x") == b"1"


@pytest.mark.parametrize("url", ["s3://bucket/cache", "gs://bucket/cache", "http://host/cache"])
def test_another_scheme_is_refused_by_name(url):
    with pytest.raises(StorageError, match=url.split(":")[0]):
        open_objects(url)


def test_of_many_writers_at_once_exactly_one_wins(objects):
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda n: objects.put_if_absent("one", b"%d" % n), range(64)))
    assert sum(won) == 1
    assert objects.get("one") == b"%d" % won.index(True)
    assert not list((objects.root / ".staging").iterdir())


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/."])
def test_paths_that_leave_the_root(objects, path):
    with pytest.raises(StorageError, match="inside"):
        objects.put(path, b"x")


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


# -- claims ------------------------------------------------------------------------------------------------


def test_a_claim_is_exclusive_and_ends(objects):
    with objects.claim("units/1.lock") as mine:
        assert mine
        with objects.claim("units/1.lock") as second, objects.claim("units/2.lock") as other:
            assert not second
            assert other
    with objects.claim("units/1.lock") as again:
        assert again
    assert objects.list("units") == []


def test_a_claim_ends_with_an_error(objects):
    with pytest.raises(RuntimeError), objects.claim("x.lock"):
        raise RuntimeError
    with objects.claim("x.lock") as mine:
        assert mine


HOLD = """
import sys, time
sys.path.insert(0, {root!r})
from pipeline.stores.objects import LocalObjects
with LocalObjects(sys.argv[1]).claim("x.lock") as mine:
    print(mine, flush=True)
    time.sleep(600)
"""


def test_a_claim_ends_with_its_process(objects):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(root=str(ROOT)), str(objects.root)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline().strip() == "True"
    with objects.claim("x.lock") as mine:
        assert not mine
    holder.kill()
    holder.wait()
    with objects.claim("x.lock") as mine:
        assert mine


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
