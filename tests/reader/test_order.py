"""The order: complete, seeded, block-wise, the same over ranks, exact on resume."""

import pickle

import numpy as np
import pytest

from softcache.errors import RunError
from softcache.reader.order import BlockShuffle


def shuffle(num_samples=1000, *, num_views=3, **changes):
    everything = np.arange(num_samples)
    options = {
        "batch_size": 64,
        "view_of": lambda epoch: epoch % num_views,
        "block_samples": 100,
        "window_blocks": 3,
        "seed": 7,
    }
    return BlockShuffle(lambda view: everything, **options | changes)


def flat(batches):
    return [pair for batch in batches for pair in batch]


def test_every_sample_comes_exactly_once_and_the_small_last_batch_is_kept():
    batches = list(shuffle(1000))
    assert sorted(sample for sample, _ in flat(batches)) == list(range(1000))
    assert [len(batch) for batch in batches] == [64] * 15 + [40]


def test_an_epoch_uses_its_view_and_its_own_order():
    order = shuffle()
    orders = []
    for epoch in range(4):
        order.load_state_dict({"epoch": epoch, "step": 0})
        pairs = flat(order)
        assert {view for _, view in pairs} == {epoch % 3}
        orders.append([sample for sample, _ in pairs])
    assert len({tuple(order) for order in orders}) == 4


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    assert np.array_equal(shuffle().order(2), shuffle(batch_size=10).order(2))
    assert not np.array_equal(shuffle().order(2), shuffle(seed=8).order(2))


def test_a_window_of_blocks_is_open_at_a_time():
    order = shuffle().order(0)
    for start in range(0, 900, 300):
        assert len(set(order[start : start + 300] // 100)) == 3, "300 samples of 3 blocks"
    assert len(set(order[:30] // 100)) == 3, "mixed inside of the window, not block after block"


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7])
def test_ranks_are_disjoint_and_together_the_single_rank_order(num_ranks):
    single = list(shuffle(1003))
    ranks = [list(shuffle(1003, rank=rank, num_ranks=num_ranks)) for rank in range(num_ranks)]
    for step, batch in enumerate(single):
        assert flat(ranks[rank][step] for rank in range(num_ranks)) == list(batch)


def test_a_rank_without_a_share_still_steps_and_says_so():
    ranks = [shuffle(65, rank=rank, num_ranks=4) for rank in range(4)]
    shares = []
    for order in ranks:
        batches = list(order)
        assert len(batches) == 2
        assert len(batches[1]) == 1
        order.step = 1
        shares.append(order.share())
    assert sum(local for local, _ in shares) == 1
    assert {total for _, total in shares} == {1}


@pytest.mark.parametrize("ranks_after", [1, 2, 3])
def test_resume_after_every_step_gives_the_remainder_for_any_number_of_ranks(ranks_after):
    whole = [list(batch) for batch in shuffle(500)]
    for step in range(len(whole)):
        saved = shuffle(500)
        saved.step = step
        state = saved.state_dict()
        rest = []
        for rank in range(ranks_after):
            order = shuffle(500, rank=rank, num_ranks=ranks_after)
            order.load_state_dict(state)
            rest.append(list(order))
        assert [flat(parts) for parts in zip(*rest, strict=True)] == whole[step:]


def test_missing_units_leave_gaps_but_no_sample_twice():
    there = np.r_[0:100, 300:450]
    order = BlockShuffle(
        lambda view: there, batch_size=32, view_of=lambda epoch: 0, block_samples=100, window_blocks=2, seed=0
    )
    assert sorted(sample for sample, _ in flat(order)) == there.tolist()
    assert order.num_steps(0) == 8


# -- geometry, windows, requests ---------------------------------------------------------------------------


def test_a_window_of_all_blocks_is_a_full_shuffle():
    full = shuffle(window_blocks=None).order(0)
    assert np.array_equal(full, shuffle(window_blocks=10).order(0))
    assert len(set(full[:100] // 100)) == 10


def test_the_order_of_a_given_seed_never_changes():
    """Checkpoints name a place in it."""
    order = shuffle(20, block_samples=4, window_blocks=2).order(1)
    assert order.tolist() == FROZEN


FROZEN = [1, 2, 12, 14, 3, 0, 13, 15, 6, 11, 5, 4, 10, 9, 8, 7, 16, 18, 19, 17]


def test_steps_in_any_order_are_the_steps_of_the_walk():
    whole = [batch.samples for batch in shuffle()]
    order = shuffle()
    for step in (12, 3, 15, 0):
        assert np.array_equal(order._samples_at(step), whole[step])


@pytest.mark.parametrize(("name", "other"), [("seed", 8), ("batch_size", 32)])
def test_a_state_of_another_seed_or_batch_size_is_refused_and_both_are_named(name, other):
    with pytest.raises(
        RunError, match=rf"{name} {other} in the saved state, {7 if name == 'seed' else 64} here"
    ):
        shuffle().load_state_dict(shuffle(**{name: other}).state_dict())


def test_a_state_brings_its_blocks_and_windows():
    saved = shuffle(window_blocks=None, block_samples=7)
    saved.epoch, saved.step = 1, 4
    order = shuffle()
    next(iter(order))
    order.load_state_dict(saved.state_dict())
    assert [list(batch) for batch in order] == [list(batch) for batch in saved]


def test_a_state_of_before_is_a_place_in_the_order_as_it_is():
    order = shuffle()
    order.load_state_dict({"epoch": 1, "step": 14})
    assert [len(batch) for batch in order] == [64, 40]


def test_a_request_is_an_array_and_a_sequence_of_pairs():
    request = pickle.loads(pickle.dumps(next(iter(shuffle()))))  # as a loader process gets it
    assert isinstance(request.samples, np.ndarray)
    assert len(request) == len(request.samples) == 64
    assert list(request)[:2] == [request[0], request[1]] == [(int(s), 0) for s in request.samples[:2]]


def test_windows_say_what_comes_next_and_go_on_in_the_next_epoch():
    order = shuffle(1000)
    order.epoch = 1
    starts = [0, 300, 600, 900]
    walk = order.order(1)
    for number, start in enumerate(starts):
        (window,) = order.windows(number, 1)
        assert np.array_equal(window.samples, walk[start : start + 300])
        assert window.view == 1
    last, next_first = order.windows(3, 2)
    assert (len(last), next_first.view) == (100, 2)
    assert np.array_equal(next_first.samples, order.order(2)[:300])
    assert [order.window_of(step) for step in (0, 4, 5, 15)] == [0, 0, 1, 3]
