"""What does not survive a fork: a child whose parent has used a library's threads would hang, or end without a message."""

from __future__ import annotations

import os

from softcache.errors import StorageError

__all__ = ["ForkGuard"]


class ForkGuard:
    """The processes, of this one and those that it was forked from, in which something was used that no fork survives.

    Args:
        used: what it is used for, as in "used a bucket".
        lost: what does not survive.
    """

    def __init__(self, used: str, lost: str) -> None:
        self._used, self._lost = used, lost
        self._processes: set[int] = set()

    @property
    def is_used_here(self) -> bool:
        return os.getpid() in self._processes

    def enter(self, where: str) -> None:
        """Notes that this process uses it from now on.

        Raises:
            StorageError: a process that this one was forked from has; `where` begins the message.
        """
        if self._processes - {os.getpid()}:
            raise StorageError(
                f"{where}: this process was forked from one that had {self._used}, and {self._lost} does not survive "
                'a fork; start processes with multiprocessing_context="forkserver" or "spawn" (of a DataLoader), or '
                "materialize the cache before"
            )
        self._processes.add(os.getpid())
