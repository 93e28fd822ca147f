"""The one-operation loss has the value and the gradient of the parts it stands for, on every route."""

from dataclasses import replace

import pytest
import torch

from softcache.errors import LabelError
from softcache.labels.sparsify import dense, top_k
from softcache.losses import cross_entropy, direct, distillation_loss, forward_kl, make_loss

P, V = 7, 12
TARGETS = torch.tensor([3, 0, 11, -100, 7, 3, 5])


def logits(seed, *, rows=P, classes=V, scale=3.0):
    return scale * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))


def by_parts(z, labels, targets, T, alpha):
    """The documented sum, by autograd over public losses, in float64."""
    labels = labels.map_arrays(lambda x: x.double() if x.is_floating_point() else x)
    soft = forward_kl(z, labels, temperature=torch.tensor(T, dtype=torch.float64))
    hard = cross_entropy(z, targets) if alpha < 1 else 0.0
    return ((1 - alpha) * hard + alpha * T**2 * soft).mean()


def value_and_gradient(function, z):
    z = z.clone().requires_grad_()
    value = function(z)
    value.backward()
    return value.detach(), z.grad


@pytest.fixture(params=["compiled", "torch"])
def route(request, monkeypatch):
    monkeypatch.setattr(direct, "_MOST_CLASSES", 10**9 if request.param == "compiled" else 0)
    return request.param


def records():
    teacher = logits(1)
    masked = teacher.clone()
    masked[2, [1, 5, 6]] = -torch.inf
    masked[4, 2:] = -torch.inf  # fewer classes than slots: some of these are unused
    whole = dense(teacher)
    narrow = top_k(teacher, k=4)
    return {
        "top_k": narrow,
        "one": top_k(teacher, k=1),
        "dense": whole,
        "masked": top_k(masked, k=5),
        "without stats": replace(narrow, stats=None),
        "half": replace(narrow, log_probs=narrow.log_probs.half(), ids=narrow.ids.to(torch.int16)),
        "uint16": replace(narrow, ids=narrow.ids.to(torch.uint16)),
        "sure": top_k(teacher * 40, k=3),
    }


@pytest.mark.parametrize("name", records())
@pytest.mark.parametrize("temperature", [1, 4.0, 1.6, 3.0])
@pytest.mark.parametrize("alpha", [0.9, 1.0])
def test_value_and_gradient_are_those_of_the_parts(route, name, temperature, alpha):
    labels, z = records()[name], logits(2)
    expected, slope = value_and_gradient(
        lambda x: by_parts(x, labels, TARGETS, float(temperature), alpha), z.double()
    )
    how = {"temperature": temperature, "alpha": alpha}
    found, gradient = value_and_gradient(lambda x: distillation_loss(x, labels, TARGETS, **how), z)
    assert found.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), slope, rtol=2e-5, atol=2e-6)


def test_it_is_taken_where_it_should_be_and_only_there(monkeypatch):
    taken = []
    monkeypatch.setattr("softcache.losses.distillation.direct_loss", lambda *args, **how: taken.append(how))
    labels, z, how = top_k(logits(1), k=3), logits(2), {"temperature": 2.0, "alpha": 0.5}
    distillation_loss(z, labels, TARGETS, **how)
    assert taken == [how]
    wide = torch.nn.functional.pad(z, (0, 2))
    ones = torch.ones(P)
    others = [
        distillation_loss(z, labels, TARGETS, mask=ones, **how),
        distillation_loss(z, labels, TARGETS, temperature=ones + 1, alpha=0.5),
        distillation_loss(wide, labels, TARGETS, padded_vocabulary=True, **how),
        distillation_loss(z, labels, TARGETS, loss="jsd", **how),
        distillation_loss(z, labels, TARGETS, loss=make_loss("forward_kl", tail="ignore"), **how),
        distillation_loss(z, labels, TARGETS, loss=make_loss("forward_kl", standardize=True), **how),
        distillation_loss(z, replace(labels, log_probs=labels.log_probs.requires_grad_()), TARGETS, **how),
    ]
    assert len(taken) == 1
    assert all(other is not None for other in others)


def test_gradient_is_that_of_the_reported_value(route):
    labels, z = top_k(logits(1), k=4), logits(2).double()
    labels = labels.map_arrays(lambda x: x.double() if x.is_floating_point() else x)
    how = {"temperature": 2.5, "alpha": 0.7}
    torch.autograd.gradcheck(lambda x: distillation_loss(x, labels, TARGETS, **how), z.requires_grad_())


def test_what_is_near_the_ends_of_float32(route):
    """Far logits, a student whose kept mass rounds to 1, and masked classes of the student's."""
    labels, z = top_k(logits(1), k=3), logits(2)
    z[0, labels.ids[0].long()] += 60.0
    z[1] *= 20.0
    z[2] -= 1e4
    dropped = [j for j in range(V) if j not in labels.ids[3].tolist()]
    z[3, dropped[:4]] = -torch.inf
    expected, slope = value_and_gradient(lambda x: by_parts(x, labels, TARGETS, 2.0, 0.5), z.double())
    how = {"temperature": 2.0, "alpha": 0.5}
    found, gradient = value_and_gradient(lambda x: distillation_loss(x, labels, TARGETS, **how), z)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-4, atol=1e-5)


def test_a_student_that_masks_what_the_teacher_has_is_infinitely_far_and_a_nan_stays(route):
    labels, z = top_k(logits(1), k=3), logits(2)
    how = {"temperature": 2.0, "alpha": 1.0}
    z[0, int(labels.ids[0, 0])] = -torch.inf
    assert distillation_loss(z, labels, None, **how) == torch.inf
    dropped = [j for j in range(V) if j not in labels.ids[0].tolist()]
    z = logits(2)
    z[0, dropped] = -torch.inf
    assert distillation_loss(z, labels, None, **how) == torch.inf
    for place in (int(labels.ids[0, 0]), dropped[0]):
        z = logits(2)
        z[0, place] = torch.nan
        value, gradient = value_and_gradient(lambda x: distillation_loss(x, labels, None, **how), z)
        assert value.isnan()
        assert gradient[0].isnan().any()
        assert not gradient[1:].isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_students_get_gradients_of_their_dtype(route, dtype):
    labels, z, how = top_k(logits(1), k=3), logits(2).to(dtype), {"temperature": 4.0, "alpha": 0.9}
    expected, slope = value_and_gradient(lambda x: distillation_loss(x, labels, TARGETS, **how), z.float())
    found, gradient = value_and_gradient(lambda x: distillation_loss(x, labels, TARGETS, **how), z)
    assert gradient.dtype == dtype
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, slope.to(dtype))


def test_larger_batches_and_uneven_numbers_of_classes(route):
    for classes in (2, 3, 5, 33, 130):
        labels, z = top_k(logits(3, rows=40, classes=classes), k=2), logits(4, rows=40, classes=classes)
        targets = torch.arange(40) % classes
        expected, slope = value_and_gradient(lambda x: by_parts(x, labels, targets, 4.0, 0.3), z.double())  # noqa: B023
        found, gradient = value_and_gradient(
            lambda x: distillation_loss(x, labels, targets, temperature=4.0, alpha=0.3),  # noqa: B023
            z,
        )
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient.double(), slope, rtol=2e-5, atol=2e-6)


def test_bad_ids_and_targets_are_named():
    labels, z, how = top_k(logits(1), k=3), logits(2), {"temperature": 4.0, "alpha": 0.9}
    ids = labels.ids.clone()
    ids[2, 1] = V + 1
    with pytest.raises(LabelError, match=r"labels.ids, position 2: expected classes in \[0, 12\)"):
        distillation_loss(z, replace(labels, ids=ids), TARGETS, **how)
    wrong = TARGETS.clone()
    wrong[5] = V
    with pytest.raises(
        LabelError, match=r"targets, position 5: expected a class in \[0, 12\) or -100; found 12"
    ):
        distillation_loss(z, labels, wrong, **how)
    with pytest.raises(LabelError, match=r"targets: expected \[7\], one per row of logits; found \[6\]"):
        distillation_loss(z, labels, TARGETS[:6], **how)


def test_buckets_at_are_those_of_at_temperature():
    for labels in records().values():
        for temperature in (1, 2.0, 3.0):
            softened = labels.at_temperature(temperature)
            expected = torch.cat([softened.log_probs, softened.log_tail[:, None]], dim=1)
            torch.testing.assert_close(labels.buckets_at(temperature), expected, rtol=1e-5, atol=1e-6)
