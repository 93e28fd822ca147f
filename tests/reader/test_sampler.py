"""Block order for plain DataLoaders: ranks disjoint and complete, resumable, right with loader processes."""

import multiprocessing
from itertools import chain

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from softcache import BlockSampler, SoftLabelDataset, open_cache
from softcache.errors import RunError, StorageError
from tests.support.caches import make_cache


def sampler(shared_cache, **options):
    return BlockSampler(shared_cache[2], **{"seed": 4, "window_blocks": 2} | options)


def test_an_epoch_in_block_order(shared_cache):
    one = sampler(shared_cache)
    order = list(one)
    assert len(one) == len(order) == 300
    assert sorted(order) == list(range(300))
    assert len({sample // 32 for sample in order[:40]}) == 2
    one.set_epoch(1)
    assert list(one) != order
    assert list(sampler(shared_cache)) == order


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_ranks_are_disjoint_and_complete(shared_cache, num_ranks):
    whole = list(sampler(shared_cache))
    parts = [list(sampler(shared_cache, rank=rank, num_ranks=num_ranks)) for rank in range(num_ranks)]
    assert sorted(chain(*parts)) == list(range(300))
    for length in (1, 10):
        first = list(chain(*(part[:length] for part in parts)))
        assert sorted(first) == sorted(whole[: length * num_ranks]), "all in the same window"


@pytest.mark.parametrize(("uneven", "lengths"), [("keep", {42, 43}), ("repeat", {43}), ("drop", {42})])
def test_what_becomes_of_the_rest(shared_cache, uneven, lengths):
    ranks = [sampler(shared_cache, rank=rank, num_ranks=7, uneven=uneven) for rank in range(7)]
    parts = [list(rank) for rank in ranks]
    assert {len(part) for part in parts} == lengths
    assert [len(rank) for rank in ranks] == [len(part) for part in parts]
    seen, counts = np.unique(list(chain(*parts)), return_counts=True)
    assert len(seen) == (294 if uneven == "drop" else 300)
    assert counts.sum() - len(seen) == (1 if uneven == "repeat" else 0)


def test_ranks_one_two_three_see_the_rest_once(shared_cache):
    whole, seen, state = list(sampler(shared_cache)), [], None
    for num_ranks, each in ((1, 80), (2, 50), (3, 40)):
        ranks = [sampler(shared_cache, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
        for one in ranks:
            if state is not None:
                one.load_state_dict(state)
            assert len(one) == len(list(one))
        seen += chain(*(list(one)[:each] for one in ranks))
        ranks[0].advance(each * num_ranks)
        state = ranks[0].state_dict()
        assert sorted(seen) == sorted(whole[: len(seen)])
    assert sorted(seen) == list(range(300))


def test_what_is_refused(shared_cache):
    with pytest.raises(ValueError, match="rank 3 of 3"):
        sampler(shared_cache, rank=3, num_ranks=3)
    with pytest.raises(RunError, match="seed 9 in the saved state, 4 here"):
        sampler(shared_cache).load_state_dict(sampler(shared_cache, seed=9).state_dict())


def batches_of(dataset, workers, context):
    loader = DataLoader(
        dataset,
        batch_size=64,
        sampler=BlockSampler(dataset, seed=1, window_blocks=2),
        collate_fn=dataset.collate,
        num_workers=workers,
        multiprocessing_context=context,
    )
    return list(loader)


def assert_right(batches, cache, data):
    assert sorted(np.concatenate([batch.samples for batch in batches])) == list(range(300))
    for batch in batches:
        expected = cache.read(batch.samples, batch.view)
        assert np.array_equal(batch.labels.to_numpy().log_tail, expected.log_tail)
        assert torch.equal(batch.images, data.train.load(batch.samples, batch.view).images)


@pytest.mark.parametrize(
    ("workers", "context"), [(0, None), pytest.param(2, "forkserver", marks=pytest.mark.slow)]
)
def test_a_plain_dataloader_in_block_order(shared_cache, workers, context):
    _, data, cache = shared_cache
    dataset = SoftLabelDataset(data.train.source, cache, view=1)
    assert_right(batches_of(dataset, workers, context), cache, data)


# -- fork --------------------------------------------------------------------------------------------------


def _read_in_child(url, cache, answers):
    for one in (cache, open_cache(url)):
        try:
            answers.put(one.read([7, 40]).log_tail)
        except StorageError as error:
            answers.put(str(error))


def in_forked_child(url, cache):
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    child = fork.Process(target=_read_in_child, args=(url, cache, answers))
    child.start()
    found = [answers.get(timeout=30) for _ in range(2)]
    child.join()
    assert child.exitcode == 0
    return found


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_zarr_cache_that_was_read_before_a_fork_warns_what_to_do(shared_cache):
    shared_cache[2].read([1])
    for warning in in_forked_child(shared_cache[2].url, shared_cache[2]):
        assert 'multiprocessing_context="forkserver"' in warning


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_parquet_cache_is_opened_again_in_a_forked_child(tmp_path):
    _, _, cache = make_cache(tmp_path / "cache", capture={"store": "parquet"})
    expected = cache.read([7, 40]).log_tail
    for found in in_forked_child(cache.url, cache):
        assert np.array_equal(found, expected)
