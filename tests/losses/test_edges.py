"""Rows at the edges of a record: one class dropped, a student without the teacher's padding, all classes alike."""

import pytest
import torch

from softcache.errors import LabelError, TemperatureError
from softcache.labels.sparsify import dense, top_k, top_p
from softcache.losses import LOSSES, distillation_loss, make_loss
from softcache.losses.fused import fused_distillation_loss

LOGITS = torch.tensor([[2.0, 1.0, 0.0]])
TARGET = torch.tensor([2])
COMPARING = sorted(name for name, spec in LOSSES.items() if spec.formula is not None)


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 1.0528139), (2.0, 0.2961656)])
def test_dkd_where_the_ground_truth_is_the_only_dropped_class(temperature, expected):
    labels = top_k(LOGITS, k=2, targets_P=TARGET)
    how = {"temperature": temperature, "alpha": 1.0, "loss": "dkd"}
    found = distillation_loss(torch.zeros(1, 3), labels, TARGET, **how)
    assert float(found) / temperature**2 == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("masked", [0, 2])
@pytest.mark.parametrize("name", ["dkd", "nkd"])
@pytest.mark.parametrize("temperature", [1.0, 1.5, 3.3])
def test_what_rounding_leaves_of_the_tail_is_no_mass(name, temperature, masked):
    """Top-k and top-p that drop the ground truth alone give what all classes give, fused as well."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.cat(
        [
            LOGITS.repeat(40, 1) + torch.randn(40, 3, generator=generator),
            torch.full((40, masked), -torch.inf),
        ],
        1,
    )
    targets = teacher.argmin(dim=1) if not masked else teacher[:, :3].argmin(dim=1)
    hidden, weight = torch.randn(40, 5, generator=generator), torch.randn(3 + masked, 5, generator=generator)
    student = hidden @ weight.T
    student[:, 3:] = -torch.inf
    how = {"temperature": temperature, "alpha": 1.0, "loss": make_loss(name)}
    expected = distillation_loss(student, dense(teacher, targets_P=targets), targets, **how)
    share = float(1.0 - teacher.softmax(dim=1).gather(1, targets[:, None]).min())
    for labels in (
        top_k(teacher, k=2, targets_P=targets),
        top_p(teacher, p=share, max_k=3, targets_P=targets),
    ):
        torch.testing.assert_close(
            distillation_loss(student, labels, targets, **how), expected, rtol=1e-4, atol=1e-5
        )
        if not masked:
            fused = fused_distillation_loss(hidden, weight, labels, targets, **how)
            torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tail", ["bucket", "uniform"])
@pytest.mark.parametrize("name", COMPARING)
def test_a_student_without_the_padding_of_a_teacher_whose_classes_are_all_kept(name, tail):
    """Finite, the loss of the teacher over the student's classes, and fused as unfused, gradients included."""
    if tail not in LOSSES.get(name).tails:
        pytest.skip("no such tail")
    generator = torch.Generator().manual_seed(1)
    teacher = torch.cat(
        [2 * torch.randn(6, 9, generator=generator), torch.full((6, 2), -18.0)], dim=1
    ).double()
    targets = torch.randint(0, 9, (6,), generator=generator)
    hidden = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(9, 4, generator=generator, dtype=torch.float64).requires_grad_()
    how = {"temperature": 1.5, "alpha": 1.0, "loss": make_loss(name, tail=tail), "padded_vocabulary": True}
    labels = dense(teacher, targets_P=targets)
    found = distillation_loss(hidden @ weight.T, labels, targets, **how)
    alone = dense(teacher[:, :9], targets_P=targets)
    torch.testing.assert_close(
        found, distillation_loss(hidden @ weight.T, alone, targets, **how), rtol=2e-3, atol=1e-4
    )
    fused = fused_distillation_loss(hidden, weight, labels, targets, **how)
    torch.testing.assert_close(fused, found)
    (expected,), (gradient,) = (torch.autograd.grad(x, weight) for x in (found, fused))
    torch.testing.assert_close(gradient, expected)
    if name == "adaptive_kl":
        return  # its weights are constants of the gradient
    numerical = torch.zeros_like(weight)
    for place in ((0, 0), (4, 2), (8, 3)):
        values = []
        for step in (1e-5, -1e-5):
            moved = weight.detach().clone()
            moved[place] += step
            values.append(fused_distillation_loss(hidden, moved, labels, targets, **how))
        numerical[place] = (values[0] - values[1]) / 2e-5
        assert float(gradient[place]) == pytest.approx(float(numerical[place]), rel=1e-4, abs=1e-6)


def test_mass_on_classes_that_the_student_lacks_is_refused():
    labels = dense(torch.tensor([[3.0, 0.0, -20.0], [0.0, 1.0, 2.0]]))
    with pytest.raises(LabelError, match=r"2 classes.* gives 0\.67 at position 1; expected at most 0\.001"):
        distillation_loss(torch.zeros(2, 2), labels, None, temperature=1.0, alpha=1.0, padded_vocabulary=True)


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "reverse_kl"])
def test_rows_without_weight_may_hold_anything(name):
    generator = torch.Generator().manual_seed(2)
    teacher, student = torch.randn(5, 8, generator=generator), torch.randn(5, 8, generator=generator)
    teacher[3], student[3] = float("nan"), float("nan")
    student[4] = float("inf")
    mask = torch.tensor([1.0, 0.5, 1.0, 0.0, 0.0])
    student.requires_grad_()
    how = {"temperature": 2.0, "alpha": 0.7, "loss": name}
    targets = torch.tensor([0, 1, 2, 3, 4])
    found = distillation_loss(student, top_k(teacher, k=3, check=False), targets, mask=mask, **how)
    (gradient,) = torch.autograd.grad(found, student)
    rows = [0, 1, 2]
    expected = distillation_loss(
        student[rows], top_k(teacher[rows], k=3), targets[rows], mask=mask[rows], **how
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0].nan_to_num(0.0))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_standardized_teacher_whose_classes_are_all_alike_is_uniform(temperature):
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(2, 6, generator=generator)
    loss = make_loss("forward_kl", standardize=True)
    how = {"temperature": temperature, "alpha": 1.0}
    z = (student - student.mean(1, keepdim=True)) / student.std(1, correction=0, keepdim=True)
    expected = (temperature**2 * (-torch.tensor(6.0).log() - (z / temperature).log_softmax(1)).mean(1)).mean()
    for teacher in (torch.full((2, 6), 3.0), 1e-6 * torch.randn(2, 6, generator=generator)):
        for labels in (dense(teacher), top_k(teacher, k=6)):
            torch.testing.assert_close(
                distillation_loss(student, labels, None, loss=loss, **how), expected, rtol=1e-4, atol=1e-5
            )
    flat = 0.002 * torch.randn(2, 6, generator=generator)
    with pytest.raises(TemperatureError, match="too low for these labels; set standardize = false"):
        distillation_loss(student, top_k(flat, k=2), None, loss=loss, temperature=1.0, alpha=1.0)
