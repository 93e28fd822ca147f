"""Objects in a bucket: the seam of `objects`, on S3, Google Cloud Storage and Azure, by obstore.

    s3://bucket/prefix    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL, AWS_ALLOW_HTTP ...
    gs://bucket/prefix    GOOGLE_APPLICATION_CREDENTIALS ...
    az://container/prefix AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY ...

An object is one PUT, so it is there whole or not at all. Reading asks for many objects, or parts of objects, at once
(`cloud_client` has the requests and their repetition). A bucket has no locks: a claim is a lease (`leases`).
"""

from __future__ import annotations

import itertools
import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from datetime import datetime
from functools import partial
from typing import Any

import pyarrow as pa

from softcache.cache.storage.base import size_error
from softcache.cache.storage.cloud.client import CONCURRENT_RANGES, CloudClient, check_path
from softcache.cache.storage.cloud.ranges import KeptObjects, RangeFile
from softcache.cache.storage.lease import LeaseManager, Tag
from softcache.errors import CacheNotFoundError, StorageError

__all__ = ["CloudObjects"]

KEPT_BYTES = 256 << 20
"""Memory for checked shards that will be read in parts: those of a few units."""


class CloudObjects:
    """Objects below a prefix of a bucket.

    Raises (from the constructor):
        StorageError: the URL is not scheme://bucket/prefix.
        MissingExtraError: obstore is not installed.
    """

    def __init__(self, url: str) -> None:
        self._client = CloudClient(url)
        self.url = self._client.url
        self._kept = KeptObjects(KEPT_BYTES)
        self._board = LeaseManager(self)
        self._offset: float | None = None

    # -- whole objects -------------------------------------------------------------------------------------

    def put(self, path: str, data: bytes) -> None:
        self._kept.drop(path)
        self._client.ask(
            path, "written", lambda client, store: client.put(store, path, data, use_multipart=False)
        )

    def put_if_absent(self, path: str, data: bytes) -> bool:
        return self.put_where(path, data, None) is not None

    def put_where(self, path: str, data: bytes, tag: Tag | None) -> Tag | None:
        """Writes an object if the one there has this tag, or, with None, if there is none.

        Returns:
            The new tag; None if the object there is another one. After an answer that got lost, that may be our own.

        Raises:
            StorageError: the server cannot compare, refuses or does not answer.
        """
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        mode: Any = "create" if tag is None else tag

        def put(client: Any, store: Any) -> Tag | None:
            try:
                return _tag(client.put(store, path, data, mode=mode))
            except (AlreadyExistsError, PreconditionError):
                return None
            except FileNotFoundError:
                if tag is None:  # there is no bucket
                    raise
                return None

        return self._client.ask(path, "written", put)

    def get(self, path: str, *, max_bytes: int | None = None) -> bytes:
        def get(client: Any, store: Any) -> bytes | int:
            found = client.get(store, path)
            size = int(found.meta["size"])
            return size if max_bytes is not None and size > max_bytes else bytes(found.bytes())

        found = self._client.ask(path, "read", get)
        if isinstance(found, int):
            raise size_error(f"{self.url}/{path}", found, max_bytes or 0)
        return found

    def get_tagged(self, path: str, *, patient: bool = True) -> tuple[bytes, Tag]:
        """Returns an object and its tag; who is not patient asks once."""

        def get(client: Any, store: Any) -> tuple[bytes, Tag]:
            found = client.get(store, path)
            return bytes(found.bytes()), _tag(found.meta)

        return self._client.ask(path, "read", get, patient=patient)

    def get_many(self, paths: Sequence[str], *, max_bytes: int | None = None) -> Iterator[bytes | None]:
        return self._client.at_once(lambda path: self._get_or_none(path, max_bytes), paths)

    def _get_or_none(self, path: str, max_bytes: int | None) -> bytes | None:
        try:
            return self.get(path, max_bytes=max_bytes)
        except CacheNotFoundError:
            return None

    def get_sized(self, sizes: Mapping[str, int]) -> Iterator[bytes | int | None]:
        return self._client.at_once(lambda item: self._get_if_sized(*item), list(sizes.items()))

    def _get_if_sized(self, path: str, expected: int) -> bytes | int | None:
        def get(client: Any, store: Any) -> bytes | int:
            found = client.get(store, path)
            size = int(found.meta["size"])
            return bytes(found.bytes()) if size == expected else size

        try:
            found = self._client.ask(path, "read", get)
        except CacheNotFoundError:
            return None
        if isinstance(found, bytes):
            self._kept.add(path, found)
        return found

    def size(self, path: str) -> int | None:
        try:
            return self._existing_size(path)
        except CacheNotFoundError:
            self._listed(None, limit=1)  # the answer to a HEAD does not say that there is no bucket
            return None

    def _existing_size(self, path: str) -> int:
        return self._client.ask(path, "read", lambda client, store: int(client.head(store, path)["size"]))

    def list(self, prefix: str) -> list[str]:
        if prefix:
            check_path(prefix, self.url)
        return sorted(self._listed(prefix or None))

    def times(self, prefix: str) -> dict[str, float]:
        check_path(prefix, self.url)
        return {path: modified.timestamp() for path, modified in self._listed(prefix).items()}

    def _listed(self, prefix: str | None, *, limit: int | None = None) -> dict[str, datetime]:
        """When each object below a folder was last written, by path."""

        def entries(client: Any, store: Any) -> dict[str, datetime]:
            pages = client.list(store, prefix, chunk_size=limit or 1000)
            return {
                entry["path"]: entry["last_modified"]
                for page in itertools.islice(pages, limit)
                for entry in page
                if not _is_folder(entry, prefix)
            }

        return self._client.ask(None, "listed", entries)

    def tags(self, path: str | None) -> dict[str, str]:
        """Returns what distinguishes an object from one that replaces it: of one object, or of all of them, by path.

        Raises:
            CacheNotFoundError: there is no such object, or no such bucket.
        """

        def entries(client: Any, store: Any) -> dict[str, str]:
            found = [client.head(store, path)] if path else itertools.chain(*client.list(store, None))
            return {
                entry["path"]: json.dumps([entry["size"], _tag(entry)])
                for entry in found
                if path or not _is_folder(entry, None)
            }

        return self._client.ask(path, "read" if path else "listed", entries)

    def blocks(self, path: str, tag: str, size: int) -> Iterator[bytes]:
        """Yields the object of a tag, in parts of `size` bytes.

        Args:
            tag: as `tags` gives it.

        Raises:
            StorageError: the object was replaced or removed since.
        """
        num_bytes, expected = json.loads(tag)
        replaced = StorageError(
            f"{self.url}/{path}: was replaced or removed while it was copied: expected {num_bytes:,} bytes of "
            f"{_e_tag(expected)}; run again when nothing writes there"
        )

        def part(start: int, client: Any, store: Any) -> bytes:
            found = client.get(store, path, options={"range": (start, min(start + size, num_bytes))})
            if int(found.meta["size"]) != num_bytes or _e_tag(found.meta) != _e_tag(expected):
                raise replaced
            return bytes(found.bytes())

        for start in range(0, num_bytes, size):
            try:
                block = self._client.ask(path, "read", partial(part, start), beyond=b"")
            except CacheNotFoundError as error:
                raise replaced from error
            if not block:
                raise replaced
            yield block

    def age(self, path: str) -> float | None:
        try:
            return self._now() - self._modified(path)
        except CacheNotFoundError:
            return None

    def _modified(self, path: str) -> float:
        return self._client.ask(
            path, "read", lambda client, store: client.head(store, path)["last_modified"].timestamp()
        )

    def _now(self) -> float:
        """The bucket's time, in seconds since the epoch: that of an object that it has just got."""
        if self._offset is None:
            path = f".softcache-clock-{uuid.uuid4().hex}"
            self.put(path, b"")
            self._offset = self._modified(path) - time.time()
            self.delete(path)
        return time.time() + self._offset

    def orphaned_writes(self, *, remove: bool, older_than: float = 0.0) -> dict[str, int]:
        return {}

    def delete(self, path: str, *, patient: bool = True) -> None:
        self._kept.drop(path)
        with suppress(CacheNotFoundError):
            self._client.ask(
                path, "deleted", lambda client, store: client.delete(store, path), patient=patient
            )

    def delete_many(self, paths: Sequence[str]) -> None:
        for _ in self._client.at_once(self.delete, paths):
            pass

    # -- parts ---------------------------------------------------------------------------------------------

    def get_suffixes(self, lengths: Mapping[str, int]) -> Sequence[tuple[bytes, int]]:
        return list(self._client.at_once(lambda item: self._get_end(*item), list(lengths.items())))

    def _get_end(self, path: str, length: int) -> tuple[bytes, int]:
        if (kept := self._kept.get(path)) is not None:
            return kept[-length:], len(kept)
        if self.url.startswith("az://"):  # which cannot be asked for the end of an object
            size = self._existing_size(path)
            return self._get_range(path, max(0, size - length), size), size

        def get(client: Any, store: Any) -> tuple[bytes, int]:
            found = client.get(store, path, options={"range": {"suffix": length}})
            return bytes(found.bytes()), int(found.meta["size"])

        return self._client.ask(path, "read", get, beyond=(b"", 0))  # an empty object has no end

    def get_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> Sequence[bytes]:
        return list(self._client.at_once(lambda item: self._get_range(*item), ranges, most=CONCURRENT_RANGES))

    def _get_range(self, path: str, start: int, stop: int) -> bytes:
        if (kept := self._kept.get(path)) is not None:
            return kept[start:stop]
        if stop <= start:
            return b""
        return self._client.ask(
            path,
            "read",
            lambda client, store: bytes(client.get_range(store, path, start=start, end=stop)),
            beyond=b"",
        )

    def kvstore(self, prefix: str) -> None:
        """None: TensorStore's own clients would have other credentials, endpoints and retries than ours."""

    def open(self, path: str) -> pa.NativeFile:
        if (kept := self._kept.get(path)) is not None:
            return pa.BufferReader(kept)
        size = self._existing_size(path)
        return pa.PythonFile(RangeFile(lambda start, stop: self._get_range(path, start, stop), size), "r")

    # -- claims --------------------------------------------------------------------------------------------

    def claim(self, path: str) -> AbstractContextManager[bool]:
        return self._board.claim(path)

    def __getstate__(self) -> dict[str, str]:
        return {"url": self.url}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _is_folder(entry: Any, prefix: str | None) -> bool:
    """Whether a listed object is the empty one by which consoles show a folder (its name ends in a slash)."""
    return entry["path"] == (prefix or "") and not entry["size"]


def _e_tag(meta: Any) -> str:
    """Returns the tag of an object without what listings and answers write around it."""
    return str(meta.get("e_tag")).removeprefix("W/").strip('"')


def _tag(meta: Any) -> Tag:
    """Returns what distinguishes this object from the one before it: S3 and Azure compare e-tags, Google versions."""
    return {name: str(meta[name]) for name in ("e_tag", "version") if meta.get(name) is not None}
