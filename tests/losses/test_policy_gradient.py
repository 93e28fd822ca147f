"""The policy gradient on sampled tokens: a slow reference, finite differences, the exact divergence, and what is refused."""

import math

import pytest
import torch
from pydantic import ValidationError

from softcache.errors import ConfigError, LabelError
from softcache.labels.sparsify import dense, top_k
from softcache.losses import LossSettings, distillation_loss, make_loss
from softcache.losses.fused import fused_distillation_loss
from tests.losses.test_functional import make_logits, numerical_gradient
from tests.support.losses_dense import kl

P, V = 6, 9
FORMS = [
    {},
    {"clip": 0.2},
    {"advantage": "sampling"},
    {"advantage": "sampling", "clip": 0.2},
    {"importance": False},
    {"advantage": "sampling", "importance": False},
]
TARGETS = torch.tensor([3, 0, 8, 7, 3, 1])


def sampled(policy, targets=TARGETS):
    return policy.log_softmax(1).gather(1, targets[:, None])[:, 0]


def by_loops(student, teacher, policy, *, now, advantage="student", importance=True, clip=None):
    """Token by token; `now` are the student's logits as constants, wherever its gradient is stopped."""
    values = []
    for row, token in enumerate(TARGETS.tolist()):
        log_s, log_p, log_q, log_now = (
            x[row][token] - torch.logsumexp(x[row], 0) for x in (student, teacher, policy, now)
        )
        gain = log_p - (log_q if advantage == "sampling" else log_now)
        ratio = torch.exp(log_s - (log_q if importance else log_now))
        loss = -ratio * gain
        if clip is not None:
            bounded = torch.minimum(torch.maximum(ratio, torch.tensor(1 - clip)), torch.tensor(1 + clip))
            loss = torch.maximum(loss, -bounded * gain)
        values.append(loss)
    return torch.stack(values)


def case(seed=0):
    return [make_logits(P, V, seed + number, scale=1.5) for number in range(3)]


@pytest.mark.parametrize("k", [1, 3, V])
@pytest.mark.parametrize("form", FORMS)
def test_value_and_gradient_are_those_of_the_reference_with_its_gradient_stopped(form, k):
    teacher, student, policy = case()
    student.requires_grad_()
    labels = top_k(teacher, k=k, targets_P=TARGETS)
    mask = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    how = {"mask": mask, "sampling_log_probs": sampled(policy), "loss": make_loss("policy_gradient", **form)}
    found = distillation_loss(student, labels, TARGETS, temperature=1.0, alpha=1.0, **how)
    now = student.detach()

    def reported(x):
        return (by_loops(x, teacher, policy, now=now, **form) * mask).sum() / mask.sum()

    # The record holds log-probabilities in float32.
    torch.testing.assert_close(found, reported(now), rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(found, student)
    torch.testing.assert_close(gradient, numerical_gradient(reported, now), rtol=1e-5, atol=1e-6)
    assert (gradient[3] == 0).all(), "a row without weight, such as one of the prompt"


@pytest.mark.parametrize("form", FORMS)
def test_through_the_head_it_is_the_same_and_holds_a_chunk_of_logits(form):
    generator = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (P, V + 2))
    bias = torch.randn(V + 2, generator=generator, dtype=torch.float64)
    parts = [x.requires_grad_() for x in (hidden, weight, bias)]
    teacher, _, policy = case(3)
    labels, targets = top_k(teacher, k=2, targets_P=TARGETS), TARGETS.clone()
    targets[4] = -100
    log_q, loss = sampled(policy), make_loss("policy_gradient", **form)
    log_q[4] = math.nan
    mask = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    logits = 4 * torch.tanh((parts[0] @ parts[1].T + parts[2]) / 4)
    how = {"temperature": 1.0, "alpha": 0.7, "padded_vocabulary": True, "loss": loss}
    wanted = distillation_loss(logits, labels, targets, mask=mask, sampling_log_probs=log_q, **how)
    found = fused_distillation_loss(
        *parts[:2],
        labels,
        targets,
        bias_V=parts[2],
        softcap=4.0,
        weights_P=mask,
        chunk_positions=2,
        sampling_log_probs_P=log_q,
        **how,
    )
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    for one, other in zip(torch.autograd.grad(found, parts), torch.autograd.grad(wanted, parts), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(
    ("form", "is_moved"),
    [({}, False), ({}, True), ({"importance": False}, False), ({"clip": 0.2}, False), ({"advantage": "sampling"}, False),
     ({"advantage": "sampling", "clip": 0.2}, False)],
)  # fmt: skip
def test_its_mean_over_all_tokens_is_the_exact_reverse_divergence(form, is_moved):
    """Each token of the vocabulary weighed by its probability under the policy: value and gradient of KL(s || p).

    `is_moved`: also of a student that is no longer the sampling policy.
    """
    teacher, student, other = (make_logits(1, V, seed, scale=1.5) for seed in (20, 21, 22))
    policy = other if is_moved else student.clone()
    student.requires_grad_()
    everything = torch.arange(V)
    labels = dense(teacher.expand(V, V))
    log_q = policy.log_softmax(1)[0]
    found = V * distillation_loss(
        student.expand(V, V),
        labels,
        everything,
        temperature=1.0,
        alpha=1.0,
        mask=None,
        soft_weights=log_q.exp(),
        loss=make_loss("policy_gradient", **form),
        sampling_log_probs=log_q,
    )
    exact = kl(student.softmax(1), teacher.softmax(1)).sum()
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)
    (gradient,), (wanted,) = torch.autograd.grad(found, student), torch.autograd.grad(exact, student)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)


def test_a_ratio_outside_of_the_clip_has_no_gradient_where_it_would_go_further():
    student = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)  # s = 1/2
    teacher = torch.tensor([[3.0, 0.0], [0.0, 3.0]], dtype=torch.float64)  # likes token 0, dislikes it
    log_q = torch.log(torch.tensor([0.25, 0.25], dtype=torch.float64))  # r = 2
    found = distillation_loss(
        student,
        dense(teacher),
        torch.tensor([0, 0]),
        temperature=1.0,
        alpha=1.0,
        loss=make_loss("policy_gradient", clip=0.2),
        sampling_log_probs=log_q,
    )
    (gradient,) = torch.autograd.grad(found, student)
    assert (gradient[0] == 0).all(), "already more likely than within the clip"
    assert gradient[1, 0] > 0, "made less likely again"


def test_a_token_that_the_teacher_never_writes_is_dear_and_not_infinite():
    teacher, student, policy = case(9)
    teacher[torch.arange(P), TARGETS] = -math.inf
    student.requires_grad_()
    how = {"temperature": 1.0, "alpha": 1.0, "sampling_log_probs": sampled(policy), "loss": "policy_gradient"}
    found = distillation_loss(student, top_k(teacher, k=2, targets_P=TARGETS), TARGETS, **how)
    (gradient,) = torch.autograd.grad(found, student)
    assert found.isfinite()
    assert (gradient.gather(1, TARGETS[:, None]) > 0).all()


def test_what_it_cannot_be_is_refused():
    teacher, student, policy = case()
    labels, log_q = top_k(teacher, k=2, targets_P=TARGETS), sampled(policy)

    def run(**changes):
        how = {"temperature": 1.0, "alpha": 1.0, "sampling_log_probs": log_q, "loss": "policy_gradient"}
        return distillation_loss(student, changes.pop("labels", labels), TARGETS, **{**how, **changes})

    with pytest.raises(LabelError, match=r"expected temperature 1, .* found temperature 2\.0"):
        run(temperature=2.0)
    with pytest.raises(LabelError, match=r"expected temperature 1, .* found standardize = true"):
        run(loss=make_loss("policy_gradient", standardize=True))
    with pytest.raises(
        LabelError,
        match=r"found rollouts without; store it in the source \(log_probs\), or set loss.importance",
    ):
        run(sampling_log_probs=None)
    run(sampling_log_probs=None, loss=make_loss("policy_gradient", importance=False))
    for bad in (0.5, math.nan, -math.inf):
        with pytest.raises(LabelError, match=r"sampling_log_probs, position 2: expected a finite") as error:
            run(sampling_log_probs=torch.where(torch.arange(P) == 2, bad, log_q))
        assert error.value.position == 2
    with pytest.raises(LabelError, match=r"target_log_prob does not hold"):
        run(labels=top_k(teacher, k=2))
    with pytest.raises(ValidationError, match="clip: bounds the ratio"):
        LossSettings(name="policy_gradient", clip=0.2, importance=False)
    for key, value in {"temperature": 2.0, "alpha": 0.5, "standardize": True}.items():
        with pytest.raises(ValidationError, match=f"{key}: policy_gradient is of tokens that were sampled"):
            LossSettings(name="policy_gradient", **{key: value})
    assert LossSettings(name="policy_gradient").alpha == 1.0


def test_a_source_without_rollouts_is_refused(tmp_path):
    from softcache.config.load import load_config

    (tmp_path / "run.toml").write_text('[source]\nname = "digits"\n[loss]\nname = "policy_gradient"\n')
    with pytest.raises(ConfigError, match=r'policy_gradient is of tokens that a policy sampled.*"rollouts"'):
        load_config(tmp_path / "run.toml")
