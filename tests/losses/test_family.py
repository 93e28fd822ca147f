"""All losses over a record: against whole distributions, loops over buckets, and finite differences."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softcache import losses
from softcache.labels.sparsify import dense, top_k
from softcache.losses import LOSSES, distillation_loss, make_loss
from tests.losses.test_functional import make_logits, numerical_gradient
from tests.support.losses_dense import (
    COMPARING,
    DENSE,
    NEEDS_TARGET,
    TARGETS,
    P,
    V,
    plain,
    truth_part,
    written_out,
)

INF = math.inf
SYMMETRIC = [name for name in DENSE if name not in ("cross_entropy", "nkd", "pld")]  # 0 where both are equal
COMBINATIONS = [(name, tail) for name in COMPARING for tail in LOSSES.get(name).tails]


def buckets_of(x, labels, targets, name):
    """Masses of the buckets, class by class: kept classes (a target apart), tail; and where the target is."""
    rows, places = [], []
    for row, ids, target in zip(x, labels.ids.tolist(), targets.tolist(), strict=True):
        own = [j for j in ids if j < len(row)]
        if name in NEEDS_TARGET and target not in own:
            own = [*own, target]
        tail = [j for j in range(len(row)) if j not in own]
        columns = [row[j] for j in own] + [row[tail].sum()]
        columns[-1:-1] = [row.new_zeros(())] * (labels.k + 2 - len(columns))
        rows.append(torch.stack(columns))
        places.append(own.index(target) if target in own else 0)
    return torch.stack(rows), torch.tensor(places)


# -- the definitions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("num_classes", [12, 300])
@pytest.mark.parametrize("name", DENSE)
def test_with_every_class_kept_it_is_the_papers_formula(name, num_classes, temperature):
    teacher, student = make_logits(P, num_classes, 0), make_logits(P, num_classes, 1).requires_grad_()
    found = plain(name, student, dense(teacher), temperature=temperature)
    expected = written_out(name, teacher, student, temperature=temperature)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    (found_gradient,) = torch.autograd.grad(found.sum(), student)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), student)
    torch.testing.assert_close(found_gradient, expected_gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("jsd", {"beta": 0.1}),
        ("jsd", {"beta": 0.8}),
        ("skew_kl", {"skew": 0.3}),
        ("skew_reverse_kl", {"skew": 0.3}),
        ("adaptive_kl", {"mu": 0.9}),
        ("adaptive_kl", {"mu": 0.1}),
        ("dkd", {"dkd_alpha": 0.5, "dkd_beta": 2.0}),
        ("nkd", {"nkd_gamma": 0.7}),
        ("tail_decoupled_kl", {"head": 3, "tail_weight": 5.0}),
        ("tail_decoupled_kl", {"head": 2, "tail_weight": 0.5}),
    ],
)
def test_parameters_mean_what_the_papers_say(name, parameters):
    teacher, student = make_logits(P, V, 2), make_logits(P, V, 3)
    found = plain(name, student, dense(teacher), temperature=2.0, **parameters)
    expected = written_out(name, teacher, student, temperature=2.0, **parameters)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    mixed = distillation_loss(
        student, dense(teacher), TARGETS, temperature=2.0, alpha=1.0, loss=make_loss(name, **parameters)
    )
    factor = 1.0 if name == "nkd" else 4.0
    assert mixed.item() == pytest.approx(factor * expected.mean().item(), rel=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [1, 4, 11])
@pytest.mark.parametrize("name", DENSE)
def test_agrees_with_loops_over_buckets(name, k, temperature):
    teacher, student = make_logits(P, V, 4), make_logits(P, V, 5)
    labels = top_k(teacher, k=k, targets_P=TARGETS, temperatures=(1.0, 2.5))
    assert (labels.ids == TARGETS[:, None]).any(1).unique().numel() == 2 or k != 4, "kept here, dropped there"
    p, places = buckets_of((teacher / temperature).softmax(1), labels, TARGETS, name)
    s, _ = buckets_of((student / temperature).softmax(1), labels, TARGETS, name)
    expected = DENSE[name](p, s, places) * (temperature**2 if name == "nkd" else 1)
    expected = expected + truth_part(name, teacher, student)
    found = plain(name, student, labels, temperature=temperature)
    # A target that was dropped is taken out of a tail that is stored in float32.
    rtol = 1e-5 if name in NEEDS_TARGET else 1e-9
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-10)


def test_dkd_of_equal_coupling_is_the_forward_divergence():
    teacher, student = make_logits(P, V, 6), make_logits(P, V, 7)
    labels = dense(teacher)
    p_t = (teacher / 2).softmax(1).gather(1, TARGETS[:, None])[:, 0]
    target, others = (
        plain("dkd", student, labels, temperature=2.0, dkd_alpha=a, dkd_beta=b) for a, b in ((1, 0), (0, 1))
    )
    whole = plain("forward_kl", student, labels, temperature=2.0)
    torch.testing.assert_close(target + (1 - p_t) * others, whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("k", [3, 7, V])
def test_a_decoupled_tail_of_weight_one_is_the_forward_divergence(k):
    labels, student = top_k(make_logits(P, V, 16), k=k), make_logits(P, V, 17)
    how = {"temperature": 2.0}
    whole = plain("forward_kl", student, labels, **how)
    one, heavy = (
        plain("tail_decoupled_kl", student, labels, head=3, tail_weight=w, **how) for w in (1.0, 4.0)
    )
    torch.testing.assert_close(one, whole, rtol=1e-9, atol=1e-12)
    assert (heavy > whole + 1e-6).all() == (k > 3), "with as many kept as in the head, the tail has no shape"


def test_soft_cross_entropy_is_the_divergence_plus_the_teachers_entropy():
    labels = top_k(make_logits(P, V, 8), k=4)
    softened = labels.at_temperature(2.0)
    log_p = torch.cat([softened.log_probs, softened.log_tail[:, None]], 1)
    student = make_logits(P, V, 9).requires_grad_()
    one, other = (plain(name, student, labels, temperature=2.0) for name in ("cross_entropy", "forward_kl"))
    torch.testing.assert_close(one - other, -(log_p.exp() * log_p).sum(1), rtol=1e-9, atol=1e-12)
    gradients = [torch.autograd.grad(x.sum(), student)[0] for x in (one, other)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_jsd_over_its_weight_tends_to_the_two_divergences():
    labels, student = top_k(make_logits(P, V, 10, scale=1.0), k=4), make_logits(P, V, 11, scale=1.0)
    near = 1e-6
    for beta, name in ((near, "forward_kl"), (1 - near, "reverse_kl")):
        found = plain("jsd", student, labels, temperature=1.0, beta=beta) / near
        torch.testing.assert_close(found, plain(name, student, labels, temperature=1.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SYMMETRIC)
def test_student_that_equals_the_teacher_has_no_loss_and_no_gradient(name):
    teacher = make_logits(P, V, 12)
    student = teacher.clone().requires_grad_()
    for k in (3, V):
        found = plain(name, student, top_k(teacher, k=k, targets_P=TARGETS), temperature=2.0)
        assert found.abs().max() < 1e-5
        (gradient,) = torch.autograd.grad(found.sum(), student)
        assert gradient.isfinite().all()
        if name != "total_variation":  # which has a kink there
            assert gradient.abs().max() < 1e-4


@given(
    rows=st.integers(3, 12).flatmap(
        lambda n: st.tuples(*[st.lists(st.floats(-40, 40), min_size=n, max_size=n)] * 2)
    ),
    k=st.integers(1, 12),
    temperature=st.sampled_from([1.0, 4.0]),
)
def test_divergences_are_never_negative_and_bounded_by_the_full_ones(rows, k, temperature):
    teacher, student = (torch.tensor([row], dtype=torch.float64) for row in rows)
    labels = top_k(teacher, k=min(k, len(rows[0])), targets_P=torch.tensor([1]), temperatures=(1.0, 4.0))
    for name in ("reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation"):
        found, full = (
            plain(name, student, x, temperature=temperature).item() for x in (labels, dense(teacher))
        )
        assert -1e-12 <= found <= full + 1e-5 * max(1.0, full)
    assert plain("jsd", student, labels, temperature=temperature).item() <= math.log(2) + 1e-12
    assert plain("total_variation", student, labels, temperature=temperature).item() <= 1 + 1e-12
    for name in ("dkd", "adaptive_kl"):
        targets = torch.tensor([1])
        assert plain(name, student, labels, targets, temperature=temperature).item() >= -1e-9


# -- gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("name", "tail"), [(n, t) for n, t in COMBINATIONS if n != "adaptive_kl"])
def test_gradient_is_that_of_the_reported_value(name, tail, temperature, standardize):
    labels = top_k(make_logits(P, V, 20), k=4, targets_P=TARGETS)
    targets = TARGETS.clone()
    targets[2] = -100
    mask = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0])
    loss = make_loss(name, tail=tail, standardize=standardize)

    def reported(student):
        how = {"temperature": temperature, "alpha": 0.6, "mask": mask, "loss": loss}
        return distillation_loss(student, labels, targets, **how)

    student = make_logits(P, V, 21).requires_grad_()
    (gradient,) = torch.autograd.grad(reported(student), student)
    assert (gradient[3] == 0).all()
    student, step = student.detach(), 1e-5
    for seed in range(4):  # along random directions, each of which has a part in every logit
        way = make_logits(P, V, 100 + seed, scale=1.0)
        expected = (reported(student + step * way) - reported(student - step * way)) / (2 * step)
        torch.testing.assert_close((gradient * way).sum(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [3, V])
def test_gradient_of_adaptive_kl_is_that_at_fixed_weights(k, temperature):
    labels, student = top_k(make_logits(P, V, 22), k=k), make_logits(P, V, 23).requires_grad_()
    how = {"temperature": temperature}
    adaptive, forward, reverse = (
        plain(name, student, labels, **how) for name in ("adaptive_kl", "forward_kl", "reverse_kl")
    )
    weight = ((adaptive - reverse) / (forward - reverse)).detach()
    assert ((weight > 0) & (weight < 1)).all()
    (gradient,) = torch.autograd.grad(adaptive.sum(), student)

    def at_fixed_weights(x):
        forward, reverse = (plain(name, x, labels, **how) for name in ("forward_kl", "reverse_kl"))
        return (weight * forward + (1 - weight) * reverse).sum()

    expected = numerical_gradient(at_fixed_weights, student.detach())
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in DENSE if name not in ("adaptive_kl", "forward_kl")])
def test_differentiable_in_a_temperature_per_position(name):
    labels = top_k(make_logits(P, V, 24), k=4, targets_P=TARGETS)
    temperature = torch.tensor([1.2, 2.0, 5.0, 1.0, 3.0], dtype=torch.float64)
    student = make_logits(P, V, 25)
    found = plain(name, student, labels, temperature=temperature)
    for position, value in enumerate(temperature.tolist()):
        alone = plain(name, student, labels, temperature=value)[position]
        torch.testing.assert_close(found[position], alone, rtol=1e-9, atol=1e-12)
    inner = temperature[[0, 1, 2, 4]].requires_grad_()
    some, targets = labels.take([0, 1, 2, 4]), TARGETS[[0, 1, 2, 4]]
    reported = lambda t: plain(name, student[[0, 1, 2, 4]], some, targets, temperature=t).sum()
    (gradient,) = torch.autograd.grad(reported(inner), inner)
    torch.testing.assert_close(gradient, numerical_gradient(reported, inner.detach()), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", COMPARING)
def test_the_factor_for_the_temperature_is_the_papers(name):
    labels, student = top_k(make_logits(P, V, 26), k=3, targets_P=TARGETS), make_logits(P, V, 27)
    found = distillation_loss(student, labels, TARGETS, temperature=4.0, alpha=1.0, loss=name)
    plain_ = (
        losses.uld(student, labels, temperature=4.0)
        if name == "uld"
        else plain(name, student, labels, temperature=4.0)
    )
    factor = 1 if name in ("uld", "total_variation", "nkd", "pld") else 16  # nkd's is in one of its terms
    assert found.item() == pytest.approx(factor * plain_.mean().item(), rel=1e-12)


# -- classes that one of them does not have ----------------------------------------------------------------


@pytest.mark.parametrize(("name", "tail"), COMBINATIONS)
def test_masked_classes_give_no_nan(name, tail):
    teacher, student = make_logits(P, V, 30), make_logits(P, V, 31)
    teacher[:, 8:] = student[:, 8:] = -INF
    teacher[0, 5] = -INF  # which the student has
    targets = torch.tensor([3, 0, 2, 7, 3])
    student.requires_grad_()
    for k in (1, 3, 8, V):
        labels = top_k(teacher, k=k, targets_P=targets)
        for standardize in (False, True):
            loss = make_loss(name, tail=tail, standardize=standardize)
            found = distillation_loss(student, labels, targets, temperature=2.0, alpha=1.0, loss=loss)
            assert not found.isnan(), k
            # a tail spread over classes that the student masks is out of its reach
            assert found.isfinite() or tail == "uniform", k
            (gradient,) = torch.autograd.grad(found, student)
            assert gradient.isfinite().all(), k


@pytest.mark.parametrize("name", DENSE)
def test_padding_of_the_student_is_as_good_as_a_teacher_that_masks_it(name):
    teacher, student = make_logits(P, 10, 32), make_logits(P, 13, 33).requires_grad_()
    masked = torch.cat([teacher, torch.full((P, 3), -INF, dtype=torch.float64)], 1)
    targets = torch.tensor([3, 0, 9, 12, 3])  # one of them in the padding
    found = plain(name, student, dense(teacher), targets, temperature=2.0, padded=True)
    expected = plain(name, student, dense(masked), targets, temperature=2.0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    gradients = [torch.autograd.grad(x.sum(), student)[0] for x in (found, expected)]
    assert gradients[0].isfinite().all()
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation", "dkd"]
)
def test_a_smaller_student_finds_what_it_lacks_in_the_tail(name):
    teacher, student = make_logits(P, V, 34), make_logits(P, 9, 35)
    targets = torch.tensor([3, 0, 8, 7, 3])
    labels = top_k(teacher, k=4, targets_P=targets, temperatures=(1.0, 2.0))
    assert (labels.ids >= 9).any()
    found = plain(name, student, labels, targets, temperature=2.0, padded=True)
    p = (teacher / 2).softmax(1)
    whole_p, whole_s = p, torch.nn.functional.pad((student / 2).softmax(1), (0, 3))
    rows = []
    for row in range(P):
        own = [j for j in labels.ids[row].tolist() if j < 9]
        own += [targets[row].item()] if name in NEEDS_TARGET and targets[row] not in own else []
        tail = [j for j in range(V) if j not in own]
        columns = [torch.stack([x[row, j] for j in own] + [x[row, tail].sum()]) for x in (whole_p, whole_s)]
        place = torch.tensor([own.index(targets[row].item()) if name in NEEDS_TARGET else 0])
        rows.append(DENSE[name](columns[0][None], columns[1][None], place)[0])
    torch.testing.assert_close(found, torch.stack(rows), rtol=1e-5, atol=1e-9)


def test_mass_where_the_teacher_has_none_is_dear_and_not_infinite():
    teacher, student = make_logits(2, 6, 36), torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    teacher[:, 5] = -INF
    for name in ("reverse_kl", "adaptive_kl"):
        found = plain(name, student, dense(teacher), temperature=1.0)
        assert (found > 5).all()
        assert (found < 100).all()
        (gradient,) = torch.autograd.grad(found.sum(), student)
        assert (gradient[:, 5] > 1).all(), "the way out of it leads away"


@pytest.mark.parametrize("name", DENSE)
def test_half_precision_is_promoted(name):
    labels = top_k(make_logits(P, 50, 37).float(), k=8, targets_P=TARGETS)
    student = make_logits(P, 50, 38).half()
    found = plain(name, student, labels, temperature=2.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain(name, student.float(), labels, temperature=2.0))
