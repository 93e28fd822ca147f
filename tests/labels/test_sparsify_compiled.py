"""Compiled records on the CPU: against float64 in torch, where the two share no code."""

import math
import os
import subprocess
import sys
import threading

import pytest
import torch

from softcache.labels.sparsify import (
    Dense,
    assemble,
    cpu_draw_kernels,
    hybrid,
    label_settings,
    row_seeds,
    sample,
    top_k,
    top_p,
)
from softcache.labels.sparsify.assemble import Rows, top_k_indices
from softcache.labels.sparsify.policies import hybrid as hybrids
from softcache.labels.sparsify.policies import sample as samples
from tests.support.caches import ROOT

INF = math.inf
ARRAYS = ("log_probs", "log_tail", "target_log_prob", "stats")


def make_logits(rows, num_classes, scale=3.0, seed=0):
    return torch.randn(rows, num_classes, generator=torch.Generator().manual_seed(seed)) * scale


def assert_agrees(logits_PV, **how):
    targets = torch.arange(len(logits_PV)) % logits_PV.shape[1]
    found = top_k(logits_PV, targets_P=targets, **how)
    wanted = top_k(logits_PV.double(), targets_P=targets, **how)
    assert torch.equal(found.ids, wanted.ids)
    for name in ARRAYS:
        assert getattr(found, name).dtype == torch.float32
        torch.testing.assert_close(getattr(found, name).double(), getattr(wanted, name), rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize(
    ("num_classes", "k"),
    [(1, 1), (2, 1), (7, 7), (10, 5), (63, 15), (64, 16), (1000, 10), (4096, 128), (4099, 700)],
)
def test_agrees_with_float64(num_classes, k):
    assert_agrees(make_logits(9, num_classes), k=k)


@pytest.mark.parametrize(
    "temperatures", [(1.0,), (1.0, 1.5), (1.0, 3.0, 100.0), (1.0, 2.0, 8.0), (1.0, 2.0, 16.0)]
)
def test_any_grid(temperatures):
    assert_agrees(make_logits(5, 3000, scale=6.0), k=20, temperatures=temperatures)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 50.0])
def test_flat_and_steep_rows(scale):
    assert_agrees(make_logits(6, 500, scale=scale), k=8, temperatures=(1.0, 2.0, 4.0))


def test_a_tail_far_below_the_top_keeps_its_digits():
    logits = make_logits(4, 900)
    logits[:, 17] += 300.0
    assert_agrees(logits, k=1)


def test_masked_classes_are_as_good_as_absent():
    logits = make_logits(5, 800)
    logits[:, ::3] = -INF
    assert_agrees(logits, k=10)
    logits[:, 20:] = -INF
    assert_agrees(logits, k=20)


@pytest.mark.parametrize("k", [1, 5, 200, 1024])
def test_ties_go_to_the_lower_id(k):
    values = torch.randint(-3, 3, (20, 1024), generator=torch.Generator().manual_seed(1)).float()
    values[values == 0] = torch.where(torch.arange((values == 0).sum()) % 2 == 0, 0.0, -0.0)
    wanted = values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(top_k_indices(values, k), wanted)
    assert torch.equal(top_k(values, k=k).ids, wanted)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, INF])
def test_a_bad_logit_anywhere_spoils_its_row_and_no_other(bad):
    logits = make_logits(6, 300)
    logits[2, 299] = bad
    logits[4] = -INF
    labels = top_k(logits, k=7, check=False, targets_P=torch.zeros(6, dtype=torch.int64))
    for name in ARRAYS:
        is_nan = getattr(labels, name).reshape(6, -1).isnan()
        assert is_nan[[2, 4]].all()
        assert not is_nan[[0, 1, 3, 5]].any()
    clean = top_k(logits[[0, 1, 3, 5]], k=7, targets_P=torch.zeros(4, dtype=torch.int64))
    assert torch.equal(labels.log_tail[[0, 1, 3, 5]], clean.log_tail)
    assert ((labels.ids >= 0) & (labels.ids < 300)).all()


def test_a_row_does_not_depend_on_its_neighbours_or_its_place_in_memory():
    logits = make_logits(8, 1000)
    whole = top_k(logits, k=30)
    strided = torch.empty(8, 2000)[:, ::2].copy_(logits)
    for row in range(8):
        for other in (top_k(logits[row : row + 1], k=30), top_k(strided[row : row + 1], k=30)):
            for name in ("ids", "log_probs", "log_tail", "stats"):
                assert torch.equal(getattr(other, name)[0], getattr(whole, name)[row]), name


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", ["top_k", "top_p", "sample", "hybrid"])
def test_threads_make_the_same_records_in_the_same_order(monkeypatch, threads, policy, dtype, mode):
    made_by, work = set(), assemble._compiled_record

    def watched(*given):
        made_by.add(threading.get_ident())
        barrier.wait(60)  # each thread has a part, so all of them are there
        return work(*given)

    settings = label_settings(policy)
    logits_PV = make_logits(6 * 256 - 100, 200).to(dtype)
    how = {"targets_P": torch.arange(len(logits_PV)) % 200, "seeds_P": torch.arange(len(logits_PV))}
    with mode():
        threads(1)
        one = settings.apply(logits_PV, **how)
        threads(3)
        barrier = threading.Barrier(3)
        monkeypatch.setattr(assemble, "_compiled_record", watched)
        several = settings.apply(logits_PV, **how)
    assert len(made_by) == 3
    for name in (*ARRAYS, "ids", "counts", "log_threshold"):
        found, wanted = getattr(several, name), getattr(one, name)
        assert (found is None) == (wanted is None)
        assert found is None or found.numpy().tobytes() == wanted.numpy().tobytes()


def test_what_fails_in_a_thread_is_raised(monkeypatch, threads):
    def fail(rows, *given):
        raise MemoryError("no memory")

    monkeypatch.setattr(assemble, "_compiled_record", fail)
    threads(2)
    with pytest.raises(MemoryError, match="no memory"):
        top_k(make_logits(600, 20), k=3)


def test_every_policy_agrees_with_float64():
    logits = make_logits(6, 400)
    seeds = row_seeds(
        torch.arange(6).numpy().astype("uint64"), torch.ones(6).numpy(), torch.zeros(6).numpy(), 1
    )
    runs = {
        "top_p": lambda x: top_p(x, p=0.8, max_k=30),
        "sample": lambda x: sample(x, draws=40, seeds_P=seeds),
        "hybrid": lambda x: hybrid(x, k=5, draws=20, seeds_P=seeds),
        "dense": lambda x: Dense().apply(x),
    }
    for name, run in runs.items():
        found, wanted = run(logits), run(logits.double())
        assert torch.equal(found.ids, wanted.ids), name
        for array in ("log_probs", "log_tail", "stats"):
            a, b = getattr(found, array).double(), getattr(wanted, array)
            torch.testing.assert_close(a, b, rtol=2e-6, atol=4e-6, msg=f"{name} {array}")


@pytest.mark.parametrize("policy", ["top_k", "top_p", "dense", "sample", "hybrid"])
def test_the_reference_makes_the_same_record(monkeypatch, policy):
    logits, targets, seeds = make_logits(6, 400), torch.arange(6), torch.arange(6)
    settings = label_settings(policy)
    found = settings.apply(logits, targets_P=targets, seeds_P=seeds)
    monkeypatch.setenv("SOFTCACHE_COMPILED", "0")
    monkeypatch.setattr("softcache.labels.sparsify.assemble._compiled_record", None)
    wanted = settings.apply(logits, targets_P=targets, seeds_P=seeds)
    assert torch.equal(found.ids, wanted.ids)
    for array in ARRAYS:
        torch.testing.assert_close(getattr(found, array), getattr(wanted, array), rtol=2e-6, atol=4e-6)


RECORDS = """
import hashlib
import numpy as np
from softcache.labels.sparsify.kernels import fill_records

x = (np.random.default_rng(0).standard_normal((64, 300)) * 3).astype(np.float32)
ids, log_probs = np.zeros((64, 12), np.int64), np.zeros((64, 12), np.float32)
tail, target, stats = (np.zeros(shape, np.float32) for shape in ((64, 8), 64, (64, 4)))
beta = np.arange(8, 0, -1) / 8
fill_records(x, True, 12, beta, ids, np.zeros(64, np.int64), log_probs, tail, target, stats)
print(hashlib.sha256(log_probs.tobytes() + tail.tobytes() + stats.tobytes()).hexdigest())
"""


def test_the_process_that_compiles_makes_the_bits_of_all_that_come_after_it(tmp_path):
    """numba keeps other machine code than it runs where it compiles."""
    environment = dict(os.environ) | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", RECORDS]
    made = {
        subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True).stdout
        for _ in range(2)
    }
    assert len(made) == 1


def make_seeds(rows):
    return torch.randint(-(2**62), 2**62, (rows,), generator=torch.Generator().manual_seed(rows))


def drawn_rows(kind, num_classes, rows=60):
    logits = make_logits(rows, num_classes, scale=2.0, seed=num_classes)
    if kind == "steep":
        return logits**3
    if kind == "tied":
        return logits.round()
    if kind == "masked":
        logits[:, 1:] = logits[:, 1:].where(make_logits(rows, num_classes - 1, seed=1) > 2.0, -INF)
    return logits


@pytest.mark.parametrize("kind", ["normal", "steep", "tied", "masked"])
@pytest.mark.parametrize("num_classes", [5, 70, 1003])
def test_draws_are_those_of_torch(kind, num_classes):
    logits = drawn_rows(kind, num_classes)
    rows, seeds = Rows(logits, slice(0, len(logits))), make_seeds(len(logits))
    assert rows.is_compiled
    for k, draws, exponent in ((1, 3, 1.0), (5, 40, 0.3), (3, 400, 1.0)):
        if k + draws <= num_classes:
            found = hybrids._compiled_choice(rows, k, draws, exponent, seeds)
            wanted = hybrids._choice(rows, rows.largest(k), draws, exponent, seeds)
            assert torch.equal(found.ids_PK, wanted.ids_PK)
            assert torch.equal(found.log_threshold_P, wanted.log_threshold_P)
        found, wanted = (
            choice(rows, draws, exponent, seeds) for choice in (samples._compiled_choice, samples._choice)
        )
        assert torch.equal(found.ids_PK, wanted.ids_PK)
        assert torch.equal(found.counts_PK, wanted.counts_PK)


def test_equal_priorities_at_the_threshold_are_taken_as_torch_takes_them(monkeypatch):
    logits, seeds = make_logits(5, 300), make_seeds(5)
    rows, draw = Rows(logits, slice(0, 5)), cpu_draw_kernels.draw_by_priority

    def tied(logits_PV, k, exponent, seeds_P, ids_PK, threshold_P, is_tied_P):
        draw(logits_PV, k, exponent, seeds_P, ids_PK, threshold_P, is_tied_P)
        assert not is_tied_P.any()
        ids_PK[1:3, k:], is_tied_P[1:3] = -1, True

    monkeypatch.setattr(cpu_draw_kernels, "draw_by_priority", tied)
    found = hybrids._compiled_choice(rows, 4, 9, 1.0, seeds)
    assert torch.equal(found.ids_PK, hybrids._choice(rows, rows.largest(4), 9, 1.0, seeds).ids_PK)


def test_a_number_too_small_for_a_first_look_is_drawn_like_others():
    """The first class has the number 5.5 / 2^52 with this seed."""
    seeds, logits = torch.tensor([-1833829319672426575]), make_logits(1, 500)
    logits[0, 0] = -20.0
    rows = Rows(logits, slice(0, 1))
    found = hybrids._compiled_choice(rows, 4, 9, 1.0, seeds)
    wanted = hybrids._choice(rows, rows.largest(4), 9, 1.0, seeds)
    assert 0 in found.ids_PK
    assert torch.equal(found.ids_PK, wanted.ids_PK)
    assert torch.equal(found.log_threshold_P, wanted.log_threshold_P)
