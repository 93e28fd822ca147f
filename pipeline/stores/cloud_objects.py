"""Objects in a bucket: the seam of `objects`, on S3, Google Cloud Storage and Azure, by obstore.

    s3://bucket/prefix    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL, AWS_ALLOW_HTTP ...
    gs://bucket/prefix    GOOGLE_APPLICATION_CREDENTIALS ...
    az://container/prefix AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY ...

An object is one PUT, so it is there whole or not at all. Every request is tried again, with growing pauses, for
$SOFTCACHE_RETRY_SECONDS (90) at most, and then fails with one message. Reading asks for many objects, or parts of
objects, at once. A bucket has no locks: a claim is a lease (`leases`).

The client is made in the process that uses it, when it first does; it does not survive a fork.
"""

from __future__ import annotations

import io
import os
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import pyarrow as pa

from pipeline.errors import CacheNotFoundError, MissingExtraError, SoftcacheError, StorageError
from pipeline.stores.cloud_errors import PROVIDERS, explained, is_beyond, is_passing
from pipeline.stores.leases import Lease, LeaseBoard

__all__ = ["SCHEMES", "CloudObjects"]

SCHEMES = tuple(PROVIDERS)

CONCURRENT_REQUESTS = 32
KEPT_BYTES = 256 << 20
"""Memory for checked shards that will be read in parts: those of a few units."""

RETRY_SECONDS = 90.0
CLIENT = {"connect_timeout": "5s", "read_timeout": "60s", "timeout": "280s"}
"""A request that is silent for a minute is given up and tried again. It has to be over in the five minutes for which its
signature holds."""
CLIENT_FLAGS = ("allow_http", "allow_invalid_certificates")

Item = TypeVar("Item")
Result = TypeVar("Result")


class CloudObjects:
    """Objects below a prefix of a bucket.

    Raises (from the constructor):
        StorageError: the URL is not scheme://bucket/prefix.
        MissingExtraError: obstore is not installed.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._bucket, self._prefix = parts.netloc, parts.path.strip("/")
        if not self._bucket or "@" in self._bucket or parts.query or parts.fragment:
            raise StorageError(
                f"{url}: expected {parts.scheme}://BUCKET/PREFIX, with nothing before or behind it"
            )
        if self._prefix:
            self._check(self._prefix, url)
        self.url = "/".join(filter(None, [f"{parts.scheme}://{self._bucket}", self._prefix]))
        self._provider = PROVIDERS[parts.scheme]
        self._kept = _Kept(KEPT_BYTES)
        self._opened: _Client | None = None
        self._lock = threading.Lock()
        self._board = LeaseBoard(self)
        _obstore(url)

    # -- whole objects -------------------------------------------------------------------------------------

    def put(self, path: str, data: bytes) -> None:
        with self._explained(path, "written") as store:
            self._kept.drop(path)
            _obstore(self.url).put(store, path, data, use_multipart=False)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        return self.put_where(path, data, None) is not None

    def put_where(self, path: str, data: bytes, e_tag: str | None) -> str | None:
        """Writes an object if the one there has this e-tag, or, with None, if there is none.

        Returns:
            The new e-tag; None if the object there is another one. After an answer that got lost, that may be our own.

        Raises:
            StorageError: the server cannot compare, refuses or does not answer.
        """
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        self._check(path, self.url)
        store, mode = self._client().store, cast(Any, "create" if e_tag is None else {"e_tag": e_tag})
        end = time.monotonic() + retry_seconds()
        for attempt in range(1_000):
            try:
                return str(_obstore(self.url).put(store, path, data, mode=mode)["e_tag"])
            except (AlreadyExistsError, PreconditionError, FileNotFoundError) as error:
                if isinstance(error, FileNotFoundError) and e_tag is None:
                    raise explained(error, url=self.url, path=path, doing="written") from error
                return None
            except _failures(self.url) as error:
                # obstore does not repeat these by itself: they are not the same when they are done twice.
                if not is_passing(error) or time.monotonic() > end:
                    raise explained(error, url=self.url, path=path, doing="written") from error
                time.sleep(random.uniform(0.05, min(5.0, 0.1 * 2**attempt)))
        raise AssertionError("unreachable")

    def get(self, path: str) -> bytes:
        return self.get_tagged(path)[0]

    def get_tagged(self, path: str) -> tuple[bytes, str]:
        """Returns an object and its e-tag."""
        with self._explained(path, "read") as store:
            found = _obstore(self.url).get(store, path)
            return bytes(found.bytes()), str(found.meta["e_tag"])

    def get_many(self, paths: Sequence[str]) -> Iterator[bytes | None]:
        return self._at_once(self._get_or_none, paths)

    def _get_or_none(self, path: str) -> bytes | None:
        try:
            return self.get(path)
        except CacheNotFoundError:
            return None

    def get_sized(self, sizes: Mapping[str, int]) -> Iterator[bytes | int | None]:
        return self._at_once(lambda item: self._get_if_sized(*item), list(sizes.items()))

    def _get_if_sized(self, path: str, expected: int) -> bytes | int | None:
        try:
            with self._explained(path, "read") as store:
                found = _obstore(self.url).get(store, path)
                if (size := int(found.meta["size"])) != expected:
                    return size
                data = bytes(found.bytes())
        except CacheNotFoundError:
            return None
        self._kept.add(path, data)
        return data

    def size(self, path: str) -> int | None:
        try:
            with self._explained(path, "read") as store:
                return int(_obstore(self.url).head(store, path)["size"])
        except CacheNotFoundError:
            next(iter(self._listed("")), None)  # the answer to a HEAD does not say that there is no bucket
            return None

    def list(self, prefix: str) -> list[str]:
        self._check(prefix, self.url)
        return sorted(self._listed(prefix))

    def _listed(self, prefix: str) -> Iterator[str]:
        with self._explained(None, "listed") as store:
            for page in _obstore(self.url).list(store, prefix or None):
                for entry in page:
                    yield entry["path"]

    def delete(self, path: str) -> None:
        with self._explained(path, "deleted") as store:
            self._kept.drop(path)
            with suppress(FileNotFoundError):
                _obstore(self.url).delete(store, path)

    # -- parts ---------------------------------------------------------------------------------------------

    def get_ends(self, lengths: Mapping[str, int]) -> Sequence[tuple[bytes, int]]:
        return list(self._at_once(lambda item: self._get_end(*item), list(lengths.items())))

    def _get_end(self, path: str, length: int) -> tuple[bytes, int]:
        if (kept := self._kept.get(path)) is not None:
            return kept[-length:], len(kept)
        if self.url.startswith("az://"):  # which cannot be asked for the end of an object
            with self._explained(path, "read") as store:
                size = int(_obstore(self.url).head(store, path)["size"])
            return self._get_range(path, max(0, size - length), size), size
        with self._explained(path, "read") as store:
            try:
                found = _obstore(self.url).get(store, path, options={"range": {"suffix": length}})
                return bytes(found.bytes()), int(found.meta["size"])
            except _failures(self.url) as error:
                if is_beyond(error):  # an empty object has no end
                    return b"", 0
                raise

    def get_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> Sequence[bytes]:
        return list(self._at_once(lambda item: self._get_range(*item), ranges))

    def _get_range(self, path: str, start: int, stop: int) -> bytes:
        if (kept := self._kept.get(path)) is not None:
            return kept[start:stop]
        if stop <= start:
            return b""
        with self._explained(path, "read") as store:
            try:
                return bytes(_obstore(self.url).get_range(store, path, start=start, end=stop))
            except _failures(self.url) as error:
                if is_beyond(error):
                    return b""
                raise

    def kvstore(self, prefix: str) -> None:
        """None: TensorStore's own clients would have other credentials, endpoints and retries than ours."""

    def open(self, path: str) -> pa.NativeFile:
        if (kept := self._kept.get(path)) is not None:
            return pa.BufferReader(kept)
        with self._explained(path, "read") as store:
            size = int(_obstore(self.url).head(store, path)["size"])
        return pa.PythonFile(_RangeFile(lambda start, stop: self._get_range(path, start, stop), size), "r")

    # -- claims --------------------------------------------------------------------------------------------

    @contextmanager
    def claim(self, path: str) -> Iterator[bool]:
        lease = Lease(self._board, path)
        if not lease.acquire():
            yield False
            return
        try:
            yield True
        finally:
            lease.release()

    # -- the client ----------------------------------------------------------------------------------------

    def _check(self, relative: str, where: str) -> None:
        if not relative or {"", ".", ".."} & set(relative.split("/")):
            raise StorageError(f"{where}: object {relative!r} is no path inside of it")

    def _client(self) -> _Client:
        with self._lock:
            if self._opened is None:
                _check_fork(self.url)
                self._opened = _Client(self._connect())
            return self._opened

    def _connect(self) -> Any:
        from obstore import store

        _obstore(self.url)
        kind = getattr(store, self._provider.name)
        try:
            return kind(
                self._bucket,
                prefix=self._prefix or None,
                client_options=client_options(self._provider.prefix),
                retry_config={
                    "max_retries": 12,
                    "retry_timeout": timedelta(seconds=retry_seconds()),
                    "backoff": {
                        "init_backoff": timedelta(milliseconds=100),
                        "max_backoff": timedelta(seconds=10),
                        "base": 2,
                    },
                },
            )
        except _failures(self.url) as error:
            raise explained(error, url=self.url, path="", doing="opened") from error

    @contextmanager
    def _explained(self, path: str | None, doing: str) -> Iterator[Any]:
        if path is not None:
            self._check(path, self.url)
        store = self._client().store
        try:
            yield store
        except SoftcacheError:
            raise
        except _failures(self.url) as error:
            raise explained(error, url=self.url, path=path or "", doing=doing) from error

    def _at_once(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yields function(item) in order; so many requests run at once, and an error is raised in its place."""
        return self._client().threads.map(function, items)

    def __getstate__(self) -> dict[str, str]:
        return {"url": self.url}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__init__(**state)  # type: ignore[misc]


class _Client:
    """What one process has open: the store, and threads that wait for its answers."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.threads = ThreadPoolExecutor(CONCURRENT_REQUESTS, "softcache-requests")


class _Kept:
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


class _RangeFile(io.RawIOBase):
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


def retry_seconds() -> float:
    """Returns for how long a request is tried again.

    Raises:
        StorageError: $SOFTCACHE_RETRY_SECONDS is no positive number.
    """
    given = os.environ.get("SOFTCACHE_RETRY_SECONDS", str(RETRY_SECONDS))
    try:
        if 0 < (seconds := float(given)) < 3600:
            return seconds
    except ValueError:
        pass
    raise StorageError(f"SOFTCACHE_RETRY_SECONDS: expected seconds between 0 and 3600; found {given!r}")


def client_options(prefix: str) -> dict[str, Any]:
    """Returns the HTTP client's options: ours, and over them the environment's, such as AWS_READ_TIMEOUT=20s.

    obstore takes options from the environment or from its caller, never some from each.
    """
    options: dict[str, Any] = dict(CLIENT)
    for name in (*CLIENT, "proxy_url", "proxy_excludes", "proxy_ca_certificate"):
        if found := os.environ.get(f"{prefix}_{name.upper()}"):
            options[name] = found
    for name in CLIENT_FLAGS:
        if found := os.environ.get(f"{prefix}_{name.upper()}"):
            options[name] = found.strip().lower() in ("1", "true", "yes", "on")
    return options


_used_in: set[int] = set()
"""The processes, of this one and those that it was forked from, in which obstore has run."""


def _check_fork(url: str) -> None:
    if _used_in - {os.getpid()}:
        raise StorageError(
            f"{url}: this process was forked from one that had used a bucket, and the client does not survive a fork; start "
            'processes with multiprocessing_context="forkserver" or "spawn" (of a DataLoader), or thaw the cache before'
        )
    _used_in.add(os.getpid())


def _obstore(url: str) -> Any:
    try:
        import obstore
    except ImportError as error:
        raise MissingExtraError(f"{url}: obstore is not installed; pip install 'softcache[cloud]'") from error
    return obstore


def _failures(url: str) -> tuple[type[Exception], ...]:
    _obstore(url)
    from obstore.exceptions import BaseError

    return BaseError, OSError, ValueError
