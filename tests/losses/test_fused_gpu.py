"""The fused losses by kernels in Triton, in its interpreter, or on a GPU where there is one: against the unfused in float64."""

import math

import numpy as np
import pytest
import torch

from softcache.labels.sparsify import hybrid, row_seeds, top_k
from softcache.losses import LOSSES, cross_entropy, distillation_loss, make_loss, uld
from softcache.losses.fused import fused_distillation_loss, fused_uld_loss, gpu
from softcache.losses.fused.chunk import ChunkObjective
from softcache.losses.fused.head import Head
from tests.losses.test_fused import (
    ODD_TEMPERATURES,
    P,
    V,
    assert_narrow_same,
    full_logits,
    make,
    make_case,
    make_labels,
    make_targets,
)

INF = math.inf
BUCKETED = [name for name, spec in LOSSES.items() if spec.formula is not None]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # NumPy's, of infinities
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)
pytest.importorskip("triton")


@pytest.fixture
def chunks(monkeypatch):
    """Has CPU chunks go the way of a GPU's; those that did."""
    chunks, call = [], gpu.TritonObjective.__call__
    if DEVICE == "cpu":
        monkeypatch.setenv("SOFTCACHE_COMPILED", "0")
        monkeypatch.setattr(gpu, "is_triton_on", lambda tensor: True)

    def counted(self, *given):
        chunks.append(given)
        return call(self, *given)

    monkeypatch.setattr(gpu.TritonObjective, "__call__", counted)
    return chunks


def check(chunks, parts, labels, targets, *, weights=None, head=None, padded=False, **how):
    """float32 through the kernels gives the value and the gradients of the unfused loss in float64, to rounding."""
    how, head = {"padded_vocabulary": padded, **how}, head or {}
    wanted = distillation_loss(full_logits(*parts, **head), labels, targets, mask=weights, **how)

    def run(parts):
        there = [x.to(DEVICE) for x in parts]
        bias = there[2] if len(parts) > 2 else None
        given = (labels.to_torch(DEVICE), targets.to(DEVICE))
        more = {"bias_V": bias, "weights_P": weights, "chunk_positions": 6}
        if isinstance(how.get("temperature"), torch.Tensor):
            more["temperature"] = how["temperature"].to(DEVICE)
        return fused_distillation_loss(*there[:2], *given, **{**head, **how, **more}).cpu()

    assert_narrow_same(run, parts, wanted)
    assert chunks


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5, ODD_TEMPERATURES], ids=["1", "2.5", "per position"])
def test_it_equals_the_unfused_loss(chunks, temperature, alpha):
    check(chunks, make_case(), make_labels(4), make_targets(), temperature=temperature, alpha=alpha)


@pytest.mark.parametrize("name", BUCKETED)
def test_every_loss_of_masses_in_buckets(chunks, name):
    targets, weights = make_targets(), make(P, seed=7).abs()
    weights[6] = 0.0
    labels = top_k(make(P, V, seed=5, scale=3.0), k=4, targets_P=targets)
    targets[1] = -100
    how = {"temperature": 2.5, "alpha": 0.4, "loss": make_loss(name)}
    check(chunks, make_case(), labels, targets, weights=weights, **how)


@pytest.mark.parametrize("tail", ["ignore", "renormalize"])
def test_other_tails(chunks, tail):
    how = {"temperature": 2.0, "alpha": 0.5, "loss": make_loss("forward_kl", tail=tail)}
    check(chunks, make_case(), make_labels(4), make_targets(), **how)


@pytest.mark.parametrize("bias", [False, True])
def test_bias_softcap_and_scale_of_the_head(chunks, bias):
    head = {"softcap": 2.0, "logit_scale": 3.0}
    check(chunks, make_case(bias=bias), make_labels(4), make_targets(), head=head, temperature=3.0, alpha=0.5)


@pytest.mark.parametrize("k", [1, V])
def test_one_kept_class_and_all(chunks, k):
    check(chunks, make_case(), make_labels(k), make_targets(), temperature=2.0, alpha=0.5)


@pytest.mark.parametrize("num_student_classes", [V - 6, V + 20])
def test_padded_vocabularies(chunks, num_student_classes):
    parts, targets = make_case(num_classes=num_student_classes), make_targets(V - 6)
    check(chunks, parts, make_labels(5), targets, padded=True, temperature=2.0, alpha=0.5)


def test_drawn_classes(chunks):
    seeds = row_seeds(np.arange(P, dtype=np.uint64), np.ones(P, np.int64), np.zeros(P, np.int64), 0)
    labels = hybrid(make(P, V, seed=5, scale=3.0), k=2, draws=4, seeds_P=seeds)
    check(chunks, make_case(), labels, make_targets(), temperature=2.0, alpha=0.5)


def test_masked_classes_and_rows_of_several_blocks(chunks):
    num_classes = 9001
    parts = make_case(num_classes=num_classes, bias=True)
    with torch.no_grad():
        parts[2][::7] = -INF
    labels = top_k(full_logits(*parts).detach() + make(P, num_classes, seed=3), k=8)
    targets = labels.ids[:, 0].clone()
    targets[4] = 1  # not kept
    check(chunks, parts, labels, targets, temperature=1.5, alpha=0.5)


def test_a_student_that_masks_every_dropped_class(chunks):
    parts, labels = make_case(bias=True), make_labels(4)
    labels = labels.map_arrays(lambda x: x[:1].expand(P, *x.shape[1:]))
    with torch.no_grad():
        parts[2][[i for i in range(V) if i not in labels.ids[0]]] = -INF
    how = {"temperature": 2.0, "alpha": 0.5, "loss": make_loss("forward_kl", tail="renormalize")}
    check(chunks, parts, labels, labels.ids[:, 0], **how)


@pytest.mark.skipif(DEVICE == "cuda", reason="simulates a GPU")
def test_the_gradient_in_the_dtype_of_the_products(chunks, monkeypatch):
    """As on a GPU: half precision multiplied as it is. The target's gradient is rounded once, also where it is nearly 0."""
    make_head = Head.__init__

    def as_on_a_gpu(self, *given):
        make_head(self, *given)
        self.product_dtype, self.weight_VD = self._rounded, self.weight_VD.to(self._rounded)

    monkeypatch.setattr(Head, "__init__", as_on_a_gpu)
    labels, targets = make_labels(4), make_targets()
    hidden, weight = (x.detach().bfloat16().requires_grad_() for x in make_case())
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    with torch.no_grad():
        for one, other in zip((hidden, weight), exact, strict=True):
            one.mul_(2.0), other.mul_(2.0)
    how = {"temperature": 2.0, "alpha": 0.3}
    found = fused_distillation_loss(hidden, weight, labels, targets, **how)
    wanted = distillation_loss(full_logits(*exact), labels, targets, **how)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    for one, other in zip(
        torch.autograd.grad(found, (hidden, weight)), torch.autograd.grad(wanted, exact), strict=True
    ):
        torch.testing.assert_close(one.double(), other, rtol=2e-2, atol=2e-3 * float(other.abs().max()))
    (head, logits_PV, *_), *_ = chunks
    assert head.gradient_buffer(logits_PV).dtype == torch.bfloat16


@pytest.mark.skipif(DEVICE == "cuda", reason="on the CPU")
def test_uld_ranks_the_students_own_classes(chunks):
    parts, labels, targets = make_case(), make_labels(4), make_targets()
    logits = full_logits(*parts)
    wanted = (0.5 * cross_entropy(logits, targets) + 0.5 * uld(logits, labels, temperature=2.0)).mean()
    assert_narrow_same(
        lambda parts: fused_uld_loss(*parts, labels, targets, temperature=2.0, alpha=0.5), parts, wanted
    )
    assert chunks


@pytest.mark.skipif(DEVICE == "cuda", reason="on the CPU")
def test_a_nan_of_the_student_stays_one(chunks):
    parts = [x.detach().float().requires_grad_() for x in make_case()]
    with torch.no_grad():
        parts[0][3] = math.nan
    loss = fused_distillation_loss(*parts, make_labels(4), make_targets(), temperature=2.0, alpha=0.5)
    assert loss.isnan()
    assert chunks


@pytest.mark.skipif(DEVICE == "cuda", reason="on the CPU")
def test_what_it_serves(chunks):
    head = Head(torch.zeros(2, 3), torch.zeros(5, 3), None, None, 1.0, None)
    assert gpu.is_triton(head, ChunkObjective(None, 0.0, None, 1.0))
    how = {"temperature": 2.0, "alpha": 0.5}
    for loss in (make_loss("forward_kl", tail="uniform"), make_loss("forward_kl", standardize=True)):
        parts = [x.detach().float().requires_grad_() for x in make_case()]
        fused_distillation_loss(*parts, make_labels(4), make_targets(), loss=loss, **how)
    fused_distillation_loss(*make_case(), make_labels(4), make_targets(), **how)  # float64
    assert not chunks


class Student(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(5, 5)
        self.head = torch.nn.Parameter(torch.randn(V, 5, generator=torch.Generator().manual_seed(0)))

    def forward(self, x, labels, targets):
        hidden = self.body(x).tanh()
        return fused_distillation_loss(hidden, self.head, labels, targets, temperature=2.0, alpha=0.5)


@pytest.mark.skipif(DEVICE == "cuda", reason="simulates a GPU")
@pytest.mark.filterwarnings("ignore::UserWarning")  # dynamo's, of caches of functions
def test_in_a_student_that_is_compiled_or_cut_by_fully_shard(chunks, tmp_path):
    """The kernels are launched between compiled graphs, and get the whole weight of a head of which a process holds a part."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    labels, targets = (
        make_labels(4).map_arrays(lambda x: x.float() if x.is_floating_point() else x),
        make_targets(),
    )
    x, student = torch.randn(P, 5, generator=torch.Generator().manual_seed(1)), Student()

    def gradients(student):
        del chunks[:]
        loss = student(x, labels, targets)
        loss.backward()
        assert chunks
        found = [loss.detach(), *(p.grad for p in student.parameters())]
        return [x.full_tensor() if hasattr(x, "full_tensor") else x for x in found]

    wanted = gradients(student)
    compiled = Student()
    compiled.load_state_dict(student.state_dict())
    compiled.compile(backend="eager")
    cut = Student()
    cut.load_state_dict(student.state_dict())
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        found = [gradients(compiled), gradients(fully_shard(cut, mesh=mesh))]
    finally:
        dist.destroy_process_group()
    for other in found:
        for one, two in zip(wanted, other, strict=True):
            torch.testing.assert_close(one, two)
