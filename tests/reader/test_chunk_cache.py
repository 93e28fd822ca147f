"""Decoded blocks: once per window, ahead and bounded, errors where the block is asked for, nothing left running."""

import gc
import multiprocessing
import threading
import time

import pytest

from softcache.errors import CorruptionError
from softcache.reader.chunk_cache import DecodedBlocks


class Decoder:
    """Doubles numbers; counts, and waits at a gate if it has one."""

    def __init__(self, gate=None, broken=()):
        self.calls, self.lock, self.gate, self.broken = [], threading.Lock(), gate, set(broken)

    def __call__(self, key):
        with self.lock:
            self.calls.append(key)
        if self.gate is not None:
            assert self.gate.wait(10)
        if key in self.broken:
            raise CorruptionError(f"block {key} is damaged")
        return 2 * key


def settled(blocks):
    """Waits until no thread decodes."""
    for _ in range(1000):
        if not blocks._running:
            return
        time.sleep(0.005)
    raise AssertionError("still decoding")


def test_a_block_is_decoded_when_it_is_asked_for_and_kept():
    decode = Decoder()
    blocks = DecodedBlocks(decode, keep=2)
    assert [blocks.get(key) for key in (1, 2, 1, 2, 1)] == [2, 4, 2, 4, 2]
    assert decode.calls == [1, 2]
    blocks.get(3)
    assert blocks.get(1) == 2
    assert decode.calls == [1, 2, 3], "the longest unused made room"
    blocks.get(2)
    assert decode.calls == [1, 2, 3, 2]


def test_what_is_expected_is_decoded_ahead_by_threads_and_bounded():
    decode = Decoder()
    blocks = DecodedBlocks(decode, keep=3)
    blocks.prefetch(range(100))
    settled(blocks)
    assert decode.calls == [0, 1, 2], "as many as are kept, whatever is expected"
    seen = 0
    for key in range(100):
        assert blocks.get(key) == 2 * key
        seen = max(seen, len(blocks._used) + len(blocks._ahead))
    assert seen <= 6
    assert sorted(decode.calls) == list(range(100)), "each once"
    blocks.close()


def test_a_block_that_is_being_decoded_is_waited_for_and_not_decoded_twice():
    gate = threading.Event()
    decode = Decoder(gate)
    blocks = DecodedBlocks(decode, keep=4, threads=1)
    blocks.prefetch([1])
    found = []
    readers = [threading.Thread(target=lambda: found.append(blocks.get(1))) for _ in range(3)]
    for reader in readers:
        reader.start()
    gate.set()
    for reader in readers:
        reader.join()
    assert found == [2, 2, 2]
    assert decode.calls == [1]


def test_many_threads_at_once_decode_each_block_once():
    decode = Decoder()
    blocks = DecodedBlocks(decode, keep=50)
    blocks.prefetch(range(50))
    found = []

    def read(first):
        for key in range(50):
            found.append(blocks.get((first + key) % 50) == 2 * ((first + key) % 50))

    readers = [threading.Thread(target=read, args=(7 * n,)) for n in range(8)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert len(found) == 400
    assert all(found)
    assert sorted(decode.calls) == list(range(50))


def test_an_error_ahead_surfaces_with_its_type_where_the_block_is_asked_for():
    decode = Decoder(broken=[2])
    blocks = DecodedBlocks(decode, keep=4)
    blocks.prefetch([1, 2, 3])
    settled(blocks)
    assert blocks.get(1) == 2
    with pytest.raises(CorruptionError, match="block 2 is damaged"):
        blocks.get(2)
    assert blocks.get(3) == 6
    decode.broken.clear()
    assert blocks.get(2) == 4, "mended, it is read again"


def test_a_new_expectation_replaces_the_old_one():
    decode = Decoder()
    blocks = DecodedBlocks(decode, keep=2)
    blocks.prefetch([1, 2, 3, 4])
    settled(blocks)
    blocks.prefetch([2, 9])
    settled(blocks)
    assert set(blocks._ahead) == {2, 9}
    assert blocks.get(9) == 18
    assert decode.calls.count(2) == 1


def test_blocks_at_hand_come_first_where_two_windows_meet():
    decode = Decoder()
    blocks = DecodedBlocks(decode, keep=3)
    for key in (5, 6, 7):
        blocks.get(key)
    wanted = [1, 2, 5, 6, 7]
    for place in blocks.cached_first(wanted):
        blocks.get(wanted[place])
    assert decode.calls == [5, 6, 7, 1, 2], "in the order asked for, 5 would have gone before its turn"


def test_close_leaves_no_thread_and_starts_anew():
    gate = threading.Event()
    blocks = DecodedBlocks(Decoder(gate), keep=8)
    blocks.prefetch(range(8))
    threads = set(blocks._pool._threads)
    assert len(threads) == 2
    threading.Timer(0.05, gate.set).start()
    blocks.close()
    assert not threads & set(threading.enumerate())
    assert blocks.get(3) == 6


def test_a_forgotten_window_ends_its_threads():
    gc.collect()
    before = set(threading.enumerate())
    blocks = DecodedBlocks(Decoder(), keep=4)
    blocks.prefetch(range(4))
    settled(blocks)
    del blocks
    gc.collect()
    for _ in range(200):
        if set(threading.enumerate()) <= before:
            return
        time.sleep(0.01)
    raise AssertionError("its threads still wait")


def _in_child(blocks, answers):
    answers.put([blocks.get(key) for key in (0, 1, 9)])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_starts_with_threads_of_its_own():
    blocks = DecodedBlocks(Decoder(), keep=4)
    blocks.prefetch(range(10))
    blocks.get(0)
    settled(blocks)
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    with blocks._lock:  # as if another thread of the parent held it when the child was made
        child = fork.Process(target=_in_child, args=(blocks, answers))
        child.start()
    assert answers.get(timeout=20) == [0, 2, 18]
    child.join()
    blocks.close()
