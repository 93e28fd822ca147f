"""The loader: a state before every batch gives the rest bit for bit; labels are read once, ahead, and never wrongly."""

import errno
import multiprocessing.reduction
import os
import random
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import chain
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from softcache import SoftLabelDataset, SoftLabelLoader, open_cache
from softcache.data import sent_batch
from softcache.data.boxes import DetectionBatch
from softcache.data.tokens import TokenBatch
from softcache.errors import AlignmentError, CorruptionError, StorageError
from softcache.labels import MixedTargets, SoftLabels
from softcache.reader.cache import Cache
from softcache.reader.dataset import FingerprintedSamples, HardLabelDataset
from softcache.reader.order import BlockShuffle
from tests.reader.test_dataset import Renamed, damaged, shards  # noqa: F401
from tests.support.caches import ROOT


def order_of(cache, *, rank=0, num_ranks=1, **changes):
    options = {
        "batch_size": 50,
        "view_of": lambda epoch: epoch % 2,
        "block_samples": 32,
        "window_blocks": 2,
        "seed": 3,
    }
    return BlockShuffle(cache.samples_in, rank=rank, num_ranks=num_ranks, **options | changes)


@pytest.fixture
def opened(shared_cache):
    """A cache of the shared ones that has not been read yet, and its source."""
    cache = open_cache(shared_cache[2].url)
    yield cache, shared_cache[1].train.source
    cache.close()


def loader_of(opened, *, checks=None, source=None, workers=0, ahead=4, **order):
    cache, there = opened
    dataset = SoftLabelDataset(source or there, cache, **(checks or {}))
    return SoftLabelLoader(dataset, order_of(cache, **order), workers=workers, ahead=ahead)


def content(batch):
    """Everything of a batch that a student sees, as bytes."""
    labels = batch.labels.to_numpy()
    arrays = [
        batch.samples,
        batch.images.numpy(),
        batch.targets.numpy(),
        labels.ids,
        labels.log_probs,
        labels.log_tail,
    ]
    return batch.view, [array.tobytes() for array in arrays]


def same(found, expected):
    if isinstance(expected, torch.Tensor | np.ndarray):
        return (
            type(found) is type(expected)
            and found.dtype == expected.dtype
            and bool((found == expected).all())
        )
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, SoftLabels | MixedTargets):
        return type(found) is type(expected) and same(
            list(vars(found).values()), list(vars(expected).values())
        )
    return found == expected


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        return [value]
    inside = vars(value).values() if hasattr(value, "__dict__") else value if isinstance(value, list) else ()
    return list(chain.from_iterable(map(tensors_of, inside)))


def batches_of(cache, source):
    images = SoftLabelDataset(source, cache).load(np.arange(20), 1)
    labels = images.labels.to_torch()
    table = -torch.rand(20, 40)  # columns of one table, as of a memory map
    mixed = MixedTargets(torch.arange(4), torch.arange(4) + 1, torch.rand(4))
    boxes = [torch.rand(2, 4), torch.rand(0, 4)]
    return [
        images,
        replace(images, labels=replace(labels, log_probs=labels.log_probs.bfloat16())),
        replace(images, labels=replace(labels, log_probs=table[:, 3:7], log_tail=table[:, 9:17])),
        replace(images, targets=mixed, labels=None),
        TokenBatch(
            *(torch.arange(6).view(2, 3), torch.zeros(2, 3), torch.arange(4), torch.arange(4)),
            *(np.array([3, 3]), np.array([2, 2]), np.arange(2), 0, np.zeros(2)),
        ),
        DetectionBatch(
            torch.rand(2, 1, 4, 4), boxes, [torch.arange(2), torch.arange(0)], np.arange(2), 0, np.zeros(2), 3
        ),
    ]


@pytest.mark.parametrize("largest", [2**19, 0])
def test_a_batch_of_a_loader_process_comes_back_as_it_was(opened, monkeypatch, largest):
    """A small one is pickled, a large one has one file of shared memory."""
    for batch in batches_of(*opened):
        monkeypatch.setattr(sent_batch, "_LARGEST", largest)
        assert batch.__reduce_ex__(4)[0] is not sent_batch._received, "elsewhere it is pickled as any object"
        monkeypatch.setattr("torch.utils.data.get_worker_info", lambda: "a loader process")
        function, (_, *memory) = batch.__reduce_ex__(4)
        assert function is sent_batch._received
        assert (not memory) == bool(largest)
        back = ForkingPickler.loads(ForkingPickler.dumps(batch))
        monkeypatch.undo()
        assert type(back) is type(batch)
        for name, value in vars(batch).items():
            assert same(getattr(back, name), value), name
        if not largest:
            places = {x.untyped_storage().data_ptr() for x in tensors_of(back)}
            used = sum(-(-x.nbytes // 64) * 64 for x in tensors_of(batch))
            assert len(places) == 1
            assert tensors_of(back)[0].untyped_storage().nbytes() == used, "no numbers but those of the batch"
        back.samples[0] += 1  # what is received can be written to
        (back.images if hasattr(back, "images") else back.tokens).zero_()


def no_room(size):
    raise RuntimeError(
        "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"
    )


def no_descriptor(number):
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.mark.parametrize(
    "fault",
    [
        (torch.UntypedStorage, "_new_shared", no_room),
        (multiprocessing.reduction, "DupFd", no_descriptor),
    ],
    ids=["no room", "no descriptor"],
)
def test_without_room_in_shared_memory_a_large_batch_goes_through_the_pipe(opened, monkeypatch, capfd, fault):
    """An error would be one of the queue's thread, which drops the batch: the reader would wait for ever."""
    found = []
    for batch in batches_of(*opened):
        with monkeypatch.context() as patched:
            patched.setattr(sent_batch, "_LARGEST", 0)
            patched.setattr(*fault)
            patched.setattr("torch.utils.data.get_worker_info", lambda: "a loader process")
            pickled = ForkingPickler.dumps(batch)
        back = ForkingPickler.loads(pickled)
        for name, value in vars(batch).items():
            assert same(getattr(back, name), value), name
        found.append(back)
    assert [type(one) for one in found] == [type(batch) for batch in batches_of(*opened)]
    assert capfd.readouterr().err.count("batches go through pipes, which is slower") <= 1


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "Caught RuntimeError in DataLoader worker process 0.\nunable to allocate shared memory(shm)"
        ),
        RuntimeError(
            "DataLoader worker (pid 7) is killed by signal: Bus error. Workers are out of shared memory."
        ),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EROFS, os.strerror(errno.EROFS)),
    ],
)
def test_no_shared_memory_for_loader_processes_is_one_message(opened, monkeypatch, error):
    def fail(self):
        raise error

    monkeypatch.setattr(DataLoader, "_get_iterator", fail)
    with pytest.raises(StorageError, match=r"/dev/shm: no place .* --shm-size=2g.* set reader\.workers = 0"):
        next(iter(loader_of(opened, workers=1)))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("a bug"),
        OSError(errno.ENOSPC, "No space left on device", "/data/x"),
        StorageError("shared memory"),
    ],
)
def test_other_errors_of_loader_processes_are_raised_as_they_are(opened, monkeypatch, error):
    def fail(self):
        raise error

    monkeypatch.setattr(DataLoader, "_get_iterator", fail)
    with pytest.raises(type(error)) as raised:
        next(iter(loader_of(opened, workers=1)))
    assert raised.value is error


def test_a_loader_process_that_may_open_no_more_files_is_one_message(opened, monkeypatch):
    """Its thread that hands out descriptors closes the connection of the reader's that it cannot accept."""

    def fail(self):
        raise errors.pop()

    errors = [EOFError("of a truncated file"), EOFError()]
    monkeypatch.setattr(DataLoader, "_get_iterator", fail)
    with pytest.raises(
        StorageError, match=r"no more files does; raise `ulimit -n` or set reader\.workers = 0"
    ):
        next(iter(loader_of(opened, workers=1)))
    with pytest.raises(EOFError, match="of a truncated file"):
        next(iter(loader_of(opened, workers=1)))


def test_without_shared_memory_forked_processes_see_the_view(opened, monkeypatch):
    def full(self):
        no_room(8)

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "share_memory_", full)
        dataset = SoftLabelDataset(opened[1], opened[0], view=1)
    child, parent = os.pipe()
    pid = os.fork()
    if pid == 0:
        os._exit(dataset.view if os.read(child, 1) == b"x" else 9)
    dataset.view = 0
    os.write(parent, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert dataset.view == 0
    dataset.view = 1
    assert ForkingPickler.loads(ForkingPickler.dumps(dataset._view)).item() == 1


def test_tensors_in_shared_memory_are_sent_as_they_are(opened, monkeypatch):
    monkeypatch.setattr("torch.utils.data.get_worker_info", lambda: "a loader process")
    monkeypatch.setattr(sent_batch, "_LARGEST", 0)
    batch = batches_of(*opened)[0]
    batch = replace(batch, images=batch.images.share_memory_())
    back = ForkingPickler.loads(ForkingPickler.dumps(batch))
    back.images.zero_()
    assert not batch.images.any()


PROGRAM = """
import sys
from softcache import SoftLabelDataset, SoftLabelLoader, open_cache
from softcache.runs import open_data
from tests.reader.test_loader import order_of
from tests.support.caches import digits_config

cache, source = open_cache(sys.argv[1]), open_data(digits_config()).train.source
whole, begun = (SoftLabelLoader(SoftLabelDataset(source, cache), order_of(cache), workers=1) for _ in range(2))
batches = iter(begun)
next(batches)
print(sum(len(batch.samples) for batch in whole))
"""


def test_a_program_that_leaves_its_loaders_open_ends(shared_cache):
    """Python ends loader processes that are left with one SIGTERM, and waits for them."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, shared_cache[2].url],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "300\n"), done.stderr


def label_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("softcache-labels")]


# -- resume ------------------------------------------------------------------------------------------------


@pytest.fixture
def whole(opened):
    """Two epochs, and the state before each of their batches and after the last."""
    loader = loader_of(opened)
    batches, states = [], [loader.state_dict()]
    for _ in range(2):
        for batch in loader:
            batches.append(content(batch))
            states.append(loader.state_dict())
    return batches, states


def rest(loader, num_batches):
    out = []
    while len(out) < num_batches:
        out += [content(batch) for batch in loader]
    return out


def test_a_state_saved_before_every_batch_gives_the_rest_in_a_fresh_loader(opened, whole):
    batches, states = whole
    assert len(batches) == 12
    for place in range(12):
        loader = loader_of(opened)
        loader.load_state_dict(states[place])
        assert rest(loader, 12 - place) == batches[place:]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_so_it_does_with_loader_processes_which_count_what_was_consumed(opened, whole, workers):
    batches, states = whole
    with loader_of(opened, workers=workers) as loader:
        for place in (0, 1, 4, 5, 7, 11):
            loader.load_state_dict(states[place])
            iterator = iter(loader)
            assert content(next(iterator)) == batches[place]
            assert loader.state_dict() == states[place + 1], "what was fetched ahead does not count"
            iterator.close()
        loader.load_state_dict(states[2])
        assert rest(loader, 10) == batches[2:]


def test_a_change_of_ranks_in_the_middle_of_an_epoch_loses_and_repeats_nothing(opened, whole):
    whole_samples = [np.frombuffer(batch[1][0], np.int64).tolist() for batch in whole[0][:6]]
    seen, state = [], order_of(opened[0]).state_dict()
    for num_ranks, until in ((1, 2), (2, 4), (3, 6)):
        ranks = [loader_of(opened, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
        for loader in ranks:
            loader.load_state_dict(state)
        iterators = [iter(loader) for loader in ranks]
        for _ in range(until - state["step"]):
            seen.append([sample for iterator in iterators for sample in next(iterator).samples.tolist()])
        assert len({str(loader.state_dict()) for loader in ranks}) == 1
        state = ranks[0].state_dict()
        for iterator in iterators:
            iterator.close()
    assert seen == whole_samples
    assert sorted(chain(*seen)) == list(range(300))


def test_leaving_an_epoch_in_the_middle_keeps_the_place(opened, whole):
    loader, found = loader_of(opened), []
    while len(found) < 12:
        for batch in loader:
            found.append(content(batch))
            if len(found) % 5 == 4:
                break
    assert found == whole[0]


def test_an_epoch_ends_at_its_end_and_the_next_begins(opened):
    loader = loader_of(opened)
    assert (len(loader), loader.epoch) == (6, 0)
    views = [{batch.view for batch in loader} for _ in range(3)]
    assert views == [{0}, {1}, {0}]
    assert (len(loader), loader.epoch, loader.step) == (6, 3, 0)
    loader.load_state_dict({"epoch": 1, "step": 6})
    assert list(loader) == [], "that epoch is done"
    assert (loader.epoch, loader.step) == (2, 0)


def test_an_iteration_of_a_place_that_was_left_is_refused(opened):
    loader = loader_of(opened)
    iterator = iter(loader)
    next(iterator)
    loader.load_state_dict({"epoch": 0, "step": 4})
    with pytest.raises(RuntimeError, match="moved from epoch 0, step 1 to epoch 0, step 4"):
        next(iterator)


# -- what is joined ----------------------------------------------------------------------------------------


def test_labels_are_those_of_the_batchs_samples(opened, shared_cache):
    for batch in loader_of(opened):
        expected = shared_cache[2].read(batch.samples, batch.view)
        assert np.array_equal(batch.labels.to_numpy().log_tail, expected.log_tail)


def test_each_chunk_is_decoded_once_per_epoch_and_no_more_is_kept_than_two_windows(opened, monkeypatch):
    cache, decoded, real, most = opened[0], [], Cache._decode_to, 0

    def counting(self, window, block):
        decoded.append((window.view, block))
        return real(self, window, block)

    monkeypatch.setattr(Cache, "_decode_to", counting)
    monkeypatch.setattr(Cache, "_decode_block", None)  # and none is decoded for single rows
    cache = open_cache(cache.url, window_blocks=2)
    loader = loader_of((cache, opened[1]), view_of=lambda epoch: 0)
    for epoch in range(2):
        for _ in loader:
            windows = list(cache._windows._windows.values())
            most = max(most, sum(len(window.blocks) for window in windows if window.columns))
        if epoch == 0:
            in_epoch = list(decoded[:10])
    loader.close()
    cache.close()
    assert sorted(in_epoch) == [(0, block) for block in range(10)]
    assert len(decoded) <= 20 + 2, "the second epoch's, and at most the first window of the third ahead"
    assert most <= 4


def test_labels_are_read_ahead_by_a_thread_and_bounded(opened, monkeypatch):
    read, real = [], Cache.read_stored

    def spy(self, samples, view=0):
        read.append(threading.current_thread() is threading.main_thread())
        return real(self, samples, view)

    monkeypatch.setattr(Cache, "read_stored", spy)
    iterator = iter(loader_of(opened, ahead=2, batch_size=10))
    for number in range(5):
        next(iterator)
        time.sleep(0.01)
        assert number + 1 <= len(read) <= number + 3
    assert not any(read)
    iterator.close()


def test_a_thawed_view_is_gathered_where_it_is_needed(opened, monkeypatch):
    monkeypatch.setattr(SoftLabelLoader, "_coming", None)  # and nothing is decoded ahead
    cache, source = opened
    threads, real = [], Cache.read_stored

    def spy(self, samples, view=0):
        threads.append(threading.current_thread())
        return chunks(self, samples, view)

    def chunks(self, samples, view):
        with monkeypatch.context() as patch:
            patch.setattr(Cache, "memmap", lambda self, view: None)
            return real(self, samples, view)

    monkeypatch.setattr(Cache, "memmap", lambda self, view: "a memory map")
    monkeypatch.setattr(Cache, "read_stored", spy)
    assert len(list(loader_of((cache, source)))) == 6
    assert set(threads) == {threading.main_thread()}


def test_hard_labels_need_no_cache(opened, shared_cache):
    dataset = HardLabelDataset(shared_cache[1].train)
    batches = list(SoftLabelLoader(dataset, order_of(opened[0])))
    assert sorted(np.concatenate([batch.samples for batch in batches])) == list(range(300))
    assert all(batch.labels is None for batch in batches)


def test_a_transform_may_seed_the_process_wide_random_state(opened):
    """Which pixels get, seeded while a thread reads labels, and what a loop draws are as without threads."""
    drawn = []
    for ahead in (0, 4):
        random.seed(5)
        torch.manual_seed(5)
        drawn.append([(random.random(), float(torch.rand(()))) for _ in loader_of(opened, ahead=ahead)])
    assert drawn[0] == drawn[1]


# -- what must never pass ----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_changed_pixels_are_caught_and_named(opened, workers):
    source = Renamed(opened[1], image=33)
    with (
        loader_of(opened, source=source, workers=workers) as loader,
        pytest.raises(AlignmentError, match=rf"sample '{source.key(33)}', view 0: the teacher saw content"),
    ):
        list(loader)
    assert not label_threads()


def test_a_worker_that_takes_no_fingerprints_is_caught(opened, monkeypatch):
    loader = loader_of(opened)
    monkeypatch.setattr(
        FingerprintedSamples,
        "load",
        lambda self, samples, view: self.data.load(samples, view, fingerprints=False),
    )
    with pytest.raises(AlignmentError, match="the student would see 0000000000000000"):
        list(loader)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_that_is_checked_is_a_function_of_sample_and_view(shared_cache, share):
    samples = np.arange(20_000)
    one, two = (
        FingerprintedSamples(shared_cache[1].train, fingerprint_fraction=share, fingerprint_first=0)
        for _ in range(2)
    )
    chosen = one.fingerprint_mask(samples, 1)
    assert chosen.mean() == pytest.approx(share, abs=0.015)
    assert np.array_equal(two.fingerprint_mask(samples[::-1], 1), chosen[::-1])
    if 0 < share < 1:
        both = (chosen & one.fingerprint_mask(samples, 0)).mean()
        assert both == pytest.approx(share**2, abs=0.015), "views are drawn apart"
        batch = one.load(samples[:300], 1)
        assert np.array_equal(batch.fingerprints != 0, chosen[:300])


def test_a_failing_checksum_in_a_thread_reaches_the_consumer(damaged, shared_cache):  # noqa: F811
    for path in shards(damaged):
        if path.as_posix().endswith("/log_probs/c/0/4/0"):
            bad = bytearray(path.read_bytes())
            bad[len(bad) // 2] ^= 4
            path.write_bytes(bad)
    cache = open_cache(damaged)
    loader = loader_of((cache, shared_cache[1].train.source))
    with pytest.raises(CorruptionError, match=r"unit 4 .*log_probs"):
        list(loader)
    assert loader.step < 6
    assert not label_threads()
    cache.close()


def test_an_error_in_the_loop_leaves_no_thread_and_the_place(opened):
    loader = loader_of(opened)
    with pytest.raises(ZeroDivisionError):
        list(map(lambda batch: 1 // 0, loader))  # noqa: C417
    assert loader.step == 1
    loader.close()
    for _ in range(100):
        if not label_threads():
            break
        time.sleep(0.01)
    assert not label_threads()
    assert len(list(loader)) == 5


def test_breaking_off_leaves_no_thread_blocked(opened):
    for place, _ in enumerate(loader_of(opened, ahead=3)):
        if place == 1:
            break
    assert not label_threads()
