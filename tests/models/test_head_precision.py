"""Logits of half-precision heads keep the float32 accumulator, at capture, in the fused loss and of an online teacher."""

import pytest
import torch
from torch import nn

from softcache.labels.sparsify import top_k
from softcache.losses import fused
from softcache.losses.fused.head import Head
from softcache.models.image import Normalize
from softcache.models.language.backbone_head import LMHeadMixin
from softcache.runtime.linear import linear_float32, matmul_float32
from softcache.teacher.image import ImageTeacher

HALVES = [torch.bfloat16, torch.float16]


def inputs(dtype, *, rows=7, width=64, classes=301):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(classes, width, generator=generator) / 2
    return hidden.to(dtype), weight.to(dtype)


def exact(hidden, weight):
    return hidden.double() @ weight.double().T


def assert_unrounded(found, hidden, weight):
    """Within float32 rounding of the exact product, and far from that of the half-precision product."""
    wanted = exact(hidden, weight)
    rounded = (hidden @ weight.T).double()
    assert found.dtype == torch.float32
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert (rounded - wanted).abs().max() > 100 * (found - wanted).abs().max()


@pytest.mark.parametrize("dtype", HALVES)
def test_a_product_keeps_its_accumulator(dtype, monkeypatch):
    hidden, weight = inputs(dtype)
    assert_unrounded(linear_float32(hidden, weight), hidden, weight)
    monkeypatch.setattr("softcache.runtime.linear.BLOCK_ELEMENTS", 64 * 10)
    assert torch.equal(matmul_float32(hidden, weight.T), linear_float32(hidden, weight))
    bias = torch.linspace(0, 1, len(weight)).to(dtype)
    assert torch.equal(linear_float32(hidden, weight, bias), linear_float32(hidden, weight) + bias.float())


def test_under_autocast_the_inputs_are_rounded_and_the_output_is_not():
    hidden, weight = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_float32(hidden, weight)
    assert_unrounded(found, hidden.bfloat16(), weight.bfloat16())


def test_gradients_are_those_of_the_product():
    hidden, weight = (x.requires_grad_() for x in inputs(torch.bfloat16))
    linear_float32(hidden, weight).square().sum().backward()
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    (wide[0] @ wide[1].T).square().sum().backward()
    for found, wanted in zip((hidden.grad, weight.grad), (x.grad for x in wide), strict=True):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), wanted, rtol=2e-2, atol=2e-2 * wanted.abs().max().item())


@pytest.mark.parametrize("dtype", HALVES)
def test_labels_of_a_half_precision_head_are_those_of_its_exact_logits(dtype):
    """Rounded logits are off by 0.01 nats and more, and tie neighbouring classes."""
    hidden, weight = inputs(dtype)

    class Parts(LMHeadMixin):
        head = nn.Linear(64, 301, bias=False)
        logit_scale, softcap = 1.0, None

    Parts.head.weight = nn.Parameter(weight)
    with torch.no_grad():
        found = Parts().logits(hidden)
    wanted = exact(hidden, weight).log_softmax(-1)
    record, reference = top_k(found, k=64), wanted.topk(64)
    assert torch.equal(record.ids.long(), reference.indices)
    assert (record.log_probs - reference.values).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", HALVES)
def test_the_fused_loss_has_the_logits_of_the_accumulator(dtype):
    hidden, weight = inputs(dtype)
    head = Head(hidden, weight, None, None, 1.0, 3)
    found = torch.cat([head.logits(part).clone() for _, part in head.chunks(hidden)])
    assert_unrounded(found, hidden, weight)


@pytest.mark.parametrize("name", ["jsd", "forward_kl", "reverse_kl"])
def test_near_the_teacher_the_fused_gradient_is_right(name):
    """Of rounded logits it is off by tens of percent: teacher and student differ by less than the rounding."""
    hidden, weight = inputs(torch.bfloat16, width=256)
    teacher = exact(hidden, weight) + 0.02 * torch.randn(7, 301, generator=torch.Generator().manual_seed(1))
    labels = top_k(teacher.float(), k=64)

    def gradient(hidden, weight):
        hidden = hidden.detach().requires_grad_()
        fused.fused_distillation_loss(
            hidden, weight, labels, None, loss=name, temperature=2.0, alpha=1.0
        ).backward()
        return hidden.grad.double()

    found, wanted = gradient(hidden, weight), gradient(hidden.double(), weight.double())
    assert (found - wanted).norm() < 0.01 * wanted.norm()


def test_the_classifier_of_an_image_teacher_keeps_its_accumulator():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10))
    normalize = Normalize((0.0,) * 3, (1.0,) * 3)
    common = {"spec": "x:y", "num_classes": 10, "device": torch.device("cpu"), "dtype": "bfloat16"}
    teacher = ImageTeacher(model, normalize=normalize, **common)
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    found = teacher.logits(images)
    hidden = normalize(images).flatten(1).bfloat16()
    wanted = exact(hidden, model[1].weight.bfloat16()) + model[1].bias.double()
    assert (found - wanted).abs().max() < 1e-5
