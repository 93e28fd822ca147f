"""The fidelity report against sums over all classes written out here."""

import numpy as np
import pytest
import torch

from softcache.errors import AlignmentError, IdentityError, IncompleteCacheError, TemperatureError
from softcache.labels.sparsify import hybrid, row_seeds, sample, top_k, top_p
from softcache.losses import forward_kl
from softcache.runs import open_data, open_teacher
from softcache.tools.fidelity import measure_cache, rerun_teacher
from softcache.tools.fidelity.frontier import DRAWS, frontier
from softcache.tools.fidelity.metrics import gradient_difference, measure
from softcache.tools.fidelity.reference import STUDENT_T, ReferenceDistribution
from softcache.tools.shrink import ShrinkSettings, shrink_cache
from tests.support.caches import digits_config, make_cache
from tests.support.text_caches import make_text_cache

NUM_CLASSES = 30


@pytest.fixture(scope="module")
def logits():
    logits = torch.randn(20, NUM_CLASSES, generator=torch.Generator().manual_seed(0)) * 3
    logits[2, 7:] = -torch.inf
    return logits


def seeds(num_rows, seed=0):
    prints = np.arange(num_rows, dtype=np.uint64)
    return row_seeds(prints, np.ones(num_rows, np.int64), np.zeros(num_rows, np.int64), seed)


def student_of(logits, T):
    """Log-probabilities of the reference student at T."""
    return (logits.double() / (T * STUDENT_T)).log_softmax(1)


@pytest.mark.parametrize("T", [1.0, 1.3, 4.0])
@pytest.mark.parametrize("make", [lambda z: top_k(z, k=4), lambda z: top_p(z, p=0.8, max_k=12)])
def test_a_cut_record_is_measured_as_written_out(logits, make, T):
    labels, p_PV = make(logits), (logits.double() / T).softmax(1)
    found = measure(labels, ReferenceDistribution(logits, T))
    softened = labels.map_arrays(lambda x: x.double() if x.is_floating_point() else x).at_temperature(T)
    for row in range(len(logits)):
        kept = [int(i) for i in labels.ids[row] if i < NUM_CLASSES]
        dropped = [j for j in range(NUM_CLASSES) if j not in kept]
        q = torch.zeros(NUM_CLASSES, dtype=torch.float64)
        q[kept] = softened.log_probs[row, : len(kept)].exp()
        q_tail = float(softened.log_tail[row].exp())
        q[dropped] = q_tail / len(dropped)
        p = p_PV[row]
        alive = p > 0
        whole = float((p[alive] * (p[alive] / q[alive]).log()).sum())
        p_tail, s = float(p[dropped].sum()), student_of(logits, T)[row].exp()
        kept_alive = [k for k in kept if p[k] > 0]
        bucket = float((p[kept_alive] * (p[kept_alive] / q[kept_alive]).log()).sum())
        bucket += p_tail * np.log(p_tail / q_tail) if p_tail else 0.0
        gradient = s - q
        gradient[dropped] = s[dropped] * (1 - q_tail / float(s[dropped].sum())) if p_tail else s[dropped]
        expected = {
            "kl_nats": whole,
            "bucket_kl_nats": bucket,
            "tail_error": q_tail - p_tail,
            "kept_mass": float(q[kept].sum()),
            "agrees": 1.0,
            "gradient": float((gradient - (s - p)).square().sum()),
        }
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert float(found[name][row]) == pytest.approx(value, abs=1e-9), (row, name)
    assert (found["bucket_kl_nats"] <= found["kl_nats"] + 1e-12).all()


@pytest.mark.parametrize("T", [1.0, 2.5])
@pytest.mark.parametrize(
    "make", [lambda z, s: sample(z, draws=9, seeds_P=s), lambda z, s: hybrid(z, k=3, draws=5, seeds_P=s)]
)
def test_the_gradient_is_that_of_the_loss(logits, make, T):
    """What the loss itself gives at the reference student, for drawn records; and the truth's is s - p."""
    labels, truth = make(logits, seeds(len(logits))), ReferenceDistribution(logits, T)
    student = (logits.double() / STUDENT_T).clamp(min=-1e4).requires_grad_()
    wide = labels.map_arrays(lambda x: x.double() if x.is_floating_point() else x)
    forward_kl(student, wide, temperature=T).sum().backward()
    s_PV, p_PV = (student.detach() / T).softmax(1), (logits.double() / T).softmax(1)
    difference_PV = T * student.grad - (s_PV - p_PV)
    torch.testing.assert_close(gradient_difference(labels, truth), difference_PV, rtol=0, atol=1e-6)
    found = measure(labels, truth)
    torch.testing.assert_close(found["gradient"], difference_PV.square().sum(1), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(truth.gradient_P, (s_PV - p_PV).square().sum(1), rtol=0, atol=1e-9)
    assert float(found["total_mass"].mean()) == pytest.approx(1.0, abs=0.5)
    assert "kl_nats" not in found


def test_a_cut_record_has_the_gradient_of_the_loss_too(logits):
    labels, T = top_k(logits, k=4), 1.5
    student = (logits.double() / STUDENT_T).clamp(min=-1e4).requires_grad_()
    wide = labels.map_arrays(lambda x: x.double() if x.is_floating_point() else x)
    forward_kl(student, wide, temperature=T).sum().backward()
    p_PV, s_PV = (logits.double() / T).softmax(1), (student.detach() / T).softmax(1)
    expected = (T * student.grad - (s_PV - p_PV)).square().sum(1)
    torch.testing.assert_close(
        measure(labels, ReferenceDistribution(logits, T))["gradient"], expected, rtol=1e-5, atol=1e-9
    )


# -- caches ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(shared_cache):
    config, data, cache = shared_cache
    return cache, data.train, open_teacher(config, data)


def test_a_rerun_has_the_logits_of_its_rows(images):
    cache, data, teacher = images
    rerun = rerun_teacher(cache, data, teacher, num_rows=100, seed=0)
    assert len(rerun) == rerun.num_samples == 100
    found = rerun.logits_PV.log_softmax(1).gather(1, rerun.labels.ids.long())
    torch.testing.assert_close(found, rerun.labels.log_probs.float(), rtol=2**-10, atol=1e-6)
    again = rerun_teacher(cache, data, teacher, num_rows=100, seed=0)
    assert torch.equal(again.logits_PV, rerun.logits_PV)
    other = rerun_teacher(cache, data, teacher, num_rows=100, seed=1)
    assert not torch.equal(other.logits_PV, rerun.logits_PV)
    assert len(rerun_teacher(cache, data, teacher, num_rows=10**6, seed=0)) == 600


def test_a_rerun_of_text_takes_some_rows_of_each_sample(tmp_path):
    positions = {"policy": "random", "share": 0.7}
    config, data, cache = make_text_cache(tmp_path / "c", tmp_path, labels={"k": 6, "positions": positions})
    rerun = rerun_teacher(cache, data.train, open_teacher(config, data), num_rows=40, seed=0)
    assert 40 <= len(rerun) < 48
    assert rerun.num_samples < 10
    found = rerun.logits_PV.log_softmax(1).gather(1, rerun.labels.ids.long())
    torch.testing.assert_close(found, rerun.labels.log_probs.float(), rtol=2**-10, atol=1e-5)
    report, points = measure_cache(cache, rerun, temperatures=[1.0, 2.0])
    assert report["temperatures"]["1"]["bucket_kl_mean_nats"] < 1e-6
    own = next(
        point for point in points if (point.policy, point.codec, point.k) == ("top_k", "open float16", 8)
    )
    assert own.temperatures["1"]["kl_nats"] < report["temperatures"]["1"]["kl_mean_nats"]  # K = 6


def test_the_report_and_the_frontier_agree_about_the_cache(images):
    cache, data, teacher = images
    rerun = rerun_teacher(cache, data, teacher, num_rows=300, seed=0)
    report, points = measure_cache(cache, rerun, temperatures=[1.0, 4.0])
    own = next(
        point for point in points if (point.policy, point.codec, point.k) == ("top_k", "open float16", 4)
    )
    for t in ("1", "4"):
        found, expected = report["temperatures"][t], own.temperatures[t]
        assert found["kl_mean_nats"] == pytest.approx(expected["kl_nats"], rel=1e-6)
        assert found["gradient_error"] == pytest.approx(expected["gradient_error"], rel=1e-6)
        assert found["top1_agreement"] == 1.0
        assert found["bucket_kl_max_nats"] <= found["kl_max_nats"]
    assert report["bytes_per_position"]["total"] == pytest.approx(
        sum(shard.num_bytes for marker in cache.markers.values() for shard in marker.shards) / 600
    )
    # 300 rows in one chunk against 64 in shards of two
    assert (
        own.bytes_per_position["total"]
        < report["bytes_per_position"]["total"]
        < 1.5 * own.bytes_per_position["total"]
    )


def test_more_classes_and_finer_steps_are_nearer_to_the_teacher(images):
    cache, data, teacher = images
    rerun = rerun_teacher(cache, data, teacher, num_rows=60, seed=0)
    points = frontier(rerun, cache.manifest, temperatures=[1.0], other_bytes=9.0)
    for codec in ("open float16", "open float32", "packed 1/8", "packed 1/128"):
        kl = [p.temperatures["1"]["kl_nats"] for p in points if (p.policy, p.codec) == ("top_k", codec)]
        assert kl == sorted(kl, reverse=True)
        assert len(kl) == 5
    whole = {p.codec: p.temperatures["1"]["kl_nats"] for p in points if p.policy == "top_k" and p.k == 10}
    assert (
        whole["open float32"]
        < whole["open float16"]
        < whole["packed 1/128"]
        < whole["packed 1/8"]
        < (1 / 8) ** 2 / 8
    )
    for point in points:
        found = point.temperatures["1"]
        assert sum(point.bytes_per_position.values()) == pytest.approx(2 * point.bytes_per_position["total"])
        if point.draws:
            squares = found["gradient_bias"] ** 2, found["gradient_noise"] ** 2
            assert found["kl_nats"] is None
            # With m the mean of R draws' differences: E |e|^2 = bias^2 + noise^2, but for what R draws cannot tell.
            assert found["gradient_error"] ** 2 <= sum(squares) + 1e-12
            assert found["gradient_error"] ** 2 >= squares[1] * (1 - 1 / DRAWS) - 1e-12


def test_drawn_caches_have_masses_instead_of_divergences(tmp_path):
    dense = {"labels": {"policy": "dense", "num_views": 1}, "capture": {"codec": {"values": "float32"}}}
    config, data, whole = make_cache(tmp_path / "whole", **dense)
    cache = shrink_cache(whole, tmp_path / "drawn", ShrinkSettings(policy="hybrid", k=2, num_samples=3))
    rerun = rerun_teacher(cache, data.train, open_teacher(config, data), num_rows=300, seed=0)
    found = measure_cache(cache, rerun, temperatures=[1.0])[0]["temperatures"]["1"]
    assert found["total_mass_mean"] == pytest.approx(1.0, abs=0.02)
    assert 0 < found["total_mass_std"] < 0.5
    assert "kl_mean_nats" not in found


def test_another_teacher_and_other_data_are_refused(images, tmp_path):
    cache, data, teacher = images
    config = digits_config(teacher={"model": "tests.fakes:known_scaled"})
    other = open_teacher(config, open_data(config))
    with pytest.raises(IdentityError, match=r"made by another teacher than the config's.*weights_digest"):
        rerun_teacher(cache, data, other, num_rows=10, seed=0)
    changed = open_data(digits_config(source={"max_train_samples": 200}))
    with pytest.raises(AlignmentError, match="300 samples were labeled, the source has 200"):
        rerun_teacher(cache, changed.train, teacher, num_rows=10, seed=0)
    with pytest.raises(TemperatureError, match="temperature"):
        measure_cache(cache, rerun_teacher(cache, data, teacher, num_rows=10, seed=0), temperatures=[0.5])


def test_an_empty_cache_has_nothing_to_measure(tmp_path):
    config, data, cache = make_cache(tmp_path / "c", labels={"num_views": 1})
    for unit in (tmp_path / "c/units").glob("*.json"):
        unit.unlink()
    with pytest.raises(IncompleteCacheError, match="no finished row"):
        rerun_teacher(type(cache)(cache.url), data.train, open_teacher(config, data), num_rows=10, seed=0)


def test_hidden_states_are_points_of_the_frontier_and_a_cache_of_them_is_measured(tmp_path):
    config, data, cache = make_text_cache(
        tmp_path / "cache", tmp_path, labels={"policy": "hidden", "values": "int8"}
    )
    rerun = rerun_teacher(cache, data.train, open_teacher(config, data), num_rows=60, seed=0)
    report, points = measure_cache(cache, rerun, temperatures=[1.0, 4.0])
    states = {(point.codec, point.components): point for point in points if point.policy == "hidden"}
    assert set(states) == {
        ("bfloat16", None),
        ("int8", None),
        ("float8_e4m3", None),
        ("int8", 8),
        ("int8", 4),
    }
    for t in ("1", "4"):
        nats = {key: point.temperatures[t]["kl_nats"] for key, point in states.items()}
        assert nats["bfloat16", None] < nats["float8_e4m3", None] < nats["int8", 8] < nats["int8", 4]
        # The rows of the cache are the states in int8, and their error is that of the frontier's point.
        found = report["temperatures"][t]
        assert found["kl_mean_nats"] == pytest.approx(nats["int8", None], rel=0.02)
        assert found["gradient_error"] == pytest.approx(
            states["int8", None].temperatures[t]["gradient_error"], rel=0.02
        )
        assert found["tail_bound_max"] == 0.0
    p_PV = (rerun.logits_PV.double()).softmax(1)
    assert rerun.states is not None
    head = rerun.states.head
    whole_PV = rerun.states.states_PD.double() @ head.weight.double().T
    torch.testing.assert_close(whole_PV.softmax(1), p_PV, atol=1e-6, rtol=0)
    sizes = {key: point.bytes_per_position["hidden"] for key, point in states.items()}
    assert sizes["int8", 4] < sizes["int8", 8] < sizes["int8", None] < sizes["bfloat16", None]
