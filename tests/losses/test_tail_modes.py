"""What becomes of the dropped classes, and of a ground truth among them; and losses that do not exist."""

import math

import pytest
import torch

from softcache.errors import LabelError
from softcache.labels.sparsify import dense, top_k
from softcache.losses import LOSSES, distillation_loss, make_loss
from tests.losses.test_functional import make_logits
from tests.support.losses_dense import COMPARING, DENSE, NEEDS_TARGET, TARGETS, P, V, plain, written_out

INF = math.inf


# -- the tail ----------------------------------------------------------------------------------------------


def spread(teacher, labels, temperature):
    """The teacher whose dropped classes are all as likely as their mean, as logits at that temperature."""
    p = (teacher / temperature).softmax(1)
    for row, ids in enumerate(labels.ids.tolist()):
        tail = [j for j in range(p.shape[1]) if j not in ids]
        p[row, tail] = p[row, tail].mean()
    return p.log() * temperature


@pytest.mark.parametrize("name", [name for name in DENSE if name not in NEEDS_TARGET])
def test_uniform_compares_with_a_teacher_of_a_flat_tail(name):
    teacher, student = make_logits(P, V, 40), make_logits(P, V, 41)
    labels = top_k(teacher, k=4, temperatures=(1.0, 2.0))
    found = plain(name, student, labels, temperature=2.0, tail="uniform")
    flat = spread(teacher, labels, 2.0)
    torch.testing.assert_close(found, written_out(name, flat, student, temperature=2.0), rtol=1e-5, atol=1e-7)
    bucket = plain(name, student, labels, temperature=2.0)
    assert name in ("adaptive_kl",) or (found >= bucket - 1e-9).all()


def test_uniform_leaves_the_target_its_own_probability():
    teacher, student = make_logits(P, V, 42), make_logits(P, V, 43)
    labels = top_k(teacher, k=3, targets_P=TARGETS, temperatures=(1.0, 2.0))
    p = (teacher / 2).softmax(1)
    for row, ids in enumerate(labels.ids.tolist()):
        tail = [j for j in range(V) if j not in ids and j != TARGETS[row]]
        p[row, tail] = p[row, tail].mean()
    found = plain("dkd", student, labels, temperature=2.0, tail="uniform")
    expected = DENSE["dkd"](p, (student / 2).softmax(1), TARGETS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [n for n, kind in LOSSES.items() if "renormalize" in kind.tails])
def test_renormalize_compares_with_a_teacher_of_the_kept_classes_alone(name):
    teacher, student = make_logits(P, V, 44), make_logits(P, V, 45)
    labels = top_k(teacher, k=4)
    alone = torch.full_like(teacher, -INF).scatter(1, labels.ids, teacher.gather(1, labels.ids))
    found = plain(name, student, labels, temperature=2.0, tail="renormalize")
    # Over buckets: the student's tail is one.
    expected = plain(name, student, top_k(alone, k=4), temperature=2.0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    if name in ("forward_kl", "cross_entropy"):  # what most tools do with a top-k
        log_s = (student / 2).log_softmax(1).gather(1, labels.ids)
        log_p = (teacher.gather(1, labels.ids) / 2).log_softmax(1)
        own = -(log_p.exp() * log_s).sum(1) + (name == "forward_kl") * (log_p.exp() * log_p).sum(1)
        torch.testing.assert_close(found, own, rtol=1e-6, atol=1e-9)


def test_ignore_counts_the_kept_terms_and_goes_negative():
    teacher, student = torch.zeros(1, 20, dtype=torch.float64), torch.zeros(1, 20, dtype=torch.float64)
    student[0, :2] = 2.0
    labels = top_k(teacher, k=2)
    log_s = student.log_softmax(1)[:, :2]
    log_p = teacher.log_softmax(1)[:, :2]
    found = plain("forward_kl", student, labels, temperature=1.0, tail="ignore")
    assert found.item() == pytest.approx((log_p.exp() * (log_p - log_s)).sum().item(), rel=1e-6)
    assert found.item() < -0.05
    reverse = plain("reverse_kl", student, labels, temperature=1.0, tail="ignore")
    assert reverse.item() == pytest.approx((log_s.exp() * (log_s - log_p)).sum().item(), rel=1e-6)
    gap = plain("total_variation", student, labels, temperature=1.0, tail="ignore")
    assert gap.item() == pytest.approx((log_p.exp() - log_s.exp()).abs().sum().item() / 2, rel=1e-6)


@pytest.mark.parametrize("tail", ["uniform", "ignore", "renormalize"])
def test_with_every_class_kept_the_tail_mode_does_not_matter(tail):
    teacher, student = make_logits(P, V, 46), make_logits(P, V, 47)
    for name in COMPARING:
        if tail in LOSSES.get(name).tails:
            found, expected = (
                plain(name, student, dense(teacher), temperature=2.0, tail=x) for x in (tail, "bucket")
            )
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


# -- the ground truth --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NEEDS_TARGET)
def test_a_dropped_target_needs_its_probability(name):
    teacher, student = make_logits(P, V, 50), make_logits(P, V, 51)
    with pytest.raises(LabelError, match=r"labels, position \d: .* target_log_prob does not hold") as error:
        plain(name, student, top_k(teacher, k=2), temperature=2.0)
    assert error.value.position is not None
    kept = top_k(teacher, k=2).ids[:, 1]
    assert plain(name, student, top_k(teacher, k=2), kept, temperature=2.0).isfinite().all()
    with pytest.raises(
        LabelError, match=r"targets, position 1: expected a class in \[0, 12\) or -100; found 12"
    ):
        plain(name, student, dense(teacher), torch.tensor([0, 12, 0, 0, 0]), temperature=2.0)
    with pytest.raises(LabelError, match=f"expected targets for loss {name}"):
        distillation_loss(student, dense(teacher), None, temperature=2.0, alpha=1.0, loss=name)


@pytest.mark.parametrize("name", NEEDS_TARGET)
def test_a_position_without_a_target_has_no_loss(name):
    student = make_logits(P, V, 52).requires_grad_()
    for targets_P in (TARGETS, None):
        labels = top_k(make_logits(P, V, 53), k=2, targets_P=targets_P)
        found = plain(name, student, labels, torch.full((P,), -100), temperature=2.0)
        assert (found == 0).all()
        (gradient,) = torch.autograd.grad(found.sum(), student)
        assert (gradient == 0).all()


def test_a_target_that_is_nearly_all_of_the_tail_is_taken_out_of_it():
    teacher = torch.full((1, 100), -30.0)
    teacher[0, 0], teacher[0, 1] = 5.0, 4.0
    student = torch.zeros(1, 100, requires_grad=True)
    labels = top_k(teacher, k=1, targets_P=torch.tensor([1]))
    found = plain("dkd", student, labels, torch.tensor([1]), temperature=1.0)
    expected = written_out("dkd", teacher.double(), student.double(), torch.tensor([1]), temperature=1.0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert gradient.isfinite().all()


# -- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "kld"}, r"loss\.name: loss 'kld': unknown; .*package\.module:Name"),
        (
            {"name": "reverse_kl", "beta": 0.5},
            r"loss\.beta: not read by reverse_kl; it belongs to jsd; leave it out",
        ),
        (
            {"name": "jsd", "skew": 0.5},
            r"loss\.skew: not read by jsd; it belongs to skew_kl and skew_reverse_kl",
        ),
        ({"name": "jsd", "zzz": 0.5}, r"loss\.zzz: not read by jsd; known: beta; leave it out"),
        ({"name": "jsd", "beta": 1.0}, r"loss\.beta: input should be less than 1; found 1\.0"),
        (
            {"name": "nkd", "nkd_gamma": math.nan},
            r"loss\.nkd_gamma: input should be a finite number; found nan",
        ),
        (
            {"name": "reverse_kl", "tail": "renormalize"},
            r"loss\.tail: expected 'bucket', 'uniform', 'ignore' for",
        ),
        ({"name": "uld", "tail": "uniform"}, r"loss\.tail: expected 'bucket' for uld; found 'uniform'"),
        (
            {"name": "dkd", "tail": "ignore"},
            r"loss\.tail: expected 'bucket', 'uniform' for dkd; found 'ignore'",
        ),
    ],
)
def test_losses_that_do_not_exist_are_refused(arguments, message):
    with pytest.raises(LabelError, match=message):
        make_loss(**arguments)
