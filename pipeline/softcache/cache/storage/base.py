"""What a file system and a bucket share: objects under a root, put whole, read whole or in ranges, and claimed."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import pyarrow as pa

from softcache.errors import CorruptionError, StorageError

__all__ = ["SCHEMES", "Objects", "check_machine", "is_bucket", "size_error"]

SCHEMES = ("s3", "gs", "az")
"""Of buckets; `cloud.errors.PROVIDERS` has the provider of each."""
_NAMES = "EMFILE ENFILE ENOMEM EIO EACCES EPERM EAGAIN EINTR ESTALE ETIMEDOUT ENOTCONN EHOSTDOWN ENETDOWN ENETUNREACH"
OF_THE_MACHINE: set[int] = {getattr(errno, name) for name in _NAMES.split()}
"""Error numbers of what cannot be read now, and is no worse for it."""


class Objects(Protocol):
    """A place for objects, addressed by relative paths.

    Raises (from every method):
        StorageError: a path that leads out, or a storage that refuses or does not answer.
    """

    url: str

    def put(self, path: str, data: bytes) -> None:
        """Writes an object whole, replacing one of that name."""

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Writes an object unless there is one; of several concurrent writers at most one gets True.

        If the bucket's answer is lost, the object is there and no writer has True.
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
        """Returns the last bytes of objects, as many as `lengths` gives, and how long each object is."""

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

    def age(self, path: str) -> float | None:
        """Returns the seconds since an object was last written, by the storage's own clock, or None if there is none."""

    def delete_many(self, paths: Sequence[str]) -> None:
        """Removes objects, as far as they are there; a bucket is asked for many at once."""

    def orphaned_writes(self, *, remove: bool, older_than: float = 0.0) -> dict[str, int]:
        """Returns the bytes of writes whose process crashed, by path; removes them if `remove` is on. Writes under way stay.

        A bucket has none: an object is there when its one PUT is.

        Args:
            older_than: seconds; writes that were touched since stay.
        """

    def kvstore(self, prefix: str) -> dict[str, str] | None:
        """TensorStore's description of the objects under a prefix; None where it is to be given bytes of `get_ranges`."""

    def open(self, path: str) -> pa.NativeFile:
        """Opens an object for reading at random places."""

    def claim(self, path: str) -> AbstractContextManager[bool]:
        """A context manager that yields whether the claim is ours; it ends with the context or the process."""


def is_bucket(url: str) -> bool:
    """Whether a URL names a bucket, and not a local folder.

    Raises:
        StorageError: it begins as a bucket's, and lacks a slash; a folder of that name is `./s3:...`.
    """
    text = str(url)
    scheme, colon, rest = text.partition(":")
    if not colon or scheme.lower() not in SCHEMES:
        return False
    if not rest.startswith("//"):
        raise StorageError(
            f"{text}: expected {scheme}://BUCKET/PREFIX; found no two slashes; a folder of that name is ./{text}"
        )
    return True


def size_error(where: str, found: int, max_bytes: int) -> CorruptionError:
    """Returns the error of an object that exceeds its size limit; raised before memory is allocated for it."""
    return CorruptionError(
        f"{where}: {found:,} bytes; at most {max_bytes:,} are expected there; restore it from a copy"
    )


def check_machine(error: Exception, where: str) -> None:
    """Raises StorageError where a decoder failed because the machine refused to read, and the bytes may be as they were.

    Args:
        error: of the decoder; TensorStore writes the system's error number into its text.
        where: names what was read.
    """
    written = re.search(r"os_error_code='(\d+)'", str(error))
    number = int(written[1]) if written else getattr(error, "errno", None)
    if number in OF_THE_MACHINE:
        to_do = (
            "raise the limit of open files (ulimit -n)"
            if number in (errno.EMFILE, errno.ENFILE)
            else "mend that"
        )
        raise StorageError(
            f"{where}: cannot be read: {os.strerror(number)}; {to_do} and run again; this is no sign of damage"
        ) from error
