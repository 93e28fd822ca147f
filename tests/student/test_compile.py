"""[train] compile: the same losses as without, exact resume, and what is refused."""

import copy

import pytest
import torch

from softcache.errors import SpecError
from softcache.models import compile as compiling
from softcache.reader.dataset import SoftLabelDataset
from tests.student.test_run import (
    Killed,
    assert_same_run,
    dies_at,
    distance,
    fit,
    one_thread,
    watched,
    weights,
)
from tests.support.text_caches import make_text_cache

__all__ = ["one_thread"]  # a fixture


def test_a_compiled_run_resumes_exactly_and_ends_near_the_eager_one(tmp_path, shared_cache, monkeypatch):
    tables = {"train": {"compile": True}}
    fit(shared_cache[2], tmp_path / "whole", tables=tables)
    with watched(monkeypatch, dies_at(9)), pytest.raises(Killed):
        fit(shared_cache[2], tmp_path / "broken", tables=tables)
    fit(shared_cache[2], tmp_path / "broken", tables=tables)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    fit(shared_cache[2], tmp_path / "eager")
    assert weights(tmp_path / "whole").keys() == weights(tmp_path / "eager").keys()
    assert distance(tmp_path / "whole", tmp_path / "eager") < 1e-4


@pytest.mark.parametrize("model", ["llama?width=16&depth=1&heads=2", "gpt2?width=16&depth=1&heads=2"])
def test_documents_of_a_packed_row_stay_apart_in_a_compiled_student(tmp_path, model):
    config, data, cache = make_text_cache(tmp_path / "cache", tmp_path)
    task = data.task(config, model)
    torch.manual_seed(0)
    student = task.build()
    compiled = copy.deepcopy(student)
    compiled.__init__(compiled.model, config.loss, context=task.context)
    compiling.compile_in_place(compiled, torch.device("cpu"))
    batch = SoftLabelDataset(data.train, cache).fetch([0, 1, 2, 3, 4])
    assert batch.segments.max() > 0
    losses = [task.loss(one, batch) for one in (student, compiled)]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    for loss in losses:
        loss.backward()
    for one, other in zip(student.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-3)


def test_a_machine_or_a_model_that_cannot_is_refused(tmp_path, shared_cache, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler")

    compile_ = torch.compile
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", lambda function: compile_(function, backend=broken))
        with pytest.raises(
            SpecError, match=r"train\.compile: .*no C\+\+ compiler.*set train\.compile = false"
        ):
            fit(shared_cache[2], tmp_path / "1", tables={"train": {"compile": True}})
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self: setattr(self, "forward", compile_(self.forward, backend=broken)),
    )
    with pytest.raises(SpecError, match=r"train\.compile: torch\.compile does not take this student here"):
        fit(shared_cache[2], tmp_path / "2", tables={"train": {"compile": True}})
