"""The order: complete, seeded, block-wise, the same over ranks, exact on resume."""

import numpy as np
import pytest

from pipeline.shuffle import BlockShuffle


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
        assert flat(ranks[rank][step] for rank in range(num_ranks)) == batch


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
    whole = list(shuffle(500))
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
