"""The record: softening against dense distributions, and what it refuses."""

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softcache.errors import LabelError, TemperatureError
from softcache.labels import DEFAULT_TEMPERATURES, STATS, SoftLabels, collect, concat
from softcache.labels.sparsify import dense, row_seeds, sample, top_k

INF = math.inf
COLUMNS = ("ids", "log_probs", "log_tail", "target_log_prob", "stats")


def make_logits(num_positions: int, num_classes: int, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_classes)
    return torch.randn(num_positions, num_classes, generator=generator, dtype=torch.float64) * scale


def make_labels(num_positions: int = 5, num_classes: int = 20, k: int = 4) -> SoftLabels:
    targets = torch.arange(num_positions) % num_classes
    return top_k(make_logits(num_positions, num_classes), k=k, targets_P=targets)


def with_unused_slots(labels: SoftLabels, *, extra: int) -> SoftLabels:
    """The same record with `extra` empty slots behind the kept ones."""
    num_positions = len(labels)
    ids = torch.full((num_positions, extra), labels.num_classes)
    log_probs = torch.full((num_positions, extra), -INF, dtype=labels.log_probs.dtype)
    return dataclasses.replace(
        labels,
        ids=torch.cat([labels.ids, ids], 1),
        log_probs=torch.cat([labels.log_probs, log_probs], 1),
    )


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("temperature", DEFAULT_TEMPERATURES)
@pytest.mark.parametrize(("num_classes", "k"), [(10, 10), (10, 3), (100, 99), (1000, 5)])
def test_softened_labels_are_the_dense_softmax_at_the_grid(kind, temperature, num_classes, k):
    logits = make_logits(5, num_classes)
    labels = top_k(logits, k=k)
    softened = (labels if kind == "torch" else labels.to_numpy()).at_temperature(temperature)
    truth = (logits / temperature).softmax(1)
    kept = truth.gather(1, labels.ids)
    np.testing.assert_allclose(np.exp(np.asarray(softened.log_probs)), kept, rtol=1e-10)
    np.testing.assert_allclose(np.exp(np.asarray(softened.log_tail)), 1 - kept.sum(1), atol=1e-10)


@pytest.mark.parametrize("temperature", [1.03, 2.0, 3.0, 6.0, 20.0, 1000.0])
def test_softened_labels_are_nearly_the_dense_softmax_between_the_grid(temperature):
    logits = make_logits(20, 500)
    labels = top_k(logits, k=10)
    kept = (logits / temperature).softmax(1).gather(1, labels.ids)
    torch.testing.assert_close(labels.at_temperature(temperature).log_probs.exp(), kept, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(labels.kept_mass(temperature), kept.sum(1), rtol=2e-4, atol=2e-4)


def test_top_128_of_a_128k_vocabulary_hold_little_mass_at_four():
    logits = make_logits(2, 131_072, scale=2.0).float()
    labels = top_k(logits, k=128)
    kept = (logits.double() / 4).softmax(1).gather(1, labels.ids)
    assert (kept.sum(1) < 0.05).all()
    torch.testing.assert_close(labels.at_temperature(4.0).log_probs.exp().double(), kept, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_kept_and_tail_always_add_up_to_one(kind, dtype):
    labels = make_labels(30, 50, k=6)
    labels = dataclasses.replace(labels, log_probs=labels.log_probs.to(getattr(torch, dtype)))
    labels = labels if kind == "torch" else labels.to_numpy()
    for temperature in (1.0, 1.7, 5.0, 50.0):
        softened = labels.at_temperature(temperature)
        total = np.exp(np.asarray(softened.log_probs)).sum(1) + np.exp(np.asarray(softened.log_tail))
        np.testing.assert_allclose(total, 1.0, atol=1e-6)
        assert str(softened.log_probs.dtype).endswith("float64")  # the tail and stats are float64 here


def test_half_precision_is_promoted_to_float32():
    labels = top_k(make_logits(4, 30).float(), k=5)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        softened = dataclasses.replace(labels, log_probs=labels.log_probs.to(dtype)).at_temperature(2.0)
        assert softened.log_probs.dtype == softened.log_tail.dtype == torch.float32


def test_float16_never_lifts_the_kept_mass_above_one():
    # Rounded to float16, the probabilities of confident rows add up to more than 1 in every fifth row.
    logits = make_logits(4000, 12)
    logits[:, 0] += torch.linspace(0, 25, 4000, dtype=torch.float64)
    labels = top_k(logits.float(), k=8)
    stored = dataclasses.replace(labels, log_probs=labels.log_probs.half())
    assert (stored.log_probs.double().exp().sum(1) > 1).any()
    for record in (stored, stored.to_numpy()):
        for temperature in (1.0, 1.5, 4.0):
            mass = np.asarray(record.kept_mass(temperature))
            assert (mass <= 1).all()
            log_probs = np.asarray(record.at_temperature(temperature).log_probs, dtype=np.float64)
            assert (np.exp(log_probs).sum(1) <= 1 + 1e-6).all()


def test_temperatures_per_position_agree_with_one_number():
    labels = make_labels(5)
    temperatures = torch.tensor([1.0, 1.3, 2.0, 4.0, 30.0], dtype=torch.float64)
    for record, array in ((labels, temperatures), (labels.to_numpy(), temperatures.numpy())):
        together = record.at_temperature(array)
        for position, temperature in enumerate(temperatures.tolist()):
            alone = record.take([position]).at_temperature(temperature)
            np.testing.assert_allclose(together.log_probs[position], alone.log_probs[0], rtol=1e-12)
            np.testing.assert_allclose(together.log_tail[position], alone.log_tail[0], rtol=1e-12)


def test_softening_without_stats_is_exact_at_the_grid_and_close_beside():
    logits = make_logits(5, 60)
    labels = dataclasses.replace(top_k(logits, k=6), stats=None, target_log_prob=None)
    for temperature, tolerance in ((2.0, 1e-12), (3.0, 1e-3), (15.0, 1e-3)):
        kept = (logits / temperature).softmax(1).gather(1, labels.ids)
        torch.testing.assert_close(
            labels.at_temperature(temperature).log_probs.exp(), kept, rtol=0, atol=tolerance
        )


def test_masked_classes_do_not_count_as_dropped():
    logits = make_logits(4, 400)
    logits[:, 20:] = -INF
    labels = top_k(logits, k=5)
    for temperature in (8.0, 40.0, 1000.0):
        kept = (logits / temperature).softmax(1).gather(1, labels.ids)
        torch.testing.assert_close(
            labels.at_temperature(temperature).log_probs.exp(), kept, rtol=1e-3, atol=0
        )


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 30.0])
def test_unused_slots_change_nothing(kind, temperature):
    labels = make_labels()
    longer = with_unused_slots(labels, extra=3)
    if kind == "numpy":
        labels, longer = labels.to_numpy(), longer.to_numpy()
    for stats in (True, False):
        if not stats:
            labels, longer = (dataclasses.replace(x, stats=None) for x in (labels, longer))
        found, wanted = longer.at_temperature(temperature), labels.at_temperature(temperature)
        np.testing.assert_allclose(found.log_probs[:, :4], wanted.log_probs, rtol=1e-12)
        np.testing.assert_allclose(found.log_tail, wanted.log_tail, rtol=1e-12)
        assert (np.asarray(found.log_probs[:, 4:]) == -INF).all()


def test_gradient_agrees_with_finite_differences():
    labels = make_labels(4, 20, k=3)
    temperatures = torch.tensor([1.2, 2.0, 5.0, 20.0], dtype=torch.float64, requires_grad=True)

    def soften(log_probs, log_tail, temperatures):
        record = dataclasses.replace(labels, log_probs=log_probs, log_tail=log_tail)
        softened = record.at_temperature(temperatures)
        return softened.log_probs, softened.log_tail

    leaves = (
        labels.log_probs.clone().requires_grad_(),
        labels.log_tail.clone().requires_grad_(),
        temperatures,
    )
    assert torch.autograd.gradcheck(soften, leaves, eps=1e-7)


@pytest.mark.parametrize("k", [4, 18])
def test_gradients_are_never_nan_with_minus_infinity_around(k):
    logits = make_logits(3, 20)
    logits[0, 5:] = -INF  # at k = 18 more slots than classes with p > 0
    logits[1, 2:] = -INF
    labels = with_unused_slots(top_k(logits, k=k), extra=2)
    log_probs, log_tail = labels.log_probs.clone().requires_grad_(), labels.log_tail.clone().requires_grad_()
    temperature = torch.full((3,), 2.0, dtype=torch.float64, requires_grad=True)
    softened = dataclasses.replace(labels, log_probs=log_probs, log_tail=log_tail).at_temperature(temperature)
    assert not softened.log_probs.isnan().any()
    finite = softened.log_probs[softened.log_probs > -INF].sum() + softened.log_tail.exp().sum()
    finite.backward()
    for leaf in (log_probs, log_tail, temperature):
        assert torch.isfinite(leaf.grad).all()
    assert (log_probs.grad[labels.log_probs == -INF] == 0).all()


@pytest.mark.parametrize("bad", [0.0, -2.0, math.nan, INF])
def test_temperatures_out_of_range_raise(bad):
    for labels in (make_labels(), make_labels().to_numpy()):
        with pytest.raises(TemperatureError, match="found"):
            labels.at_temperature(bad)
        with pytest.raises(TemperatureError, match="found"):
            labels.kept_mass(bad)


@pytest.mark.parametrize("temperature", [0.05, 0.5, 0.999])
def test_a_record_of_all_classes_serves_every_temperature(temperature):
    logits = make_logits(6, 20)
    for labels in (dense(logits), dense(logits).to_numpy()):
        found = torch.as_tensor(labels.at_temperature(temperature).log_probs)
        expected = (logits / temperature).log_softmax(1).sort(descending=True).values
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_below_one_the_tail_is_within_the_tolerance_or_the_record_refuses():
    logits = make_logits(40, 60)
    served, refused = 0, 0
    for k in (2, 10, 40):
        for temperature in (0.3, 0.7, 0.9, 0.98):
            labels = top_k(logits, k=k)
            for row in range(40):
                expected = (logits[row] / temperature).softmax(0)[labels.ids[row]]
                one = labels.take([row])
                try:
                    found = one.at_temperature(temperature)
                except TemperatureError:
                    refused += 1
                else:
                    served += 1
                    assert abs(float(found.log_probs.exp().sum() - expected.sum())) <= 2e-3
    assert served > 50
    assert refused > 50
    with pytest.raises(TemperatureError, match='policy = "dense"'):
        top_k(logits, k=2).at_temperature(0.3)


def test_temperatures_on_both_sides_of_one_are_served_row_by_row():
    logits = make_logits(4, 20)
    labels = dense(logits)
    temperatures = torch.tensor([0.5, 1.0, 2.0, 0.9], dtype=torch.float64, requires_grad=True)
    found = labels.at_temperature(temperatures)
    expected = (logits / temperatures.detach()[:, None]).log_softmax(1).sort(descending=True).values
    torch.testing.assert_close(found.log_probs.detach(), expected, rtol=1e-9, atol=1e-9)
    confident = top_k(torch.tensor([[12.0, 0.0, -1.0, -2.0]] * 2, dtype=torch.float64), k=3)
    mixed = confident.at_temperature(torch.tensor([0.8, 1.5], dtype=torch.float64))
    for row, T in enumerate((0.8, 1.5)):
        single = confident.take([row]).at_temperature(T)
        torch.testing.assert_close(mixed.log_tail[[row]], single.log_tail)
    found.log_probs[:, 0].sum().backward()
    assert bool(temperatures.grad.isfinite().all())


def test_drawn_classes_are_refused_below_one():
    seeds = row_seeds(np.arange(3, dtype=np.uint64), np.ones(3, np.int64), np.zeros(3, np.int64), 0)
    with pytest.raises(TemperatureError, match="drawn at random"):
        sample(make_logits(3, 20), draws=4, seeds_P=seeds).at_temperature(0.8)


def test_temperatures_of_the_other_kind_raise():
    with pytest.raises(TemperatureError, match="expected a number, or Tensor"):
        make_labels().at_temperature(np.full(5, 2.0))
    with pytest.raises(TemperatureError, match="expected a number, or ndarray"):
        make_labels().to_numpy().at_temperature(torch.full((5,), 2.0))


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int32, np.int64])
def test_ids_of_every_integer_dtype_travel_unchanged(dtype):
    ids = np.array(
        [[65_534, 32_768], [2_049, 40_000], [2_047, 0]], dtype=dtype
    )  # int16 wraps, float16 rounds
    labels = SoftLabels(
        ids=ids,
        log_probs=np.log(np.array([[0.5, 0.25]] * 3, dtype=np.float16)),
        log_tail=np.log(np.array([[0.25]] * 3, dtype=np.float32)),
        num_classes=65_535,
        temperatures=(1.0,),
    )
    tensors = labels.to_torch()
    for record in (labels, tensors, tensors.to_numpy(), tensors.take([0, 1, 2]), concat([tensors])):
        assert record.ids.dtype == (getattr(torch, np.dtype(dtype).name) if record.is_torch else dtype)
        assert record.ids.tolist() == ids.tolist()
        assert record.at_temperature(2.0).ids.tolist() == ids.tolist()
    assert tensors.take([2, 0]).ids.tolist() == ids[[2, 0]].tolist()


def test_conversion_shares_memory_but_not_with_read_only_arrays():
    arrays = make_labels().to_numpy()
    tensors = arrays.to_torch()
    arrays.log_tail[0, 0] = -7.0
    assert tensors.log_tail[0, 0] == -7.0
    assert tensors.to_torch().log_tail is tensors.log_tail
    arrays.log_tail.flags.writeable = False
    copied = arrays.to_torch()
    copied.log_tail[0, 0] = -8.0
    assert arrays.log_tail[0, 0] == -7.0
    assert arrays.to_torch("cpu").is_torch


def test_what_is_pinned_is_no_more_than_the_labels(monkeypatch):
    """torch pins all from a tensor's first number to its last, and copies what does not lie together once more."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    labels = make_labels(num_positions=40)
    table = np.zeros((40, 100))  # a memory map's: all columns of a row lie together
    names = ("log_probs", "log_tail", "target_log_prob")
    arrays, start = {}, 0
    for name in names:
        values = getattr(labels, name).numpy().reshape(40, -1)
        table[:, start : start + values.shape[1]] = values
        column = table[:, start : start + values.shape[1]]
        arrays[name], start = column.reshape(getattr(labels, name).shape), start + values.shape[1]
    found = dataclasses.replace(labels.to_numpy(), **arrays).pin_memory()
    assert len(pinned) == 5
    for name in names:
        assert torch.equal(getattr(found, name), getattr(labels, name))
    assert all(x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes for x in pinned)


def test_bfloat16_becomes_float32_in_numpy():
    labels = make_labels()
    labels = dataclasses.replace(labels, log_probs=labels.log_probs.bfloat16())
    np.testing.assert_array_equal(labels.to_numpy().log_probs, labels.log_probs.float().numpy())


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize(
    "indices",
    [
        [3, 0, 3],
        slice(1, 4),
        np.array([4, 2]),
        np.array([True, False, True, False, True]),
        np.array([], dtype=int),
        torch.tensor([1, 2]),
    ],
)
def test_take_picks_rows_of_every_column(kind, indices):
    labels = make_labels()
    taken = (labels if kind == "torch" else labels.to_numpy()).take(indices)
    rows = np.arange(5)[np.asarray(indices) if isinstance(indices, torch.Tensor) else indices]
    assert len(taken) == len(rows)
    for name in COLUMNS:
        np.testing.assert_array_equal(np.asarray(getattr(taken, name)), getattr(labels, name).numpy()[rows])


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_concat_is_the_inverse_of_take(kind):
    labels = make_labels() if kind == "torch" else make_labels().to_numpy()
    joined = concat([labels.take(slice(0, 2)), labels.take(slice(2, 2)), labels.take(slice(2, 5))])
    assert joined.is_torch == (kind == "torch")
    for name in COLUMNS:
        np.testing.assert_array_equal(np.asarray(getattr(joined, name)), np.asarray(getattr(labels, name)))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: make_labels(num_classes=21), "record 1: expected num_classes 20"),
        (lambda: make_labels(k=5), "record 1: expected k 4"),
        (lambda: make_labels().to_numpy(), "record 1: expected is_torch True"),
        (lambda: top_k(make_logits(2, 20), k=4, temperatures=(1.0,)), "record 1: expected temperatures"),
        (lambda: top_k(make_logits(2, 20), k=4), "expected target_log_prob in every record"),
    ],
)
def test_concat_refuses_records_that_differ(other, message):
    with pytest.raises(LabelError, match=message):
        concat([make_labels(), other()])


def test_concat_of_nothing_raises():
    with pytest.raises(LabelError, match="at least one label record"):
        concat([])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": np.zeros(5, dtype=int)}, r"ids: expected shape \[P, K\]"),
        ({"ids": np.zeros((5, 0), dtype=int)}, r"K >= 1"),
        ({"ids": np.zeros((5, 4))}, "ids: expected an integer dtype"),
        ({"log_probs": np.zeros((5, 4), dtype=int)}, "log_probs: expected a floating-point dtype"),
        ({"log_probs": np.zeros((5, 3))}, r"log_probs: expected shape \[5, 4\]"),
        ({"log_tail": np.zeros((5, 7))}, r"log_tail: expected shape \[5, 8\]"),
        ({"stats": np.zeros((5, 3))}, r"stats: expected shape \[5, 4\]"),
        ({"target_log_prob": np.zeros((4,))}, r"target_log_prob: expected shape \[5\]"),
        ({"log_tail": torch.zeros(5, 8)}, "log_tail: expected arrays of one kind"),
        ({"log_tail": [[0.0]]}, "log_tail: expected arrays of one kind"),
        ({"num_classes": 3}, "found K = 4"),
        ({"temperatures": (2.0,) * 8}, r"expected 1\.0 first"),
    ],
)
def test_malformed_records_raise(changes, message):
    with pytest.raises(LabelError, match=message):
        dataclasses.replace(make_labels().to_numpy(), **changes)


def test_record_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError, match="num_classes"):
        make_labels().num_classes = 3


def test_stats_columns_are_those_that_sparsify_writes():
    assert STATS == ("entropy", "logit_mean", "logit_std", "support")
    stats = dense(torch.zeros(1, 4, dtype=torch.float64)).stats
    torch.testing.assert_close(
        stats, torch.tensor([[math.log(4), -math.log(4), 0.0, 4.0]], dtype=torch.float64)
    )


def test_reading_a_record_needs_no_torch():
    program = (
        "import sys, numpy as np\n"
        "from softcache.labels import SoftLabels\n"
        "r = SoftLabels(ids=np.array([[0]]), log_probs=np.log(np.array([[.5]])), log_tail=np.log(np.array([[.5]])),"
        " num_classes=3, temperatures=(1.0,))\n"
        "assert r.at_temperature(2.0).log_probs.shape == (1, 1)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@given(
    logits=st.lists(st.floats(-200, 200), min_size=2, max_size=25),
    k=st.integers(1, 25),
    temperature=st.floats(1.0, 100.0),
)
def test_kept_mass_lies_between_the_share_of_the_kept_classes_and_one(logits, k, temperature):
    k = min(k, len(logits))
    labels = top_k(torch.tensor([logits], dtype=torch.float64), k=k)
    assert k / len(logits) - 1e-9 <= labels.kept_mass(temperature).item() <= 1


def test_collect_is_concat_without_keeping_the_parts():
    labels = top_k(torch.randn(7, 9), k=3, targets_P=torch.arange(7))
    parts = [slice(0, 2), slice(2, 3), slice(3, 7)]
    whole, joined = collect((labels.take(p) for p in parts), 7), concat([labels.take(p) for p in parts])
    for name in ("ids", "log_probs", "log_tail", "target_log_prob", "stats"):
        assert torch.equal(getattr(whole, name), getattr(joined, name)), name
    assert collect([labels], 7) is labels


@pytest.mark.parametrize("parts", [[slice(0, 2)], [slice(0, 4), slice(0, 4)], []])
def test_collect_refuses_another_number_of_positions(parts):
    labels = top_k(torch.randn(7, 9), k=3)
    with pytest.raises(LabelError, match="expected records of 7 positions; found"):
        collect((labels.take(p) for p in parts), 7)
