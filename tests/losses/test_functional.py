"""Losses: against dense divergences, python loops over buckets, and finite differences of the reported value."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from softcache.errors import LabelError, TemperatureError
from softcache.labels import SoftLabels
from softcache.labels.sparsify import dense, top_k
from softcache.losses import cross_entropy, distillation_loss, fit_vocabulary, forward_kl, uld

INF = math.inf
GRID = (1.0, 1.5, 2.5, 4.0)  # of labels that are compared with the truth: on it nothing is interpolated


def make_logits(num_positions: int, num_classes: int, seed: int, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_positions, num_classes, generator=generator, dtype=torch.float64) * scale


def bucket_kl(teacher: list[float], student: list[float], kept: list[int], temperature: float) -> float:
    """The definition, class by class, from the teacher's full logits."""
    p_z = sum(math.exp(x / temperature) for x in teacher)
    s_z = sum(math.exp(x / temperature) for x in student)
    buckets = [[k] for k in kept] + [[j for j in range(len(teacher)) if j not in kept]]
    total = 0.0
    for bucket in buckets:
        p = sum(math.exp(teacher[j] / temperature) for j in bucket) / p_z
        s = sum(math.exp(student[j] / temperature) for j in bucket) / s_z
        if p > 0:
            total += p * math.log(p / s)
    return total


def numerical_gradient(function, x: torch.Tensor, step: float = 1e-5) -> torch.Tensor:
    gradient = torch.zeros_like(x)
    for index in range(x.numel()):
        shift = torch.zeros(x.numel(), dtype=x.dtype)
        shift[index] = step
        shift = shift.reshape(x.shape)
        gradient.view(-1)[index] = (function(x + shift) - function(x - shift)) / (2 * step)
    return gradient


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("num_classes", [10, 1000])
def test_with_every_class_kept_it_is_the_dense_divergence(num_classes, temperature):
    teacher, student = make_logits(4, num_classes, 0), make_logits(4, num_classes, 1).requires_grad_()
    found = forward_kl(student, dense(teacher), temperature=temperature)
    log_p, log_s = (teacher / temperature).log_softmax(1), (student / temperature).log_softmax(1)
    expected = F.kl_div(log_s, log_p, log_target=True, reduction="none").sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    (found_gradient,) = torch.autograd.grad(found.sum(), student)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), student)
    torch.testing.assert_close(found_gradient, expected_gradient, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("temperature", [1.0, 1.5, 4.0])
@pytest.mark.parametrize(("num_classes", "k"), [(10, 1), (10, 3), (10, 9), (100, 10), (1000, 20)])
def test_agrees_with_loops_over_buckets(num_classes, k, temperature):
    teacher, student = make_logits(5, num_classes, 2), make_logits(5, num_classes, 3)
    labels = top_k(teacher, k=k, temperatures=GRID)
    found = forward_kl(student, labels, temperature=temperature)
    for position in range(5):
        expected = bucket_kl(
            teacher[position].tolist(), student[position].tolist(), labels.ids[position].tolist(), temperature
        )
        assert found[position].item() == pytest.approx(expected, rel=1e-9)


def test_masked_classes_of_teacher_and_student_contribute_nothing():
    teacher, student = make_logits(4, 12, 4), make_logits(4, 12, 5)
    teacher[:, 6:] = -INF
    student[0, 6:] = -INF  # a student may mask what the teacher masks
    student[1, 8:10] = -INF
    student.requires_grad_()
    for k in (3, 6, 8, 12):
        labels = top_k(teacher, k=k, temperatures=GRID)
        found = forward_kl(student, labels, temperature=2.5)
        for position in range(4):
            kept = labels.ids[position].tolist()
            expected = bucket_kl(teacher[position].tolist(), student[position].tolist(), kept, 2.5)
            assert found[position].item() == pytest.approx(expected, rel=1e-9)
        (gradient,) = torch.autograd.grad(found.sum(), student)
        assert torch.isfinite(gradient).all()
        assert (gradient[student == -INF] == 0).all()


def test_student_that_masks_a_likely_class_is_infinitely_far():
    teacher, student = make_logits(1, 6, 6), torch.zeros(1, 6, dtype=torch.float64)
    student[0, teacher.argmax()] = -INF
    assert forward_kl(student, top_k(teacher, k=2), temperature=1.0).item() == INF


@pytest.mark.parametrize("k", [3, 10])
def test_unused_slots_contribute_nothing(k):
    labels = top_k(make_logits(4, 10, 7), k=k)
    longer = dataclasses.replace(
        labels,
        ids=torch.cat([labels.ids, torch.full((4, 2), 10)], 1)[:, : min(k + 2, 10)],
        log_probs=torch.cat([labels.log_probs, torch.full((4, 2), -INF)], 1)[:, : min(k + 2, 10)],
    )
    student = make_logits(4, 10, 8).requires_grad_()
    for temperature in (1.0, 3.0):
        found, wanted = (forward_kl(student, x, temperature=temperature) for x in (longer, labels))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
        (gradient,) = torch.autograd.grad(found.sum(), student)
        (wanted_gradient,) = torch.autograd.grad(wanted.sum(), student)
        torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-10, atol=1e-14)


def test_tail_of_the_student_is_right_where_kept_mass_rounds_to_one():
    teacher = torch.zeros(1, 100)
    teacher[0, 0] = 30.0
    student = torch.zeros(1, 100)
    student[0, 0] = 28.0
    student.requires_grad_()
    found = forward_kl(student, top_k(teacher, k=1), temperature=1.0)
    assert torch.isfinite(found).all()
    (gradient,) = torch.autograd.grad(found.sum(), student)
    expected = 99 * (math.exp(-28) - math.exp(-30))  # s_tail - p_tail, far below float32's epsilon
    assert gradient[0, 1:].sum().item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_students_and_labels_are_promoted(dtype):
    teacher, student = make_logits(6, 50, 9).float(), make_logits(6, 50, 10).to(dtype)
    labels = top_k(teacher, k=8)
    found = forward_kl(student, labels, temperature=2.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, forward_kl(student.float(), labels, temperature=2.0))
    stored = dataclasses.replace(labels, log_probs=labels.log_probs.half())
    torch.testing.assert_close(forward_kl(student, stored, temperature=2.0), found, rtol=5e-3, atol=1e-4)


@pytest.mark.parametrize("id_dtype", [torch.uint16, torch.uint32, torch.int32])
def test_ids_of_every_integer_dtype_select_the_same_classes(id_dtype):
    teacher, student = make_logits(2, 50_000, 11).float(), make_logits(2, 50_000, 12).float()
    teacher[0, 2_049] = teacher[1, 40_000] = 30.0
    labels = top_k(teacher, k=3)
    stored = dataclasses.replace(labels, ids=labels.ids.to(id_dtype))
    through_numpy = stored.to_numpy().to_torch()
    wanted = forward_kl(student, labels, temperature=2.0)
    for record in (stored, through_numpy):
        assert torch.equal(forward_kl(student, record, temperature=2.0), wanted)


def test_temperature_per_position_agrees_with_one_number_and_is_differentiable():
    teacher, student = make_logits(3, 12, 13), make_logits(3, 12, 14)
    student[:, 4] = teacher[:, 4] = -INF
    labels = top_k(teacher, k=4)
    temperature = torch.tensor([1.2, 2.0, 5.0], dtype=torch.float64, requires_grad=True)
    found = forward_kl(student, labels, temperature=temperature)
    for position, value in enumerate(temperature.tolist()):
        alone = forward_kl(student, labels, temperature=value)[position]
        torch.testing.assert_close(found[position], alone, rtol=1e-12, atol=0)
    function = lambda t: forward_kl(student, labels, temperature=t).sum()
    (gradient,) = torch.autograd.grad(found.sum(), temperature)
    torch.testing.assert_close(
        gradient, numerical_gradient(function, temperature.detach()), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("k", [1, 4, 9])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_gradient_is_that_of_the_reported_value(alpha, k, temperature):
    labels, targets = top_k(make_logits(3, 9, 15), k=k), torch.tensor([2, 0, 8])
    mask = torch.tensor([True, False, True])

    def reported(student):
        return distillation_loss(student, labels, targets, temperature=temperature, alpha=alpha, mask=mask)

    student = make_logits(3, 9, 16).requires_grad_()
    (gradient,) = torch.autograd.grad(reported(student), student)
    expected = numerical_gradient(reported, student.detach())
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)
    assert (gradient[1] == 0).all()


def test_factor_of_temperature_squared_is_in_value_and_gradient_alike():
    labels = top_k(make_logits(3, 9, 17), k=3)
    student = make_logits(3, 9, 18).requires_grad_()
    plain = forward_kl(student, labels, temperature=4.0).mean()
    scaled = distillation_loss(student, labels, None, temperature=4.0, alpha=1.0)
    assert scaled.item() == pytest.approx(16 * plain.item(), rel=1e-12)
    (plain_gradient,) = torch.autograd.grad(plain, student)
    (scaled_gradient,) = torch.autograd.grad(scaled, student)
    torch.testing.assert_close(scaled_gradient, 16 * plain_gradient, rtol=1e-12, atol=0)


def test_distillation_loss_is_the_masked_mean_of_its_parts():
    teacher, student, targets = make_logits(4, 9, 19), make_logits(4, 9, 20), torch.tensor([1, 2, 3, 4])
    labels, weights = top_k(teacher, k=3, temperatures=GRID), [0.0, 1.0, 0.5, 2.0]
    total = 0.0
    for position, weight in enumerate(weights):
        row = student[position].tolist()
        hard = math.log(sum(math.exp(x) for x in row)) - row[int(targets[position])]
        kept = labels.ids[position].tolist()
        soft = bucket_kl(teacher[position].tolist(), row, kept, 2.5)
        total += weight * (0.4 * hard + 0.6 * 2.5**2 * soft)
    found = distillation_loss(
        student, labels, targets, temperature=2.5, alpha=0.6, mask=torch.tensor(weights)
    )
    assert found.item() == pytest.approx(total / 3.5, rel=1e-9)
    unmasked = distillation_loss(student, labels, targets, temperature=2.5, alpha=0.6)
    ones = distillation_loss(student, labels, targets, temperature=2.5, alpha=0.6, mask=torch.ones(4).bool())
    assert unmasked.item() == pytest.approx(ones.item(), rel=1e-12)


def test_masked_positions_may_hold_anything():
    student = make_logits(3, 9, 21)
    student[2] = math.nan
    labels, targets = top_k(make_logits(3, 9, 22), k=3), torch.tensor([1, 2, -100])
    mask = torch.tensor([True, True, False])
    found = distillation_loss(student, labels, targets, temperature=2.0, alpha=0.5, mask=mask)
    shorter = distillation_loss(student[:2], labels.take([0, 1]), targets[:2], temperature=2.0, alpha=0.5)
    assert found.item() == pytest.approx(shorter.item(), rel=1e-12)


@pytest.mark.parametrize("num_positions", [0, 3])
def test_empty_mask_gives_zero(num_positions):
    student = make_logits(num_positions, 9, 23).requires_grad_()
    labels = top_k(make_logits(num_positions, 9, 24), k=3)
    targets, mask = torch.zeros(num_positions, dtype=torch.int64), torch.zeros(num_positions).bool()
    found = distillation_loss(student, labels, targets, temperature=2.0, alpha=0.5, mask=mask)
    assert found.item() == 0.0
    (gradient,) = torch.autograd.grad(found, student)
    assert (gradient == 0).all()


def test_parts_without_weight_are_not_needed():
    student, labels, targets = (
        make_logits(3, 9, 25),
        top_k(make_logits(3, 9, 26), k=3),
        torch.tensor([1, 2, 3]),
    )
    hard = distillation_loss(student, None, targets, temperature=0.1, alpha=0.0)
    assert hard.item() == pytest.approx(cross_entropy(student, targets).mean().item())
    soft = distillation_loss(student, labels, None, temperature=2.0, alpha=1.0)
    assert soft.item() == pytest.approx(4 * forward_kl(student, labels, temperature=2.0).mean().item())
    with pytest.raises(LabelError, match="expected labels for alpha above 0"):
        distillation_loss(student, None, targets, temperature=2.0, alpha=0.5)
    with pytest.raises(LabelError, match="expected targets for alpha below 1"):
        distillation_loss(student, labels, None, temperature=2.0, alpha=0.5)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_alpha_out_of_range_raises(alpha):
    student, labels = make_logits(2, 5, 27), top_k(make_logits(2, 5, 28), k=2)
    with pytest.raises(LabelError, match=r"alpha: expected a weight in \[0, 1\]"):
        distillation_loss(student, labels, torch.tensor([0, 1]), temperature=2.0, alpha=alpha)


def test_cross_entropy_promotes_half_precision():
    student, targets = make_logits(4, 9, 29), torch.tensor([0, 8, 3, -100])
    found = cross_entropy(student.half(), targets)
    assert found.dtype == torch.float32
    expected = [
        -student.half().double().log_softmax(1)[i, t].item() if t >= 0 else 0.0 for i, t in enumerate(targets)
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (torch.zeros(3, 8), "expected 9 classes as in the labels; found 8; build the student with 9 outputs"),
        (torch.zeros(2, 9), r"expected \[3, 9\], a row per labeled position; found \[2, 9\]"),
        (torch.zeros(9), r"expected \[3, 9\]"),
    ],
)
def test_students_of_another_shape_raise(student, message):
    labels = top_k(make_logits(3, 9, 30), k=2)
    with pytest.raises(LabelError, match=message):
        forward_kl(student, labels, temperature=1.0)


# -- vocabularies of another size --------------------------------------------------------------------------


def padded_kl(teacher: list[float], student: list[float], kept: list[int], temperature: float) -> float:
    """The definition, class by class; a class that one side does not have has no mass there."""
    p = [math.exp(x / temperature) for x in teacher]
    s = [math.exp(x / temperature) for x in student]
    both = min(len(p), len(s))
    buckets = [[k] for k in kept if k < both]
    buckets += [[j for j in range(len(p)) if [j] not in buckets]]
    total = 0.0
    for bucket in buckets:
        p_bucket = sum(p[j] for j in bucket) / sum(p)
        s_bucket = sum(s[j] for j in bucket if j < len(s)) / sum(s)
        total += p_bucket * math.log(p_bucket / s_bucket)
    return total


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("num_student_classes", [7, 11, 12, 13, 20])
@pytest.mark.parametrize("k", [1, 4])
def test_padded_vocabularies_agree_with_loops_over_buckets(k, num_student_classes, temperature):
    teacher, student = make_logits(5, 12, 40), make_logits(5, num_student_classes, 41)
    labels = top_k(teacher, k=k, temperatures=GRID)
    assert num_student_classes > 7 or (labels.ids >= 7).any(), "some class must be folded"
    found = forward_kl(student, labels, temperature=temperature, padded_vocabulary=True)
    for position in range(5):
        expected = padded_kl(
            teacher[position].tolist(), student[position].tolist(), labels.ids[position].tolist(), temperature
        )
        assert found[position].item() == pytest.approx(expected, rel=1e-9)
    if num_student_classes == 12:
        assert torch.equal(found, forward_kl(student, labels, temperature=temperature))


def test_padding_of_the_student_is_as_good_as_a_teacher_that_masks_it():
    teacher, student = make_logits(4, 10, 42), make_logits(4, 13, 43)
    masked = torch.cat([teacher, torch.full((4, 3), -INF, dtype=torch.float64)], 1)
    found = forward_kl(student, dense(teacher), temperature=2.0, padded_vocabulary=True)
    torch.testing.assert_close(found, forward_kl(student, dense(masked), temperature=2.0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("num_student_classes", [6, 9, 14])
def test_gradient_with_a_padded_vocabulary_is_that_of_the_reported_value(num_student_classes):
    labels, targets = top_k(make_logits(3, 9, 44), k=4), torch.tensor([2, 0, 5])
    temperature = torch.tensor([1.2, 2.0, 5.0], dtype=torch.float64, requires_grad=True)

    def reported(student, temperature):
        return distillation_loss(
            student, labels, targets, temperature=temperature, alpha=0.5, padded_vocabulary=True
        )

    student = make_logits(3, num_student_classes, 45).requires_grad_()
    assert torch.autograd.gradcheck(reported, (student, temperature), eps=1e-6, atol=1e-7, rtol=1e-5)


def test_fitting_a_vocabulary_moves_mass_and_loses_none():
    labels = top_k(make_logits(6, 12, 46), k=5)
    softened = labels.at_temperature(2.0)
    for num_student_classes in (5, 12, 15):
        fitted = fit_vocabulary(softened, 12, num_student_classes)
        mass = fitted.log_probs.exp().sum(1) + fitted.log_tail.exp()
        torch.testing.assert_close(mass, torch.ones_like(mass), rtol=1e-6, atol=0)
        assert ((fitted.ids < num_student_classes) | (fitted.log_probs == -INF)).all()


# -- universal logit distillation --------------------------------------------------------------------------


def obvious_uld(teacher: list[float], student: list[float], k: int, temperature: float) -> float:
    p = sorted((math.exp(x / temperature) for x in teacher), reverse=True)
    s = sorted((math.exp(x / temperature) for x in student), reverse=True)
    p, s = ([x / sum(row) for x in row] + [0.0] * 50 for row in (p, s))
    return sum(abs(p[i] - s[i]) for i in range(k)) + abs(sum(p[k:]) - sum(s[k:]))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("num_student_classes", [4, 12, 30])
@pytest.mark.parametrize("k", [1, 5, 12])
def test_uld_agrees_with_the_obvious_loop(k, num_student_classes, temperature):
    teacher, student = make_logits(4, 12, 50), make_logits(4, num_student_classes, 51)
    found = uld(student, top_k(teacher, k=k, temperatures=GRID), temperature=temperature)
    whole = uld(student, dense(teacher), temperature=temperature)
    for position in range(4):
        rows = teacher[position].tolist(), student[position].tolist()
        assert found[position].item() == pytest.approx(obvious_uld(*rows, k, temperature), rel=1e-6)
        assert whole[position].item() == pytest.approx(obvious_uld(*rows, 40, temperature), rel=1e-6)
    assert (found <= whole + 1e-6).all()


def test_uld_compares_ranks_not_classes():
    teacher = make_logits(4, 12, 52)
    shuffled = teacher[:, torch.randperm(12, generator=torch.Generator().manual_seed(0))]
    found = uld(shuffled, dense(teacher), temperature=2.0)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-7)


@pytest.mark.parametrize("num_student_classes", [3, 9, 14])
def test_gradient_of_uld_is_that_of_the_reported_value(num_student_classes):
    labels = top_k(make_logits(3, 9, 53), k=4)
    temperature = torch.tensor([1.2, 2.0, 5.0], dtype=torch.float64, requires_grad=True)
    student = make_logits(3, num_student_classes, 54).requires_grad_()
    function = lambda student, temperature: uld(student, labels, temperature=temperature)
    assert torch.autograd.gradcheck(function, (student, temperature), eps=1e-6, atol=1e-7, rtol=1e-5)


def test_uld_promotes_half_precision_and_checks_positions():
    labels = top_k(make_logits(3, 9, 55).float(), k=4)
    assert uld(make_logits(3, 20, 56).half(), labels, temperature=2.0).dtype == torch.float32
    with pytest.raises(LabelError, match="a row per labeled position"):
        uld(make_logits(2, 9, 57), labels, temperature=2.0)


def test_numpy_labels_unknown_tails_and_low_temperatures_raise():
    student, labels = make_logits(3, 9, 31), top_k(make_logits(3, 9, 32), k=2)
    with pytest.raises(LabelError, match=r"call labels\.to_torch"):
        forward_kl(student, labels.to_numpy(), temperature=1.0)
    with pytest.raises(LabelError, match=r"expected 'bucket', .*; found 'drop'"):
        forward_kl(student, labels, temperature=1.0, tail="drop")
    with pytest.raises(TemperatureError, match=r"temperature 0\.5: below 1 the mass of the dropped"):
        forward_kl(student, labels, temperature=0.5)


def test_vocabularies_above_131072_work():
    teacher, student = torch.zeros(2, 151_936), torch.zeros(2, 151_936)
    teacher[0, 131_072] = teacher[1, 151_935] = 12.0
    labels = top_k(teacher, k=1)
    mass = math.exp(12) / (math.exp(12) + 151_935)
    expected = mass * math.log(mass * 151_936) + (1 - mass) * math.log((1 - mass) * 151_936 / 151_935)
    found = forward_kl(student, labels, temperature=1.0)
    torch.testing.assert_close(found, torch.full((2,), expected), rtol=1e-4, atol=0)
    aligned = forward_kl(teacher, labels, temperature=1.0)
    torch.testing.assert_close(aligned, torch.zeros(2), rtol=0, atol=1e-5)


def truncated_kl(student: torch.Tensor, labels: SoftLabels) -> torch.Tensor:
    """What others do: the kept classes alone."""
    log_s = student.log_softmax(1).gather(1, labels.ids)
    return (labels.log_probs.exp() * (labels.log_probs - log_s)).sum(1)


def test_a_truncated_divergence_goes_negative_where_ours_does_not():
    teacher = torch.zeros(1, 20, dtype=torch.float64)
    student = torch.zeros(1, 20, dtype=torch.float64)
    student[0, :2] = 2.0
    labels = top_k(teacher, k=2)
    assert truncated_kl(student, labels).item() < -0.05
    assert forward_kl(student, labels, temperature=1.0).item() > 0.05


@given(
    rows=st.integers(2, 20).flatmap(
        lambda n: st.tuples(*[st.lists(st.floats(-60, 60), min_size=n, max_size=n)] * 2)
    ),
    k=st.integers(1, 20),
    temperature=st.floats(1.0, 50.0),
)
def test_is_never_negative_and_bounded_by_the_full_divergence(rows, k, temperature):
    teacher, student = (torch.tensor([row], dtype=torch.float64) for row in rows)
    labels = top_k(teacher, k=min(k, len(rows[0])), temperatures=GRID)
    found = forward_kl(student, labels, temperature=temperature).item()
    assert found >= -1e-12
    on_grid = forward_kl(student, labels, temperature=4.0).item()
    full = forward_kl(student, dense(teacher), temperature=4.0).item()
    assert on_grid <= full + 1e-9
