"""A store on which operations fail, for tests: by chance from a seed, or at a given operation."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import pyarrow as pa

from softcache.cache.storage.base import Objects
from softcache.errors import StorageError

__all__ = ["FAULTS", "FaultyObjects", "Killed"]

T = TypeVar("T")
FAULTS = ("refused", "lost", "repeated", "killed", "killed_after")
"""An error instead of the operation; after it; the operation twice, as by a client that got no answer; the process ends
before it; after it."""
WRITES = frozenset({"put", "put_if_absent", "delete"})


class Killed(BaseException):
    """The end of a process in the middle of an operation; no `except Exception` handles it."""


class FaultyObjects:
    """Another store, on which operations fail.

    Args:
        objects: the store that keeps what is written.
        seed: of what meets which fault; the same calls meet the same ones.
        rates: share of the operations that meet each fault (`FAULTS`).
        at: faults of certain operations, by (name, number): {("put", 2): "killed"} is the third put.
        lag: operations until an object that was put is listed, as on a file system with delayed visibility.

    Attributes:
        rates: may be changed between operations.
        counts: operations by name.
        injected: faults by name.

    Example:
        >>> from softcache.cache.storage.local import LocalObjects
        >>> store = FaultyObjects(LocalObjects("/tmp/x", create=True), at={("put", 1): "killed"})
        >>> store.put("a", b"1")
        >>> store.put("b", b"2")
        Traceback (most recent call last):
            ...
        softcache.testing.faults.Killed: put b
    """

    def __init__(
        self,
        objects: Objects,
        *,
        seed: int = 0,
        rates: Mapping[str, float] | None = None,
        at: Mapping[tuple[str, int], str] | None = None,
        lag: int = 0,
    ) -> None:
        self.objects, self.url, self.rates, self.lag = objects, objects.url, dict(rates or {}), lag
        self.counts: Counter[str] = Counter()
        self.injected: Counter[str] = Counter()
        self._at, self._random = dict(at or {}), random.Random(seed)
        self._put_at: dict[str, int] = {}

    def _draw(self, name: str) -> str | None:
        planned = self._at.get((name, self.counts[name]))
        self.counts[name] += 1
        place = self._random.random()
        if planned is not None:
            return planned
        for fault, rate in self.rates.items():
            if place < rate:
                return fault
            place -= rate
        return None

    def _do(self, name: str, path: str, act: Callable[[], T]) -> T:
        fault = self._draw(name)
        if fault is None or (fault in ("repeated", "lost") and name not in WRITES):
            return act()
        self.injected[fault] += 1
        if fault == "killed":
            raise Killed(f"{name} {path}")
        if fault == "refused":
            raise StorageError(f"{self.url}/{path}: cannot {name}: injected fault; rerun")
        found = act()
        if fault == "killed_after":
            raise Killed(f"{name} {path}")
        if fault == "lost":
            raise StorageError(f"{self.url}/{path}: no answer to {name}: injected fault; rerun")
        return act() if fault == "repeated" else found

    # -- what `Objects` promises -------------------------------------------------------------------------------

    def put(self, path: str, data: bytes) -> None:
        self._do("put", path, lambda: self.objects.put(path, data))
        self._put_at[path] = self.counts.total()

    def put_if_absent(self, path: str, data: bytes) -> bool:
        won = self._do("put_if_absent", path, lambda: self.objects.put_if_absent(path, data))
        self._put_at.setdefault(path, self.counts.total())
        return won

    def get(self, path: str, *, max_bytes: int | None = None) -> bytes:
        return self._do("get", path, lambda: self.objects.get(path, max_bytes=max_bytes))

    def get_many(self, paths: Sequence[str], *, max_bytes: int | None = None) -> Iterator[bytes | None]:
        yield from self._do("get_many", "", lambda: self.objects.get_many(paths, max_bytes=max_bytes))

    def get_sized(self, sizes: Mapping[str, int]) -> Iterator[bytes | int | None]:
        yield from self._do("get_sized", "", lambda: self.objects.get_sized(sizes))

    def get_suffixes(self, lengths: Mapping[str, int]) -> Sequence[tuple[bytes, int]]:
        return self._do("get_suffixes", "", lambda: self.objects.get_suffixes(lengths))

    def get_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> Sequence[bytes]:
        return self._do("get_ranges", "", lambda: self.objects.get_ranges(ranges))

    def size(self, path: str) -> int | None:
        return self._do("size", path, lambda: self.objects.size(path))

    def list(self, prefix: str) -> list[str]:
        found = self._do("list", prefix, lambda: self.objects.list(prefix))
        newest = self.counts.total() - self.lag
        return [path for path in found if self._put_at.get(path, -1) <= newest] if self.lag else found

    def times(self, prefix: str) -> dict[str, float]:
        return self._do("times", prefix, lambda: self.objects.times(prefix))

    def delete(self, path: str) -> None:
        self._do("delete", path, lambda: self.objects.delete(path))

    def delete_many(self, paths: Sequence[str]) -> None:
        for path in paths:
            self.delete(path)

    def open(self, path: str) -> pa.NativeFile:
        return self._do("open", path, lambda: self.objects.open(path))

    @contextmanager
    def claim(self, path: str) -> Iterator[bool]:
        with self._do("claim", path, lambda: self.objects.claim(path)) as is_ours:
            yield is_ours

    def age(self, path: str) -> float | None:
        return self.objects.age(path)

    def orphaned_writes(self, *, remove: bool, older_than: float = 0.0) -> dict[str, int]:
        return self.objects.orphaned_writes(remove=remove, older_than=older_than)

    def kvstore(self, prefix: str) -> None:
        """Returns None: TensorStore reads through this store too."""
