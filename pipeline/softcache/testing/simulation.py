"""Storage in memory whose clients stop before each request, for state machines.

    storage = LateStorage()
    one = Process(storage, "one", lambda objects: objects.put("a", b"1"))     # stops before its first request
    one.step(LOST)                                                             # it happens, and its answer is lost

Between any two requests of one process, others have theirs. A test decides what becomes of each: it is answered, its answer
is lost, it arrives once more later, or the process dies before it. Listings show what was made visible so far. Claims end
only when their process releases them or the test takes them away.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from softcache.cache.storage.base import size_error
from softcache.errors import CacheNotFoundError, StorageError

__all__ = ["ANSWERED", "LOST", "REPEATED", "Crash", "LateObjects", "LateStorage", "Process"]

ANSWERED, LOST, REPEATED = "answered", "lost", "repeated"


class Crash(BaseException):
    """The process was killed."""


class LateStorage:
    """What is stored, and what listings show of it."""

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}
        self.written: dict[str, float] = {}
        self.listed: dict[str, float] = {}
        self.claims: dict[str, Process | None] = {}
        self.writers: dict[str, Process | None] = {}
        self.late: list[Callable[[], None]] = []
        self._clock = 0.0

    def put(self, path: str, data: bytes) -> None:
        self._clock += 1
        self.data[path], self.written[path] = data, self._clock

    def put_if_absent(self, path: str, data: bytes) -> bool:
        if path in self.data:
            return False
        self.put(path, data)
        return True

    def delete(self, path: str) -> None:
        self.data.pop(path, None)
        self.written.pop(path, None)

    def show(self, paths: list[str] | None = None) -> None:
        """Lets listings see the present state of some paths, or of all."""
        for path in paths if paths is not None else {*self.listed, *self.written}:
            if path in self.written:
                self.listed[path] = self.written[path]
            else:
                self.listed.pop(path, None)


class Process:
    """A function that runs in steps: one request for each.

    Attributes:
        is_done: it returned, failed or crashed.
        result, error: what it returned or raised.
    """

    def __init__(self, storage: LateStorage, name: str, function: Callable[[Any], Any]) -> None:
        self.storage, self.name = storage, name
        self.is_done, self.is_dead = False, False
        self.result: Any = None
        self.error: Exception | None = None
        self.request = ""
        self._fate = ANSWERED
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(function,), daemon=True)
        self._thread.start()
        self._stopped.acquire()

    def _run(self, function: Callable[[Any], Any]) -> None:
        try:
            self.result = function(LateObjects(self.storage, self))
        except Crash:
            self.is_dead = True
        except Exception as error:
            self.error = error
        self.is_done = True
        self._stopped.release()

    def step(self, fate: str = ANSWERED) -> None:
        """Lets the request that it stopped at happen, and runs on to the next."""
        if not self.is_done:
            self._fate = fate
            self._go.release()
            self._stopped.acquire()

    def crash(self) -> None:
        """Ends it before its request; its claims stay."""
        if not self.is_done:
            self.is_dead = True
            self._go.release()
            self._stopped.acquire()

    def gate(self, request: str) -> str:
        """Called before each request; returns what becomes of it."""
        if self.is_dead:
            raise Crash
        if self.is_done:
            return ANSWERED
        self.request = request
        self._stopped.release()
        self._go.acquire()
        if self.is_dead:
            raise Crash
        return self._fate


class LateObjects:
    """The objects as one process has them; without a process, every request is answered at once."""

    url = "late://"

    def __init__(self, storage: LateStorage, process: Process | None = None) -> None:
        self._storage, self._process = storage, process

    def _change(self, request: str, change: Callable[[], Any]) -> Any:
        fate = self._process.gate(request) if self._process else ANSWERED
        result = change()
        if fate == REPEATED:
            self._storage.late.append(change)
        return None if fate == LOST else (result, True)

    def _ask(self, request: str) -> None:
        if self._process:
            self._process.gate(request)

    def put(self, path: str, data: bytes) -> None:
        self._storage.writers[path] = self._process
        if self._change(f"put {path}", lambda: self._storage.put(path, data)) is None:
            raise StorageError(f"{path}: cannot be written: no answer")

    def put_if_absent(self, path: str, data: bytes) -> bool:
        found = self._change(f"put_if_absent {path}", lambda: self._storage.put_if_absent(path, data))
        return bool(found[0]) if found else False

    def delete(self, path: str) -> None:
        if self._change(f"delete {path}", lambda: self._storage.delete(path)) is None:
            raise StorageError(f"{path}: cannot be deleted: no answer")

    def delete_many(self, paths: Sequence[str]) -> None:
        for path in paths:
            self.delete(path)

    def get(self, path: str, *, max_bytes: int | None = None) -> bytes:
        self._ask(f"get {path}")
        if path not in self._storage.data:
            raise CacheNotFoundError(f"{path}: missing")
        data = self._storage.data[path]
        if max_bytes is not None and len(data) > max_bytes:
            raise size_error(path, len(data), max_bytes)
        return data

    def get_many(self, paths: Sequence[str], *, max_bytes: int | None = None) -> Iterator[bytes | None]:
        for path in paths:
            try:
                yield self.get(path, max_bytes=max_bytes)
            except CacheNotFoundError:
                yield None

    def get_sized(self, sizes: Mapping[str, int]) -> Iterator[bytes | int | None]:
        for path, expected in sizes.items():
            found = self.size(path)
            data = self._storage.data.get(path)
            yield data if found == expected and data is not None else found

    def get_suffixes(self, lengths: Mapping[str, int]) -> Sequence[tuple[bytes, int]]:
        found = [(self.get(path), length) for path, length in lengths.items()]
        return [(data[-length:], len(data)) for data, length in found]

    def get_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> Sequence[bytes]:
        return [self.get(path)[start:stop] for path, start, stop in ranges]

    def age(self, path: str) -> float | None:
        """Returns 0 as long as the process that wrote it runs, then infinity: none pauses for as long as collectors wait."""
        if self.size(path) is None:
            return None
        writer = self._storage.writers.get(path)
        return math.inf if writer is None or writer.is_done else 0.0

    def size(self, path: str) -> int | None:
        self._ask(f"size {path}")
        data = self._storage.data.get(path)
        return None if data is None else len(data)

    def list(self, prefix: str) -> list[str]:
        return sorted(self.times(prefix))

    def times(self, prefix: str) -> dict[str, float]:
        self._ask(f"list {prefix}")
        return {
            path: at
            for path, at in self._storage.listed.items()
            if not prefix or path.startswith(f"{prefix}/")
        }

    def orphaned_writes(self, *, remove: bool, older_than: float = 0.0) -> dict[str, int]:
        return {}

    @contextmanager
    def claim(self, path: str) -> Iterator[bool]:
        self._ask(f"claim {path}")
        claims = self._storage.claims
        if path in claims:
            yield False
            return
        claims[path] = self._process
        try:
            yield True
        finally:
            if not (self._process and self._process.is_dead):
                self._ask(f"release {path}")
                if claims.get(path) is self._process:
                    del claims[path]
