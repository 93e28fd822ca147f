"""Records whose classes were drawn: unbiased, the same on every run, and what they are on the way through a cache."""

import itertools
import math

import numpy as np
import pytest
import torch

from softcache.errors import LabelError, TemperatureError
from softcache.labels import DEFAULT_TEMPERATURES, Sampling, SoftLabels, concat
from softcache.labels.sampling import estimate_mass
from softcache.labels.sparsify import (
    dense,
    hybrid,
    label_settings,
    row_seeds,
    sample,
    top_k,
    top_p,
)
from softcache.runs import open_teacher
from softcache.tools.verify.teacher import verify_against_teacher, verify_units
from tests.support.caches import make_cache
from tests.support.text_caches import make_text_cache

INF = math.inf
DRAWS = 20_000


def seeds(count, seed=0):
    return row_seeds(
        np.arange(count, dtype=np.uint64), np.ones(count, np.int64), np.zeros(count, np.int64), seed
    )


def make_logits(num_classes, seed=0):
    return torch.randn(num_classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def estimates(labels, T):
    """[P, V] each record's estimate for every class at T: 0 where it has none."""
    softened = labels.at_temperature(T)
    mass_PK = (softened.log_probs + softened.log_weights).exp()
    whole = torch.zeros(len(labels), labels.num_classes + 1, dtype=mass_PK.dtype)
    return whole.scatter_add_(1, softened.ids.long(), mass_PK)[:, :-1]


HOW = {
    "sample": lambda z, n: sample(z.expand(n, -1), draws=5, seeds_P=seeds(n)),
    "sample, exponent 0.75": lambda z, n: sample(z.expand(n, -1), draws=5, seeds_P=seeds(n), exponent=0.75),
    "sample, one draw": lambda z, n: sample(z.expand(n, -1), draws=1, seeds_P=seeds(n)),
    "hybrid": lambda z, n: hybrid(z.expand(n, -1), k=2, draws=3, seeds_P=seeds(n)),
    "hybrid, exponent 0.5": lambda z, n: hybrid(
        z.expand(n, -1), k=1, draws=4, seeds_P=seeds(n), exponent=0.5
    ),
}


@pytest.mark.parametrize("temperature", [1.0, 2.0, 8.0])
@pytest.mark.parametrize("policy", HOW)
def test_the_mean_over_the_draws_is_the_distribution_at_every_temperature(policy, temperature):
    logits = make_logits(12)
    found_PV = estimates(HOW[policy](logits, DRAWS), temperature)
    expected_V = (logits / temperature).softmax(0)
    error_V = found_PV.std(0) / math.sqrt(DRAWS)
    assert error_V.max() < 0.02
    assert bool((found_PV.std(0) > 0).any())
    assert ((found_PV.mean(0) - expected_V).abs() <= 4.5 * error_V + 1e-9).all()


def test_at_the_proposals_temperature_a_draw_with_replacement_is_its_share():
    logits = make_logits(12)
    labels = sample(logits.expand(50, -1), draws=7, seeds_P=seeds(50), exponent=0.75)
    softened = labels.at_temperature(4 / 3)
    shares_PK = (softened.log_probs + softened.log_weights).exp()
    torch.testing.assert_close(shares_PK, labels.counts.double() / 7, rtol=1e-9, atol=1e-12)
    assert (labels.counts.sum(1) == 7).all()


def test_draws_with_replacement_follow_the_cumulative_weights():
    """Against numbers drawn by a loop from the same uniforms, which are read off one class of a flat distribution."""
    logits = make_logits(9)
    labels = sample(logits.expand(200, -1), draws=1, seeds_P=seeds(200))
    uniforms = (
        sample(torch.zeros(200, 4096, dtype=torch.float64), draws=1, seeds_P=seeds(200)).ids[:, 0] / 4096
    )
    reached = np.cumsum(logits.softmax(0).numpy())
    for row, low in enumerate(uniforms.tolist()):
        allowed = {int(np.searchsorted(reached, u, side="right")) for u in (low, low + 1 / 4096)}
        assert labels.ids[row, 0].item() in range(min(allowed), max(allowed) + 1)


def test_priority_sampling_takes_the_highest_priorities():
    logits = make_logits(30)
    labels = hybrid(logits.expand(40, -1), k=3, draws=6, seeds_P=seeds(40))
    log_probs = logits.log_softmax(0)
    order = log_probs.argsort(descending=True)
    assert (labels.ids[:, :3] == order[:3]).all()
    for row in range(40):
        drawn = labels.ids[row, 3:]
        assert len(set(labels.ids[row].tolist())) == 9
        assert (log_probs[drawn].diff() <= 0).all()
        weights = labels.at_temperature(1.0).log_weights[row]
        assert (weights[:3] == 0).all()
        expected = (labels.log_threshold[row] - log_probs[drawn]).clamp(min=0)
        torch.testing.assert_close(weights[3:], expected)


def test_hybrid_varies_less_than_draws_with_replacement():
    logits = make_logits(200)
    plain = estimates(sample(logits.expand(4000, -1), draws=12, seeds_P=seeds(4000)), 1.0).var(0).sum()
    mixed = estimates(hybrid(logits.expand(4000, -1), k=4, draws=8, seeds_P=seeds(4000)), 1.0).var(0).sum()
    assert mixed < 0.7 * plain


@pytest.mark.parametrize("policy", ["sample", "hybrid"])
def test_a_rerun_draws_the_same_whatever_the_chunks_and_the_batch(policy):
    settings = label_settings(policy, num_samples=6, seed=3, **({"k": 2} if policy == "hybrid" else {}))
    logits = make_logits(50).expand(30, -1) + torch.arange(30)[:, None] / 10
    whole = settings.apply(logits, seeds_P=seeds(30, 3))
    parts = [settings.apply(logits[i : i + 7], seeds_P=seeds(30, 3)[i : i + 7]) for i in range(0, 30, 7)]
    assert torch.equal(whole.ids, concat(parts).ids)
    assert not torch.equal(whole.ids, settings.apply(logits, seeds_P=seeds(30, 4)).ids)
    function = sample if policy == "sample" else hybrid
    extra = {} if policy == "sample" else {"k": 2}
    one_by_one = function(logits, draws=6, seeds_P=seeds(30, 3), chunk_positions=1, **extra)
    assert torch.equal(whole.ids, one_by_one.ids)


def test_rows_of_a_sample_and_samples_have_seeds_of_their_own():
    found = row_seeds(np.array([5, 2**64 - 1], np.uint64), np.array([2, 3]), np.array([0, 1, 0, 1, 2]), 0)
    assert len(set(found.tolist())) == 5
    again = row_seeds(np.array([2**64 - 1], np.uint64), np.array([1]), np.array([1]), 0)
    assert again.item() == found[3].item()


def test_uniforms_are_uniform():
    ids = sample(torch.zeros(20_000, 64), draws=8, seeds_P=seeds(20_000))
    counts = torch.zeros(65).scatter_add_(0, ids.ids.flatten(), ids.counts.flatten().float())[:64]
    chi_square = float(((counts - 2500) ** 2 / 2500).sum())
    assert 63 - 5 * math.sqrt(126) < chi_square < 63 + 5 * math.sqrt(126)


@pytest.mark.parametrize("num_classes", [1, 3, 10])
def test_more_draws_than_classes(num_classes):
    logits = make_logits(num_classes)
    labels = sample(logits.expand(20, -1), draws=300, seeds_P=seeds(20))
    assert labels.k == num_classes
    assert (labels.counts.sum(1) == 300).all()
    if num_classes > 1:
        all_of_it = hybrid(logits.expand(20, -1), k=1, draws=num_classes - 1, seeds_P=seeds(20))
        assert (all_of_it.log_threshold == -INF).all()
        torch.testing.assert_close(estimates(all_of_it, 1.0), logits.softmax(0).expand(20, -1))


def test_masked_classes_are_never_drawn():
    logits = make_logits(12)
    logits[::2] = -INF
    for labels in (
        sample(logits.expand(500, -1), draws=9, seeds_P=seeds(500)),
        hybrid(logits.expand(500, -1), k=2, draws=9, seeds_P=seeds(500)),
    ):
        used = labels.ids < 12
        assert (labels.ids[used] % 2 == 1).all()
        assert (labels.log_probs[~used] == -INF).all()
        assert not estimates(labels, 2.0).isnan().any()


def test_one_hot_rows_are_exact():
    logits = torch.full((4, 6), -INF)
    logits[:, 2] = 0.0
    for labels in (
        sample(logits, draws=3, seeds_P=seeds(4)),
        hybrid(logits, k=1, draws=3, seeds_P=seeds(4)),
    ):
        assert estimates(labels, 3.0)[:, 2].tolist() == [1.0] * 4


def test_a_drawn_record_keeps_the_exact_tail_and_its_parts():
    logits = make_logits(40).expand(6, -1)
    drawn = sample(logits, draws=5, seeds_P=seeds(6), targets_P=torch.arange(6))
    whole = dense(logits, targets_P=torch.arange(6))
    log_z_PG = torch.stack([(whole.log_probs / t).logsumexp(1) for t in DEFAULT_TEMPERATURES], 1)
    torch.testing.assert_close(drawn.log_tail, log_z_PG)
    torch.testing.assert_close(drawn.target_log_prob, whole.target_log_prob)
    torch.testing.assert_close(drawn.stats, whole.stats)
    assert (drawn.kept_mass(2.0) == 0).all()
    mixed = hybrid(logits, k=3, draws=5, seeds_P=seeds(6))
    torch.testing.assert_close(mixed.log_tail, top_k(logits, k=3).log_tail)
    torch.testing.assert_close(mixed.kept_mass(2.5), top_k(logits, k=3).kept_mass(2.5))
    for labels in (drawn, mixed):
        again = concat([labels.take(slice(0, 2)), labels.take([2, 3, 4, 5])])
        torch.testing.assert_close(estimates(again, 2.0), estimates(labels, 2.0))
        numpy = labels.to_numpy().at_temperature(2.0)
        np.testing.assert_allclose(
            numpy.log_weights, labels.at_temperature(2.0).log_weights.numpy(), rtol=1e-6
        )


@pytest.mark.parametrize(("p", "max_k"), [(0.5, 12), (0.9, 12), (0.9, 4), (1.0, 12), (1e-9, 12)])
def test_top_p_keeps_as_few_as_hold_the_mass(p, max_k):
    logits = torch.stack([make_logits(12, seed) for seed in range(20)])
    logits[3, 5:] = -INF
    labels = top_p(logits, p=p, max_k=max_k)
    for row, values in enumerate(logits.softmax(1).tolist()):
        order = sorted(range(12), key=lambda i: (-values[i], i))
        needed = next((n for n in range(1, 13) if sum(values[i] for i in order[:n]) >= p - 1e-12), 12)
        kept = order[: min(needed, max_k)]
        found = [i for i in labels.ids[row].tolist() if i < 12]
        if p < 1.0:
            assert found == kept
        assert found == order[: len(found)]
        left = math.fsum(values[i] for i in order[len(found) :])
        assert math.exp(labels.log_tail[row, 0]) == pytest.approx(left, abs=1e-9)
        assert (labels.log_probs[row, len(found) :] == -INF).all()


def test_bad_arguments_raise():
    logits = torch.zeros(2, 5)
    with pytest.raises(LabelError, match="seeds"):
        sample(logits, draws=2, seeds_P=seeds(3))
    with pytest.raises(LabelError, match="draws"):
        sample(logits, draws=0, seeds_P=seeds(2))
    with pytest.raises(LabelError, match=r"labels\.k"):
        hybrid(logits, k=3, draws=3, seeds_P=seeds(2))
    with pytest.raises(LabelError, match=r"sampling\.exponent"):
        sample(logits, draws=2, seeds_P=seeds(2), exponent=0.0)
    with pytest.raises(TemperatureError, match=r"1\.42857"):
        sample(logits, draws=2, seeds_P=seeds(2), exponent=0.7)
    with pytest.raises(LabelError, match=r"labels\.p"):
        top_p(logits, p=0.0, max_k=2)
    with pytest.raises(LabelError, match="seeds of the rows"):
        label_settings("sample", num_samples=2).apply(logits)
    labels = sample(logits, draws=2, seeds_P=seeds(2))
    with pytest.raises(LabelError, match=r"SoftLabels\.counts"):
        SoftLabels(
            labels.ids, labels.log_probs, labels.log_tail, 5, labels.temperatures, sampling=labels.sampling
        )
    with pytest.raises(LabelError, match="no exact classes"):
        Sampling(exact=1, draws=2, exponent=1.0, replacement=True)


@pytest.mark.parametrize("store", ["zarr", "parquet"])
@pytest.mark.parametrize(
    "labels", [{"policy": "sample", "num_samples": 7}, {"policy": "hybrid", "k": 2, "num_samples": 4}]
)
def test_through_a_cache_of_images(tmp_path, labels, store):
    config, data, cache = make_cache(str(tmp_path / "cache"), labels=labels, capture={"store": store})
    assert list(verify_units(cache)) == []
    teacher = open_teacher(config, data)
    record = cache.read(range(20), 0)
    batch = data.train.load(range(20), 0)
    fresh, _ = teacher.label(batch, config.labels)
    assert np.array_equal(record.ids, fresh.ids.numpy())
    assert record.sampling == fresh.sampling
    given = {"num_rows": 40, "threshold_nats": 1e-4, "seed": 0}
    assert list(verify_against_teacher(cache, data.train, teacher, **given)) == []


def test_through_a_cache_of_tokens(tmp_path):
    labels = {"policy": "hybrid", "k": 2, "num_samples": 4}
    _, _, first = make_text_cache(str(tmp_path / "a"), tmp_path, labels=labels)
    _, _, other = make_text_cache(str(tmp_path / "b"), tmp_path, labels=labels, capture={"batch_size": 3})
    assert np.array_equal(first.read(range(5), 0).ids, other.read(range(5), 0).ids)


def test_all_outcomes_of_two_draws_add_up_to_the_distribution():
    """Exactly, not by chance: every pair of draws, with its probability."""
    logits = make_logits(4)
    probs = logits.softmax(0)
    for T in (1.0, 2.0):
        total = torch.zeros(4, dtype=torch.float64)
        for pair in itertools.product(range(4), repeat=2):
            unique = sorted(set(pair), key=lambda i: -probs[i])
            ids = torch.tensor([unique + [4] * (2 - len(unique))])
            labels = SoftLabels(
                ids=ids,
                log_probs=torch.cat([probs.log(), torch.tensor([-INF])])[ids],
                log_tail=torch.stack([(probs.log() / t).logsumexp(0) for t in DEFAULT_TEMPERATURES])[None],
                num_classes=4,
                temperatures=DEFAULT_TEMPERATURES,
                sampling=Sampling(exact=0, draws=2, exponent=1.0, replacement=True),
                counts=torch.tensor([[pair.count(i) for i in ids[0].tolist()]]),
            )
            total += probs[pair[0]] * probs[pair[1]] * estimates(labels, T)[0]
        torch.testing.assert_close(total, (logits / T).softmax(0))


@pytest.mark.parametrize("exponent", [1.0, 0.75])
@pytest.mark.parametrize("temperature", [1.0, 4 / 3, 2.0])
def test_the_error_of_the_mass_is_that_of_importance_sampling(exponent, temperature):
    """Of N draws from q, the variance of the sum of p / q is (sum p^2 / q - 1) / N."""
    z, draws = make_logits(9), 5
    labels = sample(z.expand(DRAWS, -1), draws=draws, seeds_P=seeds(DRAWS), exponent=exponent).to_numpy()
    p_V, q_V = (z / temperature).softmax(0), (z * exponent).softmax(0)
    expected = max(float((p_V**2 / q_V).sum() - 1), 0.0) ** 0.5 / draws**0.5
    mass_P, effective_P = estimate_mass(labels, temperature)
    assert mass_P.mean() == pytest.approx(1, abs=4 * expected / DRAWS**0.5 + 1e-6)
    assert ((mass_P - 1) ** 2).mean() ** 0.5 == pytest.approx(expected, rel=0.05, abs=1e-5)
    assert effective_P.max() <= draws + 1e-4
    if abs(temperature * exponent - 1) < 1e-9:  # drawn as they weigh: every draw is worth one
        assert effective_P.min() == pytest.approx(draws, rel=1e-4)
    else:
        assert effective_P.mean() < draws - 0.02


@pytest.mark.parametrize("draws", [3, 6])
def test_hybrid_without_an_exact_class_is_refused(draws):
    with pytest.raises(LabelError, match=r"hybrid, k: expected at least 1 exact class; found 0"):
        hybrid(torch.randn(4, 6), k=0, draws=draws, seeds_P=torch.arange(4))
