"""A student cut over processes by FSDP2: the student of one process, resumed on any number, and what is refused."""

import json

import pytest
import torch
from accelerate import Accelerator
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from softcache.errors import ConfigError, RunError
from softcache.models.language import build_language_model
from softcache.reader.open import open_cache
from softcache.runs import open_data, train_student
from softcache.student import TrainSettings
from softcache.student.sharding import build_sharded, find_blocks
from tests.student.test_huggingface_models import FAMILIES, save_model
from tests.student.test_many_processes import TEXT, assert_same_student, may_write_nothing
from tests.student.test_run import Killed, dies_at, distance, watched
from tests.support.caches import digits_config
from tests.support.process_groups import run_ranks
from tests.support.text_caches import make_text_cache, text_config

TIED = "llama?width=16&depth=2&heads=2&gradient_checkpointing=true"
TRAIN = {"epochs": 2, "batch_size": 9, "eval_batch_size": 3, "clip_norm": 1.0, "checkpoint_steps": 2}
BROKEN = {"parallel": "fsdp", "fsdp": {"reshard_after_forward": False}}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with a cache of documents, of which every second position has a label, and a pretrained student."""
    folder = tmp_path_factory.mktemp("texts")
    make_text_cache(folder / "cache", folder, **TEXT)
    save_model(folder / "pretrained", FAMILIES["llama"], open_data(text_config(folder, **TEXT)).tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder / "pretrained")
    model.to(torch.bfloat16).save_pretrained(folder / "half")
    return folder


def train(folder, out, *, model=TIED, lora=None, dies=None, **settings):
    """Trains on the cache; returns the metrics, or None where it was killed before a step."""
    student = {} if lora is None else {"lora": lora}
    config = text_config(folder, **TEXT, train=TRAIN | settings, student=student)
    with pytest.MonkeyPatch.context() as patch, watched(patch, dies_at(dies or 1000)):
        try:
            return train_student(
                *(config, open_data(config)),
                model=model,
                labels="cache",
                cache=open_cache(folder / "cache"),
                out=out,
            )
        except Killed:
            return None


def lora_of(folder, name="pretrained"):
    return {"model": f"hf:{folder / name}", "lora": {"rank": 4}}


class Stopped(Exception):
    pass


class Unbuilt:
    """A task whose student is never built."""

    sharded_methods = ()

    def build(self):
        raise Stopped


def _trains(rank, folder, out):
    if rank > 0:
        may_write_nothing()
    # Of nine samples one rank has four and one has five: two and three pieces.
    found = {"whole": train(folder, out / "whole", parallel="fsdp", accumulation_steps=3)}
    found["lora"] = train(
        folder, out / "lora", parallel="fsdp", fsdp={"build_at_once": 1}, epochs=1, **lora_of(folder)
    )
    found["broken"] = train(folder, out / "broken", dies=4, **BROKEN)
    with pytest.MonkeyPatch.context() as patch:
        # Documents as rows of their own, in passes of a number that differs between the processes.
        patch.setattr("softcache.models.language.splitting.isolates_documents", lambda parts: False)
        found["rows"] = train(folder, out / "rows", parallel="fsdp", epochs=1)
    other = {"reshard_after_forward": rank == 0}
    differs = pytest.raises(RunError, match=r"\[train\.fsdp\] differs .* reshard_after_forward: True; False")
    with differs if rank else pytest.raises(Stopped):
        build_sharded(Unbuilt(), TrainSettings(parallel="fsdp", fsdp=other), Accelerator(cpu=True))
    with pytest.raises(ConfigError, match=r'"adafactor": cannot step on weights that are cut'):
        train(folder, out / "adafactor", parallel="fsdp", optimizer="adafactor")
    return found


def test_two_processes_with_a_share_each_train_the_student_that_one_trains(tmp_path, texts):
    """To rounding: float32 sums in another order, 2e-5 of a weight at most, as with DDP."""
    two, one = tmp_path / "two", tmp_path / "one"
    assert train(texts, two / "broken", dies=4, **BROKEN) is None  # one process begins
    ended = run_ranks(tmp_path / "ranks", 2, _trains, texts, two)  # two go on from step 2 to 4
    assert [end.code for end in ended] == [0, 0], ended
    assert ended[0].value == ended[1].value
    assert ended[0].value["broken"] is None
    assert json.loads((two / "broken/checkpoint/progress.json").read_text())["step"] == 4
    shards = {path.name for path in (two / "broken/checkpoint/shards").iterdir()}
    assert shards == {".metadata", "__0_0.distcp", "__1_0.distcp"}, "each process wrote its share"
    train(texts, two / "broken", **BROKEN)  # one ends it

    train(texts, one / "whole")
    train(texts, one / "rows", epochs=1)
    train(texts, one / "lora", epochs=1, **lora_of(texts))
    for name, of in (("whole", "whole"), ("broken", "whole"), ("lora", "lora"), ("rows", "rows")):
        assert_same_student(two / name, one / of)
        ours, theirs = (load_file(folder / "hf/model.safetensors") for folder in (two / name, one / of))
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            torch.testing.assert_close(value, theirs[key], rtol=0, atol=2e-5)
    metrics = [json.loads((folder / "lora/metrics.json").read_text()) for folder in (two, one)]
    for key in ("num_parameters", "num_trained_parameters", "steps", "eval_samples"):
        assert metrics[0][key] == metrics[1][key]


def test_one_process_computes_what_it_computes_uncut_and_in_bfloat16_nearly_so(tmp_path, texts):
    untied = "qwen3?width=16&depth=1&heads=2&tied=false"
    for name, settings in {
        "plain": {},
        "cut": {"parallel": "fsdp"},
        "autocast": {"precision": "bf16"},
        "half": {"parallel": "fsdp", "precision": "bf16"},
    }.items():
        train(texts, tmp_path / name, model=untied, epochs=1, **settings)
    assert distance(tmp_path / "plain", tmp_path / "cut") == 0.0
    # Frozen weights in bfloat16, adapters in float32: gathered together.
    for name, settings in {"lora": {}, "lora-cut": {"parallel": "fsdp"}}.items():
        train(texts, tmp_path / name, epochs=1, **lora_of(texts, "half"), **settings)
    assert distance(tmp_path / "lora", tmp_path / "lora-cut") == 0.0
    losses = {
        name: json.loads((tmp_path / name / "metrics.json").read_text())["eval_loss"]
        for name in ("plain", "autocast", "half")
    }
    assert losses["half"] == pytest.approx(losses["plain"], rel=2e-3)
    assert losses["half"] != losses["plain"] != losses["autocast"]
    assert {value.dtype for value in load_file(tmp_path / "half/model.safetensors").values()} == {
        torch.float32
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_one_gpu_computes_what_it_computes_uncut(tmp_path, texts):
    for name, settings in {"plain": {}, "cut": {"parallel": "fsdp"}}.items():
        train(texts, tmp_path / name, epochs=1, device="auto", **settings)
    assert distance(tmp_path / "plain", tmp_path / "cut") < 2e-5


def test_blocks_are_those_that_transformers_names_or_the_longest_list():
    model = build_language_model("llama?width=16&depth=3&heads=2", vocab_size=50, context=8)
    assert find_blocks(model) == list(model.model.layers)
    assert find_blocks(model, ("LlamaMLP",)) == [layer.mlp for layer in model.model.layers]
    lists = torch.nn.Sequential(
        torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(2)),
        torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(2, 2)) for _ in range(3)),
    )
    assert find_blocks(lists) == list(lists[1])
    with pytest.raises(ConfigError, match="no module of class Block; found lists of LlamaDecoderLayer; name"):
        find_blocks(model, ("Block",))
    with pytest.raises(
        ConfigError, match=r"no list of modules of one class; name classes in train\.fsdp\.blocks"
    ):
        find_blocks(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"fsdp": {}}, 'read by parallel = "fsdp"; found parallel = "ddp"'),
        ({"parallel": "fsdp", "precision": "fp16"}, 'precision = "fp16".* use precision = "bf16"'),
        ({"parallel": "fsdp", "compile": True}, "compile: does not go with"),
        ({"parallel": "fsdp", "optimizer": "adamw_8bit"}, '8-bit blocks .* use "adamw"'),
    ],
)
def test_settings_that_do_not_go_with_a_student_that_is_cut_are_refused(train, message):
    with pytest.raises(ValidationError, match=message):
        TrainSettings.model_validate(train)


def test_students_that_cannot_be_cut_are_refused(tmp_path):
    config = digits_config(train={"parallel": "fsdp", "labels": "ground_truth"})
    with pytest.raises(ConfigError, match=r"ImageTask trains no student that can be cut"):
        train_student(config, open_data(config), model="mlp", labels="ground_truth", out=tmp_path)


def test_what_identifies_a_run_has_the_way_of_cutting_but_not_its_details():
    plain = TrainSettings().identity()
    assert "parallel" not in plain
    cut = TrainSettings(parallel="fsdp").identity()
    assert cut == plain | {"parallel": "fsdp"}
    assert TrainSettings.model_validate({"parallel": "fsdp", "fsdp": {"build_at_once": 1}}).identity() == cut
