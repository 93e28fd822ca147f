"""Whether a cache that is read is still the one that was opened.

A unit is compared with its marker once, so that a part of it may be read long after, and out of what another teacher wrote
to the same place meanwhile: every checksum of which is right.
"""

from __future__ import annotations

import time

from softcache.cache.manifest import MAX_MANIFEST_BYTES
from softcache.cache.storage.base import Objects, is_bucket
from softcache.errors import CacheNotFoundError, CorruptionError
from softcache.hashing.digests import digest_bytes

__all__ = ["ManifestWatch"]

FOLDER_SECONDS, BUCKET_SECONDS = 1.0, 10.0
"""How long a manifest that was read is taken for the one that is there."""


class ManifestWatch:
    """The manifest of a cache, looked at again from time to time.

    Args:
        objects: of the cache.
        path: of the manifest.
        sha256: of what was opened.
    """

    def __init__(self, objects: Objects, path: str, sha256: str) -> None:
        self._objects, self._path, self._sha256 = objects, path, sha256
        self._seconds = BUCKET_SECONDS if is_bucket(objects.url) else FOLDER_SECONDS
        self._same_until = time.monotonic() + self._seconds

    def check(self, *, now: bool = False) -> None:
        """Raises where the cache has given its place to another one; asked after reading from it, by any thread.

        Args:
            now: also where the manifest has just been looked at.

        Raises:
            CorruptionError: the manifest is another one, or gone.
        """
        if not now and time.monotonic() < self._same_until:
            return
        try:
            found = digest_bytes(self._objects.get(self._path, max_bytes=MAX_MANIFEST_BYTES))
        except CacheNotFoundError:
            found = ""
        if found != self._sha256:
            found = f"{found[:12]}… found" if found else "found none"
            raise CorruptionError(
                f"cache {self._objects.url}: {self._path} is not the one that was opened (sha256 {self._sha256[:12]}… "
                f"expected, {found}): another cache was written here, or this one removed, while it was read; what was read "
                "since may be of either: restore it, or open what is there now, and start the run anew"
            )
        self._same_until = time.monotonic() + self._seconds
