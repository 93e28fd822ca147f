"""Records from one pass, by Triton's interpreter, or on a GPU where there is one: against float64 in torch on the CPU."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from softcache.labels import DEFAULT_TEMPERATURES
from softcache.labels.sparsify import (
    assemble,
    hybrid,
    logit_faults,
    record_faults,
    row_seeds,
    sample,
    top_k,
    top_p,
)
from softcache.labels.sparsify.one_pass import MAX_LARGEST, is_one_pass, read_rows
from softcache.labels.sparsify.validate import describe_fault
from tests.support.caches import ROOT

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # NumPy's, of infinities
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)
pytest.importorskip("triton")

INF = math.inf
ARRAYS = ("log_probs", "log_tail", "target_log_prob", "stats")


@pytest.fixture
def one_pass(monkeypatch):
    """Has CPU rows go the way of a GPU's."""

    def serves(logits_PV, num_largest, temperatures):
        return logits_PV.dtype != torch.float64 and num_largest <= MAX_LARGEST

    if DEVICE == "cpu":
        monkeypatch.setattr(assemble, "is_one_pass", serves)


def make_logits(rows, num_classes, scale=3.0, seed=0):
    return torch.randn(rows, num_classes, generator=torch.Generator().manual_seed(seed)) * scale


def assert_agrees(found, wanted):
    found = found.to_torch("cpu")
    assert torch.equal(found.ids, wanted.ids)
    for name in ARRAYS:
        assert getattr(found, name).dtype == torch.float32
        torch.testing.assert_close(getattr(found, name).double(), getattr(wanted, name), rtol=1e-6, atol=2e-6)


def check(logits_PV, k, temperatures=DEFAULT_TEMPERATURES):
    how = {
        "k": k,
        "temperatures": temperatures,
        "targets_P": torch.arange(len(logits_PV)) % logits_PV.shape[1],
    }
    assert_agrees(top_k(logits_PV.to(DEVICE), **how), top_k(logits_PV.double(), **how))


@pytest.mark.usefixtures("one_pass")
@pytest.mark.parametrize(
    ("num_classes", "k", "dtype"),
    [
        (1, 1, torch.float32),
        (7, 7, torch.bfloat16),
        (1000, 300, torch.float16),
        (4104, 64, torch.float32),
        (40_001, 10, torch.bfloat16),
    ],
)
def test_agrees_with_float64(num_classes, k, dtype):
    check(make_logits(2, num_classes).to(dtype), k)


@pytest.mark.usefixtures("one_pass")
@pytest.mark.parametrize(("num_classes", "dtype"), [(262_144, torch.float32), (151_936, torch.bfloat16)])
def test_the_largest_vocabularies(num_classes, dtype):
    logits = make_logits(1, num_classes, scale=4.0)
    logits[0, 100_000:130_000] = -INF
    check(logits.to(dtype), 64)


@pytest.mark.usefixtures("one_pass")
def test_tied_masked_and_sorted_rows():
    logits = make_logits(6, 9000)
    logits[0] = 2.5
    logits[1] = logits[1].round()
    logits[2, ::3] = -INF
    logits[3, 20:] = -INF  # fewer classes than slots
    logits[4] = torch.arange(9000) / 100  # each block holds larger logits than those before
    logits[5] = torch.where(torch.arange(9000) % 2 == 0, 0.0, -0.0)
    check(logits, 40)


@pytest.mark.usefixtures("one_pass")
@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 3.0, 100.0)])
def test_any_grid(temperatures):
    check(make_logits(2, 5000, scale=6.0), 20, temperatures)


@pytest.mark.usefixtures("one_pass")
def test_a_tail_far_below_the_top_keeps_its_digits():
    logits = make_logits(2, 5000)
    logits[0, 17] += 300.0
    logits[1, :3] += 80.0
    check(logits, 3)


@pytest.mark.usefixtures("one_pass")
def test_faults_are_found_in_the_same_pass():
    logits, k = make_logits(7, 5000), 4
    logits[1, 4999], logits[2, 0], logits[3, 9] = math.nan, -math.nan, INF
    logits[4] = -INF
    logits[5, 7], logits[5, 8] = INF, math.nan
    targets = torch.zeros(7, dtype=torch.int64)
    labels = top_k(logits.to(DEVICE), k=k, check=False, targets_P=targets).to_torch("cpu")
    assert torch.equal(record_faults(labels, logits), logit_faults(logits))
    for name in ("log_probs", "log_tail", "target_log_prob"):
        is_nan = getattr(labels, name).reshape(7, -1).isnan()
        assert is_nan[1:6].all()
        assert not is_nan[[0, 6]].any()
    assert ((labels.ids >= 0) & (labels.ids < 5000)).all()
    by_torch = top_k(logits.double(), k=k, check=False, targets_P=targets)
    assert torch.equal(record_faults(by_torch, logits), logit_faults(logits))
    assert describe_fault(int(record_faults(labels, logits)[3])) == "a +inf logit"


def test_a_row_has_the_same_bits_in_every_batch_and_with_any_stride():
    logits = make_logits(3, 33_000).to(DEVICE)
    wide = torch.full((3, 40_000), math.nan, device=DEVICE)
    wide[:, :33_000] = logits
    whole, one = (
        read_rows(logits, 20, DEFAULT_TEMPERATURES),
        read_rows(wide[1:2, :33_000], 20, DEFAULT_TEMPERATURES),
    )
    for every, single in zip(whole, one, strict=True):
        assert every is None or torch.equal(every[1:2], single)


@pytest.mark.usefixtures("one_pass")
@pytest.mark.parametrize("policy", ["sample", "hybrid", "top_p"])
def test_policies_that_choose_among_all_classes(policy):
    logits, targets = make_logits(3, 5000), torch.tensor([5, 0, 4999])
    logits[1] *= 3.0
    seeds = row_seeds(np.arange(3, dtype=np.uint64), np.ones(3, np.int64), np.zeros(3, np.int64), 0)
    how = {
        "sample": lambda z: sample(z, draws=12, seeds_P=seeds, targets_P=targets),
        "hybrid": lambda z: hybrid(z, k=5, draws=7, seeds_P=seeds, targets_P=targets, chunk_positions=2),
        "top_p": lambda z: top_p(z, p=0.5, max_k=30, targets_P=targets),
    }[policy]
    found, wanted = how(logits.to(DEVICE)).to_torch("cpu"), how(logits.double())
    assert_agrees(found, wanted)
    assert found.sampling == wanted.sampling
    if policy == "sample":
        assert torch.equal(found.counts, wanted.counts)
    if policy == "hybrid":
        torch.testing.assert_close(found.log_threshold.double(), wanted.log_threshold, rtol=1e-6, atol=1e-6)
    if policy == "top_p":
        assert (found.ids == 5000).any()


@pytest.mark.usefixtures("one_pass")
@pytest.mark.parametrize("exponent", [1.0, 0.6])
@pytest.mark.parametrize(("num_classes", "k", "draws"), [(24, 4, 20), (24, 4, 19), (9000, 1, 300)])
def test_draws_without_replacement(num_classes, k, draws, exponent):
    logits = make_logits(2, num_classes)
    logits[1, ::3] = -INF  # at V = 24 fewer classes than slots
    seeds = row_seeds(np.arange(2, dtype=np.uint64), np.ones(2, np.int64), np.zeros(2, np.int64), 7)
    found, wanted = (
        hybrid(
            z, k=k, draws=draws, seeds_P=seeds, exponent=exponent, targets_P=torch.zeros(2, dtype=torch.int64)
        )
        for z in (logits.to(DEVICE), logits.double())
    )
    assert_agrees(found, wanted)
    threshold = found.log_threshold.cpu().double()
    torch.testing.assert_close(threshold, wanted.log_threshold, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("one_pass")
@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_draws_with_replacement(exponent):
    logits = make_logits(3, 1500)
    logits[1, :1400] = -INF
    logits[2, 700] = 200.0
    seeds = row_seeds(np.arange(3, dtype=np.uint64), np.ones(3, np.int64), np.zeros(3, np.int64), 7)
    found, wanted = (
        sample(z, draws=200, seeds_P=seeds, exponent=exponent, targets_P=torch.zeros(3, dtype=torch.int64))
        for z in (logits.to(DEVICE), logits.double())
    )
    assert_agrees(found, wanted)
    assert torch.equal(found.counts.cpu(), wanted.counts)


def test_which_rows_it_serves(monkeypatch):
    class Device:
        type = "cuda"

    class Logits:
        device, dtype = Device, torch.bfloat16

        def numel(self):
            return 8

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert is_one_pass(Logits(), 8, DEFAULT_TEMPERATURES)
    assert not is_one_pass(torch.zeros(2, 4), 2, DEFAULT_TEMPERATURES)
    assert not is_one_pass(Logits(), MAX_LARGEST + 1, DEFAULT_TEMPERATURES)
    assert not is_one_pass(Logits(), 8, tuple(range(1, 10)))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not is_one_pass(Logits(), 8, DEFAULT_TEMPERATURES)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("SOFTCACHE_COMPILED", "0")
    assert not is_one_pass(Logits(), 8, DEFAULT_TEMPERATURES)


def test_the_kernels_compile_for_gpus_without_spills(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.triton_compile"],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 28
    assert all(line.endswith(" 0 bytes of spills") for line in lines), done.stdout
