"""Logits into records: against python loops over every class."""

import math

import pytest
import torch

from softcache.errors import LabelError, TemperatureError
from softcache.labels import DEFAULT_TEMPERATURES
from softcache.labels.sparsify import Dense, TopK, dense, describe_fault, label_settings, logit_faults, top_k

INF = math.inf


def make_logits(
    num_positions: int, num_classes: int, dtype=torch.float64, scale: float = 3.0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_classes)
    return (torch.randn(num_positions, num_classes, generator=generator, dtype=torch.float64) * scale).to(
        dtype
    )


def reference(logits: list[float], k: int) -> dict:
    log_z = math.log(sum(math.exp(x) for x in logits))
    log_probs = [x - log_z for x in logits]
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    kept, dropped = order[:k], [log_probs[i] for i in order[k:] if logits[i] > -INF]
    alive = [x for x in log_probs if x > -INF]
    mean = sum(alive) / len(alive)
    return {
        "ids": kept,
        "log_probs": [log_probs[i] for i in kept],
        "log_tail": [
            math.log(sum(math.exp(x / t) for x in dropped)) if dropped else -INF for t in DEFAULT_TEMPERATURES
        ],
        "stats": [
            -sum(math.exp(x) * x for x in alive),
            mean,
            math.sqrt(sum((x - mean) ** 2 for x in alive) / len(alive)),
            len(alive),
        ],
    }


@pytest.mark.parametrize(("num_classes", "k"), [(10, 1), (10, 9), (10, 10), (100, 10), (1000, 7)])
@pytest.mark.parametrize("masked", [False, True])
def test_agrees_with_loops_over_every_class(num_classes, k, masked):
    logits = make_logits(6, num_classes)
    if masked:
        logits[:, 1::3] = -INF
    labels = top_k(logits, k=k, targets_P=torch.arange(6) % 10)
    assert labels.num_classes == num_classes
    assert labels.ids.dtype == torch.int64
    for position, row in enumerate(logits.tolist()):
        expected = reference(row, k)
        assert labels.ids[position].tolist() == expected["ids"]
        for name in ("log_probs", "log_tail", "stats"):
            expected_row = torch.tensor(expected[name], dtype=torch.float64)
            torch.testing.assert_close(getattr(labels, name)[position], expected_row, rtol=1e-12, atol=1e-12)
        log_z = math.log(sum(math.exp(x) for x in row))
        assert labels.target_log_prob[position].item() == pytest.approx(row[position % 10] - log_z, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_logits_are_worked_on_in_float32(dtype):
    logits = make_logits(5, 50, dtype)
    found, wanted = top_k(logits, k=4), top_k(logits.double(), k=4)
    for name in ("log_probs", "log_tail", "stats"):
        assert getattr(found, name).dtype == torch.float32
        assert getattr(wanted, name).dtype == torch.float64
        torch.testing.assert_close(getattr(found, name).double(), getattr(wanted, name), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.ids, wanted.ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_logits_keep_the_lower_id(dtype):
    logits = torch.tensor(
        [[0.0, 1.0, -0.0, 1.0, 0.0, -2.0, 0.0], [-1.0, -1.0, -INF, -1.0, -INF, -1.0, -1.0]], dtype=dtype
    )
    assert top_k(logits, k=4).ids.tolist() == [[1, 3, 0, 2], [0, 1, 3, 5]]
    assert top_k(torch.zeros(1, 3000, dtype=dtype), k=300).ids.tolist() == [list(range(300))]
    assert dense(logits).ids.tolist() == [[1, 3, 0, 2, 4, 6, 5], [0, 1, 3, 5, 6, 2, 4]]


def test_order_holds_for_every_magnitude_and_sign():
    values = torch.tensor([[-1e-40, 1e-40, 3e38, -3e38, -1.5, 1.5, 0.0, -1e-3, 2.0, 1e-3]])
    assert top_k(values, k=10).ids.tolist() == [values[0].sort(descending=True).indices.tolist()]


def test_dense_keeps_all_and_has_no_tail():
    logits = make_logits(4, 12)
    labels = dense(logits)
    assert labels.k == 12
    assert (labels.log_tail == -INF).all()
    assert torch.equal(labels.log_probs, logits.log_softmax(1).sort(descending=True).values)


def test_masked_classes_leave_the_tail_empty_when_all_others_are_kept():
    logits = torch.full((1, 8), -INF)
    logits[0, 2:5] = torch.tensor([1.0, 3.0, 2.0])
    labels = top_k(logits, k=5)
    assert labels.ids.tolist() == [[3, 4, 2, 0, 1]]
    assert (labels.log_tail == -INF).all()
    assert labels.stats[0, 3] == 3
    assert labels.kept_mass(4.0).item() == pytest.approx(1.0)


@pytest.mark.parametrize("chunk_positions", [1, 3, 7, 100])
def test_chunks_do_not_change_the_result(chunk_positions):
    logits, targets = make_logits(7, 30, torch.float32), torch.arange(7)
    whole = top_k(logits, k=5, targets_P=targets)
    chunked = top_k(logits, k=5, targets_P=targets, chunk_positions=chunk_positions)
    for name in ("ids", "log_probs", "log_tail", "target_log_prob", "stats"):
        assert torch.equal(getattr(whole, name), getattr(chunked, name)), name


def test_no_positions_give_an_empty_record():
    labels = top_k(torch.zeros(0, 9), k=3, targets_P=torch.zeros(0, dtype=torch.int64))
    assert (len(labels), labels.k, tuple(labels.log_tail.shape)) == (0, 3, (0, len(DEFAULT_TEMPERATURES)))


def test_tail_of_a_confident_row_keeps_its_digits():
    logits = torch.zeros(1, 1000)
    logits[0, 5] = 40.0
    tail = top_k(logits, k=1).log_tail[0, 0].item()  # 1 - p would round to 0
    assert tail == pytest.approx(math.log(999) - 40.0, abs=1e-5)


def test_vocabularies_above_131072_keep_their_ids():
    logits = torch.zeros(2, 151_936)
    logits[0, 131_072] = logits[1, 151_935] = 20.0
    labels = top_k(logits, k=2, targets_P=torch.tensor([131_072, 151_935]))
    assert labels.ids[:, 0].tolist() == [131_072, 151_935]
    assert (labels.ids[:, 1] == 0).all()
    assert torch.equal(labels.target_log_prob, labels.log_probs[:, 0])


def test_inputs_are_left_alone_and_no_gradient_is_kept():
    logits = make_logits(3, 20, torch.float32).requires_grad_()
    before = logits.detach().clone()
    labels = top_k(logits, k=3)
    assert torch.equal(logits.detach(), before)
    assert not labels.log_probs.requires_grad
    assert not labels.log_tail.requires_grad


FAULTY = torch.tensor([[0.0, 1.0], [math.nan, INF], [INF, 0.0], [-INF, -INF], [-INF, 0.0], [math.nan, -INF]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_faults_are_told_apart(dtype):
    faults = logit_faults(FAULTY.to(dtype))
    assert faults.dtype == torch.uint8
    assert faults.tolist() == [0, 1, 2, 3, 0, 1]
    assert [describe_fault(code) for code in range(4)] == [
        "no fault",
        "a NaN logit",
        "a +inf logit",
        "all logits -inf",
    ]


@pytest.mark.parametrize(
    ("row", "message"), [(1, "a NaN logit"), (2, r"a \+inf logit"), (3, "all logits -inf")]
)
def test_faulty_logits_raise_with_their_position(row, message):
    logits = FAULTY[[0, 4, row, row]]
    with pytest.raises(LabelError, match=f"logits, position 2: .* found {message}") as caught:
        top_k(logits, k=1)
    assert caught.value.position == 2


def test_without_check_only_the_faulty_rows_are_spoilt():
    labels = top_k(FAULTY[[0, 1]], k=1, check=False)
    assert torch.equal(labels.log_probs[0], top_k(FAULTY[:1], k=1).log_probs[0])
    assert labels.log_probs[1].isnan().all()


@pytest.mark.parametrize("bad", [-1, 10, -100, 2**40])
@pytest.mark.parametrize("check", [False, True])
def test_targets_out_of_range_raise_with_their_position(bad, check):
    with pytest.raises(LabelError, match=r"targets, position 1: expected a class in \[0, 10\)") as caught:
        top_k(make_logits(3, 10), k=2, targets_P=torch.tensor([9, bad, bad]), check=check)
    assert caught.value.position == 1


@pytest.mark.parametrize("targets", [torch.zeros(2, dtype=torch.int64), torch.zeros(3)])
def test_targets_of_another_shape_or_dtype_raise(targets):
    with pytest.raises(LabelError, match=r"targets: expected \[3\] integers"):
        top_k(make_logits(3, 10), k=2, targets_P=targets)


@pytest.mark.parametrize("k", [0, -1, 11])
def test_k_out_of_range_raises(k):
    with pytest.raises(LabelError, match=r"labels\.k: expected 1 to 10"):
        top_k(make_logits(3, 10), k=k)


@pytest.mark.parametrize(
    "logits", [torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)]
)
def test_logits_of_another_shape_or_dtype_raise(logits):
    with pytest.raises(LabelError, match=r"expected floating-point \[P, V\]"):
        top_k(logits, k=1)


def test_settings_choose_the_policy():
    logits = make_logits(3, 10)
    assert TopK(k=4).apply(logits).k == 4
    assert Dense().apply(logits).k == 10
    labels = TopK(k=2, temperatures=(1.0, 3.0)).apply(logits, targets_P=torch.tensor([1, 2, 3]))
    assert labels.temperatures == (1.0, 3.0)
    assert labels.log_tail.shape == (3, 2)
    assert labels.target_log_prob is not None
    with pytest.raises(LabelError, match="found 11"):
        TopK(k=11).apply(logits)


def test_settings_take_what_toml_gives():
    assert label_settings(temperatures=[1, 2.5, 4]).temperatures == (1.0, 2.5, 4.0)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"k": 0}, "greater than or equal to 1"),
        ({"k": "3"}, "valid integer"),
        ({"k": 2.0}, "valid integer"),
        ({"num_views": 0}, "greater than or equal to 1"),
        ({"policy": "top"}, "did you mean top_p or top_k"),
        ({"policy": "top_p", "p": 0.0}, "p"),
        ({"policy": "sample", "num_samples": 0}, "num_samples"),
        ({"policy": "sample", "proposal_temperature": 1.5}, "among the temperatures"),
        ({"policy": "hybrid", "proposal_temperature": 0.5}, "proposal_temperature"),
        ({"top": 3}, "Extra inputs"),
        ({"temperatures": [2.0, 4.0]}, r"expected 1\.0 first"),
        ({"temperatures": [1.0, 4.0, 4.0]}, "strictly increasing"),
        ({"temperatures": []}, r"expected 1\.0 first"),
        ({"temperatures": ["1"]}, "valid number"),
    ],
)
def test_bad_settings_raise(table, message):
    with pytest.raises(ValueError, match=message):
        label_settings(**table)


def test_malformed_grid_raises():
    with pytest.raises(TemperatureError, match=r"expected 1\.0 first"):
        top_k(make_logits(2, 5), k=2, temperatures=(2.0,))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_agrees_and_does_not_wait():
    logits, targets = make_logits(16, 1000, torch.float32), torch.arange(16)
    wanted = top_k(logits, k=10, targets_P=targets)
    on_device = logits.cuda()
    top_k(on_device, k=10, check=False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = top_k(on_device, k=10, targets_P=targets.cuda(), check=False, chunk_positions=5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.ids.cpu(), wanted.ids)
    for name in ("log_probs", "log_tail", "target_log_prob", "stats"):
        torch.testing.assert_close(getattr(found, name).cpu(), getattr(wanted, name), rtol=1e-5, atol=1e-5)
