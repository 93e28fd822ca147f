"""Fused records against the fusion of the whole distributions, class by class in plain Python, and within their bounds."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softcache.errors import LabelError
from softcache.labels import STATS, SoftLabels
from softcache.labels.sparsify import Sample, dense, top_k, top_p
from softcache.tools.fuse import RULES, fused_labels, rule_weights
from tests.support.fusion_bounds import fusion_bounds

GRID = (1.0, 1.5, 2.0, 4.0, 8.0)


def teachers(num_positions=30, num_classes=20, *, seed=0, num_teachers=3, apart=1.0):
    """Logits of teachers that agree in part, and a ground truth."""
    draw = torch.Generator().manual_seed(seed)
    common = torch.randn(num_positions, num_classes, generator=draw) * 3
    logits = [
        common + apart * torch.randn(num_positions, num_classes, generator=draw) for _ in range(num_teachers)
    ]
    return logits, torch.randint(num_classes, (num_positions,), generator=draw)


def records(logits, targets, policy=dense, **how):
    return [policy(z, targets_P=targets, temperatures=GRID, **how).to_numpy() for z in logits]


def slow(logits, target, rule):
    """One row's fused distribution, from the definitions."""
    probs = [[float(x) for x in z.double().softmax(0)] for z in logits]
    losses = [-math.log(p[target]) for p in probs]
    num, size = len(probs), len(probs[0])
    if rule == "best":
        return probs[losses.index(min(losses))]
    if rule == "geometric":
        products = [math.prod(p[j] ** (1 / num) for p in probs) for j in range(size)]
        return [x / sum(products) for x in products]
    if rule == "mean":
        weights = [1 / num] * num
    elif rule == "entropy":
        surety = [math.exp(sum(x * math.log(x) for x in p)) for p in probs]
        weights = [x / sum(surety) for x in surety]
    elif rule == "entropy_share":
        entropies = [-sum(x * math.log(x) for x in p) for p in probs]
        weights = [(1 - x / sum(entropies)) / (num - 1) for x in entropies]
    else:
        weights = [
            (1 - math.exp(loss) / sum(math.exp(other) for other in losses)) / (num - 1) for loss in losses
        ]
    return [sum(w * p[j] for w, p in zip(weights, probs, strict=True)) for j in range(size)]


def whole(record):
    """[P, V] probabilities of a record of every class."""
    out = np.zeros((len(record), record.num_classes + 1))
    np.put_along_axis(out, record.ids.astype(np.int64), np.exp(record.log_probs.astype(np.float64)), 1)
    return out[:, :-1]


@pytest.mark.parametrize("rule", RULES)
def test_dense_records_fuse_to_the_definition(rule):
    logits, targets = teachers()
    found = fused_labels(records(logits, targets), rule, 20)
    for row, target in enumerate(targets.tolist()):
        expected = slow([z[row] for z in logits], target, rule)
        np.testing.assert_allclose(whole(found)[row], expected, atol=2e-6)
        assert found.target_log_prob[row] == pytest.approx(math.log(expected[target]), abs=1e-5)
        entropy = -sum(p * math.log(p) for p in expected)
        assert found.stats[row, STATS.index("entropy")] == pytest.approx(entropy, abs=1e-5)
    direct = dense(torch.from_numpy(np.log(whole(found))), temperatures=GRID).to_numpy()
    np.testing.assert_allclose(found.stats, direct.stats, rtol=1e-4, atol=1e-4)
    assert (found.log_tail == -np.inf).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("k", [3, 7])
def test_a_cut_of_whole_distributions_has_the_exact_tail(rule, k):
    logits, targets = teachers()
    found = fused_labels(records(logits, targets), rule, k)
    expected = top_k(
        torch.from_numpy(np.log(whole(fused_labels(records(logits, targets), rule, 20)))),
        k=k,
        temperatures=GRID,
    ).to_numpy()
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-5)
    np.testing.assert_allclose(found.log_tail, expected.log_tail, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("policy", [{"policy": top_k, "k": 4}, {"policy": top_p, "p": 0.8, "max_k": 6}])
def test_teachers_that_agree_fuse_to_themselves(rule, policy):
    logits, targets = teachers(num_teachers=1)
    one = records(logits, targets, **policy)[0]
    found = fused_labels([one, one, one], rule, one.k)
    used = one.ids < one.num_classes
    np.testing.assert_array_equal(np.where(used, found.ids, 0), np.where(used, one.ids, 0))
    assert (found.ids[~used] == one.num_classes).all()
    np.testing.assert_allclose(found.log_probs, one.log_probs, atol=1e-5)
    np.testing.assert_allclose(found.log_tail, one.log_tail, atol=1e-5)
    np.testing.assert_allclose(found.target_log_prob, one.target_log_prob, atol=1e-5)
    np.testing.assert_allclose(found.stats, one.stats, atol=1e-3)


@pytest.mark.parametrize("rule", RULES)
def test_kept_and_tail_are_one_distribution_and_the_truth_is_exact(rule):
    logits, targets = teachers(num_classes=50)
    found = fused_labels(records(logits, targets, top_k, k=5), rule, 5, targets=targets.numpy())
    mass = np.exp(found.log_probs).sum(1) + np.exp(found.log_tail[:, 0])
    np.testing.assert_allclose(mass, 1, atol=1e-5)
    if rule == "geometric":
        return  # its normaliser is an estimate
    exact = fused_labels(records(logits, targets), rule, 50).target_log_prob
    np.testing.assert_allclose(found.target_log_prob, exact, atol=1e-4)
    there = found.ids == targets.numpy()[:, None]
    np.testing.assert_allclose(found.log_probs[there], exact[there.any(1)], atol=1e-4)


def test_best_rows_are_the_chosen_teachers_own():
    logits, targets = teachers()
    given = [
        top_k(z, k=k, targets_P=targets, temperatures=GRID).to_numpy()
        for z, k in zip(logits, (3, 4, 5), strict=True)
    ]
    found = fused_labels(given, "best", 5)
    for row, choice in enumerate(np.argmax([r.target_log_prob for r in given], axis=0)):
        chosen = given[choice]
        np.testing.assert_array_equal(found.ids[row, : chosen.k], chosen.ids[row])
        np.testing.assert_array_equal(found.log_tail[row], chosen.log_tail[row])
        np.testing.assert_array_equal(found.stats[row], chosen.stats[row])


@given(
    seed=st.integers(0, 10_000),
    num_classes=st.integers(4, 40),
    k=st.integers(1, 6),
    apart=st.floats(0, 4),
    num_teachers=st.integers(2, 4),
    rule=st.sampled_from(["mean", "geometric", "entropy", "confidence"]),
    known=st.booleans(),
)
def test_estimates_and_truth_are_within_the_bounds(seed, num_classes, k, apart, num_teachers, rule, known):
    logits, targets = teachers(8, num_classes, seed=seed, num_teachers=num_teachers, apart=apart)
    k = min(k, num_classes)
    kept, given = records(logits, targets, top_k, k=k), {"targets": targets.numpy()} if known else {}
    bounds = fusion_bounds(kept, rule, **given)
    wide = min(num_classes, k * num_teachers)
    found, truth = (
        fused_labels(kept, rule, wide, **given),
        fused_labels(records(logits, targets), rule, num_classes),
    )
    used = bounds.ids < num_classes
    for record in (found, truth):
        probs = np.pad(whole(record), ((0, 0), (0, 1)))
        here = np.take_along_axis(probs, bounds.ids, 1)
        assert (here >= bounds.lower - 1e-5)[used].all()
        assert (here <= bounds.upper + 1e-5)[used].all()
        if record is truth:
            np.put_along_axis(probs, bounds.ids, 0.0, 1)
            tail = np.stack([(probs ** (1 / t)).sum(1) for t in GRID], axis=1)
        else:
            tail = np.exp(record.log_tail)
        assert (tail >= bounds.tail_lower * (1 - 1e-4) - 1e-5).all()
        # float32 records: a tail of which all but a rounding was moved out is 1e-7 or 0, and its root is larger
        assert (tail <= bounds.tail_upper * (1 + 1e-4) + 1e-4 ** (1 / np.array(GRID))).all()


@pytest.mark.parametrize("rule", RULES)
def test_the_fused_tail_is_convex_and_stats_fit_it(rule):
    logits, targets = teachers(60, 200, apart=2.0)
    found = fused_labels(records(logits, targets, top_k, k=4), rule, 4, targets=targets.numpy())
    beta = 1 / np.array(GRID)
    count = 200 - 4
    nodes = np.concatenate([[0.0], beta[::-1]])
    values = np.concatenate([np.full((60, 1), math.log(count)), found.log_tail[:, ::-1]], axis=1)
    slopes = np.diff(values) / np.diff(nodes)
    assert (np.diff(slopes) >= -1e-4).all()
    assert (found.stats[:, STATS.index("support")] == 200).all()
    for t in (1.2, 3.0, 20.0):
        softened = found.at_temperature(t)
        mass = np.exp(softened.log_probs).sum(1) + np.exp(softened.log_tail)
        np.testing.assert_allclose(mass, 1, atol=1e-5)


def test_masked_classes_stay_without_probability():
    logits, targets = teachers(10, 12)
    for z in logits:
        z[:, 6:] = -torch.inf
    targets = targets % 6
    for rule in RULES:
        found = fused_labels(records(logits, targets, top_k, k=3), rule, 3)
        assert (found.ids[found.log_probs > -np.inf] < 6).all()
        assert (found.stats[:, STATS.index("support")] == 6).all()
        direct = fused_labels(records(logits, targets), rule, 12)
        assert (whole(direct)[:, 6:] == 0).all()
        assert np.isfinite(found.stats).all()


def test_confidence_weighs_by_the_ground_truth_and_survives_a_teacher_that_rules_it_out():
    logits, targets = teachers(6, 5)
    logits[1][torch.arange(6), targets] = -torch.inf
    weights = rule_weights(records(logits, targets), "confidence")
    np.testing.assert_allclose(weights.sum(0), 1)
    np.testing.assert_allclose(weights[1], 0, atol=1e-12)
    np.testing.assert_allclose(weights[0], 0.5, atol=1e-12)


def test_no_geometric_mean_where_the_teachers_share_no_class():
    one, other = torch.full((1, 4), -torch.inf), torch.full((1, 4), -torch.inf)
    one[0, 0] = other[0, 1] = 0.0
    given = records([one, other], torch.tensor([0]))
    with pytest.raises(LabelError, match=r"row 0: no class has a probability above 0 with every teacher"):
        fused_labels(given, "geometric", 4)
    np.testing.assert_allclose(whole(fused_labels(given, "mean", 4)), [[0.5, 0.5, 0, 0]])


def test_what_cannot_be_fused_is_refused():
    logits, targets = teachers(4, 6)
    good = records(logits, targets, top_k, k=2)
    drawn = (
        Sample(num_samples=3, temperatures=GRID)
        .apply(
            logits[0],
            targets_P=targets,
            seeds_P=torch.arange(4),
        )
        .to_numpy()
    )
    other_grid = top_k(logits[0], k=2, targets_P=targets).to_numpy()
    for bad, message in (
        ([good[0]], "at least 2 records; found 1"),
        ([good[0], good[1].take(slice(2))], "record 1: expected 4 positions; found 2"),
        ([good[0], other_grid], "record 1: expected temperatures"),
        ([good[0], drawn], "record 1: expected the most likely classes"),
        (
            [good[0], top_k(logits[0], k=2, temperatures=GRID).to_numpy()],
            "record 1: expected stats and target",
        ),
    ):
        with pytest.raises(LabelError, match=message):
            fused_labels(bad, "mean", 2)
    with pytest.raises(LabelError, match="k from 1 to 6; found 7"):
        fused_labels(good, "mean", 7)
    with pytest.raises(LabelError, match='"best" takes rows as they are'):
        fusion_bounds(good, "best")
    assert isinstance(fused_labels(good, "mean", 6), SoftLabels)


def test_a_ground_truth_that_one_teacher_masks_leaves_no_mass_out():
    """Three equal classes and a masked one, k = 1, with a teacher that keeps the masked one: masses add up to 1."""
    target = torch.tensor([3])
    first = top_k(torch.tensor([[0.0, 0.0, 0.0, -math.inf]]), k=1, targets_P=target).to_numpy()
    second = top_k(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), k=2, targets_P=target).to_numpy()
    found = fused_labels([first, second], "mean", 4, targets=target.numpy())
    mass = np.exp(found.log_probs).sum() + np.exp(found.log_tail[0, 0])
    assert mass == pytest.approx(1.0, abs=1e-6)
    place = found.ids[0].tolist().index(3)
    assert np.exp(found.log_probs[0, place]) == pytest.approx(
        0.5 * math.exp(second.target_log_prob[0]), rel=1e-5
    )


@given(seed=st.integers(0, 10**6), rule=st.sampled_from(["mean", "geometric", "entropy_share"]))
def test_masked_classes_leave_no_mass_out(seed, rule):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(3, 7))
    logits = 3 * rng.normal(size=(2, size))
    logits[rng.random((2, size)) < 0.3] = -np.inf
    logits[:, int(rng.integers(size))] = 1.0  # one that both have
    target = torch.tensor([int(rng.integers(size))])
    rows = [
        top_k(torch.from_numpy(x[None]), k=int(rng.integers(1, size + 1)), targets_P=target).to_numpy()
        for x in logits
    ]
    found = fused_labels(rows, rule, size, targets=target.numpy()) if sum(r.k for r in rows) >= size else None
    if found is not None:
        mass = np.exp(found.log_probs.astype(np.float64)).sum() + np.exp(found.log_tail[0, 0])
        assert mass == pytest.approx(1.0, abs=2e-5)
