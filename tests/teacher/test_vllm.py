"""The contract of a teacher, run by vLLM: `make test-vllm`, in an environment of its own.

vLLM runs in this process but for one test; a start takes three seconds, and twenty the first time that an architecture is seen.
"""

import os
import signal

import psutil
import pytest
import torch

from softcache.errors import ConfigError, EngineError
from softcache.runs import capture_labels, open_data, open_teacher
from softcache.tools.verify.teacher import verify_against_teacher
from tests.support.engine_models import label, largest_difference, load_teacher, save_model
from tests.support.text_caches import text_config

pytestmark = pytest.mark.vllm
ROUNDING = 5e-5
"""Largest difference of labels of float32 weights, nats."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return text_config(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def batch(config):
    return open_data(config).train.load(range(12))


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def started():
    """Starts teachers, and stops them at the end, since a process holds one engine."""
    teachers = []

    def start(*args, **options):
        teachers.append(load_teacher(*args, **options))
        return teachers[-1]

    yield start
    for teacher in teachers:
        teacher.close()


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "gpt2", "cohere", "mixtral"])
def test_labels_and_identity_are_those_of_transformers(name, batch, tmp_path, started):
    saved = save_model(tmp_path / name, name)
    ours = load_teacher(saved, query="?attn_implementation=eager" if name == "gemma2" else "")
    theirs = started(saved, "vllm")
    assert largest_difference(label(ours, batch), label(theirs, batch)) < ROUNDING
    theirs.check_forward(batch)
    if name != "mixtral":
        assert theirs.identity()["teacher"] == ours.identity()["teacher"] | {"spec": f"hf:{saved}"}


def test_bfloat16(batch, tmp_path, started):
    saved = save_model(tmp_path / "qwen3", "qwen3", dtype=torch.bfloat16)
    ours, theirs = load_teacher(saved), started(saved, "vllm")
    one, other = (torch.cat(list(teacher.chunks(batch))).log_softmax(-1) for teacher in (ours, theirs))
    divergence_P = (one.exp() * (one - other)).sum(-1)
    assert divergence_P.max() < 2e-3
    assert theirs.identity() == ours.identity()


@pytest.mark.parametrize(
    "settings",
    [
        {"enable_prefix_caching": True},
        {"enable_prefix_caching": True, "enable_chunked_prefill": True, "max_num_batched_tokens": 40, "max_num_seqs": 3},
        {"enable_chunked_prefill": False, "max_num_batched_tokens": 64},
    ],
    ids=["prefixes", "chunks", "whole rows"],
)  # fmt: skip
def test_scheduling_changes_no_label(settings, folder, batch, started):
    expected = label(load_teacher(folder), batch)
    theirs = started(folder, {"name": "vllm", "max_model_len": 64} | settings)
    for _ in range(2):  # the second time, prefixes are there
        assert largest_difference(label(theirs, batch), expected) < ROUNDING


def test_an_interrupted_capture_is_byte_identical_and_one_teacher(folder, config, tmp_path):
    table = {"model": f"hf:{folder}", "engine": "vllm"}
    config = config.model_copy(update={"teacher": type(config.teacher).model_validate(table)})
    data = open_data(config)
    teacher = open_teacher(config, data)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    capture_labels(config, data, teacher, str(whole))
    original, calls = teacher._engine.hidden_states, []

    def fail(rows):
        calls.append(rows)
        if len(calls) > 20:
            raise KeyboardInterrupt
        return original(rows)

    teacher._engine.hidden_states = fail
    with pytest.raises(KeyboardInterrupt):
        capture_labels(config, data, teacher, str(cut))
    teacher._engine.hidden_states = original
    cache, report = capture_labels(config, data, teacher, str(cut))
    teacher.close()
    assert report.units_found > 0
    assert files_of(cut) == files_of(whole)
    ours = load_teacher(folder)
    assert not list(verify_against_teacher(cache, data.train, ours, num_rows=30, threshold_nats=1e-6, seed=0))


def test_a_process_that_dies_is_started_again(folder, batch, started):
    theirs = started(folder, {"name": "vllm", "separate_process": True})
    expected = label(theirs, batch)
    children = [
        child
        for child in psutil.Process().children()
        if "EngineCore" in " ".join([*child.cmdline(), child.name()])
    ]
    os.kill(children[0].pid, signal.SIGKILL)
    assert largest_difference(label(theirs, batch), expected) < ROUNDING


def test_what_vllm_cannot_run(folder, tmp_path, monkeypatch):
    with pytest.raises(
        ConfigError, match=r"max_model_len: 16, but the rows of the source have up to 32 tokens"
    ):
        load_teacher(folder, {"name": "vllm", "max_model_len": 16})
    with pytest.raises(EngineError, match=r"vLLM 0\.\d+\.\d+: it cannot be started: .*quantization"):
        load_teacher(folder, {"name": "vllm", "quantization": "no-such"})
    monkeypatch.setattr(
        "vllm.v1.engine.llm_engine.LLMEngine.get_supported_tasks", lambda self: ("embed", "classify")
    )
    with pytest.raises(
        EngineError, match=r"Unsupported task: 'token_embed' Supported tasks: .*; expected an arch"
    ):
        load_teacher(folder, "vllm")
