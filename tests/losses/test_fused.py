"""The fused losses against the unfused ones in float64, finite differences, and what they may allocate."""

import dataclasses
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from softcache.errors import LabelError, TemperatureError
from softcache.labels.sparsify import dense, top_k
from softcache.losses import cross_entropy, distillation_loss, uld
from softcache.losses.fused import fused_distillation_loss, fused_uld_loss, token_scores

INF = math.inf
P, D, V = 11, 5, 17
ODD_TEMPERATURES = torch.linspace(1, 5, P, dtype=torch.float64)


def make(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def make_case(*, num_classes: int = V, bias: bool = False, seed: int = 0) -> list[torch.Tensor]:
    """Hidden states, weight and maybe a bias, all to be differentiated."""
    parts = [make(P, D, seed=seed), make(num_classes, D, seed=seed + 1)]
    parts += [make(num_classes, seed=seed + 2)] if bias else []
    return [x.requires_grad_() for x in parts]


def make_targets(num_classes: int = V) -> torch.Tensor:
    return torch.randint(0, num_classes, (P,), generator=torch.Generator().manual_seed(9))


def make_labels(k: int, num_classes: int = V, seed: int = 5):
    return top_k(make(P, num_classes, seed=seed, scale=3.0), k=k)


def full_logits(hidden, weight, bias=None, softcap=None, logit_scale=1.0):
    logits = hidden @ weight.T
    logits = (logits if bias is None else logits + bias) * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def assert_same(parts, labels, targets, *, weights=None, head=None, padded=False, **how):
    """Fused and unfused agree in value and in every gradient."""
    head = head or {}
    wanted = distillation_loss(
        full_logits(*parts, **head), labels, targets, mask=weights, padded_vocabulary=padded, **how
    )

    def run(parts):
        return fused_distillation_loss(
            *parts[:2],
            labels,
            targets,
            bias_V=parts[2] if len(parts) > 2 else None,
            weights_P=weights,
            chunk_positions=4,
            padded_vocabulary=padded,
            **head,
            **how,
        )

    found = run(parts)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-13)
    slopes = torch.autograd.grad(wanted, parts, retain_graph=True)
    for one, other in zip(torch.autograd.grad(found, parts), slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-13)
    assert_narrow_same(run, parts, wanted)


def assert_narrow_same(run, parts, wanted):
    """`run` on float32 inputs, which a CPU does by compiled rows, gives the float64 value and gradients to rounding."""
    narrow = [x.detach().float().requires_grad_() for x in parts]
    found = run(narrow)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted.detach(), rtol=2e-5, atol=2e-6)
    slopes = torch.autograd.grad(wanted, parts)
    for one, other in zip(torch.autograd.grad(found, narrow), slopes, strict=True):
        torch.testing.assert_close(
            one.double(), other, rtol=1e-4, atol=2e-5 * max(1.0, float(other.abs().max()))
        )


# -- the same as the unfused loss --------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, V])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4, ODD_TEMPERATURES], ids=["1", "2", "4", "per position"])
def test_fused_equals_unfused(temperature, alpha, k):
    assert_same(make_case(), make_labels(k), make_targets(), temperature=temperature, alpha=alpha)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "head", [{}, {"softcap": 2.0}, {"logit_scale": 0.3}, {"softcap": 2.0, "logit_scale": 3.0}]
)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_bias_softcap_and_scale_of_the_head(temperature, head, bias):
    assert_same(
        make_case(bias=bias), make_labels(4), make_targets(), head=head, temperature=temperature, alpha=0.3
    )


def test_dense_labels_of_a_full_record():
    labels = dense(make(P, V, seed=5, scale=3.0))
    for temperature in (1.0, 2.0):
        assert_same(make_case(), labels, make_targets(), temperature=temperature, alpha=0.5)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_weights_and_ignored_targets(alpha):
    weights, targets = make(P, seed=7).abs(), make_targets()
    weights[[0, 5, 6]] = 0.0
    targets[[1, 5]] = -100
    for mask in (weights, weights > 0.4, None):
        assert_same(make_case(), make_labels(4), targets, weights=mask, temperature=2.0, alpha=alpha)


@pytest.mark.parametrize("k", [3, 8, V])
def test_masked_classes_of_teacher_and_student(k):
    logits = make(P, V, seed=5)
    logits[:, 9:] = -INF
    hidden, weight, bias = make_case(bias=True)
    bias = bias.detach().clone()
    bias[9:12] = -INF
    parts = [hidden, weight, bias.requires_grad_()]
    for temperature in (1.0, 2.0):
        assert_same(parts, top_k(logits, k=k), make_targets(9), temperature=temperature, alpha=0.5)


def test_a_student_that_masks_every_dropped_class():
    logits = make(P, V, seed=5)
    logits[:, 6:] = -INF
    hidden, weight, bias = make_case(bias=True)
    bias = bias.detach().clone()
    bias[6:] = -INF
    parts = [hidden, weight, bias.requires_grad_()]
    assert_same(parts, top_k(logits, k=6), make_targets(6), temperature=2.0, alpha=0.5)


@pytest.mark.parametrize("num_student_classes", [V, V + 6])
def test_unused_slots_contribute_nothing(num_student_classes):
    labels = make_labels(3)
    longer = dataclasses.replace(
        labels,
        ids=torch.cat([labels.ids, torch.full((P, 2), V)], 1),
        log_probs=torch.cat([labels.log_probs, torch.full((P, 2), -INF)], 1),
    )
    parts, padded = make_case(num_classes=num_student_classes), num_student_classes != V
    for temperature in (1.0, 3.0):
        how = {"temperature": temperature, "alpha": 0.5, "padded_vocabulary": padded}
        assert_same(parts, longer, make_targets(), padded=padded, temperature=temperature, alpha=0.5)
        found, wanted = (fused_distillation_loss(*parts, x, make_targets(), **how) for x in (longer, labels))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 2.0, ODD_TEMPERATURES], ids=["1", "2", "per position"])
@pytest.mark.parametrize("num_student_classes", [V - 6, V - 1, V + 1, V + 20])
@pytest.mark.parametrize("k", [1, 5])
def test_padded_vocabularies(k, num_student_classes, temperature):
    parts = make_case(num_classes=num_student_classes)
    targets = make_targets(min(V, num_student_classes))
    assert_same(parts, make_labels(k), targets, padded=True, temperature=temperature, alpha=0.5)


def test_every_kept_class_of_a_row_may_be_folded():
    logits = make(P, V, seed=5)
    logits[::2, V - 2 :] += 20.0  # both kept classes of these rows lie beyond the student
    parts = make_case(num_classes=V - 2)
    assert_same(parts, top_k(logits, k=2), make_targets(V - 2), padded=True, temperature=2.0, alpha=0.5)


def test_compiled_rows_are_the_same_on_any_number_of_threads():
    parts = [x.detach().float().requires_grad_() for x in make_case()]
    labels, before, results = make_labels(4), torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 3, P + 5):
            torch.set_num_threads(num_threads)
            loss = fused_distillation_loss(*parts, labels, make_targets(), temperature=3.0, alpha=0.5)
            results.append([loss.detach(), *torch.autograd.grad(loss, parts)])
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        for one, other in zip(found, results[0], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_nan_of_the_student_stays_one(temperature):
    hidden, weight = (x.detach().float() for x in make_case())
    hidden[3] = math.nan
    hidden.requires_grad_()
    loss = fused_distillation_loss(
        hidden, weight, make_labels(4), make_targets(), temperature=temperature, alpha=0.5
    )
    assert loss.isnan()
    (slope,) = torch.autograd.grad(loss, hidden)
    assert slope[3].isnan().all()
    assert slope[[0, 1, 2, *range(4, P)]].isfinite().all()


def test_tied_embedding_receives_both_gradients():
    labels, targets, tokens = make_labels(4), make_targets(), make_targets().flip(0)
    embedding = make(V, D, seed=3).requires_grad_()
    how = {"temperature": 2.0, "alpha": 0.5}
    hidden = torch.tanh(embedding[tokens])
    (found,) = torch.autograd.grad(
        fused_distillation_loss(hidden, embedding, labels, targets, **how), embedding
    )
    hidden = torch.tanh(embedding[tokens])
    (wanted,) = torch.autograd.grad(
        distillation_loss(hidden @ embedding.T, labels, targets, **how), embedding
    )
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-13)


def test_the_gradient_that_comes_in_scales_the_one_that_goes_out():
    parts, labels, targets = make_case(bias=True), make_labels(4), make_targets()
    how = {"temperature": 2.0, "alpha": 0.5, "bias_V": parts[2]}
    loss = fused_distillation_loss(*parts[:2], labels, targets, **how)
    plain = torch.autograd.grad(loss, parts, retain_graph=True)
    tripled = torch.autograd.grad(3 * loss, parts)
    for one, other in zip(plain, tripled, strict=True):
        torch.testing.assert_close(3 * one, other, rtol=1e-14, atol=0)


@pytest.mark.parametrize("frozen", [[0], [1], [2], [0, 1], [0, 1, 2]])
def test_frozen_inputs_get_no_gradient_and_change_nothing(frozen):
    parts, labels, targets = make_case(bias=True), make_labels(4), make_targets()
    how = {"temperature": 2.0, "alpha": 0.5}
    wanted = fused_distillation_loss(*parts[:2], labels, targets, bias_V=parts[2], **how)
    gradients = torch.autograd.grad(wanted, parts)
    thawed = [i for i in range(3) if i not in frozen]
    some = [x.detach() if i in frozen else x for i, x in enumerate(parts)]
    found = fused_distillation_loss(*some[:2], labels, targets, bias_V=some[2], **how)
    assert torch.equal(found, wanted)
    assert found.requires_grad == bool(thawed)
    for i, gradient in zip(
        thawed, torch.autograd.grad(found, [some[i] for i in thawed]) if thawed else (), strict=True
    ):
        assert torch.equal(gradient, gradients[i])
    with torch.no_grad():
        unwatched = fused_distillation_loss(*parts[:2], labels, targets, bias_V=parts[2], **how)
    assert torch.equal(unwatched, wanted)
    assert not unwatched.requires_grad


# -- numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("loss", [fused_distillation_loss, fused_uld_loss])
def test_gradient_is_that_of_the_reported_value(loss, temperature):
    labels, targets = make_labels(4), make_targets()
    targets[2] = -100
    weights = make(P, seed=8).abs()

    def reported(hidden, weight, bias):
        return loss(
            hidden,
            weight,
            labels,
            targets,
            temperature=temperature,
            alpha=0.4,
            bias_V=bias,
            softcap=4.0,
            logit_scale=0.8,
            weights_P=weights,
            chunk_positions=3,
        )

    assert torch.autograd.gradcheck(reported, make_case(bias=True), eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("loss", [fused_distillation_loss, fused_uld_loss])
def test_chunk_size_does_not_matter(loss):
    parts, labels, targets, weights = make_case(), make_labels(4), make_targets(), make(P, seed=8).abs()
    results = []
    for chunk in (1, 2, 5, P, 100, None):
        how = {"temperature": ODD_TEMPERATURES, "alpha": 0.5, "weights_P": weights, "chunk_positions": chunk}
        value = loss(*parts, labels, targets, **how)
        results.append((value, *torch.autograd.grad(value, parts)))
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-15)


def test_tail_of_the_student_is_right_where_kept_mass_rounds_to_one():
    teacher, weight = torch.zeros(1, 100), torch.zeros(100, 1)
    teacher[0, 0], weight[0, 0] = 30.0, 28.0
    hidden = torch.ones(1, 1)
    bias = torch.zeros(100, requires_grad=True)
    labels = top_k(teacher, k=1)
    value = fused_distillation_loss(hidden, weight, labels, None, temperature=1.0, alpha=1.0, bias_V=bias)
    (gradient,) = torch.autograd.grad(value, bias)
    expected = 99 * (math.exp(-28) - math.exp(-30))
    assert gradient[1:].sum().item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 2.5, 3.0, 8.0])
@pytest.mark.parametrize("above", [-200.0, -70.0, -18.0, 18.0, 70.0])
def test_the_rest_may_be_far_from_the_kept_classes(temperature, above):
    teacher = torch.randn(1, 90, generator=torch.Generator().manual_seed(3))
    student = torch.randn(1, 90, generator=torch.Generator().manual_seed(4))
    labels = top_k(teacher, k=3)
    student[0, labels.ids[0]] += above
    how, target = {"temperature": temperature, "alpha": 0.7}, torch.tensor([40])
    bias, hidden, weight = student[0].clone().requires_grad_(), torch.ones(1, 1), torch.zeros(90, 1)
    value = fused_distillation_loss(hidden, weight, labels, target, bias_V=bias, **how)
    whole = student.double().requires_grad_()
    wanted = distillation_loss(whole, labels, target, **how)
    torch.testing.assert_close(value.double(), wanted, rtol=2e-6, atol=0)
    (found,), (expected,) = torch.autograd.grad(value, bias), torch.autograd.grad(wanted, whole)
    torch.testing.assert_close(found.double(), expected[0], rtol=2e-5, atol=2e-7)


def test_tail_of_the_student_may_underflow():
    bias = torch.zeros(50, requires_grad=True)
    weight = torch.zeros(50, 1)
    weight[0] = 500.0  # exp(-500) is 0 in float32
    labels = top_k(weight.T / 100, k=1)
    how = {"temperature": 2.0, "alpha": 1.0}
    value = fused_distillation_loss(torch.ones(1, 1), weight, labels, None, bias_V=bias, **how)
    wanted = distillation_loss(weight.T + bias, labels, None, **how)
    torch.testing.assert_close(value, wanted)
    found, expected = (torch.autograd.grad(x, bias)[0] for x in (value, wanted))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    labels, targets = make_labels(4), make_targets()
    parts = [x.detach().to(dtype).requires_grad_() for x in make_case(bias=True)]
    exact = [x.detach().double().requires_grad_() for x in parts]
    how = {"temperature": 2.0, "alpha": 0.5}
    found = fused_distillation_loss(*parts[:2], labels, targets, bias_V=parts[2], **how)
    wanted = distillation_loss(full_logits(*exact), labels, targets, **how)
    assert found.dtype == torch.float32
    tolerance = {"rtol": 2e-2, "atol": 1e-2 if dtype == torch.bfloat16 else 1e-3}
    torch.testing.assert_close(found.double(), wanted, **tolerance)
    for one, other in zip(torch.autograd.grad(found, parts), torch.autograd.grad(wanted, exact), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, **tolerance)


def test_float16_gradients_do_not_vanish_in_a_mean_over_many_positions():
    """At 1 / P each, float16 could not hold them; a gradient scaler would come too late."""
    parts = [x.detach().half().requires_grad_() for x in make_case()]
    weights = torch.full((P,), 1e-7)
    weights[0] = 1e3  # takes nearly all of the mean
    labels, targets, how = make_labels(4), make_targets(), {"temperature": 1.0, "alpha": 0.5}
    loss = fused_distillation_loss(*parts, labels, targets, weights_P=weights, **how)
    (gradient,) = torch.autograd.grad(loss * 2.0**30, parts[0])
    assert (gradient[1:] != 0).any(dim=1).all()


def test_autocast_multiplies_in_its_dtype_and_keeps_float32_elsewhere():
    parts = [x.detach().float().requires_grad_() for x in make_case(bias=True)]
    labels, targets, how = make_labels(4), make_targets(), {"temperature": 2.0, "alpha": 0.5}
    with torch.autocast("cpu", torch.bfloat16):
        found = fused_distillation_loss(*parts[:2], labels, targets, bias_V=parts[2], **how)
        mixed = fused_distillation_loss(
            parts[0].bfloat16(), parts[1], labels, targets, bias_V=parts[2], **how
        )
    gradients = torch.autograd.grad(found, parts)
    narrow = [x.detach().bfloat16().requires_grad_() for x in parts[:2]]
    wanted = fused_distillation_loss(*narrow, labels, targets, bias_V=parts[2], **how)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)
    assert torch.equal(mixed, wanted)
    for one, other in zip(gradients, torch.autograd.grad(wanted, [*narrow, parts[2]]), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.to(other.dtype), other)


# -- positions that count for nothing ----------------------------------------------------------------------


def test_positions_without_weight_may_hold_anything():
    parts, labels, targets = make_case(), make_labels(4), make_targets()
    weights = torch.ones(P)
    weights[[2, 7]] = 0.0
    how = {"temperature": 2.0, "alpha": 0.5}
    clean = fused_distillation_loss(*parts, labels, targets, weights_P=weights, **how)
    hidden = parts[0].detach().clone()
    hidden[[2, 7]] = math.nan
    log_probs, ids = labels.log_probs.clone(), labels.ids.clone()
    log_probs[2], ids[7], targets[7] = math.nan, V + 5, V + 5
    dirty = [hidden.requires_grad_(), parts[1]]
    labels = dataclasses.replace(labels, log_probs=log_probs, ids=ids)
    found = fused_distillation_loss(*dirty, labels, targets, weights_P=weights, **how)
    assert torch.equal(found, clean)
    for one, other in zip(torch.autograd.grad(found, dirty), torch.autograd.grad(clean, parts), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("loss", [fused_distillation_loss, fused_uld_loss])
@pytest.mark.parametrize("num_positions", [0, P])
def test_nothing_with_weight_gives_zero_with_zero_gradients(num_positions, loss):
    hidden = make(num_positions, D, seed=0).requires_grad_()
    weight, bias = make_case(bias=True)[1:]
    labels, targets = make_labels(4).take(slice(0, num_positions)), make_targets()[:num_positions]
    for weights in (None, torch.zeros(num_positions)):
        if num_positions and weights is None:
            continue
        how = {"temperature": 2.0, "alpha": 0.5, "bias_V": bias, "weights_P": weights}
        found = loss(hidden, weight, labels, targets, **how)
        assert found.item() == 0.0
        for gradient in torch.autograd.grad(found, (hidden, weight, bias)):
            assert (gradient == 0).all()


def test_only_ignored_targets_give_zero():
    parts = make_case()
    found = fused_distillation_loss(*parts, None, torch.full((P,), -100), temperature=1.0, alpha=0.0)
    assert found.item() == 0.0
    assert all((x == 0).all() for x in torch.autograd.grad(found, parts))


# -- errors ------------------------------------------------------------------------------------------------


def test_heads_of_another_vocabulary_raise_unless_that_is_asked_for():
    labels, targets = make_labels(4), make_targets()
    with pytest.raises(
        LabelError, match=r"expected 17 classes as in the labels; found 20; .*padded_vocabulary"
    ):
        fused_distillation_loss(*make_case(num_classes=20), labels, targets, temperature=1.0, alpha=0.5)
    fused_distillation_loss(*make_case(num_classes=20), labels, targets, temperature=1.0, alpha=0.0)


@pytest.mark.parametrize(("target", "found"), [(V, V), (-1, -1), (-101, -101)])
def test_targets_out_of_range_raise(target, found):
    targets = make_targets()
    targets[3] = target
    with pytest.raises(
        LabelError, match=rf"position 3: expected a class in \[0, 17\) or -100; found {found}"
    ) as error:
        fused_distillation_loss(*make_case(), make_labels(4), targets, temperature=1.0, alpha=0.5)
    assert error.value.position == 3
    with pytest.raises(LabelError, match="position 3"):
        token_scores(*make_case(), targets)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bad", [V, V + 1, -1])
def test_kept_classes_out_of_range_raise(bad, weighted, dtype):
    labels = make_labels(4)
    ids = labels.ids.clone()
    ids[6, 1] = bad
    weights = (torch.arange(P) > 1).to(dtype) if weighted else None
    with pytest.raises(LabelError, match=r"labels\.ids, position 6: expected classes in \[0, 17\)") as error:
        fused_distillation_loss(
            *(x.detach().to(dtype) for x in make_case()),
            dataclasses.replace(labels, ids=ids),
            make_targets(),
            temperature=1.0,
            alpha=0.5,
            weights_P=weights,
            chunk_positions=4,
        )
    assert error.value.position == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 1.5}, r"loss\.alpha: expected a weight in \[0, 1\]"),
        ({"alpha": 0.0, "targets_P": None}, "expected targets for alpha below 1"),
        ({"labels": None}, "expected labels for alpha above 0"),
        ({"labels": make_labels(4).to_numpy()}, r"call labels\.to_torch"),
        ({"labels": make_labels(4).take([0, 1])}, "labels: expected 11 positions.*found 2"),
        ({"targets_P": torch.zeros(3, dtype=torch.int64)}, r"targets: expected \[11\].*found \[3\]"),
        ({"weights_P": torch.ones(P, 1)}, r"weights: expected \[11\].*found \[11, 1\]"),
        ({"hidden_PD": torch.zeros(2, P, D)}, r"hidden states \[P, D\].*found \[2, 11, 5\]"),
        ({"weight_VD": torch.zeros(V, D)}, "one floating-point dtype; found torch.float64 and torch.float32"),
        ({"bias_V": torch.zeros(3)}, r"expected a bias \[17\].*found \[3\]"),
        ({"softcap": 0.0}, r"softcap: expected a number above 0; found 0\.0"),
        ({"chunk_positions": 0}, "chunk_positions: expected at least 1; found 0"),
        (
            {"temperature": torch.tensor(2.0, requires_grad=True)},
            r"expected a constant; .*losses\.distillation_loss",
        ),
    ],
)
def test_arguments_that_do_not_fit_raise(change, message):
    hidden, weight = make_case()
    arguments = {
        "hidden_PD": hidden,
        "weight_VD": weight,
        "labels": make_labels(4),
        "targets_P": make_targets(),
    }
    arguments |= {"temperature": 2.0, "alpha": 0.5} | change
    with pytest.raises(LabelError, match=message):
        fused_distillation_loss(**arguments)


def test_temperatures_the_labels_cannot_serve_raise():
    for temperature in (0.5, torch.ones(3)):
        with pytest.raises(TemperatureError, match=r"temperature: expected|temperature 0\.5: below 1"):
            fused_distillation_loss(
                *make_case(), make_labels(4), make_targets(), temperature=temperature, alpha=0.5
            )


# -- memory ------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("loss", [fused_distillation_loss, fused_uld_loss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_all_logits_is_ever_made(dtype, loss):
    num_positions, num_classes, chunk = 64, 300, 8
    hidden = make(num_positions, D, seed=0).to(dtype).requires_grad_()
    weight = make(num_classes, D, seed=1).to(dtype).requires_grad_()
    labels = top_k(make(num_positions, num_classes, seed=2), k=4)
    targets = torch.arange(num_positions)
    how = {"temperature": 2.0, "alpha": 0.5, "softcap": 5.0, "chunk_positions": chunk}
    with LargestTensor() as seen:
        loss(hidden, weight, labels, targets, weights_P=torch.rand(num_positions), **how).backward()
        token_scores(hidden, weight, targets, chunk_positions=chunk)
    assert seen.elements == chunk * num_classes
    with LargestTensor() as seen:
        distillation_loss(hidden @ weight.T, labels, targets, temperature=2.0, alpha=0.5)
    assert seen.elements >= num_positions * num_classes


# -- evaluation, and the loss across vocabularies ----------------------------------------------------------


@pytest.mark.parametrize("head", [{}, {"softcap": 2.0, "logit_scale": 3.0}])
def test_token_scores_are_those_of_the_full_logits(head):
    hidden, weight, bias = make_case(bias=True)
    targets = make_targets()
    logits = full_logits(hidden, weight, bias, **head).detach()
    targets[:4], targets[5] = logits.argmax(1)[:4], -100
    nats, correct = token_scores(hidden, weight, targets, bias_V=bias, chunk_positions=3, **head)
    assert (nats.dtype, correct.dtype) == (torch.float32, torch.bool)
    torch.testing.assert_close(nats, cross_entropy(logits, targets).float())
    assert torch.equal(correct, logits.argmax(1) == targets)
    assert not nats.requires_grad


@pytest.mark.parametrize("temperature", [1.0, 2.0, ODD_TEMPERATURES], ids=["1", "2", "per position"])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(("k", "num_student_classes"), [(1, V), (4, V), (V, V), (5, 30), (9, 6), (V, 30)])
def test_fused_uld_equals_unfused(k, num_student_classes, alpha, temperature):
    parts, labels = make_case(num_classes=num_student_classes, bias=True), make_labels(k)
    targets, weights = make_targets(num_student_classes), make(P, seed=7).abs()
    targets[3], weights[4] = -100, 0.0
    logits = full_logits(*parts, softcap=6.0)
    terms = (1 - alpha) * cross_entropy(logits, targets) + alpha * uld(
        logits, labels, temperature=temperature
    )
    wanted = (terms * weights).sum() / weights.sum()
    found = fused_uld_loss(
        *parts[:2],
        labels,
        targets,
        temperature=temperature,
        alpha=alpha,
        bias_V=parts[2],
        softcap=6.0,
        weights_P=weights,
        chunk_positions=4,
    )
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-13)
    for one, other in zip(torch.autograd.grad(found, parts), torch.autograd.grad(wanted, parts), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-13)


@pytest.mark.gpu
@pytest.mark.parametrize("loss", [fused_distillation_loss, fused_uld_loss])
def test_on_a_gpu_it_is_the_same_and_waits_once(loss):
    labels, targets, weights = make_labels(4), make_targets(), make(P, seed=7).abs()
    targets[3], weights[4] = -100, 0.0
    how = {"temperature": 2.0, "alpha": 0.5, "softcap": 6.0, "chunk_positions": 4}
    parts = make_case()
    wanted = loss(*parts, labels, targets, weights_P=weights, **how)
    there = [x.detach().cuda().requires_grad_() for x in parts]
    moved = labels.to_torch("cuda"), targets.cuda()
    with torch.profiler.profile() as profile:
        found = loss(*there, *moved, weights_P=weights.cuda(), **how)
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-11, atol=1e-13)
    for one, other in zip(torch.autograd.grad(found, there), torch.autograd.grad(wanted, parts), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-9, atol=1e-13)
    copies = [event for event in profile.events() if "Memcpy DtoH" in event.name]
    assert len(copies) <= 1
