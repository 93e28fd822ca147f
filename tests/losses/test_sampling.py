"""Losses on labels whose classes were drawn at random: their gradient is, in the mean over the draws, the full one."""

import itertools
import math

import numpy as np
import pytest
import torch

from softcache.errors import LabelError
from softcache.labels import Sampling, SoftLabels
from softcache.labels.sparsify import dense, hybrid, row_seeds, sample, top_k
from softcache.losses import LOSSES, distillation_loss, make_loss, soft_cross_entropy
from softcache.losses.fused import fused_distillation_loss
from tests.losses.test_functional import make_logits
from tests.losses.test_fused import assert_narrow_same

GRID = (1.0, 2.0)
LINEAR = ["forward_kl", "cross_entropy"]


def outcome_record(logits_V: torch.Tensor, draws: int, exponent: float) -> tuple[SoftLabels, torch.Tensor]:
    """Every outcome of `sample`, one per position, written out by hand; and how likely each is."""
    num_classes = len(logits_V)
    log_p = logits_V.log_softmax(0)
    proposal = (log_p * exponent).softmax(0)
    ids, counts, log_probs, likely = [], [], [], []
    for outcome in itertools.product(range(num_classes), repeat=draws):
        distinct = sorted(set(outcome), key=lambda j: -log_p[j].item())
        unused = draws - len(distinct)
        ids.append(distinct + [num_classes] * unused)
        counts.append([outcome.count(j) for j in distinct] + [0] * unused)
        log_probs.append([log_p[j].item() for j in distinct] + [-math.inf] * unused)
        likely.append(math.prod(proposal[j].item() for j in outcome))
    labels = SoftLabels(
        ids=torch.tensor(ids),
        log_probs=torch.tensor(log_probs, dtype=torch.float64),
        log_tail=torch.stack([(log_p / t).logsumexp(0) for t in GRID]).expand(len(ids), -1),
        num_classes=num_classes,
        temperatures=GRID,
        sampling=Sampling(exact=0, draws=draws, exponent=exponent, replacement=True),
        counts=torch.tensor(counts),
    )
    return labels, torch.tensor(likely, dtype=torch.float64)


def full_gradient(teacher_V, student_V, temperature, loss):
    """Of distillation_loss with the whole distribution: value and gradient [V]."""
    student = student_V[None].clone().requires_grad_()
    value = distillation_loss(
        student, dense(teacher_V[None]), None, temperature=temperature, alpha=1.0, loss=loss
    )
    return value.item(), torch.autograd.grad(value, student)[0][0]


@pytest.mark.parametrize("loss", LINEAR)
@pytest.mark.parametrize("temperature", GRID)
@pytest.mark.parametrize(("draws", "exponent"), [(1, 1.0), (2, 1.0), (2, 0.5), (3, 1.0)])
def test_over_all_outcomes_value_and_gradient_are_the_full_ones(draws, exponent, temperature, loss):
    teacher, student_V = make_logits(1, 5, 0, scale=1.5)[0], make_logits(1, 5, 1)[0]
    labels, likely = outcome_record(teacher, draws, exponent)
    assert likely.sum().item() == pytest.approx(1.0)
    value, gradient = full_gradient(teacher, student_V, temperature, loss)
    student = student_V.expand(len(labels), -1).clone().requires_grad_()
    # A mean weighed by the outcomes' probabilities is the expectation.
    expected = distillation_loss(
        student, labels, None, temperature=temperature, alpha=1.0, mask=likely, loss=loss
    )
    assert expected.item() == pytest.approx(value, rel=1e-9)
    (by_outcome,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(by_outcome.sum(0), gradient, rtol=1e-9, atol=1e-12)
    spread = (by_outcome / likely[:, None] - gradient).abs().max()
    assert spread > 0.1, "no outcome alone has the full gradient"


@pytest.mark.parametrize("temperature", GRID)
def test_fused_has_the_full_gradient_too(temperature):
    teacher = make_logits(1, 5, 2, scale=1.5)[0]
    labels, likely = outcome_record(teacher, 2, 1.0)
    hidden_D, weight = make_logits(1, 3, 3)[0], make_logits(5, 3, 4).requires_grad_()
    whole = distillation_loss(
        hidden_D[None] @ weight.T, dense(teacher[None]), None, temperature=temperature, alpha=1.0
    )
    (expected,) = torch.autograd.grad(whole, weight)
    hidden = hidden_D.expand(len(labels), -1).contiguous()
    found = fused_distillation_loss(
        hidden, weight, labels, None, temperature=temperature, alpha=1.0, weights_P=likely, chunk_positions=4
    )
    assert found.item() == pytest.approx(whole.item(), rel=1e-9)
    torch.testing.assert_close(torch.autograd.grad(found, weight)[0], expected, rtol=1e-9, atol=1e-12)


# -- Monte Carlo -------------------------------------------------------------------------------------------

NUM_ROWS = 40_000


def drawn(policy: str, teacher_V: torch.Tensor) -> SoftLabels:
    logits = teacher_V.expand(NUM_ROWS, -1)
    fingerprints = np.arange(NUM_ROWS, dtype=np.uint64) * np.uint64(7919)
    seeds = row_seeds(fingerprints, np.ones(NUM_ROWS, np.int64), np.zeros(NUM_ROWS, np.int64), 17)
    if policy == "sample":
        return sample(logits, draws=3, seeds_P=seeds, temperatures=GRID)
    if policy == "tempered":
        return sample(logits, draws=3, seeds_P=seeds, exponent=0.5, temperatures=GRID)
    return hybrid(logits, k=2, draws=3, seeds_P=seeds, temperatures=GRID)


@pytest.mark.parametrize("temperature", GRID)
@pytest.mark.parametrize("policy", ["sample", "tempered", "hybrid"])
def test_the_mean_over_many_rows_is_the_full_gradient(policy, temperature):
    teacher, student_V = make_logits(1, 9, 5, scale=2.0)[0], make_logits(1, 9, 6)[0]
    labels = drawn(policy, teacher)
    _, gradient = full_gradient(teacher, student_V, temperature, "forward_kl")

    def scores(labels):
        """How many standard errors the mean gradient is off, by class; and the errors."""
        student = student_V.expand(NUM_ROWS, -1).clone().requires_grad_()
        value = distillation_loss(student, labels, None, temperature=temperature, alpha=1.0)
        by_row = torch.autograd.grad(value * NUM_ROWS, student)[0]
        error = by_row.std(0) / math.sqrt(NUM_ROWS)
        return (by_row.mean(0) - gradient) / error, error

    score, error = scores(labels)
    assert score.abs().max() < 4.0
    assert (error < 0.02).all(), "tight enough to see a bias of a few per cent"
    # The same classes taken for the whole distribution, as a truncated top-k takes them, are far off.
    softened = labels.at_temperature(1.0)
    truncated = SoftLabels(
        ids=labels.ids,
        log_probs=softened.log_probs - softened.log_probs.logsumexp(1, keepdim=True),
        log_tail=torch.full((NUM_ROWS, 1), -math.inf),
        num_classes=9,
        temperatures=(1.0,),
    )
    assert scores(truncated)[0].abs().max() > 20.0


# -- what else they do -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_student_classes", [9, 12])
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("policy", ["sample", "hybrid"])
@pytest.mark.parametrize("name", LINEAR)
def test_fused_equals_unfused(name, policy, standardize, num_student_classes):
    teacher = make_logits(6, 9, 7)
    seeds = torch.arange(6)
    labels = (
        sample(teacher, draws=4, seeds_P=seeds)
        if policy == "sample"
        else hybrid(teacher, k=2, draws=3, seeds_P=seeds)
    )
    hidden, weight = (
        make_logits(6, 4, 8).requires_grad_(),
        make_logits(num_student_classes, 4, 9).requires_grad_(),
    )
    how = {"temperature": 2.0, "alpha": 0.6, "loss": make_loss(name, standardize=standardize)}
    how["padded_vocabulary"] = True
    targets = torch.arange(6)

    def run(parts):
        return fused_distillation_loss(*parts, labels, targets, chunk_positions=4, **how)

    parts = (hidden, weight)
    found = run(parts)
    wanted = distillation_loss(hidden @ weight.T, labels, targets, **how)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    slopes = torch.autograd.grad(wanted, parts, retain_graph=True)
    for one, other in zip(torch.autograd.grad(found, parts), slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)
    assert_narrow_same(run, parts, wanted)


def test_the_sampled_cross_entropy_is_the_papers():
    teacher, student = make_logits(1, 7, 10)[0], make_logits(1, 7, 11)
    labels, _ = outcome_record(teacher, 2, 1.0)
    found = soft_cross_entropy(student.expand(len(labels), -1), labels, temperature=1.0)
    # Drawn in proportion to p at T=1, a class weighs its share of the draws (arXiv 2503.16870, section 3.4).
    shares = labels.counts / 2
    log_s = torch.cat([student.log_softmax(1)[0], torch.zeros(1)])[labels.ids]
    torch.testing.assert_close(found, -(shares * log_s).sum(1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("policy", ["sample", "hybrid"])
@pytest.mark.parametrize("name", [name for name in LOSSES.names() if name not in LINEAR])
def test_losses_that_cannot_be_estimated_name_the_policy(name, policy):
    teacher, student, seeds, targets = (
        make_logits(4, 9, 12),
        make_logits(4, 9, 13),
        torch.arange(4),
        torch.arange(4),
    )
    labels = (
        sample(teacher, draws=4, seeds_P=seeds)
        if policy == "sample"
        else hybrid(teacher, k=2, draws=3, seeds_P=seeds)
    )
    match = rf'loss {name}: not defined on labels of policy "{policy}".*use forward_kl or cross_entropy'
    with pytest.raises(LabelError, match=match):
        distillation_loss(student, labels, targets, temperature=2.0, alpha=1.0, loss=name)
    with pytest.raises(LabelError, match=match):
        fused_distillation_loss(
            student[:, :3],
            teacher.T[:, :3].contiguous(),
            labels,
            targets,
            temperature=2.0,
            alpha=1.0,
            loss=name,
        )


@pytest.mark.parametrize("tail", ["uniform", "ignore", "renormalize"])
def test_drawn_classes_leave_no_tail_to_treat(tail):
    labels = sample(make_logits(4, 9, 14), draws=4, seeds_P=torch.arange(4))
    with pytest.raises(
        LabelError, match=rf"loss\.tail '{tail}': .*\"sample\" drop no class.*leave out loss\.tail"
    ):
        soft_cross_entropy(make_logits(4, 9, 15), labels, temperature=2.0, tail=tail)
    assert soft_cross_entropy(
        make_logits(4, 9, 15), top_k(make_logits(4, 9, 14), k=2), temperature=2.0, tail=tail
    ).numel()
