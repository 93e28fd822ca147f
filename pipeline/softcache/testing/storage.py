"""The contract of a storage backend, `softcache.cache.storage.base.Objects`, as tests for pytest.

An object is there whole or not at all, one of many writers wins, and claims exclude each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from softcache.cache.storage.base import Objects
from softcache.errors import CacheNotFoundError, CorruptionError, StorageError

__all__ = ["StorageContract"]

Reopen = Callable[[], Objects]


class StorageContract:
    """The tests of one kind of storage: a subclass whose name begins with Test has the fixture `reopen`.

    `reopen` returns a function without arguments, which opens the same place each time anew; it is empty at first. In
    addition a claim must end with its process, which the subclass tests itself.
    """

    @pytest.fixture
    def objects(self, reopen: Reopen) -> Objects:
        return reopen()

    def test_put_get_size_list_delete(self, objects: Objects) -> None:
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

    def test_many_objects_are_removed_as_far_as_they_are_there(self, objects: Objects) -> None:
        for name in ("gone/a", "gone/b", "kept"):
            objects.put(name, b"x")
        objects.delete_many(["gone/a", "none", "gone/b"])
        objects.delete_many([])
        assert objects.list("") == ["kept"]

    def test_names_that_an_url_would_have_to_escape(self, objects: Objects) -> None:
        names = sorted(["data/a b", "data/100%", "data/ü?&=#+", "data/x%20y"])
        for name in names:
            objects.put(name, name.encode())
        assert objects.list("data") == names
        assert [objects.get(name).decode() for name in names] == names

    def test_a_list_is_of_a_folder_and_not_of_names_that_begin_alike(self, objects: Objects) -> None:
        for name in ("units/1.json", "units/deep/2.json", "units2/3.json", "unit"):
            objects.put(name, b"x")
        assert objects.list("units") == ["units/1.json", "units/deep/2.json"]
        assert objects.list("") == ["unit", "units/1.json", "units/deep/2.json", "units2/3.json"]

    def test_many_objects_come_in_the_order_in_which_they_were_asked_for(self, objects: Objects) -> None:
        for number in range(50):
            objects.put(f"units/{number}", b"%d" % number)
        asked = [f"units/{number}" for number in (7, 99, *range(49, -1, -1))]
        found = list(objects.get_many(asked))
        assert found == [b"7", None, *(b"%d" % number for number in range(49, -1, -1))]
        assert list(objects.get_many([])) == []

    def test_objects_of_a_known_size(self, objects: Objects) -> None:
        objects.put("one", b"12345")
        objects.put("two", b"123456")
        assert list(objects.get_sized({"one": 5, "two": 5, "none": 5})) == [b"12345", 6, None]

    def test_an_object_that_is_too_large_is_refused_before_it_is_read(self, objects: Objects) -> None:
        objects.put("a/b", bytes(100))
        assert objects.get("a/b", max_bytes=100) == bytes(100)
        with pytest.raises(CorruptionError, match=r"a/b: 100 bytes; at most 99 are expected"):
            objects.get("a/b", max_bytes=99)
        with pytest.raises(CorruptionError, match=r"at most 99"):
            list(objects.get_many(["a/b"], max_bytes=99))

    def test_when_objects_were_written(self, objects: Objects) -> None:
        before = time.time()
        objects.put("times/one", b"1")
        objects.put("timesout", b"2")
        (path,) = found = objects.times("times")
        assert path == "times/one"
        assert before - 5 <= found[path] <= time.time() + 5

    def test_finished_writes_leave_none_of_the_dead(self, objects: Objects) -> None:
        objects.put("a", b"1")
        assert objects.orphaned_writes(remove=True) == {}

    @pytest.mark.parametrize("checked_before", [False, True])
    def test_parts_of_objects(self, objects: Objects, checked_before: bool) -> None:
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

    def test_what_is_replaced_is_read_anew(self, objects: Objects) -> None:
        objects.put("x", b"old")
        assert list(objects.get_sized({"x": 3})) == [b"old"]
        objects.put("x", b"new!")
        assert objects.get_ranges([("x", 0, 9)]) == [b"new!"]

    def test_of_many_writers_at_once_exactly_one_wins(self, reopen: Reopen) -> None:
        places = [reopen() for _ in range(8)]
        with ThreadPoolExecutor(16) as pool:
            won = list(pool.map(lambda n: places[n % 8].put_if_absent("one", b"%d" % n), range(64)))
        assert sum(won) == 1
        assert places[0].get("one") == b"%d" % won.index(True)

    @pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/."])
    def test_paths_that_leave_the_root(self, objects: Objects, path: str) -> None:
        for act in (objects.get, objects.delete, objects.size, objects.open, lambda p: objects.put(p, b"x")):
            with pytest.raises(StorageError, match="inside"):
                act(path)

    def test_a_claim_is_exclusive_and_ends(self, objects: Objects, reopen: Reopen) -> None:
        other_process = reopen()
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

    def test_a_claim_ends_with_an_error(self, objects: Objects) -> None:
        with pytest.raises(RuntimeError), objects.claim("x.lock"):
            raise RuntimeError
        with objects.claim("x.lock") as mine:
            assert mine

    def test_of_many_claimers_at_once_one_has_it(self, reopen: Reopen) -> None:
        places = [reopen() for _ in range(8)]
        inside: list[int] = []
        most: list[int] = []

        def hold(place: Objects) -> bool:
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
