"""Requests to a bucket: made by obstore, repeated for a bounded time, explained when they fail, many at once.

Every request is tried again, with growing pauses, for about $SOFTCACHE_RETRY_SECONDS (90), and then fails with one message
(`cloud_errors`). The environment gives credentials, endpoint and timeouts; see `client_options`.

obstore is set up in the process that uses it, when it first does; it does not survive a fork.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit

from softcache.cache.storage.cloud.errors import (
    PROVIDERS,
    Provider,
    is_range_error,
    is_transient,
    translate_error,
)
from softcache.errors import MissingExtraError, StorageError
from softcache.runtime.display import format_duration
from softcache.runtime.forks import ForkGuard

__all__ = ["CloudClient", "check_path"]


CONCURRENT_REQUESTS = 32
CONCURRENT_RANGES = 96
"""Of chunks, which are small: those of a window, 16 chunks of six columns, in one round."""
RETRY_SECONDS = 90.0
MAX_PAUSE_SECONDS = 10.0
CLIENT = {"connect_timeout": "5s", "read_timeout": "60s", "timeout": "280s"}
"""A request that is silent for a minute is given up and tried again. It has to be over in the five minutes for which its
signature holds."""
CLIENT_FLAGS = ("allow_http", "allow_invalid_certificates")
OBSTORE_RETRIES = {
    "max_retries": 3,
    "backoff": {
        "init_backoff": timedelta(milliseconds=100),
        "max_backoff": timedelta(seconds=1),
        "base": 2,
    },
}

Item = TypeVar("Item")
Result = TypeVar("Result")


class CloudClient:
    """A prefix of a bucket, and who asks for its objects.

    Attributes:
        url: scheme://bucket/prefix, without a slash at its end.

    Raises (from the constructor):
        StorageError: the URL is not scheme://bucket/prefix.
        MissingExtraError: obstore is not installed.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._bucket, self._prefix = parts.netloc, parts.path.removeprefix("/").removesuffix("/")
        if not self._bucket or "@" in self._bucket or parts.query or parts.fragment:
            raise StorageError(
                f"{url}: expected {parts.scheme}://BUCKET/PREFIX, with nothing before or behind it"
            )
        if self._prefix:
            check_path(self._prefix, url)
        self.url = "/".join(filter(None, [f"{parts.scheme}://{self._bucket}", self._prefix]))
        self._provider, self._lock = PROVIDERS[parts.scheme], threading.Lock()
        self._store: Any = None
        self._threads: dict[int, ThreadPoolExecutor] = {}
        _obstore(url)

    def ask(
        self,
        path: str | None,
        doing: str,
        request: Callable[[Any, Any], Result],
        *,
        beyond: Result | None = None,
        patient: bool = True,
    ) -> Result:
        """Returns request(obstore, store); asks again while what went wrong may pass.

        obstore repeats requests by itself, but not a conditional put, nor an answer that breaks off in its body.

        Args:
            path: of the object; None for the root.
            doing: what could not be done, such as "read".
            beyond: what a range behind the object's end gives.
            patient: repeat it.

        Raises:
            CacheNotFoundError: there is no such object.
            StorageError: anything else; with what to do.
        """
        if path is not None:
            check_path(path, self.url)
        obstore, store, started = _obstore(self.url), self._opened(), time.monotonic()
        for tries in itertools.count(1):
            try:
                return request(obstore, store)
            except _failures() as error:
                if beyond is not None and is_range_error(error):
                    return beyond
                seconds = time.monotonic() - started
                if not patient or not is_transient(error) or seconds > retry_seconds():
                    tried = (
                        f", after {tries} {'try' if tries == 1 else 'tries'} in {format_duration(seconds)}"
                    )
                    raise translate_error(
                        error, url=self.url, path=path or "", doing=doing, tried=tried
                    ) from error
                time.sleep(random.uniform(0.05, min(MAX_PAUSE_SECONDS, 0.1 * 2**tries)))
            except BaseException as error:
                if type(error).__name__ != "PanicException":  # of Rust, and no Exception
                    raise
                raise StorageError(
                    f"{self.url}: cannot be {doing}: the client cannot make a request of its settings; check "
                    f"{self._provider.endpoint}, the region and {self._provider.credentials}"
                ) from error
        raise AssertionError("unreachable")

    def at_once(
        self, function: Callable[[Item], Result], items: Iterable[Item], *, most: int = CONCURRENT_REQUESTS
    ) -> Iterator[Result]:
        """Yields function(item) in order; up to `most` requests run at once, and an error is raised in its place."""
        self._opened()
        with self._lock:
            if most not in self._threads:
                self._threads[most] = ThreadPoolExecutor(most, "softcache-requests")
            threads = self._threads[most]
        return threads.map(function, items)

    def _opened(self) -> Any:
        with self._lock:
            if self._store is None or not _FORKS.is_used_here:
                _FORKS.enter(self.url)
                self._store = self._connect()
            return self._store

    def _connect(self) -> Any:
        from obstore import store

        check_environment(self._provider, self.url)
        try:
            return getattr(store, self._provider.name)(
                self._bucket,
                prefix=self._prefix or None,
                client_options=client_options(self._provider.prefix),
                retry_config=OBSTORE_RETRIES | {"retry_timeout": timedelta(seconds=retry_seconds())},
            )
        except _failures() as error:
            raise translate_error(error, url=self.url, path="", doing="opened") from error


def check_environment(provider: Provider, url: str) -> None:
    """Raises StorageError where a variable that leads to a bucket cannot be one; a value that may be secret is not shown."""
    for name, value in os.environ.items():
        if name.startswith(f"{provider.prefix}_") and re.search(r"[\x00-\x1f\x7f]", value):
            raise StorageError(
                f"{url}: {name} holds a line break or another control character; set it without (`echo` appends a line "
                "break, `printf %s` does not)"
            )
    for name in (provider.endpoint, f"{provider.prefix}_ENDPOINT"):
        value = os.environ.get(name, "")
        if value and not re.fullmatch(r"https?://[^\s/]+(/\S*)?", value):
            shown = value.rsplit("@", 1)[-1]
            raise StorageError(
                f"{url}: {name}: expected http://HOST or https://HOST, maybe with :PORT; found {shown!r}"
            )


def check_path(relative: str, where: str) -> None:
    """Raises StorageError unless a path names something inside of its root."""
    if not relative or {"", ".", ".."} & set(relative.split("/")):
        raise StorageError(f"{where}: object {relative!r} is no path inside of it")


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


_FORKS = ForkGuard("used a bucket", "the client")


def _obstore(url: str) -> Any:
    try:
        import obstore
    except ImportError as error:
        raise MissingExtraError(f"{url}: obstore is not installed; pip install 'softcache[cloud]'") from error
    return obstore


def _failures() -> tuple[type[Exception], ...]:
    from obstore.exceptions import BaseError

    return BaseError, OSError, ValueError
