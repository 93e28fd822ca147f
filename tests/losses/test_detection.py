"""Losses over a detector's cells, against their formulas and numerical derivatives."""

import pytest
import torch

from softcache.errors import LabelError
from softcache.labels import BernoulliLabels
from softcache.losses.detection import box_giou, box_l1, edge_kl, quality_bce


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def record(teacher_PV, k):
    top = teacher_PV.topk(k, 1)
    rest = teacher_PV.scatter(1, top.indices, -torch.inf).amax(1)
    return BernoulliLabels(
        ids=top.indices, logits=top.values, dropped_bound=rest, num_classes=teacher_PV.shape[1]
    )


@pytest.mark.parametrize("T", [1.0, 2.5])
@pytest.mark.parametrize("focus", [0.0, 1.0, 2.0])
def test_quality_bce_of_all_classes_is_the_formula(T, focus):
    teacher, student = normal(6, 5), 2 * normal(6, 5, seed=1)
    y, q = (teacher / T).sigmoid(), (student / T).sigmoid()
    expected = ((y - q).abs() ** focus * -(y * q.log() + (1 - y) * (1 - q).log())).sum(1)
    assert torch.allclose(
        quality_bce(student, record(teacher, 5), temperature=T, focus=focus), expected, atol=1e-12
    )
    per_cell = quality_bce(student, record(teacher, 5), temperature=torch.full((6,), T), focus=focus)
    assert torch.allclose(per_cell, expected, atol=1e-12)


@pytest.mark.parametrize("T", [1.0, 3.0])
@pytest.mark.parametrize("k", [2, 5])
def test_quality_bce_has_the_derivative_of_its_values(T, k):
    labels, student = record(normal(6, 5), k), (2 * normal(6, 5, seed=1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: quality_bce(s, labels, temperature=T), student)
    assert torch.autograd.gradcheck(lambda s: quality_bce(s, labels, temperature=T, focus=2.0), student)


@pytest.mark.parametrize("focus", [0.0, 1.0])
def test_a_dropped_class_pushes_only_above_its_bound(focus):
    labels = BernoulliLabels(
        ids=torch.tensor([[0]]),
        logits=torch.tensor([[2.0]]),
        dropped_bound=torch.tensor([-1.0]),
        num_classes=3,
    )
    student = torch.tensor([[2.0, -3.0, 1.0]], requires_grad=True)
    quality_bce(student, labels, temperature=2.0, focus=focus).sum().backward()
    assert student.grad[0, 1] == 0
    assert student.grad[0, 2] > 0
    assert abs(student.grad[0, 0]) < 1e-6  # equal to the teacher


def test_losses_are_nothing_where_the_student_is_the_teacher():
    teacher = normal(4, 5)
    assert quality_bce(teacher, record(teacher, 5)).abs().max() == 0
    boxes = torch.tensor([[1.0, 2, 5, 9]])
    assert box_giou(boxes, boxes).abs().max() < 1e-6
    assert box_l1(boxes, boxes).max() == 0


def test_boxes_far_apart_cost_more_than_boxes_that_touch():
    here = torch.tensor([[0.0, 0, 4, 4]] * 3, dtype=torch.float64, requires_grad=True)
    there = torch.tensor([[1.0, 0, 5, 4], [6, 0, 10, 4], [20, 0, 24, 4]], dtype=torch.float64)
    loss = box_giou(here, there)
    assert loss[0].item() == pytest.approx(1 - 12 / 20)
    assert loss[0] < loss[1] < loss[2] < 2
    assert torch.autograd.gradcheck(lambda box: box_giou(box, there), here)
    assert box_l1(here, there).tolist() == [2, 12, 40]


@pytest.mark.parametrize("T", [1.0, 3.0])
def test_edges_are_compared_by_kl_at_the_temperature(T):
    teacher, student = normal(5, 4, 9), 2 * normal(5, 4, 9, seed=1)
    p, q = (teacher / T).softmax(-1), (student / T).softmax(-1)
    expected = T**2 * (p * (p.log() - q.log())).sum(-1).mean(-1)
    torch.testing.assert_close(edge_kl(student, teacher, temperature=T), expected)
    assert edge_kl(teacher, teacher, temperature=T).abs().max() < 1e-12
    assert torch.autograd.gradcheck(lambda s: edge_kl(s, teacher, temperature=T), student.requires_grad_())


def test_heads_of_other_shapes_are_refused():
    with pytest.raises(LabelError, match=r"logits of edges of shape \(4, 4, 9\).*found \(4, 4, 5\)"):
        edge_kl(normal(4, 4, 5), normal(4, 4, 9))
    with pytest.raises(LabelError, match=r"expected class logits of shape \(4, 5\).*found \(4, 6\)"):
        quality_bce(normal(4, 6), record(normal(4, 5), 2))
