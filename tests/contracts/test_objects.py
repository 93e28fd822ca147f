"""What a place for objects promises, a folder or a bucket: whole or absent, one winner, claims that die with their process."""

import errno
import multiprocessing
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from softcache.cache.storage.local import LocalObjects
from softcache.cache.storage.open import open_objects
from softcache.errors import CacheNotFoundError, CorruptionError, StorageError
from tests.support.programs import Program


class Contract:
    """Subclassed once per kind of place; `root` is the URL of an empty one."""

    @pytest.fixture
    def objects(self, root):
        return open_objects(root, create=True)

    def test_put_get_size_list_delete(self, objects):
        objects.put("a/b.bin", b"one")
        objects.put("a/b.bin", b"three")
        objects.put("c.bin", b"")
        assert objects.get("a/b.bin") == b"three"
        sizes = [objects.size(path) for path in ("a/b.bin", "c.bin", "a/none", "c.bin/x")]
        assert sizes == [5, 0, None, None]
        assert objects.list("a") == ["a/b.bin"]
        assert objects.list("nothing") == []
        objects.delete("a/b.bin")
        objects.delete("a/b.bin")
        with pytest.raises(CacheNotFoundError, match=r"a/b\.bin: missing"):
            objects.get("a/b.bin")
        with pytest.raises(CacheNotFoundError, match="missing"):
            objects.open("a/b.bin")

    def test_names_that_an_url_would_have_to_escape(self, objects):
        names = sorted(["data/a b", "data/100%", "data/ü?&=#+", "data/x%20y"])
        for name in names:
            objects.put(name, name.encode())
        assert objects.list("data") == names
        assert [objects.get(name).decode() for name in names] == names

    def test_a_list_is_of_a_folder_and_not_of_names_that_begin_alike(self, objects):
        for name in ("units/1.json", "units/deep/2.json", "units2/3.json", "unit"):
            objects.put(name, b"x")
        assert objects.list("units") == ["units/1.json", "units/deep/2.json"]
        assert objects.list("") == ["unit", "units/1.json", "units/deep/2.json", "units2/3.json"]

    def test_many_objects_come_in_the_order_in_which_they_were_asked_for(self, objects):
        for number in range(50):
            objects.put(f"units/{number}", b"%d" % number)
        asked = [f"units/{number}" for number in (7, 99, *range(49, -1, -1))]
        found = list(objects.get_many(asked))
        assert found == [b"7", None, *(b"%d" % number for number in range(49, -1, -1))]
        assert list(objects.get_many([])) == []

    def test_objects_of_a_known_size(self, objects):
        objects.put("one", b"12345")
        objects.put("two", b"123456")
        assert list(objects.get_sized({"one": 5, "two": 5, "none": 5})) == [b"12345", 6, None]

    def test_an_object_that_is_too_large_is_refused_before_it_is_read(self, objects):
        objects.put("a/b", bytes(100))
        assert objects.get("a/b", max_bytes=100) == bytes(100)
        with pytest.raises(CorruptionError, match=r"a/b: 100 bytes; at most 99 are expected"):
            objects.get("a/b", max_bytes=99)
        with pytest.raises(CorruptionError, match=r"at most 99"):
            list(objects.get_many(["a/b"], max_bytes=99))

    def test_when_objects_were_written(self, objects):
        before = time.time()
        objects.put("times/one", b"1")
        objects.put("timesout", b"2")
        (path,) = found = objects.times("times")
        assert path == "times/one"
        assert before - 5 <= found[path] <= time.time() + 5

    def test_finished_writes_leave_none_of_the_dead(self, objects):
        objects.put("a", b"1")
        assert objects.orphaned_writes(remove=True) == {}

    @pytest.mark.parametrize("checked_before", [False, True])
    def test_parts_of_objects(self, objects, checked_before):
        data = bytes(range(256)) * 40
        objects.put("part/a", data)
        objects.put("part/b", b"xyz")
        if checked_before:
            assert list(objects.get_sized({"part/a": len(data)})) == [data]
        assert objects.get_suffixes({"part/a": 10, "part/b": 10}) == [(data[-10:], len(data)), (b"xyz", 3)]
        ranges = [
            ("part/a", 5, 300),
            ("part/b", 1, 2),
            ("part/a", 0, 0),
            ("part/a", len(data) - 4, len(data) + 9),
        ]
        assert objects.get_ranges(ranges) == [data[5:300], b"y", b"", data[-4:]]
        with objects.open("part/a") as file:
            file.seek(1000)
            assert (file.read(7), file.tell(), file.size()) == (data[1000:1007], 1007, len(data))
        objects.put("part/empty", b"")
        assert objects.get_suffixes({"part/empty": 10}) == [(b"", 0)]
        assert objects.get_ranges([("part/empty", 0, 10), ("part/b", 5, 10)]) == [b"", b""]
        for act in (objects.get_suffixes, lambda paths: objects.get_ranges([(path, 0, 3) for path in paths])):
            with pytest.raises(CacheNotFoundError, match="part/none: missing"):
                act({"part/none": 3})

    def test_what_is_replaced_is_read_anew(self, objects):
        objects.put("x", b"old")
        assert list(objects.get_sized({"x": 3})) == [b"old"]
        objects.put("x", b"new!")
        assert objects.get_ranges([("x", 0, 9)]) == [b"new!"]

    def test_of_many_writers_at_once_exactly_one_wins(self, root):
        places = [open_objects(root, create=True) for _ in range(8)]
        with ThreadPoolExecutor(16) as pool:
            won = list(pool.map(lambda n: places[n % 8].put_if_absent("one", b"%d" % n), range(64)))
        assert sum(won) == 1
        assert places[0].get("one") == b"%d" % won.index(True)

    @pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/."])
    def test_paths_that_leave_the_root(self, objects, path):
        for act in (objects.get, objects.delete, objects.size, objects.open, lambda p: objects.put(p, b"x")):
            with pytest.raises(StorageError, match="inside"):
                act(path)

    def test_a_claim_is_exclusive_and_ends(self, objects, root):
        other_process = open_objects(root)
        with objects.claim("units/1.lock") as mine:
            assert mine
            with other_process.claim("units/1.lock") as second, other_process.claim("units/2.lock") as other:
                assert not second
                assert other
            with objects.claim("units/1.lock") as again:
                assert not again
        with other_process.claim("units/1.lock") as again:
            assert again
        assert objects.list("units") == []

    def test_a_claim_ends_with_an_error(self, objects):
        with pytest.raises(RuntimeError), objects.claim("x.lock"):
            raise RuntimeError
        with objects.claim("x.lock") as mine:
            assert mine

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

    def test_of_many_claimers_at_once_one_has_it(self, root):
        places, inside, most = [open_objects(root, create=True) for _ in range(8)], [], []

        def hold(place):
            with place.claim("x.lock") as mine:
                if mine:
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(0.1)
                    inside.pop()
            return mine

        with ThreadPoolExecutor(8) as pool:
            assert any(pool.map(hold, places * 2))
        assert max(most) == 1


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
