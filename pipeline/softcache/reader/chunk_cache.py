"""Decoded blocks, kept while they are used and decoded ahead by threads before they are.

Reading one row of a compressed chunk decodes all of it, so a reader in block order keeps a window of chunks. Told
which come next, a few threads decode them meanwhile (decompression releases the interpreter's lock), and the reader
finds them done. Memory is bounded: `keep` blocks in use and as many ahead of them, however long the list of what
comes next.

Threads are made when there is something for them to do, in the process that does it: after a fork the child starts
with nothing. They run one block each and are handed the next, so that closing waits for those blocks and no more.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

__all__ = ["DecodedBlocks"]

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class DecodedBlocks(Generic[Key, Value]):
    """A window of decoded blocks; safe to use from several threads.

    Args:
        decode: what makes a block from its key; called in any thread, for one key once while the block is kept.
        keep: blocks in use that are kept, and blocks that may be decoded ahead of them.
        threads: that decode ahead.

    Example:
        >>> blocks = DecodedBlocks(lambda key: key * 2, keep=4)
        >>> blocks.prefetch([1, 2, 3])
        >>> blocks.get(1)
        2
        >>> blocks.close()
    """

    def __init__(self, decode: Callable[[Key], Value], *, keep: int, threads: int = 2) -> None:
        self._decode, self.keep, self._num_threads = decode, keep, threads
        self._start()

    def _start(self) -> None:
        # Reentrant: a block may be done before its callback is added, which then runs at once.
        self._pid, self._lock = os.getpid(), threading.RLock()
        self._used: OrderedDict[Key, Future[Value]] = OrderedDict()
        self._ahead: dict[Key, Future[Value]] = {}
        self._expected: dict[Key, None] = {}  # in order; not begun
        self._running = 0
        self._pool: ThreadPoolExecutor | None = None

    def _check_process(self) -> None:
        if self._pid != os.getpid():  # the parent's threads and the owner of its lock are not here
            self._start()

    def get(self, key: Key) -> Value:
        """Returns a block: from the window, from those decoded ahead, or decoded now.

        Raises:
            Exception: whatever decoding it raised, in this thread or ahead; asked for again, it is tried again.
        """
        self._check_process()
        with self._lock:
            future, mine = self._take(key)
        if mine:
            try:
                future.set_result(self._decode(key))
            except BaseException as error:
                future.set_exception(error)
        try:
            return future.result()
        except BaseException:
            with self._lock:
                if self._used.get(key) is future:
                    del self._used[key]
            raise

    def _take(self, key: Key) -> tuple[Future[Value], bool]:
        """Returns the block's future, now in use, and whether it is the caller who has to decode it."""
        if (future := self._used.get(key)) is not None:
            self._used.move_to_end(key)
            return future, False
        future = self._ahead.pop(key, None)
        mine = future is None
        if future is None:
            self._expected.pop(key, None)
            future = Future()
        self._used[key] = future
        while len(self._used) > self.keep:
            self._used.popitem(last=False)
        self._fill()
        return future, mine

    def cached_first(self, keys: Sequence[Key]) -> list[int]:
        """Returns the places in `keys` in the order in which to get them: a new block may end the stay of an old one."""
        self._check_process()
        with self._lock:
            rank = dict.fromkeys(self._ahead, 1) | dict.fromkeys(self._used, 0)
            return sorted(range(len(keys)), key=lambda place: rank.get(keys[place], 2))

    def prefetch(self, keys: Iterable[Key]) -> None:
        """Announces the blocks that are needed next, in order; replaces an earlier announcement.

        A block that cannot be decoded fails where it is asked for, not here.
        """
        self._check_process()
        with self._lock:
            wanted = dict.fromkeys(keys)
            self._ahead = {key: future for key, future in self._ahead.items() if key in wanted}
            self._expected = {key: None for key in wanted if key not in self._ahead and key not in self._used}
            self._fill()

    def _fill(self) -> None:
        """Gives free threads the next blocks, while there is room."""
        while self._expected and self._running < self._num_threads and len(self._ahead) < self.keep:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._num_threads, "softcache-blocks")
            key = next(iter(self._expected))
            try:
                future = self._pool.submit(self._decode, key)
            except RuntimeError:  # the interpreter is exiting
                self._expected.clear()
                return
            del self._expected[key]
            self._ahead[key] = future
            self._running += 1
            future.add_done_callback(self._finished)

    def _finished(self, future: Future[Value]) -> None:
        with self._lock:
            self._running -= 1
            self._fill()

    def close(self) -> None:
        """Forgets all blocks and ends the threads; the next use starts anew."""
        self._check_process()
        with self._lock:
            pool, self._pool = self._pool, None
            self._expected.clear()
            self._ahead.clear()
            self._used.clear()
        if pool is not None:
            pool.shutdown(wait=True)
