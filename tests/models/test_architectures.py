"""Labels of small models of many architectures are the log-softmax of a plain forward of each document alone."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner

from softcache.errors import MissingExtraError, SpecError
from softcache.losses import LossSettings
from softcache.models.language import build_language_model, check_loss, check_split, split
from softcache.models.language.lora import LoraSettings, trainable
from softcache.models.spec import architecture_of
from softcache.student.tasks.token_student import TokenStudent
from tests.support.architectures import ARCHITECTURES, SIZES, Architecture, compare, make_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def architecture(name):
    return next(each for each in ARCHITECTURES if each.name == name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("each", ARCHITECTURES, ids=lambda each: each.name)
def test_labels_are_those_of_a_plain_forward(each, dtype):
    """In bfloat16 a row's shape decides how kernels round, so packed rows are compared within what rounding costs."""
    refusal = each.refusal(DTYPES[dtype])
    if refusal:
        with pytest.raises(SpecError, match=refusal):
            compare(each, DTYPES[dtype])
        return
    found = compare(each, DTYPES[dtype])
    if dtype == "float32":
        assert found.packed < 2e-5
    else:
        assert found.alone < 2e-5
        assert found.packed < 0.02 + 2 * found.noise


def test_the_page_has_a_row_of_each():
    found = (Path(__file__).parents[2] / "docs/architectures.md").read_text()
    for each in ARCHITECTURES:
        variant = f" ({each.variant})" if each.variant else ""
        assert f"| `{each.model_type}`{variant} | {each.features} |" in found


def test_the_command_prints_chosen_rows():
    from benchmarks.architectures import main

    printed = CliRunner().invoke(main, ["granite", "xlm"], catch_exceptions=False).stdout
    assert re.search(r"\| `granite` \| logits divided, multipliers \| positions \| \d\.\de-0[67] \|", printed)
    assert re.search(
        r"\| `xlm` \| encoder \| a later token changes the hidden states before it; the model", printed
    )
    assert CliRunner().invoke(main, ["granit"]).exit_code == 2


def test_the_models_are_small_and_many():
    assert len({each.model_type for each in ARCHITECTURES if not each.refused}) >= 80
    assert len({each.name for each in ARCHITECTURES}) == len(ARCHITECTURES)
    for name in ("llama", "mamba2", "gpt_oss", "inkling_text", "mistral3", "deepseek_v4"):
        assert sum(x.numel() for x in make_model(architecture(name)).parameters()) < 1e6


@pytest.mark.parametrize(
    ("name", "scale", "softcap"),
    [
        ("recurrent_gemma", 1.0, 5.0),
        ("xlstm", 1.0, 5.0),
        ("nanochat", 1.0, 5.0),
        ("falcon_h1", 0.3, None),
        ("granitemoehybrid", 1 / 6, None),
        ("mpt", 1.0, None),
    ],
)
def test_a_scale_and_a_soft_cap_are_found_under_each_name(name, scale, softcap):
    parts = split(make_model(architecture(name)))
    assert (parts.logit_scale, parts.softcap) == (pytest.approx(scale), softcap)


@pytest.mark.parametrize("size", [1.0, 0.02])
def test_the_soft_cap_of_an_encoder_decoder_is_known(size):
    """With the logits of fresh weights it was left out without a word."""
    sizes = SIZES | {"head_dim": 8}
    decoder = sizes | {"cross_attention_hidden_size": 32, "final_logit_softcapping": 5.0}
    config = transformers.T5GemmaConfig(encoder=sizes, decoder=decoder, vocab_size=SIZES["vocab_size"])
    torch.manual_seed(0)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(size)
    parts = split(model)
    assert parts.softcap == 5.0
    check_split(model, parts)
    with pytest.raises(SpecError, match="expected a linear head, a scale and a soft cap"):
        check_split(model, replace(parts, softcap=None))


def test_a_word_in_place_of_a_scale_is_left_out():
    model = make_model(architecture("mpt"))
    model.config.logit_scale = "inv_sqrt_d_model"  # as published; transformers does not read it
    check_split(model, split(model))


def test_an_unknown_soft_cap_shows_on_logits_near_zero():
    """At the size of fresh weights a cap of 30 changes no digit of a logit; the trained model would be wrong."""
    config = transformers.AutoConfig.for_model("gemma2", **SIZES, head_dim=8)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.1)
    config.final_logit_softcapping = None
    parts = split(model)
    check_split(model, parts)
    config.final_logit_softcapping = 30.0
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        found = parts.logits(parts.hidden(tokens, None)[0])
        assert (found - model(tokens, use_cache=False).logits[0]).abs().max() < 1e-5
    with pytest.raises(SpecError, match="expected a linear head, a scale and a soft cap"):
        check_split(model, parts)
    head = model.get_output_embeddings()
    assert not head._forward_hooks


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_encoder_is_refused_in_every_dtype(dtype):
    """In bfloat16 its leak was within the rounding of its largest hidden value."""
    model = make_model(architecture("bert-generation"), DTYPES[dtype])
    with pytest.raises(SpecError, match=r"a later token changes .* is_decoder = false"):
        check_split(model, split(model))


def test_a_forward_that_fails_is_one_message():
    """More layers than the configuration counts: transformers' cache has no place for the last."""
    parts = split(make_model(architecture("opt")))

    def forward(*_, **__):
        raise IndexError("list index out of range")

    parts.backbone.forward = forward
    with pytest.raises(
        SpecError, match=r"its forward fails on a few tokens: IndexError: list index out of range"
    ):
        check_split(parts.backbone, parts)


def test_out_of_memory_is_not_a_fault_of_the_model():
    model = make_model(architecture("opt"))

    def forward(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    parts = split(model)
    parts.backbone.forward = forward
    with pytest.raises(torch.OutOfMemoryError):
        check_split(model, parts)


def test_infinity_in_a_configuration_is_named_in_the_identity():
    """Mamba 2 and its hybrids limit a time step by (0, inf), which strict JSON has no word for."""
    models = [make_model(Architecture("mamba2", "", architecture("mamba2").config | more)) for more in ({}, {"time_step_limit": (0.0, 1.0)})]  # fmt: skip
    names = [architecture_of(model, "hf:x") for model in models]
    assert names[0].startswith("Mamba2ForCausalLM:")
    assert names[0] != names[1]


# ---- quantized weights, and models of texts and images


@pytest.mark.parametrize("key", ["load_in_4bit", "load_in_8bit"])
def test_what_quantized_weights_need_is_named(key, tmp_path, monkeypatch):
    make_model(architecture("llama")).save_pretrained(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        MissingExtraError, match=rf"{key} needs the package bitsandbytes; pip install bitsandbytes"
    ):
        build_language_model(f"hf:{tmp_path}?{key}=true", vocab_size=101, context=8)


def test_quantized_weights_are_for_teachers():
    model = make_model(architecture("llama"))
    model.is_quantized = True
    for lora in (None, LoraSettings()):
        with pytest.raises(
            SpecError, match=r"its weights are quantized.*leave load_in_4bit .* to the teacher"
        ):
            trainable(model, "hf:x?load_in_4bit=true", lora)


def test_rows_of_llm_int8_depend_on_the_batch():
    """As measured with bitsandbytes 0.50: outliers are those of the batch."""
    model = make_model(architecture("llama"))
    layer = model.model.layers[1].mlp
    forward = layer.forward
    layer.forward = lambda x: forward(x) * (1 + x.abs().max() / 10)
    model.is_loaded_in_8bit = True
    with pytest.raises(SpecError, match=r"outliers in a whole batch, .* llm_int8_threshold=0\.0, or load"):
        check_split(model, split(model))


def test_the_text_of_a_model_with_images_is_built(tmp_path):
    make_model(architecture("mistral3")).save_pretrained(tmp_path)
    model = build_language_model(f"hf:{tmp_path}", vocab_size=101, context=8)
    parts = split(model)
    check_split(model, parts)
    assert type(model).__name__ == "Mistral3ForConditionalGeneration"
    assert (parts.vocab_size, parts.packing) == (101, "positions")


# ---- losses that a model adds itself


@pytest.mark.parametrize(
    ("name", "setting", "match"),
    [
        (
            "mixtral",
            {"output_router_logits": True},
            r"adds 0\.002\d* to .*the balance of its experts' load\).*=false",
        ),
        ("jetmoe", {"output_router_logits": True}, r"adds 0\.02\d* to .*the balance of its experts' load"),
        (
            "bamba",
            {"z_loss_coefficient": 0.01},
            r"z_loss_coefficient = 0\.01: a penalty .*z_loss_coefficient=0\.0",
        ),
    ],
)
def test_a_student_whose_forward_adds_a_loss_is_refused(name, setting, match):
    each = architecture(name)
    asked = make_model(replace(each, config=each.config | setting))
    with pytest.raises(SpecError, match=match):
        TokenStudent(asked, LossSettings(), context=8)
    TokenStudent(make_model(each), LossSettings(), context=8)


def test_a_loss_that_no_setting_names_is_refused():
    model = make_model(architecture("llama"))
    forward = model.forward

    def with_more(*args, **kwargs):
        output = forward(*args, **kwargs)
        return output if output.loss is None else replace(output, loss=output.loss + 0.5)

    model.forward = with_more
    with pytest.raises(SpecError, match=r"adds 0\.5 .* \(no setting that softcache knows\)"):
        check_loss(model)


def test_router_logits_that_add_nothing_are_taken():
    """DeepSeek balances its experts without a loss."""
    each = architecture("deepseek_v3")
    check_loss(make_model(replace(each, config=each.config | {"output_router_logits": True})))
