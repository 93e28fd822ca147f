"""Teachers that an engine runs: the labels of the model in this process, and one message for each thing that is wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from softcache.config.run import RunConfig
from softcache.errors import ConfigError, EngineError, LabelError, MissingExtraError, SpecError
from softcache.models.language.checkpoint import Checkpoint
from softcache.runs import capture_labels, open_data, open_teacher
from tests.fakes_engine import ModuleEngine
from tests.support.engine_models import (
    CONFIGS,
    SEQ_LEN,
    VOCAB,
    label,
    largest_difference,
    load_teacher,
    save_model,
)
from tests.support.text_caches import text_config

FAKE = "tests.fakes_engine:ModuleSettings"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return open_data(text_config(tmp_path_factory.mktemp("texts"))).train


@pytest.fixture(scope="module")
def batch(data):
    return data.load(range(6))


@pytest.mark.parametrize("name", CONFIGS)
def test_labels_and_identity_are_those_of_the_model_in_this_process(name, batch, tmp_path):
    saved = save_model(tmp_path / name, name)
    ours, theirs = load_teacher(saved), load_teacher(saved, FAKE)
    assert largest_difference(label(ours, batch), label(theirs, batch)) < 2e-5
    theirs.check_forward(batch)
    found, expected = theirs.identity()["teacher"], ours.identity()["teacher"]
    if name == "mixtral":  # transformers merges the experts at loading
        assert found.pop("weights_digest") != expected.pop("weights_digest")
    assert found == expected
    assert (theirs.num_classes, theirs.num_parameters) == (320, ours.num_parameters)


def test_documents_are_rows_of_their_own_that_end_at_the_last_label(folder, batch):
    teacher = load_teacher(folder, FAKE)
    list(teacher.chunks(batch))
    rows = teacher._engine.calls[0]
    expected = []
    for tokens_L, segments_L, length in zip(batch.tokens, batch.segments, batch.lengths, strict=True):
        for segment in segments_L[:length].unique():
            document = tokens_L[:length][segments_L[:length] == segment].tolist()
            expected += [document[:-1]] if len(document) > 1 else []
    assert rows == expected


def test_across_documents_a_sample_is_one_row(folder, batch):
    ours, theirs = (load_teacher(folder, engine, cross_documents=True) for engine in ("transformers", FAKE))
    assert largest_difference(label(ours, batch), label(theirs, batch)) < 2e-5
    assert len(theirs._engine.calls[0]) == len(batch)


def test_chosen_rows_of_a_batch(folder, batch):
    chosen = batch.select(torch.arange(0, batch.num_rows, 5).numpy())
    teacher = load_teacher(folder, FAKE)
    whole, some = torch.cat(list(teacher.chunks(batch))), torch.cat(list(teacher.chunks(chosen)))
    torch.testing.assert_close(some, whole[::5], atol=2e-6, rtol=0)


def test_a_checkpoint_without_the_prefix_of_its_backbone_and_without_its_tied_head(batch, tmp_path):
    saved = save_model(tmp_path / "gpt2", "gpt2")
    expected = load_teacher(saved)
    tensors = load_file(saved / "model.safetensors")
    save_file(
        {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()},
        saved / "model.safetensors",
        metadata={"format": "pt"},
    )
    teacher = load_teacher(saved, FAKE)
    assert torch.equal(teacher.parts.weight, expected.parts.weight)
    assert teacher.weights_digest == expected.weights_digest


@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_a_configuration_that_leaves_out_weights_is_refused_by_its_headers(prefix, tmp_path):
    """Engines skip biases that they do not expect; a part for training is none, nor is one of a layer in other tensors."""
    saved = save_model(tmp_path / "biased", "llama", attention_bias=True, tie_word_embeddings=True)
    tensors = load_file(saved / "model.safetensors") | {"v_head.summary.weight": torch.zeros(1, 64)}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    options = {"vocab_size": VOCAB, "context": SEQ_LEN}
    Checkpoint(f"hf:{saved}", **options)
    config = json.loads((saved / "config.json").read_text())
    del config["attention_bias"]
    (saved / "config.json").write_text(json.dumps(config))
    match = r"leaves out 8 weights .* \(\S*model\.layers\.0\.self_attn\.k_proj\.bias, .*attention_bias"
    with pytest.raises(SpecError, match=match):
        Checkpoint(f"hf:{saved}", **options)
    packed = {name.replace("_proj.weight", "_proj.qweight"): tensor for name, tensor in tensors.items()}
    save_file(packed, saved / "model.safetensors", metadata={"format": "pt"})
    Checkpoint(f"hf:{saved}", **options)  # quantized layers may have a bias of zeros for the layout's sake


def test_weights_of_another_dtype_have_another_digest(folder):
    options = {"vocab_size": VOCAB, "context": SEQ_LEN}
    float32, bfloat16 = (Checkpoint(f"hf:{folder}{query}", **options) for query in ("", "?dtype=bfloat16"))
    assert (float32.dtype, bfloat16.dtype) == (torch.float32, torch.bfloat16)
    assert bfloat16.weights_digest == load_teacher(folder, query="?dtype=bfloat16").weights_digest
    assert bfloat16.weights_digest != float32.weights_digest


def test_an_engine_that_fails_is_started_again(folder, batch, monkeypatch):
    teacher = load_teacher(folder, FAKE)
    expected = label(teacher, batch)
    monkeypatch.setattr(ModuleEngine, "failing", {1})
    assert largest_difference(label(teacher, batch), expected) == 0.0
    assert teacher._engine.starts == 2
    assert {len(rows) for rows in teacher._engine.calls[2:]} == {1}


def test_an_engine_that_fails_again_is_named_and_the_cache_stays_whole(folder, tmp_path, monkeypatch):
    config = text_config(
        tmp_path, teacher={"model": f"hf:{folder}", "engine": FAKE}, capture={"evaluate": False}
    )
    data, url = open_data(config), str(tmp_path / "cache")
    teacher = open_teacher(config, data)
    monkeypatch.setattr(ModuleEngine, "failing", set(range(18, 100)))
    with pytest.raises(
        EngineError, match=r"out of memory; twice, .* one row of \d+ tokens .*, unit \d\); finished units"
    ):
        capture_labels(config, data, teacher, url)
    monkeypatch.setattr(ModuleEngine, "failing", set())
    _, report = capture_labels(config, data, open_teacher(config, data), url)
    assert report.units_found > 0
    plain = text_config(tmp_path, teacher={"model": f"hf:{folder}"}, capture={"evaluate": False})
    # One teacher, run by an engine or not: the cache is found to be complete.
    assert capture_labels(plain, data, open_teacher(plain, data), url)[1].units_done == 0


def test_an_engine_of_another_model_is_refused(folder, batch, tmp_path):
    with pytest.raises(EngineError, match=r"shape \(\d+, 63\); expected \(\d+, 64\) .* another model"):
        list(load_teacher(folder, "tests.fakes_engine:NarrowSettings").chunks(batch))
    other = save_model(tmp_path / "other", "llama", rms_norm_eps=10.0)
    teacher = load_teacher(folder, FAKE)
    teacher._engine.parts = load_teacher(other).parts
    with pytest.raises(LabelError, match="its labels are not those of its own forward pass"):
        teacher.check_forward(batch)


def test_settings_that_change_labels_are_part_of_the_identity(folder):
    spec, options = f"hf:{folder}", {"vocab_size": VOCAB, "context": SEQ_LEN}
    plain = load_teacher(folder, {"name": FAKE, "threads": 8})
    changed = load_teacher(folder, {"name": FAKE, "rows": 3})
    assert plain.architecture == Checkpoint(spec, **options).architecture
    assert changed.architecture == plain.architecture + "?rows=3"


def test_a_model_without_its_head(folder, tmp_path):
    saved = tmp_path / "headless"
    shutil.copytree(folder, saved)
    tensors = load_file(saved / "model.safetensors")
    head = tensors.pop("lm_head.weight")
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(
        SpecError,
        match=r"head cannot be found in .*headless: expected a tensor lm_head.weight; found 20 others",
    ):
        load_teacher(saved, FAKE)
    save_file(tensors | {"lm_head.qweight": head}, saved / "model.safetensors")
    with pytest.raises(SpecError, match=r"found lm_head.qweight; keep the head out of quantization"):
        load_teacher(saved, FAKE)
    save_file(tensors | {"lm_head.weight": head.to(torch.int8)}, saved / "model.safetensors")
    with pytest.raises(
        SpecError, match=r"lm_head.weight of .* is torch.int8 \(320, 64\); expected floating point"
    ):
        load_teacher(saved, FAKE)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"engine": "vllm"}, MissingExtraError, r"vllm is not installed; pip install 'softcache\[vllm\]'"),
        ({"engine": "vllm", "weights": "a.safetensors"}, ConfigError, r"teacher.weights: .* hf:FOLDER"),
        ({"engine": "vllm", "model": "gpt2"}, ConfigError, r"teacher.model: 'gpt2' .* expected hf:NAME_OR_PATH"),
        ({"engine": "vllm", "query": "?attn_implementation=eager"}, SpecError, "attn_implementation: arguments of transf"),
    ],
)  # fmt: skip
def test_what_an_engine_cannot_run(settings, error, message, folder, data, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    table = {"model": f"hf:{folder}{settings.pop('query', '')}"} | settings
    config = text_config(tmp_path, teacher=table)
    with pytest.raises(error, match=message):
        open_data(config).teacher(config, config.teacher)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"teacher": {"engine": "vlm"}}, r"teacher\.engine\.name.*unknown; did you mean vllm"),
        ({"teacher": {"engine": {"max_model_len": 64}}}, r"engine\.max_model_len.*unknown key with name = 'transformers'"),
        ({"teacher": {"engine": {"name": "vllm", "max_len": 64}}}, r"engine\.max_len.*did you mean max_model_len"),
        ({"source": {"modality": "image", "name": "digits"}, "teacher": {"engine": "vllm"}}, r"'vllm' runs causal language models"),
    ],
)  # fmt: skip
def test_settings_of_engines_are_strict(tables, message, tmp_path):
    base = json.loads(text_config(tmp_path).model_dump_json(exclude_unset=True))
    if "source" in tables:
        base = {"name": "x"}
    config = base | {
        key: (base.get(key, {}) if key == "teacher" else {}) | table for key, table in tables.items()
    }
    config["teacher"] = {"model": "gpt2"} | config["teacher"]
    with pytest.raises((ConfigError, ValueError), match=r"(?s)" + message):
        RunConfig.model_validate(config)
