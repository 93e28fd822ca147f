"""The locks of a file system: the kernel's, which end with their process, or none that can be relied on.

    flock   probed on a new file: a second handle must be refused. Trusted where the mount table names a file system whose
            locks hold for every host that writes there; NFS with local_lock, Lustre with localflock and FUSE do not.
    lease   everywhere else: claims are leases (`lease`), and a staged file is orphaned when it is old.

$SOFTCACHE_LOCKS (auto, flock, lease) overrides the choice. The first process that chooses leases marks the folder, so that
all of them do.
"""

from __future__ import annotations

import errno
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple

from softcache.errors import StorageError
from softcache.runtime.files import MISSING_FEATURE, try_lock
from softcache.runtime.logging import log_info

__all__ = ["MARK", "Locks", "find_locks", "lock_file", "report_once", "try_stale_lock"]

MARK = "leases"
"""In the staging folder: claims of this folder are leases."""
ATTEMPTS_IF_STALE = 5
ONE_HOST = (
    {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "jfs", "reiserfs", "nilfs2", "ubifs"}
    | {"overlay", "aufs", "tmpfs", "ramfs", "rootfs", "ecryptfs", "devtmpfs"}
    | {"vfat", "exfat", "ntfs3", "fuseblk", "hfsplus"}
)
"""File systems of one kernel, as the mount table spells them."""
ALL_HOSTS = {"nfs", "nfs4", "lustre", "gpfs", "ceph", "gfs2", "ocfs2", "cifs", "smb3"}
"""File systems whose server keeps flock, unless an option of the mount turns that off."""
PER_HOST_OPTIONS = {"nolock", "local_lock=flock", "local_lock=all", "localflock", "nobrl"}


class Locks(NamedTuple):
    """How a folder is locked, and why not by flock; empty where it is."""

    kind: Literal["flock", "lease"]
    reason: str = ""


_REPORTED: set[str] = set()


def report_once(message: str) -> None:
    """Logs a message the first time that this process has it."""
    if message not in _REPORTED:
        _REPORTED.add(message)
        log_info(message)


def find_locks(root: Path, staging: Path) -> Locks:
    """Returns how a folder is locked.

    Args:
        staging: the folder of its staged files, which exists; the probe writes there.

    Raises:
        StorageError: $SOFTCACHE_LOCKS is none of auto, flock and lease.
        OSError: the folder cannot be written.
    """
    given = os.environ.get("SOFTCACHE_LOCKS", "auto")
    if given not in ("auto", "flock", "lease"):
        raise StorageError(f"SOFTCACHE_LOCKS: expected auto, flock or lease; found {given!r}")
    if given == "flock":
        return Locks("flock")
    mark = staging / MARK
    if given == "lease":
        reason = "SOFTCACHE_LOCKS=lease"
    elif mark.exists():
        reason = (
            mark.read_text("utf-8", errors="replace")[:200] or "another process found no locks to rely on"
        )
    else:
        reason = _missing_flock(staging) or _per_host(root)
    if not reason:
        return Locks("flock")
    if not mark.exists():
        mark.write_text(reason, encoding="utf-8")
    report_once(
        f"{root}: {reason}; claims are leases: what a killed process held is free again after a minute without renewal"
    )
    return Locks("lease", reason)


def _missing_flock(staging: Path) -> str:
    """Returns why flock is of no use in a folder; empty where a second holder is refused."""
    path = staging / f"probe-{uuid.uuid4().hex}"
    first = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        second = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if not try_lock(first):
                return "flock refuses a new file"
            return "flock does not exclude a second holder" if try_lock(second) else ""
        finally:
            os.close(second)
    except OSError as error:
        if error.errno not in MISSING_FEATURE:
            raise
        cause = str(error.strerror).removeprefix("flock: ")
        return f"no flock on this file system ({cause})"
    finally:
        os.close(first)
        with suppress(OSError):
            path.unlink()


def _per_host(root: Path) -> str:
    """Returns why another host may not see this one's locks; empty where it does, or no mount table is there."""
    try:
        table = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""
    where, found = f"{root.resolve()}/", ("", "", set[str]())
    for line in table.splitlines():
        before, _, after = line.partition(" - ")
        fields, of_kind = before.split(" "), after.split(" ")
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[4]).rstrip("/")
        if where.startswith(f"{point}/") and len(point) >= len(found[0]):
            found = (point, of_kind[0], {*fields[5].split(","), *of_kind[-1].split(",")})
    _, kind, options = found
    if off := sorted(options & PER_HOST_OPTIONS):
        return f"locks of this {kind} mount hold on one host only ({', '.join(off)})"
    if kind in ONE_HOST or kind in ALL_HOSTS:
        return ""
    return f"locks of a {kind or 'nameless'} file system may hold on one host only"


def lock_file(path: Path) -> int | None:
    """Returns a handle that holds the lock on `path`, or None if another process holds it."""
    stale = 0
    while True:
        handle = -1
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            if not try_lock(handle):
                os.close(handle)
                return None
            # The last holder may have unlinked this very file between our open and our lock: then try again.
            if os.fstat(handle).st_ino == os.stat(path).st_ino:
                return handle
        except FileNotFoundError:
            if handle < 0:  # its folder
                raise
        except OSError as error:
            stale += 1
            if error.errno != errno.ESTALE or stale > ATTEMPTS_IF_STALE:
                if handle >= 0:
                    os.close(handle)
                raise
        if handle >= 0:
            os.close(handle)


@contextmanager
def try_stale_lock(path: str) -> Iterator[int | None]:
    """Yields the size of a staged file, locked meanwhile; None if its writer lives, or has just finished."""
    try:
        # No link is followed: it would lock, and count, a file elsewhere.
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    try:
        yield os.fstat(handle).st_size if try_lock(handle) and os.fstat(handle).st_nlink else None
    finally:
        os.close(handle)
