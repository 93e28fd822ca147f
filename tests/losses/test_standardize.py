"""Logit standardisation: against z-scores of whole logits, and what it refuses."""

import dataclasses
import math

import pytest
import torch

from softcache.errors import LabelError, TemperatureError
from softcache.labels.sparsify import dense, dense_labels_unsorted, top_k
from softcache.losses import distillation_loss, forward_kl, make_loss, standardized
from softcache.losses.fused import fused_distillation_loss
from tests.losses.test_functional import make_logits
from tests.support.losses_dense import COMPARING, DENSE, TARGETS, WITH_TAIL, P, V

INF = math.inf


def z_scores(logits):
    return (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True, correction=0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", DENSE)
def test_it_is_the_loss_of_z_scores(name, temperature):
    teacher, student = make_logits(P, V, 0), make_logits(P, V, 1).requires_grad_()
    loss = make_loss(name, standardize=True)
    found = distillation_loss(student, dense(teacher), TARGETS, temperature=temperature, alpha=1.0, loss=loss)
    p, s = ((z_scores(x) / temperature).softmax(1) for x in (teacher, student))
    if name in WITH_TAIL:
        p, s = (torch.cat([x, torch.zeros(P, 1)], 1) for x in (p, s))
    expected = temperature ** (0 if name in ("total_variation", "pld") else 2) * DENSE[name](p, s, TARGETS)
    if name == "nkd":  # whose other part is at T=1, of the logits as they are
        at = (TARGETS[:, None], student.log_softmax(1), teacher.softmax(1))
        expected = expected - (at[2].gather(1, at[0]) * at[1].gather(1, at[0]))[:, 0]
    torch.testing.assert_close(found, expected.mean(), rtol=1e-6, atol=1e-9)
    gradients = [torch.autograd.grad(x, student)[0] for x in (found, expected.mean())]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", [name for name in COMPARING if name not in ("cross_entropy", "nkd", "pld")])
def test_scale_and_shift_of_the_student_do_not_matter(name):
    teacher = make_logits(P, V, 2)
    labels = top_k(teacher, k=4, targets_P=TARGETS, temperatures=(1.0, 2.0))
    student = teacher / 7 + 3
    loss = make_loss(name, standardize=True)
    found = distillation_loss(student, labels, TARGETS, temperature=2.0, alpha=1.0, loss=loss)
    assert found.abs().item() < 2e-2  # off the grid, a tail is interpolated
    plain = distillation_loss(student, labels, TARGETS, temperature=2.0, alpha=1.0, loss=name)
    assert plain.item() > 10 * found.item()


def test_classes_that_are_masked_count_for_nothing():
    teacher, student = make_logits(P, V, 3), make_logits(P, V, 4)
    wide = [torch.cat([x, torch.full((P, 3), -INF, dtype=x.dtype)], 1) for x in (teacher, student)]
    for make in (dense, lambda x: top_k(x, k=4)):
        values = []
        for t, s in ((teacher, student), wide):
            logits, temperature = standardized(s, make(t), temperature=2.0)
            values.append(forward_kl(logits, make(t), temperature=temperature))
        torch.testing.assert_close(*values, rtol=1e-6, atol=1e-9)


def test_a_whole_record_needs_no_stats():
    teacher, student = make_logits(P, V, 5).float(), make_logits(P, V, 6)
    one, other = (
        standardized(student, x, temperature=2.0)[1] for x in (dense_labels_unsorted(teacher), dense(teacher))
    )
    torch.testing.assert_close(one, other)


def test_equal_logits_of_a_student_have_a_bounded_gradient():
    labels = top_k(make_logits(P, V, 7).float(), k=4)
    student = torch.zeros(P, V, requires_grad=True)
    weight = torch.zeros(V, 3, requires_grad=True)
    how = {"temperature": 2.0, "alpha": 1.0, "loss": make_loss("forward_kl", standardize=True)}
    found = distillation_loss(student, labels, None, **how)
    fused = fused_distillation_loss(torch.ones(P, 3), weight, labels, None, **how)
    torch.testing.assert_close(found, fused)
    (gradient,) = torch.autograd.grad(found, student)
    assert gradient.isfinite().all()
    assert gradient.abs().max() < 2 / 1e-3
    (fused_gradient,) = torch.autograd.grad(fused, weight)
    expected = gradient.sum(0)[:, None].expand(-1, 3)
    torch.testing.assert_close(fused_gradient, expected, rtol=1e-4, atol=1e-4)


def test_labels_without_stats_are_refused():
    labels = dataclasses.replace(top_k(make_logits(P, V, 8), k=4), stats=None)
    with pytest.raises(
        LabelError, match=r"loss\.standardize: expected labels with stats.*standardize = false"
    ):
        standardized(make_logits(P, V, 9), labels, temperature=2.0)


def test_a_teacher_too_flat_for_its_labels_is_refused():
    teacher = make_logits(P, V, 10)
    teacher[3] *= 0.1
    labels, student = top_k(teacher, k=4), make_logits(P, V, 11)
    match = r"standardize, position 3: .*deviation of 0\.\d+.*too low for these labels.*loss\.temperature of at least [\d.]+"
    with pytest.raises(TemperatureError, match=match) as error:
        standardized(student, labels, temperature=1.5)
    assert error.value.position == 3
    least = float(str(error.value).split("of at least ")[1].split(",")[0])
    standardized(student, labels, temperature=least * 1.01)
    standardized(student, dense(teacher), temperature=1.5)  # which serves every temperature
    loss = make_loss("forward_kl", standardize=True)
    weights = torch.ones(P, dtype=torch.float64)
    weights[3] = 0.0  # a position that does not count may hold anything
    hidden, weight = make_logits(P, 4, 12), make_logits(V, 4, 13)
    how = {"temperature": 1.5, "alpha": 1.0, "loss": loss}
    found = fused_distillation_loss(hidden, weight, labels, None, weights_P=weights, **how)
    wanted = distillation_loss(hidden @ weight.T, labels, None, mask=weights, **how)
    torch.testing.assert_close(found, wanted)
    with pytest.raises(TemperatureError, match="position 3"):
        fused_distillation_loss(hidden, weight, labels, None, **how)
