"""Files that are read in parts again and again, kept open: opening one, with every link on its way looked at, takes longer
than reading a chunk of it."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable

__all__ = ["OpenFiles"]

KEPT_FILES = 128


class _OpenFile:
    """A file that is closed with its last reader.

    Attributes:
        signature: what distinguishes it from one that replaces it.
    """

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.signature = _signature(os.fstat(handle))

    def __del__(self) -> None:
        os.close(self.handle)

    def read(self, start: int, stop: int) -> bytes:
        """Returns the bytes from `start` to `stop` or the file's end; one call of the system returns 2 GiB at most."""
        data = os.pread(self.handle, stop - start, start) if stop > start else b""
        while data and len(data) < stop - start:
            more = os.pread(self.handle, stop - start - len(data), start + len(data))
            if not more:
                break
            data += more
        return data


class OpenFiles:
    """The files read last, by path, kept open for this process; safe to use from several threads."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock, self._most = threading.Lock(), KEPT_FILES

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[()]]:
        return OpenFiles, ()

    def read(self, path: str, start: int, stop: int, open_file: Callable[[], int]) -> bytes:
        """Returns a part of the file that is at a path now, from `start` to `stop` or its end.

        Args:
            open_file: returns a handle of it.

        Raises:
            OSError: there is none, or it cannot be read.
        """
        with self._lock:
            file = self._files.get(path)
        if file is None or file.signature != _signature(os.stat(path)):
            file = self._opened(open_file)
        with self._lock:
            self._files[path] = file
            self._files.move_to_end(path)
            while len(self._files) > self._most:
                self._files.popitem(last=False)
        return file.read(start, stop)

    def _opened(self, open_file: Callable[[], int]) -> _OpenFile:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # of which a run has other uses
        self._most = KEPT_FILES if limit == resource.RLIM_INFINITY else min(KEPT_FILES, limit // 4)
        try:
            return _OpenFile(open_file())
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        with self._lock:
            self._files.clear()
        return _OpenFile(open_file())


def _signature(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
