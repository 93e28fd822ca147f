"""Parts of objects of a bucket: out of memory where an object was fetched before, as a file where a library wants one."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Callable

__all__ = ["KeptObjects", "RangeFile"]


class KeptObjects:
    """Whole objects, the last used up to a number of bytes; safe to use from several threads."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self._bytes = limit_bytes, 0
        self._objects: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: str) -> bytes | None:
        with self._lock:
            if path in self._objects:
                self._objects.move_to_end(path)
            return self._objects.get(path)

    def add(self, path: str, data: bytes) -> None:
        self.drop(path)
        if len(data) > self._limit:
            return
        with self._lock:
            self._objects[path] = data
            self._bytes += len(data)
            while self._bytes > self._limit:
                self._bytes -= len(self._objects.popitem(last=False)[1])

    def drop(self, path: str) -> None:
        with self._lock:
            self._bytes -= len(self._objects.pop(path, b""))


class RangeFile(io.RawIOBase):
    """An object as a file for pyarrow, which asks for ranges."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read, self._size, self._place = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def size(self) -> int:
        return self._size

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        stop = self._size if size is None or size < 0 else min(self._size, self._place + size)
        data = self._read(self._place, stop)
        self._place += len(data)
        return data
