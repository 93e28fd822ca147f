"""Objects under a root: put whole, get whole or in ranges, claim. What a file system and a bucket share.

A path or file:// is a folder (`local_objects`); s3://, gs:// and az:// are buckets (`cloud_objects`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

import pyarrow as pa

from softcache.cache.storage.cloud.client import SCHEMES
from softcache.cache.storage.cloud.store import CloudObjects
from softcache.cache.storage.local import LocalObjects
from softcache.errors import StorageError

__all__ = ["LocalObjects", "Objects", "is_bucket", "open_objects"]


class Objects(Protocol):
    """A place for objects, addressed by relative paths.

    Raises (from every method):
        StorageError: a path that leads out, or a storage that refuses or does not answer.
    """

    url: str

    def put(self, path: str, data: bytes) -> None:
        """Writes an object whole, replacing one of that name."""

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Writes an object unless there is one; of many writers at once at most one is told True.

        A bucket whose answer was lost on the way leaves its winner untold: the object is there, and nobody has True.
        """

    def get(self, path: str, *, max_bytes: int | None = None) -> bytes:
        """Returns an object whole; one of more than `max_bytes` is refused before it is read.

        Raises:
            CacheNotFoundError: there is none.
            CorruptionError: it is too large.
        """

    def get_many(self, paths: Sequence[str], *, max_bytes: int | None = None) -> Iterator[bytes | None]:
        """Yields objects in the order of `paths`, None for one that is not there; a bucket is asked for many at once."""

    def get_sized(self, sizes: Mapping[str, int]) -> Iterator[bytes | int | None]:
        """Yields objects of a known size [bytes], in order: the bytes, the size found if it is another, None if missing.

        They will be read again in ranges: a bucket's are kept in memory, as far as it is set aside for that.
        """

    def get_suffixes(self, lengths: Mapping[str, int]) -> Sequence[tuple[bytes, int]]:
        """Returns the last bytes of objects, so many as `lengths` says, and how long each object is."""

    def get_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> Sequence[bytes]:
        """Returns parts (path, start, stop) of objects, in order; what lies beyond an object's end is left out."""

    def size(self, path: str) -> int | None:
        """Returns an object's bytes, or None if there is none."""

    def list(self, prefix: str) -> list[str]:
        """Returns the paths of all objects below a folder, sorted; "" is the root. Writes under way are left out."""

    def times(self, prefix: str) -> dict[str, float]:
        """Returns when each object below a folder was last written, by path, in seconds since the epoch."""

    def delete(self, path: str) -> None:
        """Removes an object, if it is there."""

    def orphaned_writes(self, *, remove: bool) -> dict[str, int]:
        """Returns the bytes of writes whose process died, by path; removes them if told so. Live ones are not touched.

        A bucket has none: an object is there when its one PUT is.
        """

    def kvstore(self, prefix: str) -> dict[str, str] | None:
        """TensorStore's description of the objects under a prefix; None where it is to be given bytes of `get_ranges`."""

    def open(self, path: str) -> pa.NativeFile:
        """Opens an object for reading at random places."""

    def claim(self, path: str) -> AbstractContextManager[bool]:
        """A context manager that yields whether the claim is ours; it ends with the context or the process."""


def is_bucket(url: str) -> bool:
    """Whether a URL names a bucket, and not a local folder."""
    return "://" in str(url) and urlsplit(str(url)).scheme in SCHEMES


def open_objects(url: str, *, create: bool = False) -> LocalObjects | CloudObjects:
    """Returns the objects under a local path, a file:// URL, or s3://, gs:// or az:// with bucket and prefix.

    A bucket is not asked for anything yet, and has to be there; a folder is made if `create` is on.

    Raises:
        StorageError: another scheme, no bucket, or a root that cannot be made.
        MissingExtraError: a bucket, and obstore is not installed.
    """
    parts = urlsplit(str(url))
    if is_bucket(url):
        return CloudObjects(str(url))
    if parts.scheme and parts.scheme != "file" and "://" in str(url):
        raise StorageError(
            f"{url}: {parts.scheme}:// is not served; use a local path, file://, "
            + ", ".join(f"{scheme}://" for scheme in SCHEMES)
        )
    return LocalObjects(Path(unquote(parts.path)) if parts.scheme == "file" else Path(url), create=create)
