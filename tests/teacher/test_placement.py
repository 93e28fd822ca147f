"""Teachers on more than one device: the labels of one device, one writer, and what is refused."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoConfig

from softcache.errors import ConfigError, RunError, SpecError
from softcache.models.language import build_language_model
from softcache.models.language.placement import Placement, WholeState
from softcache.reader.open import open_cache
from softcache.runs import capture_labels, open_data, open_teacher
from softcache.teacher import TeacherSettings
from softcache.teacher.group import join_teacher_group
from tests.student.test_huggingface_models import FAMILIES, save_model
from tests.support.process_groups import run_ranks
from tests.support.text_caches import text_config

DISK = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.rotary_emb": "cpu"}
DISK |= {"model.layers.1": "disk", "model.norm": "cpu", "lm_head": "disk"}
SPECS = {"qwen3": FAMILIES["qwen3"], "llama": "llama?width=16&depth=2&heads=2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with two pretrained teachers, of a head of its own and of a tied one, and labels of both on one device."""
    folder = tmp_path_factory.mktemp("teachers")
    tokenizer = open_data(text_config(folder)).tokenizer
    for name, spec in SPECS.items():
        save_model(folder / name, spec, tokenizer)
        label(folder, name, "plain")
    return folder


def config_of(folder, name, **engine):
    return text_config(folder, teacher={"model": f"hf:{folder / name}", "engine": engine})


def label(folder, name, cache, **engine):
    """Labels into a cache, of that name behind the teacher's; returns the report."""
    config = config_of(folder, name, **engine)
    data = open_data(config)
    return capture_labels(config, data, open_teacher(config, data), str(folder / f"{name}-{cache}"))[1]


def assert_same_cache(folder, one, other, *, within):
    """Two caches of one teacher, whose identity is equal and whose labels differ by rounding at most."""
    first, second = open_cache(folder / one), open_cache(folder / other)
    assert second.manifest.identity["teacher"] == first.manifest.identity["teacher"]
    rows = np.arange(len(first))
    labels, others = first.read(rows), second.read(rows)
    np.testing.assert_array_equal(others.ids, labels.ids)
    np.testing.assert_allclose(others.log_probs, labels.log_probs, rtol=0, atol=within)
    np.testing.assert_allclose(others.log_tail, labels.log_tail, rtol=0, atol=within)


def test_a_teacher_that_is_partly_on_the_disk_gives_the_labels_of_one_device(folder, tmp_path):
    label(folder, "qwen3", "disk", device_map=DISK, offload_folder=str(tmp_path / "offload"))
    assert_same_cache(folder, "qwen3-plain", "qwen3-disk", within=0.0)
    spread = {"device_map": "auto", "max_memory": {"cpu": "40GiB"}}
    assert label(folder, "qwen3", "disk", **spread).units_done == 0, "the same teacher: nothing is left to do"
    config = config_of(folder, "qwen3", device_map=DISK)
    teacher = open_teacher(config, open_data(config))
    assert teacher.model.model.layers[1].mlp.up_proj.weight.is_meta
    assert not teacher.parts.weight.is_meta
    whole = WholeState(teacher.model)
    plain = build_language_model(f"hf:{folder / 'qwen3'}", vocab_size=300, context=32).state_dict()
    assert whole.keys() == plain.keys()
    assert all(torch.equal(whole[name], plain[name]) for name in plain)


def _labels(rank, folder, out):
    """Two processes, each with a part of every layer; the second never writes."""
    if rank == 1:
        from softcache.cache.storage.local import LocalObjects

        def refuse(*args, **kwargs):
            raise AssertionError("a process that does not label writes")

        LocalObjects.put = refuse
    found = {name: label(folder, name, "two", tp_plan="auto").units_done for name in ("qwen3", "llama")}
    refused = pytest.raises(
        RunError, match=r"process 1 of 2: the teacher differs .*: model: 'hf:0'; 'hf:1'; give all"
    )
    with refused if rank else nullcontext():
        join_teacher_group({"model": f"hf:{rank}"}, torch.device("cpu"))
    with pytest.raises(
        ConfigError, match=r"device_map: .* found 2 processes of one launch; start it without torchrun"
    ):
        label(folder, "qwen3", "no", device_map="auto")
    return found


def test_two_processes_with_a_part_of_each_layer_give_the_labels_of_one(folder, tmp_path):
    ended = run_ranks(tmp_path / "ranks", 2, _labels, folder, tmp_path)
    assert [end.code for end in ended] == [0, 0], ended
    units = open_cache(folder / "qwen3-plain").manifest.plan.num_units
    assert ended[0].value == {"qwen3": units, "llama": units}
    assert ended[1].value == {"qwen3": 0, "llama": 0}
    for name in ("qwen3", "llama"):
        assert_same_cache(folder, f"{name}-plain", f"{name}-two", within=1e-5)


@pytest.mark.parametrize(
    ("engine", "teacher", "message"),
    [
        ({"max_memory": {"cpu": "1GiB"}}, {}, "are read with device_map"),
        ({"device_map": "auto", "tp_plan": "auto"}, {}, "expected one of them"),
        (
            {"device_map": "auto"},
            {"model": "llama"},
            "expected a model that transformers loads .* found 'llama'",
        ),
        ({"tp_plan": "auto"}, {"weights": "w.pt"}, "found 'hf:name' with weights"),
        ({"name": "vllm", "tp_plan": "auto"}, {}, "tp_plan"),
    ],
)
def test_settings_that_do_not_fit_are_refused(engine, teacher, message):
    with pytest.raises(ValidationError, match=message):
        TeacherSettings.model_validate({"model": "hf:name", "engine": engine} | teacher)


def test_a_plan_that_is_not_there_and_a_launch_that_does_not_fit_are_refused(folder, monkeypatch):
    config = config_of(folder, "qwen3", tp_plan="auto")
    with pytest.raises(ConfigError, match=r"found one process; start it by \"torchrun --nproc-per-node N"):
        open_teacher(config, open_data(config))
    bare = SimpleNamespace(get_text_config=lambda: SimpleNamespace(base_model_tp_plan=None))
    with pytest.raises(
        SpecError, match=r"transformers has none for SimpleNamespace; use teacher\.engine\.device_map"
    ):
        Placement(tp_plan="auto").arguments(bare, "hf:name")
    monkeypatch.setenv("WORLD_SIZE", "3")
    config = AutoConfig.from_pretrained(folder / "qwen3")
    with pytest.raises(SpecError, match=r"cuts its 2 key-value heads over 3 processes; .* start as many"):
        Placement(tp_plan="auto").arguments(config, "hf:name")
