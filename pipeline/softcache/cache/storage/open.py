"""Opens the objects under a URL.

A path or file:// is a folder (`local`); s3://, gs:// and az:// are buckets (`cloud.store`).
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from softcache.cache.storage.base import SCHEMES, is_bucket
from softcache.cache.storage.cloud.store import CloudObjects
from softcache.cache.storage.local import LocalObjects
from softcache.errors import StorageError
from softcache.runtime.files import expand_home

__all__ = ["open_objects"]


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
    if parts.scheme == "file" and (parts.netloc not in ("", "localhost") or parts.query or parts.fragment):
        raise StorageError(
            f"{url}: expected file:///PATH, of this machine, with %3F and %23 for ? and # in names; or give the plain path"
        )
    path = unquote(parts.path) if parts.scheme == "file" else expand_home(str(url))
    return LocalObjects(Path(path), create=create)
