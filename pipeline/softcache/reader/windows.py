"""Windows of an order, decoded ahead so that the rows stand in batch order: a batch is then a slice.

A window is the samples that are mixed with each other (`softcache.reader.order`), in order of use. Each of its chunks is
decoded once, by a thread, and each row written to where its batch is; nothing is picked or copied when a batch is read.
The arrays of a batch are views of the window. So a window hands out each row once: the caller may change what it was
given, and a row that is read again is decoded again, by `softcache.reader.chunk_cache`.

The chunks of a bucket are asked for window by window, all at once and a window before they are decoded: a request takes
longer than decoding what it brings.

Memory: the window in use and the next one, of a bucket two more as they are stored, and what batches still hold of
earlier ones. The memory of a window whose batches are gone is used for another one: fresh memory costs more than decoding
does, page by page.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from softcache.cache.row_index import RowIndex
from softcache.reader.chunk_cache import DecodedBlocks
from softcache.runtime.indexing import concatenated_ranges

__all__ = ["DecodedWindows", "Piece", "Window"]

ALIGNMENT = 64
DECODED_WINDOWS = 2
DECODING_THREADS = 4
"""At most; two where there are fewer cores."""
SPARE_BUFFERS = 3


class Window:
    """The samples of a window in order of use, and the arrays of their labels.

    Attributes:
        view: of all samples.
        samples: [N] int64, in order of use.
        counts: [N] int64, rows of each.
        offsets: [N + 1] int64, where the rows of each begin.
        blocks: numbers of the chunks of samples that it needs.
        columns: by name, [rows, ...]: what was decoded; empty before.
        fingerprints: [N] uint64.
        cursor: samples before it may have been handed out.
        fetched: chunks as they are stored, by number, on their way from a bucket; None: each is read when it is decoded.
    """

    def __init__(self, view: int, samples: np.ndarray, rows: RowIndex, block_samples: int) -> None:
        self.view, self.samples, self._rows, self._block_samples = view, samples, rows, block_samples
        self.counts = rows.counts(samples)
        self.offsets = np.concatenate([[0], np.cumsum(self.counts)])
        numbers = samples // block_samples
        first = int(numbers.min(initial=0))
        numbers = (numbers - first).astype(np.min_scalar_type(int(numbers.max(initial=0)) - first))
        self._by_block = np.argsort(numbers, kind="stable")  # of 16 bits: counted, not compared
        ordered = numbers[self._by_block].astype(np.int64)
        starts = np.flatnonzero(np.diff(ordered, prepend=-1))
        ends = np.append(starts[1:], len(samples))
        self.blocks = (ordered[starts] + first).tolist()
        self._spans = dict(
            zip(self.blocks, zip(starts.tolist(), ends[: len(starts)].tolist(), strict=True), strict=True)
        )
        self.columns: dict[str, np.ndarray] = {}
        self.fingerprints = np.zeros(0, np.uint64)
        self.cursor, self.is_ready = 0, False
        self.fetched: Future[dict[int, Any]] | None = None

    @property
    def num_rows(self) -> int:
        return int(self.offsets[-1])

    def chosen(self, block: int) -> np.ndarray:
        """Returns the places in the window of its samples that a chunk holds."""
        return self._by_block[slice(*self._spans[block])]

    def stored(self, block: int) -> Any:
        """Returns a chunk as it is stored, if it was fetched; it is given up then. None: it is to be read."""
        return None if self.fetched is None else self.fetched.result().pop(block, None)

    def places(self, block: int, num_rows: int) -> np.ndarray:
        """Returns where each of a chunk's rows goes, [num_rows] int64; -1: it is not of this window.

        Raises:
            ValueError: a sample is in the window twice.
        """
        chosen, first = self.chosen(block), block * self._block_samples
        places_P = np.full(num_rows, -1)
        if self._rows.ragged:
            counts = self.counts[chosen]
            sources = concatenated_ranges(self._rows.starts(self.samples[chosen], first), counts)
            places_P[sources] = concatenated_ranges(self.offsets[chosen], counts)
        else:
            sources = self.samples[chosen] - first
            places_P[sources] = chosen
        if np.count_nonzero(places_P >= 0) != len(sources):
            raise ValueError("a sample is in the window twice")
        return places_P

    def find(self, samples: np.ndarray) -> tuple[int, int] | None:
        """Returns the places of the first of `samples`, up to the window's end, if they come next or later in this order."""
        start = self.cursor
        if start == len(self.samples):
            return None
        if self.samples[start] != samples[0]:
            later = np.flatnonzero(self.samples[start:] == samples[0])
            if not len(later):
                return None
            start += int(later[0])
        stop = min(start + len(samples), len(self.samples))
        return (start, stop) if np.array_equal(self.samples[start:stop], samples[: stop - start]) else None


class Piece(NamedTuple):
    """The samples `start` to `stop` of a window, and their rows by column."""

    window: Window
    start: int
    stop: int

    @property
    def columns(self) -> dict[str, np.ndarray]:
        first, last = self.window.offsets[self.start], self.window.offsets[self.stop]
        return {name: values[first:last] for name, values in self.window.columns.items()}


class _WithdrawnError(Exception):
    """A window is not announced any more."""


class DecodedWindows:
    """The windows that are read next, decoded ahead by threads.

    Args:
        decode: writes the rows of a chunk into the window's arrays; called in any thread.
        columns: of a row by name, arrays [0, ...] of their dtypes and inner shapes.
        fetch: returns chunks of a window as they are stored, by number; called in a thread; None: nothing is fetched.
    """

    def __init__(
        self,
        decode: Callable[[Window, int], None],
        columns: Callable[[], Mapping[str, np.ndarray]],
        fetch: Callable[[Window], dict[int, Any]] | None = None,
    ) -> None:
        self._decode, self._columns, self._fetch = decode, columns, fetch
        self._start()

    def _start(self) -> None:
        self._pid, self._fetcher = os.getpid(), ThreadPoolExecutor(1, "softcache-fetch")
        self._tasks: DecodedBlocks[tuple[int, int], None] = DecodedBlocks(
            self._decode_block, keep=1, threads=min(max(os.cpu_count() or 2, 2), DECODING_THREADS)
        )
        self._windows: dict[int, Window] = {}
        self._lock, self._next_number = threading.Lock(), 0
        self._buffers: list[np.ndarray] = []

    def announce(
        self, requests: Sequence[tuple[int, np.ndarray]], make: Callable[[int, np.ndarray], Window]
    ) -> None:
        """Has the first two windows decoded and all fetched, in order; an earlier announcement keeps what is here again.

        Args:
            requests: view and samples of each.
            make: returns a window that was not announced before.
        """
        self._check_process()
        with self._lock:
            there, self._windows = self._windows, {}
            for view, samples in requests:
                for number, known in there.items():
                    if known.view == view and np.array_equal(known.samples, samples):
                        self._windows[number] = known
                        break
                else:
                    self._windows[self._next_number] = make(view, samples)
                    self._next_number += 1
            for number, window in there.items():
                if number not in self._windows and window.fetched is not None:
                    window.fetched.cancel()
            for window in self._windows.values():
                if self._fetch is not None and window.fetched is None:
                    window.fetched = self._fetcher.submit(self._fetch, window)
            near = list(self._windows.items())[:DECODED_WINDOWS]
            keys = [(number, block) for number, window in near for block in window.blocks]
            self._tasks.keep = max([1, *(len(window.blocks) for window in self._windows.values())])
        self._tasks.prefetch(keys)

    def take(self, view: int, samples: np.ndarray) -> list[Piece] | None:
        """Returns the pieces of windows that hold `samples` in this order; None where they are to be read elsewhere.

        Each row is handed out once, and those that an order skips are not any more.
        """
        self._check_process()
        with self._lock:
            if (piece := self._next(view, samples)) is not None:
                return [piece]
            found = self._find(view, samples)
        if not found:
            return None
        numbers, pieces = list(found), list(found.values())
        try:
            for number, piece in zip(numbers, pieces, strict=True):
                self._wait(number, piece.window)
        except Exception:  # raised again where the rows of that chunk are read one by one, and for them alone
            self._drop(number)
            return None
        with self._lock:
            if any(piece.start < piece.window.cursor for piece in pieces):  # by another thread, meanwhile
                return None
            for number, piece in zip(numbers, pieces, strict=True):
                piece.window.cursor = piece.stop
                if piece.stop == len(piece.window.samples):
                    self._windows.pop(number, None)
        return pieces

    def _check_process(self) -> None:
        if self._pid != os.getpid():  # the parent's threads and the owner of its lock are not here
            self._start()

    def _next(self, view: int, samples: np.ndarray) -> Piece | None:
        """Hands out samples that come next in the first window, where that is decoded: most batches, in a few steps."""
        number = next(iter(self._windows), None)
        if number is None or not (window := self._windows[number]).is_ready or window.view != view:
            return None
        start, stop = window.cursor, window.cursor + len(samples)
        if not start < stop <= len(window.samples):
            return None
        if window.samples[start:stop].tobytes() != samples.tobytes():
            return None
        window.cursor = stop
        if stop == len(window.samples):
            del self._windows[number]
        return Piece(window, start, stop)

    def _find(self, view: int, samples: np.ndarray) -> dict[int, Piece]:
        """Returns the pieces by the number of the window; none where a sample does not come next in one."""
        pieces: dict[int, Piece] = {}
        done = 0
        while done < len(samples):
            for number, window in self._windows.items():
                if (
                    number not in pieces
                    and window.view == view
                    and (span := window.find(samples[done:])) is not None
                ):
                    pieces[number] = Piece(window, *span)
                    done += span[1] - span[0]
                    break
            else:
                return {}
        return pieces

    def _wait(self, number: int, window: Window) -> None:
        if not window.is_ready:
            for block in window.blocks:
                self._tasks.get((number, block))
            window.is_ready = True

    def _drop(self, number: int) -> None:
        with self._lock:
            self._windows.pop(number, None)

    def _decode_block(self, key: tuple[int, int]) -> None:
        number, block = key
        with self._lock:
            window = self._windows.get(number)
            if window is None:
                raise _WithdrawnError
            if not window.columns:
                self._allocate(window)
        self._decode(window, block)

    def _allocate(self, window: Window) -> None:
        """Makes the arrays of a window, out of memory that no batch refers to any more where there is some."""
        columns, places, end = self._columns(), {}, 8 * len(window.samples)
        for name, column in columns.items():
            places[name] = start = -(-end // ALIGNMENT) * ALIGNMENT
            end = start + window.num_rows * column[:0].dtype.itemsize * int(np.prod(column.shape[1:]))
        buffer = self._free_buffer(end)
        window.fingerprints = buffer[: 8 * len(window.samples)].view(np.uint64)
        window.columns = {
            name: np.ndarray((window.num_rows, *column.shape[1:]), column.dtype, buffer, places[name])
            for name, column in columns.items()
        }

    def _free_buffer(self, num_bytes: int) -> np.ndarray:
        for place in range(len(self._buffers)):
            # Referred to by the list and for this question; every array of a batch adds one.
            if (
                sys.getrefcount(self._buffers[place]) == 2
                and num_bytes <= len(self._buffers[place]) <= 2 * num_bytes
            ):
                self._buffers.append(self._buffers.pop(place))
                return self._buffers[-1]
        self._buffers = [*self._buffers[1 - SPARE_BUFFERS :], np.empty(num_bytes, np.uint8)]
        return self._buffers[-1]

    def close(self) -> None:
        """Drops what is decoded and ends the threads; announcing starts anew."""
        self._check_process()
        with self._lock:
            self._windows = {}
        self._tasks.close()
        self._fetcher.shutdown(wait=True, cancel_futures=True)
        self._start()
