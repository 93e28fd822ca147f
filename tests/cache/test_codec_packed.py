"""The packed codec: its bound for any legal record, what it keeps bit for bit, and what peers lose."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softcache.cache.codecs import OpenCodec, PackedCodec, codec_from_dict
from softcache.cache.codecs.packed.layout import MAX_NEG_LOG_PROB
from softcache.errors import LabelError, ManifestError
from softcache.labels import Sampling, SoftLabels
from softcache.labels.sparsify import hybrid, sample, top_k
from tests.support.caches import ROOT

GRID = (1.0, 2.0, 8.0)
SMALL = settings(suppress_health_check=[HealthCheck.too_slow])
STEPS = st.sampled_from([1 / 16384, 1 / 512, 1 / 128, 1 / 100, 1 / 32, 0.5, 8.0])


def packed(labels, **how):
    return PackedCodec(
        **{
            "num_classes": labels.num_classes,
            "k": labels.k,
            "temperatures": labels.temperatures,
            "stats": labels.stats is not None,
            "max_temperature": labels.max_temperature,
            "sampling": labels.sampling,
        }
        | how
    )


def made(num_rows=65, num_classes=50, k=5, scale=3.0, grid=GRID, seed=0):
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, num_classes, generator=random) * scale
    return top_k(logits, k=k, temperatures=grid, targets_P=torch.arange(num_rows) % num_classes).to_numpy()


def rounding(*values):
    """What float32 and the arithmetic of a few float64 numbers may add to an error."""
    return 1e-5 + 2.0**-22 * max(float(np.abs(np.where(np.isfinite(v), v, 0)).max(initial=0)) for v in values)


def clipped(values):
    return np.where(np.isneginf(values), values, np.maximum(values, -MAX_NEG_LOG_PROB))


def assert_near(found, wanted, bound):
    """Equal where -inf; elsewhere within the bound."""
    wanted = clipped(np.asarray(wanted, np.float64))
    assert np.array_equal(np.isneginf(found), np.isneginf(wanted))
    error = np.abs(np.where(np.isneginf(wanted), 0, found) - np.where(np.isneginf(wanted), 0, wanted))
    assert error.max(initial=0) <= bound + rounding(wanted)


@st.composite
def records(draw):
    """Any legal record: any V and K, ties, -inf, unused slots, far values, with and without statistics."""
    num_classes = draw(
        st.one_of(st.integers(2, 300), st.sampled_from([2**16 - 1, 2**16, 2**17, 2**18, 2**31 - 1]))
    )
    k, rows = draw(st.integers(1, min(num_classes, 70))), draw(st.integers(1, 70))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    span = draw(st.sampled_from([0.0, 1.0, 30.0, 1e4]))
    grid = draw(st.sampled_from([(1.0,), GRID, (1.0, 1.1, 1.25, 1.5, 1.8, 2.5, 4.0, 8.0)]))
    log_probs = -np.sort(random.random((rows, k)) * span, axis=1).astype(np.float32)
    if draw(st.booleans()):
        log_probs = np.round(log_probs)  # ties
    finite = random.integers(draw(st.sampled_from([0, 1])), k + 1, (rows, 1))
    used = np.maximum(finite, random.integers(0, k + 1, (rows, 1)))
    log_probs[np.arange(k) >= finite] = -np.inf
    ids = random.integers(0, num_classes, (rows, k))
    ids[0, 0] = num_classes - 1
    used[0, 0], ids[np.arange(k) >= used] = max(used[0, 0], 1), num_classes
    tail = (-random.random((rows, 1)) * span / np.array(grid) + random.normal(size=(rows, len(grid)))).astype(
        np.float32
    )
    tail[random.random(rows) < 0.2] = -np.inf
    target = (-random.random(rows) * span).astype(np.float32)
    target[random.random(rows) < 0.2] = -np.inf
    stats = None
    if draw(st.booleans()):
        moments = random.normal(size=(rows, 3)) * (1 + span)
        support = np.float32(random.integers(1, num_classes + 1, (rows, 1)))
        stats = np.concatenate([moments, support], axis=1).astype(np.float32)
    return SoftLabels(ids, log_probs, tail, num_classes, grid, target_log_prob=target, stats=stats)


@SMALL
@given(records(), STEPS, st.sampled_from(["fixed", "steps", "float32"]), st.booleans())
def test_any_legal_record_comes_back_within_its_bound(labels, step, tail, transposed):
    codec = packed(labels, step=step, tail=tail)
    columns = codec.encode(labels)
    if transposed:
        columns = {"record": np.ascontiguousarray(columns["record"])}
    back = codec.decode(columns)
    assert np.array_equal(back.ids, labels.ids)
    assert_near(back.log_probs, labels.log_probs, step / 2)
    assert_near(back.target_log_prob, labels.target_log_prob, step / 2)
    assert_near(back.log_tail[:, 0], labels.log_tail[:, 0], step / 32 if tail == "steps" else 0.0)
    if tail != "steps":
        assert np.array_equal(back.log_tail[:, 0], labels.log_tail[:, 0])
    if tail == "float32":
        assert np.array_equal(back.log_tail, labels.log_tail)
    else:
        assert_near(back.log_tail, labels.log_tail, step / 2)
    if labels.stats is not None:
        assert np.array_equal(back.stats[:, 3], labels.stats[:, 3])
        assert np.allclose(back.stats[:, :3], labels.stats[:, :3], rtol=2.0**-11, atol=2.0**-25)


@SMALL
@given(records())
def test_float16_values_keep_what_float16_keeps(labels):
    codec = packed(labels, step=None, tail="float32")
    back = codec.decode(codec.encode(labels))
    assert np.array_equal(back.log_probs, clipped(labels.log_probs).astype(np.float16))
    for name in ("ids", "log_tail", "target_log_prob"):
        assert np.array_equal(getattr(back, name), getattr(labels, name)), name


def kl(true, found, T):
    """KL between two records at T over the kept classes and the rest, float64, [P]."""
    pair = []
    for labels in (true, found):
        wide = SoftLabels(
            labels.ids,
            labels.log_probs.astype(np.float64),
            labels.log_tail,
            labels.num_classes,
            labels.temperatures,
        )
        soft = wide.at_temperature(T)
        pair.append(np.concatenate([soft.log_probs, soft.log_tail[:, None]], axis=1))
    p, q = pair
    possible = p > -np.inf
    return (np.exp(p) * np.subtract(p, q, out=np.zeros_like(p), where=possible)).sum(1)


@SMALL
@given(st.integers(0, 2**32), STEPS, st.sampled_from([0.0, 0.3, 3.0, 30.0]), st.integers(1, 40))
def test_the_divergence_is_at_most_an_eighth_of_the_squared_step(seed, step, scale, k):
    labels = made(num_rows=40, num_classes=40, k=k, scale=scale, seed=seed)
    codec = packed(labels, step=step)
    back = codec.decode(codec.encode(labels))
    for T in GRID:
        assert kl(labels, back, T).max() <= step**2 / 8 + 1e-9


def test_rounding_does_not_add_up_along_the_ranks():
    """Differences that are each rounded alone are off by K/2 steps at the end."""
    k, step = 200, 0.5
    log_probs = -0.2 * np.arange(k, dtype=np.float32)[None]
    labels = SoftLabels(
        np.arange(k)[None],
        log_probs,
        np.zeros((1, 1), np.float32),
        k,
        (1.0,),
        target_log_prob=np.zeros(1, np.float32),
    )
    codec = packed(labels, step=step)
    assert np.abs(codec.decode(codec.encode(labels)).log_probs - log_probs).max() <= step / 2 + 1e-4


def test_logits_in_bfloat16_are_kept_exactly_but_for_their_offset():
    logits = (torch.randn(100, 300, generator=torch.Generator().manual_seed(0)) * 4 + 8).bfloat16().float()
    labels = top_k(logits, k=8, temperatures=GRID, targets_P=torch.zeros(100, dtype=torch.int64)).to_numpy()
    codec = packed(labels)
    back = codec.decode(codec.encode(labels))
    apart, wanted = np.diff(back.log_probs, axis=1), np.diff(labels.log_probs, axis=1)
    assert np.abs(apart - wanted).max() < 4e-6
    assert kl(labels, back, 1.0).max() < 1e-9


def test_a_target_among_the_kept_has_the_value_of_its_slot():
    labels = made(num_classes=6, k=6)
    codec = packed(labels, step=1 / 3)
    back = codec.decode(codec.encode(labels))
    at_target = back.log_probs[back.ids == (np.arange(len(labels)) % 6)[:, None]]
    assert np.array_equal(at_target, back.target_log_prob)


# -- drawn classes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [PackedCodec, OpenCodec])
@pytest.mark.parametrize("draws", [3, 40, 300])
@pytest.mark.parametrize("policy", ["sample", "hybrid"])
def test_drawn_records_keep_their_counts_and_thresholds(policy, draws, codec):
    random = torch.Generator().manual_seed(1)
    logits, seeds = torch.randn(70, 400, generator=random) * 3, torch.arange(70)
    more = {"seeds_P": seeds, "targets_P": seeds % 400, "temperatures": GRID, "draws": draws}
    labels = (sample(logits, **more) if policy == "sample" else hybrid(logits, k=4, **more)).to_numpy()
    codec = codec(400, labels.k, GRID, sampling=labels.sampling)
    assert codec_from_dict(json.loads(json.dumps(codec.to_dict()))) == codec
    back = codec.decode(codec.encode(labels))
    assert back.sampling == labels.sampling
    assert np.array_equal(back.ids, labels.ids)
    for name in ("counts", "log_threshold"):
        if getattr(labels, name) is not None:
            assert np.array_equal(getattr(back, name), getattr(labels, name)), name
    if policy == "sample":
        assert back.counts.dtype == (np.uint8 if draws <= 255 else np.uint16)
        assert (back.counts.sum(axis=1) == draws).all()


def drawn(order, exact=0):
    """One row of four drawn classes, in some order; with replacement unless some are exact."""
    ids, log_probs, counts = (
        np.array([7, 3, 9, 10]),
        np.float32([-1, -2, -3, -np.inf]),
        np.array([1, 5, 2, 0]),
    )
    sampling = Sampling(exact=exact, draws=8, exponent=1.0, replacement=not exact)
    of_kind = {"log_threshold": np.zeros(1, np.float32)} if exact else {"counts": counts[order][None]}
    return SoftLabels(
        ids[order][None], log_probs[order][None], np.zeros((1, 1), np.float32), 10, (1.0,),
        target_log_prob=np.zeros(1, np.float32), sampling=sampling, **of_kind,
    )  # fmt: skip


def test_slots_in_any_order_are_put_in_order_with_their_counts():
    labels = drawn([3, 2, 0, 1])
    codec = packed(labels)
    back = codec.decode(codec.encode(labels))
    assert back.ids.tolist() == [[7, 3, 9, 10]]
    assert back.counts.tolist() == [[1, 5, 2, 0]]


def test_a_drawn_slot_above_an_exact_one_is_refused():
    with pytest.raises(LabelError, match="drawn slot of row 0 is more likely than an exact one"):
        packed(labels := drawn([1, 0, 2, 3], exact=1)).encode(labels)


# -- what peers lose ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_classes", "ids"),
    [
        (262_144, [131_071, 131_072, 262_143, 0]),  # Megatron: 17 bits; its -1 for "none" is 131,071
        (131_072, [131_071, 0, 65_535, 65_536]),
        (65_536, [32_767, 32_768, 65_535, 1]),  # TinyViT: int16
        (4_096, [2_049, 2_048, 4_095, 0]),  # FKD: ids in float16
        (2**31 - 1, [2**31 - 2, 2**30, 1, 2**24 + 1]),
    ],
)
def test_ids_that_peers_fold_or_drop_survive(num_classes, ids):
    labels = SoftLabels(
        np.array([[*ids, num_classes]]), np.float32([[-1, -2, -3, -4, -np.inf]]), np.zeros((1, 1), np.float32),
        num_classes, (1.0,), target_log_prob=np.zeros(1, np.float32),
    )  # fmt: skip
    codec = packed(labels)
    assert codec.decode(codec.encode(labels)).ids[0].tolist() == [*ids, num_classes]


@pytest.mark.parametrize("bad", [-1, 51, 131_072])
def test_an_id_that_is_no_class_is_refused(bad):
    """DistillKit stores 131,072 as 0 where 17 bits are asked for."""
    labels = made()
    labels.ids[3, 2] = bad
    for codec in (packed(labels), OpenCodec(50, 5, GRID)):
        with pytest.raises(LabelError, match=f"column ids: {bad} in row 3; expected 0 to 50"):
            codec.encode(labels)


def test_one_masked_class_leaves_the_rest_of_its_row_alone():
    labels = made()
    labels.log_probs[0, -1] = -np.inf
    codec = packed(labels, step=1 / 64)
    back = codec.decode(codec.encode(labels))
    assert np.isneginf(back.log_probs[0, -1])
    assert_near(back.log_probs, labels.log_probs, 1 / 128)


# -- refusals and descriptions -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["log_probs", "log_tail", "target_log_prob", "stats"])
def test_what_is_no_number_is_refused(name, value):
    labels = made()
    getattr(labels, name)[7] = value
    with pytest.raises(LabelError, match=f"column {name}: .* in row 7"):
        packed(labels).encode(labels)


def test_a_log_probability_in_an_unused_slot_is_refused():
    labels = made()
    labels.ids[2, -1] = 50
    with pytest.raises(LabelError, match=r"unused slot \(id 50\) of row 2"):
        packed(labels).encode(labels)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "squeezed"}, {"name": None}, {"name": []}, {"step": 0}, {"step": -1.0}, {"step": float("nan")}, {"step": "x"},
        {"step": 1e-9}, {"step": 1e9}, {"tail": "float16"}, {"tail": []}, {"values": "float16"}, {"sampling": {}}, {"k": 0},
        {"sampling": {"exact": 9, "draws": 1, "exponent": 1.0, "replacement": False}}, {"sampling": 3},
        {"sampling": {"exact": 0, "draws": 0, "exponent": 1.0, "replacement": True}}, {"num_classes": 2**40},
    ],
)  # fmt: skip
def test_a_description_out_of_range_is_refused(change):
    with pytest.raises(ManifestError, match="codec"):
        codec_from_dict(PackedCodec(50, 5, GRID).to_dict() | change)


@pytest.mark.parametrize("how", [{}, {"step": 1 / 100}, {"step": None, "tail": "float32"}, {"stats": False}])
def test_a_packed_codec_names_itself(how):
    codec = PackedCodec(50, 5, GRID, **how)
    assert codec_from_dict(json.loads(json.dumps(codec.to_dict()))) == codec


def test_records_of_another_codec_are_refused():
    labels = made()
    with pytest.raises(
        LabelError, match=r"column record: expected uint8 \[P, \d+\]; found uint8 \[65, \d+\]"
    ):
        packed(labels, stats=False).decode(packed(labels).encode(labels))


def test_no_rows_and_few_rows():
    labels = made()
    codec = packed(labels)
    for rows in (0, 1, 63, 64):
        part = labels.take(slice(0, rows))
        assert np.array_equal(codec.decode(codec.encode(part)).ids, part.ids)


def test_numba_is_imported_only_to_decode():
    code = "import sys, softcache.cache.codecs, softcache.reader.cache; sys.exit('numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
