"""Losses of two heads against whole distributions in float64: values, gradients by autograd and by differences, and memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from softcache.errors import LabelError
from softcache.labels import OutputHead, VectorLabels, encode_vectors
from softcache.losses import LOSSES, make_loss
from softcache.losses.fused import fused_distillation_loss, fused_hidden_loss
from tests.support import losses_dense

P, D, V, TEACHER_D = 11, 5, 17, 7
CLASSWISE = [name for name, kind in LOSSES.items() if kind.classwise]
PER_ROW = torch.linspace(1, 4, P, dtype=torch.float64)
BLOCKS = {"one": (None, None), "rows": (4, None), "both": (4, 6), "single": (1, 1)}


def make(*shape, seed, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


class Fixed:
    def __init__(self, head):
        self.head = head

    def load(self, device):
        return OutputHead(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in self.head))


def make_labels(num_classes=V, values="float32", bias=None, logit_scale=1.0, softcap=None):
    weight = make(num_classes, TEACHER_D, seed=21)
    head = Fixed(OutputHead(weight, bias, logit_scale, softcap))
    states = make(P, TEACHER_D, seed=20).float()
    return VectorLabels(encode_vectors(states, values), {"hidden": values}, num_classes, head)


def teacher_logits(labels):
    head = labels.head.load("cpu")
    numbers, scale = labels.numbers()
    states = numbers.double() if scale is None else numbers.double() * scale.double()[:, None]
    z = states @ head.weight.double().T
    z = (z if head.bias is None else z + head.bias) * head.logit_scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def parts_of(num_classes=V, bias=True, dtype=torch.float64):
    parts = [make(P, D, seed=0), make(num_classes, D, seed=1), *([make(num_classes, seed=2)] if bias else [])]
    return [x.to(dtype).requires_grad_() for x in parts]


def dense_loss(
    parts,
    labels,
    targets,
    *,
    temperature,
    alpha,
    name="forward_kl",
    weights=None,
    softcap=None,
    scale=1.0,
    **how,
):
    """The mixture over whole distributions, from the papers' formulas of tests/support/losses_dense.py."""
    z = parts[0].double() @ parts[1].double().T
    z = (z + parts[2].double() if len(parts) > 2 else z) * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    T = temperature.reshape(-1, 1) if isinstance(temperature, torch.Tensor) else temperature
    t = teacher_logits(labels)[:, : z.shape[1]]
    t = torch.nn.functional.pad(t, (0, z.shape[1] - t.shape[1]), value=-torch.inf)
    p, s = (t / T).softmax(1), (z / T).softmax(1)
    soft = getattr(losses_dense, name)(p, s, targets, **how) * (
        temperature ** LOSSES.get(name).temperature_power
    )
    hard = torch.nn.functional.cross_entropy(z, targets, reduction="none", ignore_index=-100)
    loss = (1 - alpha) * hard + alpha * soft
    weights = torch.ones(P, dtype=torch.float64) if weights is None else weights.double()
    return (loss * weights).sum() / weights.sum()


def check_same(parts, labels, wanted, blocks="both", tolerance=1e-10, **how):
    rows, classes = BLOCKS[blocks]
    found = fused_hidden_loss(
        *parts[:2],
        labels,
        bias_V=parts[2] if len(parts) > 2 else None,
        chunk_positions=rows,
        chunk_classes=classes,
        **how,
    )
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
    slopes = torch.autograd.grad(wanted, parts)
    for one, other in zip(torch.autograd.grad(found, parts), slopes, strict=True):
        assert one.dtype == parts[0].dtype
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance * 10, atol=tolerance)


TARGETS = torch.randint(0, V, (P,), generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("name", CLASSWISE)
@pytest.mark.parametrize("temperature", [1.0, 2.5, 0.7, PER_ROW], ids=["1", "2.5", "0.7", "per row"])
@pytest.mark.parametrize("blocks", ["one", "both"])
def test_every_loss_that_sums_over_classes_is_that_of_whole_distributions(name, temperature, blocks):
    labels, parts = make_labels(), parts_of()
    wanted = dense_loss(parts, labels, TARGETS, temperature=temperature, alpha=0.7, name=name)
    check_same(
        parts, labels, wanted, blocks, targets_P=TARGETS, temperature=temperature, alpha=0.7, loss=name
    )


def test_forward_and_reverse_kl_and_jsd_are_among_them():
    assert {"forward_kl", "reverse_kl", "jsd", "skew_kl", "total_variation"} <= set(CLASSWISE)
    for name in ("adaptive_kl", "dkd", "uld"):
        with pytest.raises(LabelError, match=f"loss {name}: not made for labels of hidden states"):
            fused_hidden_loss(
                *parts_of(bias=False), make_labels(), TARGETS, temperature=1.0, alpha=1.0, loss=name
            )


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize(
    "head", [{"softcap": 2.0}, {"logit_scale": 0.3}, {"softcap": 2.0, "logit_scale": 3.0}], ids=str
)
def test_numerical_differentiation_through_softcap_and_scale_at_other_temperatures(name, head):
    labels = make_labels(bias=make(V, seed=22), logit_scale=1.5, softcap=3.0)

    def run(hidden, weight, bias):
        return fused_hidden_loss(
            hidden, weight, labels, TARGETS, bias_V=bias, temperature=2.0, alpha=0.6, loss=name,
            chunk_positions=4, chunk_classes=7, **head,
        )  # fmt: skip

    parts = parts_of()
    is_whole = (
        name == "forward_kl" and len(head) == 2
    )  # of the others a random projection, in a tenth of the time
    assert torch.autograd.gradcheck(run, parts, atol=1e-6, fast_mode=not is_whole)
    how = {"softcap": head.get("softcap"), "scale": head.get("logit_scale", 1.0)}
    wanted = dense_loss(parts, labels, TARGETS, temperature=2.0, alpha=0.6, name=name, **how)
    torch.testing.assert_close(run(*parts), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("values", ["float32", "bfloat16", "float8_e4m3", "int8"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_encoding_gives_the_loss_of_the_stored_numbers(values, dtype):
    labels, parts = make_labels(values=values, bias=make(V, seed=22)), parts_of(dtype=dtype)
    wanted = dense_loss(parts, labels, TARGETS, temperature=2.0, alpha=1.0)
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    check_same(parts, labels, wanted, "both", tolerance, targets_P=None, temperature=2.0, alpha=1.0)


def test_weights_ignored_targets_and_masked_classes():
    weights, targets = make(P, seed=7).abs(), TARGETS.clone()
    weights[[0, 5, 6]] = 0.0
    targets[[1, 5]] = -100
    bias = make(V, seed=22)
    bias[4] = -torch.inf
    labels, parts = make_labels(bias=bias), parts_of()
    for mask in (weights, weights > 0.4):
        wanted = dense_loss(parts, labels, targets, temperature=2.0, alpha=0.4, weights=mask)
        check_same(parts, labels, wanted, targets_P=targets, temperature=2.0, alpha=0.4, weights_P=mask)
    nothing = fused_hidden_loss(
        *parts[:2], labels, targets, temperature=2.0, alpha=0.4, weights_P=torch.zeros(P)
    )
    assert float(nothing.detach()) == 0.0
    hard = fused_hidden_loss(*parts[:2], labels, targets, temperature=2.0, alpha=0.0, weights_P=weights)
    torch.testing.assert_close(
        hard,
        fused_distillation_loss(*parts[:2], None, targets, temperature=1.0, alpha=0.0, weights_P=weights),
    )


def test_heads_of_two_paddings_of_one_vocabulary():
    labels, wide = make_labels(), parts_of(num_classes=V + 3)
    how = {"targets_P": TARGETS, "temperature": 2.0, "alpha": 0.5}
    with pytest.raises(LabelError, match=f"expected {V} classes as in the labels; found {V + 3}"):
        fused_hidden_loss(*wide[:2], labels, **how)
    wanted = dense_loss(wide, labels, TARGETS, temperature=2.0, alpha=0.5)
    check_same(wide, labels, wanted, padded_vocabulary=True, **how)
    bias = make(V + 3, seed=22)
    bias[V:] = -40.0
    labels, parts = make_labels(V + 3, bias=bias), parts_of()
    wanted = dense_loss(parts, labels, TARGETS, temperature=2.0, alpha=0.5)
    check_same(parts, labels, wanted, padded_vocabulary=True, tolerance=1e-7, **how)
    with pytest.raises(
        LabelError, match=rf"{V} classes, to all others of which the teacher gives .* at labeled row \d"
    ):
        fused_hidden_loss(*parts[:2], make_labels(V + 3), padded_vocabulary=True, **how)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"loss": make_loss("forward_kl", standardize=True)},
            "standardized logits: not made for labels of hidden states",
        ),
        (
            {"temperature": torch.tensor(2.0, requires_grad=True)},
            "expected a constant; found a tensor that requires",
        ),
        ({"targets_P": None}, "expected targets for alpha below 1"),
        ({"alpha": 1.5}, "loss.alpha"),
    ],
)
def test_what_cannot_be_is_refused(change, match):
    how = {"targets_P": TARGETS, "temperature": 1.0, "alpha": 0.5} | change
    with pytest.raises(LabelError, match=match):
        fused_hidden_loss(*parts_of(bias=False), make_labels(), **how)
    with pytest.raises(
        LabelError, match="expected a torch record of 11 positions with a head; found 11 positions, NumPy"
    ):
        fused_hidden_loss(*parts_of(bias=False), make_labels().to_numpy(), None, temperature=1.0, alpha=1.0)


class Largest(TorchDispatchMode):
    """The most elements that an operation returned in one tensor."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for x in found if isinstance(found, tuple | list) else (found,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return found


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_no_tensor_has_all_rows_or_all_classes_of_logits(name):
    rows, classes = 60, 900
    weight = make(classes, TEACHER_D, seed=21).float()
    head = Fixed(OutputHead(weight, None, 1.0, None))
    states = encode_vectors(make(rows, TEACHER_D, seed=20), "bfloat16")
    labels = VectorLabels(states, {"hidden": "bfloat16"}, classes, head)
    hidden = make(rows, D, seed=0).float().requires_grad_()
    student = make(classes, D, seed=1).float().requires_grad_()
    with Largest() as seen:
        fused_hidden_loss(
            hidden,
            student,
            labels,
            None,
            temperature=2.0,
            alpha=1.0,
            loss=name,
            chunk_positions=20,
            chunk_classes=100,
        ).backward()
    assert seen.elements <= classes * TEACHER_D  # the head itself; a block has 2,000
