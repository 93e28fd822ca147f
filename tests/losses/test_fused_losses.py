"""Every loss through the head: the same as unfused, in value and gradient, and never all logits at once."""

import math

import pytest
import torch

from softcache.errors import LabelError
from softcache.labels.sparsify import dense, top_k
from softcache.losses import LOSSES, distillation_loss, make_loss
from softcache.losses.fused import fused_distillation_loss
from tests.losses.test_fused import (
    ODD_TEMPERATURES,
    D,
    LargestTensor,
    P,
    V,
    assert_narrow_same,
    full_logits,
    make,
    make_case,
    make_labels,
    make_targets,
)
from tests.support.losses_dense import COMPARING, NEEDS_TARGET

INF = math.inf
COMBINATIONS = [
    (name, tail, standardize)
    for name in COMPARING
    for tail in LOSSES.get(name).tails
    for standardize in (False, True)
]
SMOOTH = [
    name for name in COMPARING if name not in ("adaptive_kl", "uld")
]  # whose gradient is of fixed weights; in test_fused


def labels_of(k, targets, seed=5, num_classes=V, **changes):
    logits = make(P, num_classes, seed=seed, scale=3.0)
    return top_k(logits, k=k, targets_P=targets.clamp(0, num_classes - 1), **changes)


def assert_same(parts, labels, targets, loss, *, weights=None, head=None, padded=False, **how):
    head = head or {}
    how = {"padded_vocabulary": padded, "loss": loss, **how}
    wanted = distillation_loss(full_logits(*parts, **head), labels, targets, mask=weights, **how)

    def run(parts):
        bias = parts[2] if len(parts) > 2 else None
        return fused_distillation_loss(
            *parts[:2], labels, targets, bias_V=bias, weights_P=weights, chunk_positions=4, **head, **how
        )

    found = run(parts)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    slopes = torch.autograd.grad(wanted, parts, retain_graph=True)
    for one, other in zip(torch.autograd.grad(found, parts), slopes, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-11)
    if loss.kind.linear:
        assert_narrow_same(run, parts, wanted)


@pytest.mark.parametrize("temperature", [1.0, 2.5, ODD_TEMPERATURES], ids=["1", "2.5", "per position"])
@pytest.mark.parametrize(("name", "tail", "standardize"), COMBINATIONS)
def test_fused_equals_unfused(name, tail, standardize, temperature):
    targets, weights = make_targets(V - 4), make(P, seed=7).abs()
    targets[1], weights[6] = -100, 0.0
    loss, how = make_loss(name, tail=tail, standardize=standardize), {"temperature": temperature}
    k = 1 if isinstance(temperature, float) else 5
    assert_same(make_case(), labels_of(k, targets), targets, loss, weights=weights, alpha=0.4, **how)
    if isinstance(temperature, torch.Tensor) or temperature != 1.0:
        num_student_classes = V - 4 if isinstance(temperature, float) else V + 3
        parts = make_case(num_classes=num_student_classes)
        assert_same(parts, labels_of(5, targets), targets, loss, padded=True, alpha=1.0, **how)


@pytest.mark.parametrize(("name", "tail", "standardize"), COMBINATIONS)
def test_labels_of_all_classes(name, tail, standardize):
    targets, loss = make_targets(), make_loss(name, tail=tail, standardize=standardize)
    assert_same(make_case(), labels_of(V, targets), targets, loss, temperature=2.0, alpha=0.4)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("name", COMPARING)
def test_bias_softcap_and_scale_of_the_head(name, standardize):
    targets, head = make_targets(), {"softcap": 2.0, "logit_scale": 3.0}
    loss = make_loss(name, standardize=standardize)
    parts = make_case(bias=True)
    assert_same(parts, labels_of(4, targets), targets, loss, head=head, temperature=2.5, alpha=0.3)


@pytest.mark.parametrize(("name", "tail", "standardize"), COMBINATIONS)
def test_masked_classes_of_teacher_and_student(name, tail, standardize):
    logits, targets = make(P, V, seed=5), make_targets(9)
    logits[:, 9:] = -INF
    logits[2, 3] = -INF
    hidden, weight, bias = make_case(bias=True)
    bias = bias.detach().clone()
    bias[9:] = -INF
    parts = [hidden, weight, bias.requires_grad_()]
    loss = make_loss(name, tail=tail, standardize=standardize)
    for k in (3, 9):
        labels = top_k(logits, k=k, targets_P=targets)
        how = {"temperature": 2.0, "alpha": 0.5, "loss": loss}
        found = fused_distillation_loss(*parts[:2], labels, targets, bias_V=parts[2], **how)
        if tail == "uniform" and k < V:  # a tail that is spread over classes that the student masks
            assert not found.isnan()
            continue
        assert_same(parts, labels, targets, loss, temperature=2.0, alpha=0.5)


def test_uniform_over_a_tail_with_masked_kept_classes_is_finite():
    """Kept classes that the student masks have no part in the mean over the others."""
    logits, targets = make(P, V, seed=5), make_targets(9)
    hidden, weight, bias = make_case(bias=True, num_classes=V + 2)
    bias = bias.detach().clone()
    bias[V:] = -INF  # padding, which is kept with a mass of 0
    parts = [hidden, weight, bias.requires_grad_()]
    for name in ("forward_kl", "cross_entropy"):
        labels = top_k(logits, k=4)
        assert_same(
            parts, labels, targets, make_loss(name, tail="uniform"), padded=True, temperature=2.0, alpha=0.5
        )


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", SMOOTH)
def test_gradient_is_that_of_the_reported_value(name, temperature, standardize):
    targets = make_targets()
    targets[2] = -100
    labels = labels_of(4, targets)
    weights = make(P, seed=8).abs()
    parts = make_case(bias=True)

    def reported(*parts):
        return fused_distillation_loss(
            *parts[:2],
            labels,
            targets,
            temperature=temperature,
            alpha=0.7,
            bias_V=parts[2],
            softcap=4.0,
            weights_P=weights,
            chunk_positions=3,
            loss=make_loss(name, standardize=standardize),
        )

    gradients = torch.autograd.grad(reported(*parts), parts)
    parts, step = [x.detach() for x in parts], 1e-5
    for seed in range(4):
        ways = [make(*x.shape, seed=100 + seed + 10 * i) for i, x in enumerate(parts)]
        ends = [
            reported(*(x + sign * step * way for x, way in zip(parts, ways, strict=True))) for sign in (1, -1)
        ]
        found = sum((gradient * way).sum() for gradient, way in zip(gradients, ways, strict=True))
        torch.testing.assert_close(found, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", COMPARING)
def test_half_precision(name, dtype):
    targets = make_targets()
    labels = labels_of(4, targets)
    parts = [x.detach().to(dtype).requires_grad_() for x in make_case()]
    exact = [x.detach().double().requires_grad_() for x in parts]
    how = {"temperature": 2.0, "alpha": 0.5, "loss": make_loss(name)}
    found = fused_distillation_loss(*parts, labels, targets, **how)
    wanted = distillation_loss(full_logits(*exact), labels, targets, **how)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=2e-2, atol=1e-2)
    assert all(x.isfinite().all() for x in torch.autograd.grad(found, parts))


def test_without_a_need_for_gradients_none_are_made():
    targets = make_targets()
    for name in COMPARING:
        with torch.no_grad():
            found = fused_distillation_loss(
                *make_case(), labels_of(4, targets), targets, temperature=2.0, alpha=0.5, loss=name
            )
        wanted = fused_distillation_loss(
            *make_case(), labels_of(4, targets), targets, temperature=2.0, alpha=0.5, loss=name
        )
        assert torch.equal(found, wanted.detach())
        assert not found.requires_grad


@pytest.mark.parametrize(("name", "tail", "standardize"), COMBINATIONS)
def test_no_tensor_of_all_logits_is_ever_made(name, tail, standardize):
    num_positions, num_classes, chunk = 64, 300, 8
    hidden = make(num_positions, D, seed=0).float().requires_grad_()
    weight = make(num_classes, D, seed=1).float().requires_grad_()
    targets = torch.arange(num_positions)
    labels = top_k(make(num_positions, num_classes, seed=2, scale=2.0), k=4, targets_P=targets)
    loss = make_loss(name, tail=tail, standardize=standardize)
    with LargestTensor() as seen:
        fused_distillation_loss(
            hidden, weight, labels, targets, temperature=2.0, alpha=0.5, chunk_positions=chunk, loss=loss
        ).backward()
    # A tail that is spread out has columns for a target, for unused slots and for an empty tail.
    assert seen.elements <= chunk * (num_classes + (3 if tail == "uniform" else 0))


@pytest.mark.parametrize("num_positions", [0, P])
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("name", COMPARING)
def test_nothing_with_weight_gives_zero_with_zero_gradients(name, standardize, num_positions):
    targets = make_targets()[:num_positions]
    labels = labels_of(4, make_targets()).take(slice(0, num_positions))
    hidden, weight = make(num_positions, D, seed=0).requires_grad_(), make(V, D, seed=1).requires_grad_()
    how = {"temperature": 2.0, "alpha": 0.5, "loss": make_loss(name, standardize=standardize)}
    nothing = torch.zeros(num_positions)
    for found in (
        fused_distillation_loss(hidden, weight, labels, targets, weights_P=nothing, **how),
        distillation_loss(hidden @ weight.T, labels, targets, mask=nothing, **how),
    ):
        assert found.item() == 0.0
        assert all((x == 0).all() for x in torch.autograd.grad(found, (hidden, weight)))


# -- the ground truth --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NEEDS_TARGET)
def test_a_dropped_target_needs_its_probability(name):
    targets, labels = make_targets(), make_labels(2)
    how = {"temperature": 2.0, "alpha": 0.5, "loss": name}
    missing = ~(labels.ids == targets[:, None]).any(1)
    first = int(missing.int().argmax())
    with pytest.raises(
        LabelError, match=rf"labels, position {first}: .*target_log_prob does not hold"
    ) as error:
        fused_distillation_loss(*make_case(), labels, targets, **how)
    assert error.value.position == first
    # Rows without weight may lack it.
    kept = (~missing).double() if bool((~missing).any()) else None
    assert (
        kept is None
        or fused_distillation_loss(*make_case(), labels, targets, weights_P=kept, **how).isfinite()
    )
    fused_distillation_loss(*make_case(), dense(make(P, V, seed=5)), targets, **how)


@pytest.mark.parametrize("name", NEEDS_TARGET)
def test_targets_are_needed_whatever_alpha(name):
    with pytest.raises(LabelError, match=f"fused loss: expected targets for loss {name}"):
        fused_distillation_loss(*make_case(), make_labels(2), None, temperature=2.0, alpha=1.0, loss=name)
