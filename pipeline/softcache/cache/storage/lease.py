"""Claims where there are no locks: a small object with an owner and an expiry, renewed while it is held.

    acquire   create it; or, if the one there has run out, replace exactly that one (by its tag)
    hold      a thread replaces it by a later one, again by its tag, three times per lease
    release   delete it, if it is still ours

A lease saves work and promises nothing: its holder may be paused for longer than the lease, clocks may differ, a
delete may hit the next holder's. Two may then make one unit. What is read is right all the same: each object is
whole, and the marker, which is written last, names the checksum of each. On one kind of hardware, with as many
threads, both write the same bytes; elsewhere the last bits may differ, and a unit that got shards of one and the
marker of the other is refused until it is made again.

A lease has run out when its own expiry has passed on our clock, or when it has not been renewed for its whole length
while we looked: a machine whose clock is behind takes over later, not never.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from softcache.errors import CacheNotFoundError, SoftcacheError
from softcache.runtime.files import parse_json

__all__ = ["LEASE_SECONDS", "Lease", "LeaseManager", "Tag"]

LEASE_SECONDS = 60.0
RENEWALS = 3
"""Per lease: two may fail in a row."""


Tag = dict[str, str]
"""Distinguishes an object from earlier ones under its name."""


class _Tagged(Protocol):
    def put_where(self, path: str, data: bytes, tag: Tag | None) -> Tag | None: ...
    def get_tagged(self, path: str, *, patient: bool = True) -> tuple[bytes, Tag]: ...
    def delete(self, path: str, *, patient: bool = True) -> None: ...


def _wall_clock() -> float:
    return time.time()


class LeaseManager:
    """Where leases are, and since when this process has seen other people's unchanged."""

    def __init__(self, objects: _Tagged) -> None:
        self.objects = objects
        self._seen: dict[str, tuple[Tag, float]] = {}
        self._lock = threading.Lock()

    def unchanged_seconds(self, path: str, tag: Tag) -> float:
        """Returns for how long a lease has had this tag, since it was first asked for here."""
        now = time.monotonic()
        with self._lock:
            seen, since = self._seen.get(path, (tag, now))
            if seen != tag:
                since = now
            self._seen[path] = (tag, since)
            return now - since

    def forget(self, path: str) -> None:
        with self._lock:
            self._seen.pop(path, None)

    @contextmanager
    def claim(self, path: str) -> Iterator[bool]:
        """Yields whether the lease is this caller's; it is renewed until the context ends."""
        lease = Lease(self, path)
        if not lease.acquire():
            yield False
            return
        try:
            yield True
        finally:
            lease.release()


class Lease:
    """One claim of one process.

    Args:
        seconds: for how long the claim outlives its process.
    """

    def __init__(self, board: LeaseManager, path: str, *, seconds: float | None = None) -> None:
        self._board, self._objects, self._path = board, board.objects, path
        self._seconds = LEASE_SECONDS if seconds is None else seconds
        self._owner, self._tag = uuid.uuid4().hex, Tag()
        self._ended, self._thread = threading.Event(), threading.Thread(target=self._renew, daemon=True)

    def acquire(self) -> bool:
        """Returns whether the claim is ours now; it is then renewed until `release`.

        Raises:
            StorageError: the storage refuses or does not answer.
        """
        tag = self._objects.put_where(self._path, self._body(), None)
        if tag is None:
            tag = self._take_over()
        if tag is None:
            return False
        self._tag = tag
        self._board.forget(self._path)
        self._thread.start()
        return True

    def release(self) -> None:
        """Ends the claim; one that cannot be deleted runs out by itself."""
        self._ended.set()
        self._thread.join(
            timeout=1.0
        )  # it may be waiting for a bucket that does not answer; what it does is conditional
        with suppress(SoftcacheError):
            if self._read(patient=False)[0].get("owner") == self._owner:
                self._objects.delete(self._path, patient=False)

    def _body(self) -> bytes:
        content = {
            "owner": self._owner,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "seconds": self._seconds,
            "expires": _wall_clock() + self._seconds,
        }
        return (json.dumps(content) + "\n").encode()

    def _read(self, *, patient: bool = True) -> tuple[dict, Tag]:
        """Returns the content of the lease there, {} if that cannot be understood, and its tag."""
        data, tag = self._objects.get_tagged(self._path, patient=patient)
        with suppress(ValueError):
            found = parse_json(data)
            if isinstance(found, dict):
                return found, tag
        return {}, tag

    def _take_over(self) -> Tag | None:
        """Returns the tag of our lease in the place of one that has run out; None if another process holds it."""
        try:
            found, tag = self._read()
        except CacheNotFoundError:
            return None  # released just now; who asks again gets it
        if found.get("owner") == self._owner:  # ours: the answer to its creation got lost
            return tag
        seconds, expires = found.get("seconds"), found.get("expires")
        if not isinstance(seconds, int | float) or not isinstance(expires, int | float):
            seconds, expires = self._seconds, float("inf")  # not one of ours: gone unless it is renewed
        unchanged = self._board.unchanged_seconds(self._path, tag)
        if expires > _wall_clock() and unchanged <= min(seconds, 10 * LEASE_SECONDS):
            return None
        return self._objects.put_where(self._path, self._body(), tag)

    def _renew(self) -> None:
        while not self._ended.wait(self._seconds / RENEWALS):
            try:
                tag = self._objects.put_where(self._path, self._body(), self._tag)
                if tag is None:  # another process's; or ours, and the answer to the last renewal got lost
                    found, tag = self._read()
                    if found.get("owner") != self._owner:
                        return
                self._tag = tag
            except SoftcacheError:
                continue  # what is not renewed may run out, and is then made twice
