"""Language models: specs, the split into backbone and head, and documents that do not see each other."""

import json
import logging
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from softcache.errors import SpecError
from softcache.models.language import (
    CausalParts,
    build_language_model,
    check_context,
    check_split,
    split,
    tokenizer_of,
)
from softcache.models.language.causal_lm import exact_attention, transformers_library
from softcache.models.language.checkpoint import Checkpoint
from softcache.models.language.probes import _eps

VOCAB, CONTEXT = 61, 16
BUILTIN = [
    "gpt2?width=16&depth=2&heads=2",
    "llama?width=16&depth=2&heads=4&kv_heads=2",
    "qwen3?width=16&depth=2&heads=2&tied=false",
]
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": CONTEXT,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), None),
}
OPT = {"ffn_dim": 32, "word_embed_proj_dim": 16}
FAMILIES = {
    # model type: (what its configuration adds, how a packed row is run)
    "llama": ({}, "positions"),
    "qwen3": ({"head_dim": 8}, "positions"),
    "gpt2": ({}, "positions"),
    "mistral": ({"sliding_window": 2}, "positions"),
    "gemma2": ({"head_dim": 8, "sliding_window": 2, "final_logit_softcapping": 0.5}, "positions"),
    "cohere": ({"logit_scale": 0.25}, "positions"),
    "granite": ({"logits_scaling": 8.0}, "positions"),
    "opt": (OPT, "rows"),
    "gpt_oss": ({"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, "rows"),
    "mamba": ({"state_size": 4, "max_position_embeddings": None}, "rows"),
}
SEGMENTS = torch.tensor([[0] * 3 + [1] * 4 + [2] * 5, [0] * 12, [0] * 7 + [4] * 1 + [7] * 4])


def tokens(rows=3, length=12, seed=0):
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def make(family, **args):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SIZES | FAMILIES[family][0] | args)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)  # so that attention matters
    return model


def build(spec, **args):
    return build_language_model(spec, **{"vocab_size": VOCAB, "context": CONTEXT} | args)


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, tmp_path_factory):
    """A model of each family, written by save_pretrained and loaded through its spec."""
    path = tmp_path_factory.mktemp("hf") / request.param
    make(request.param).save_pretrained(path)
    return request.param, build(f"hf:{path}")


# ---- the split


def test_the_parts_give_the_logits_of_the_model(loaded):
    _, model = loaded
    parts = split(model)
    with torch.no_grad():
        expected = model(tokens(), use_cache=False).logits
        hidden = parts.hidden(tokens(), None).flatten(0, 1)
        found = torch.cat([parts.logits(chunk) for chunk in hidden.split(5)]).view_as(expected)
    assert torch.allclose(found, expected, atol=1e-5)
    check_split(model, parts)
    assert (parts.vocab_size, parts.context) == (
        VOCAB,
        None if "mamba" in model.config.model_type else CONTEXT,
    )


@pytest.mark.parametrize("spec", BUILTIN)
def test_built_in_models_split(spec):
    model = build(spec)
    check_split(model, split(model))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == ("tied=false" not in spec)
    assert not any(isinstance(module, nn.Dropout) and module.p for module in model.modules())


@pytest.mark.parametrize(("family", "scale", "softcap"), [("cohere", 0.25, None), ("granite", 0.125, None), ("gemma2", 1, 0.5), ("llama", 1, None)])  # fmt: skip
def test_scale_and_softcap_are_read_from_the_config(family, scale, softcap):
    parts = split(make(family))
    assert (parts.logit_scale, parts.softcap) == (scale, softcap)


def test_a_step_between_hidden_state_and_logits_is_noticed():
    model = make("gemma2")
    parts = split(model)
    model.config.final_logit_softcapping = 0.4  # what the parts do not know
    with pytest.raises(
        SpecError, match=r"something happens between hidden state and logits .* differ by 0\."
    ):
        check_split(model, parts)


@pytest.mark.parametrize("tied", [True, False])
def test_the_parts_own_nothing(tied):
    model = make("llama", tie_word_embeddings=tied)
    parts = split(model)
    own = {id(parameter) for parameter in model.parameters()}
    assert id(parts.weight) in own
    assert parts.bias is None
    assert {id(parameter) for parameter in parts.backbone.parameters()} <= own

    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.parts = model, parts

        def forward(self, tokens_BL):
            return self.parts.logits(self.parts.hidden(tokens_BL, None).flatten(0, 1))

    student = Student()
    assert set(student.state_dict()) == {f"model.{name}" for name in model.state_dict()}
    student(tokens()).logsumexp(1).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_probe_leaves_modes_gradients_and_random_numbers_alone():
    model = make("gpt2", resid_pdrop=0.5).train()
    model.transformer.h[0].eval()
    modes, random = [module.training for module in model.modules()], torch.get_rng_state()
    check_split(model, split(model))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_bfloat16_weights_and_autocast(tmp_path):
    make("qwen3").save_pretrained(tmp_path)
    model = build(f"hf:{tmp_path}?dtype=bfloat16")
    parts = split(model)
    assert parts.weight.dtype == torch.bfloat16
    check_split(model, parts)
    assert parts.logits(parts.hidden(tokens(), SEGMENTS).flatten(0, 1)).dtype == torch.float32
    model = build(BUILTIN[1])
    parts = split(model)
    with torch.autocast("cpu", torch.bfloat16):
        check_split(model, parts)
        loss = parts.logits(parts.hidden(tokens(), SEGMENTS).flatten(0, 1)).logsumexp(1).sum()
    loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_the_rounding_that_is_allowed_is_that_of_autocast():
    """float32 hidden states, as a norm in float32 leaves them, of products that were computed in bfloat16."""
    states = torch.zeros(2)
    with torch.autocast("cpu", torch.bfloat16):
        assert _eps(states) == 8 * torch.finfo(torch.bfloat16).eps
    assert _eps(states) == 1e-5


def test_gradient_checkpointing_changes_no_gradient():
    grads = []
    for spec in (BUILTIN[0], f"{BUILTIN[0]}&gradient_checkpointing=true"):
        torch.manual_seed(0)
        model = build(spec).train()
        split(model).hidden(tokens(), SEGMENTS).square().sum().backward()
        grads.append(model.transformer.wte.weight.grad)
    assert model.transformer.gradient_checkpointing
    assert torch.allclose(*grads, atol=1e-6)


# ---- packed rows


def alone(parts, tokens_BL, segments_BL):
    """Each document in a batch of its own."""
    hidden = torch.zeros(*tokens_BL.shape, parts.weight.shape[1])
    for row, segments_L in enumerate(segments_BL):
        for segment in segments_L.unique():
            here = segments_L == segment
            hidden[row, here] = parts.backbone(tokens_BL[row, here][None]).last_hidden_state[0]
    return hidden


@torch.no_grad()
def test_a_packed_row_equals_its_documents_alone(loaded):
    family, model = loaded
    parts = split(model)
    assert parts.packing == FAMILIES[family][1]
    expected = alone(parts, tokens(), SEGMENTS)
    assert torch.allclose(parts.hidden(tokens(), SEGMENTS), expected, atol=1e-5)


LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.0, 1.0, 1.0],
        "long_factor": [2.0, 4.0, 6.0, 8.0],
        "original_max_position_embeddings": 6,
    },
    "original_max_position_embeddings": 6,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("packing", ["positions", "rows"])
@torch.no_grad()
def test_with_longrope_a_document_does_not_depend_on_the_length_of_others(packing):
    """As soon as one row is longer than 6 here, all of the batch have other positions."""
    FAMILIES["phi3"] = (LONGROPE, packing)
    try:
        parts = replace(split(make("phi3")), packing=packing)
    finally:
        del FAMILIES["phi3"]
    assert parts.length_threshold == 6
    segments = torch.tensor([[0] * 3 + [1] * 9, [0] * 12, [0] * 7 + [1] * 5])
    expected = alone(parts, tokens(), segments)
    assert torch.allclose(parts.hidden(tokens(), segments), expected, atol=1e-5)
    naive = parts.backbone(tokens()[2:, 7:]).last_hidden_state, parts.hidden(tokens(), None)[2:, 7:]
    assert not torch.allclose(*naive, atol=1e-2), "this model does not show the fault"
    with pytest.raises(SpecError, match=r"rows of more than 6 tokens \(LongRoPE\).* found 12 tokens"):
        parts.hidden(tokens(), segments, cross_documents=True)
    short = torch.zeros(3, 5, dtype=torch.int64)
    assert torch.allclose(
        parts.hidden(tokens(length=5), short), alone(parts, tokens(length=5), short), atol=1e-5
    )


@torch.no_grad()
def test_a_document_is_blind_to_the_others(loaded):
    parts = split(loaded[1])
    changed = tokens()
    changed[0, :3] = (changed[0, :3] + 1) % VOCAB
    before, after = (parts.hidden(these, SEGMENTS) for these in (tokens(), changed))
    assert (after - before)[0, 3:].abs().max() <= 1e-6
    assert (after - before)[0, :3].abs().max() > 1e-2
    assert (after - before)[1:].abs().max() <= 1e-6


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@torch.no_grad()
def test_both_attentions_keep_documents_apart(family, attention, tmp_path):
    make(family).save_pretrained(tmp_path)
    parts = split(build(f"hf:{tmp_path}?attn_implementation={attention}"))
    assert parts.backbone.config._attn_implementation == attention
    assert parts.packing == "positions"
    assert torch.allclose(parts.hidden(tokens(), SEGMENTS), alone(parts, tokens(), SEGMENTS), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("capped", [50.0, None])
def test_a_cap_on_attention_scores_is_never_left_out(tmp_path, capped):
    """scaled_dot_product_attention has none; transformers before 5.23 left it out there."""
    config = transformers.Gemma2Config(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, attn_logit_softcapping=capped,
    )  # fmt: skip
    transformers.Gemma2ForCausalLM._from_config(config, attn_implementation="eager").save_pretrained(tmp_path)
    exact = exact_attention(f"hf:{tmp_path}", config, {})
    assert exact == ({} if capped is None else {"attn_implementation": "eager"})
    if capped is not None:
        with pytest.raises(
            SpecError, match="'sdpa' leaves out the cap on attention scores that gemma2 was trained"
        ):
            build(f"hf:{tmp_path}?attn_implementation=sdpa")
        parts = split(build(f"hf:{tmp_path}"))
        assert parts.backbone.config._attn_implementation == "eager"
    assert exact_attention("", config, {"attn_implementation": "flash_attention_2"}) == {}


def test_documents_cross_only_on_request(loaded):
    parts = split(loaded[1])
    whole = parts.hidden(tokens(), None)
    assert torch.equal(parts.hidden(tokens(), SEGMENTS, cross_documents=True), whole)
    assert torch.allclose(parts.hidden(tokens(), torch.zeros_like(SEGMENTS)), whole, atol=1e-6)
    assert (parts.hidden(tokens(), SEGMENTS) - whole)[0, 3:].abs().max() > 1e-2


@torch.no_grad()
def test_padding_changes_nothing(loaded):
    """Whether it is a segment of its own or carries the number of the last document."""
    parts = split(loaded[1])
    short = parts.hidden(tokens()[:, :8], torch.zeros(3, 8, dtype=torch.int64))
    padded = tokens()
    padded[:, 8:] = 0
    for padding in (1, 0):
        segments = torch.zeros(3, 12, dtype=torch.int64)
        segments[:, 8:] = padding
        assert torch.allclose(parts.hidden(padded, segments)[:, :8], short, atol=1e-5)


def test_rows_and_positions_agree_on_hidden_states_and_gradients():
    model = make("llama")
    parts = split(model)
    rows = CausalParts(parts.backbone, parts.head, "rows", parts.context)
    grads = []
    for each in (parts, rows):
        model.zero_grad()
        each.hidden(tokens(), SEGMENTS).sin().sum().backward()
        grads.append([parameter.grad.clone() for parameter in parts.backbone.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*grads, strict=True))


@torch.no_grad()
def test_flash_attention_gets_one_flat_row():
    """Its varlen path reads restarted positions in a batch of one row only; the kernel here is sdpa's."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    transformers.AttentionInterface.register("flash_stand_in", sdpa_attention_forward)
    transformers.AttentionMaskInterface.register("flash_stand_in", sdpa_mask)
    model = make("llama")
    expected = split(model).hidden(tokens(), SEGMENTS)
    model.config._attn_implementation = "flash_stand_in"
    parts = split(model)
    shapes = []
    parts.backbone.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    assert torch.allclose(parts.hidden(tokens(), SEGMENTS), expected, atol=1e-5)
    parts.hidden(tokens(), None)
    assert (parts.packing, shapes) == ("positions", [(1, 36), (3, 12)])


def test_rows_take_no_more_tokens_at_a_time_than_the_batch_has():
    parts = split(make("opt"))
    sizes = []
    parts.backbone.register_forward_pre_hook(lambda _, args: sizes.append(args[0].numel()))
    segments = torch.arange(12).expand(3, 12).clone()
    segments[0] = 0
    parts.hidden(tokens(), segments)
    assert len(sizes) > 1
    assert max(sizes) <= tokens().numel()


# ---- models of one's own


class Bag(nn.Module):
    """Mean of the tokens so far: causal, but it knows nothing of positions."""

    causal = True

    def __init__(self, vocab_size, width=8):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)

    def forward(self, tokens_BL):
        embedded = self.embedding(tokens_BL)
        if not self.causal:
            return embedded + embedded.mean(1, keepdim=True)
        counts = torch.arange(1, tokens_BL.shape[1] + 1)[:, None]
        return embedded.cumsum(1) / counts


class Own(nn.Module):
    def __init__(self, vocab_size, scale=1.0):
        super().__init__()
        self.base_model, self.out = Bag(vocab_size), nn.Linear(8, vocab_size)
        self.config = SimpleNamespace(logit_scale=scale)

    def get_output_embeddings(self):
        return self.out

    def forward(self, tokens_BL):
        return self.out(self.base_model(tokens_BL)) * self.config.logit_scale


class Headless(Own):
    def get_output_embeddings(self):
        return None


class TwoLayerHead(Own):
    def get_output_embeddings(self):
        return nn.Sequential(nn.Linear(8, 8), self.out)


class Baseless(Own):
    def __init__(self, vocab_size):
        super().__init__(vocab_size)
        self.base_model = None


class Wider(Own):
    def __init__(self, vocab_size):
        super().__init__(vocab_size)
        self.out = nn.Linear(9, vocab_size)


def not_a_model():
    return "model"


def test_a_model_of_ones_own():
    model = build("tests.models.test_language:Own?scale=3")
    parts = split(model)
    check_split(model, parts)
    assert (parts.packing, parts.context, parts.logit_scale) == ("rows", None, 3)
    assert parts.bias is model.out.bias
    with torch.no_grad():
        packed = parts.hidden(tokens(), SEGMENTS)
        assert torch.allclose(packed[0, 3:7], model.base_model(tokens()[:1, 3:7])[0], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("Headless", r"Headless: no head: expected get_output_embeddings\(\)"),
        ("Bag", r"Bag: no head: expected get_output_embeddings\(\)"),
        ("TwoLayerHead", "its head is a torch.nn.modules.container.Sequential; expected a plain"),
        ("Baseless", "no backbone: expected `base_model`"),
        ("Wider", r"expected hidden states of shape \(2, 8, 9\) .*; found \(2, 8, 8\)"),
    ],
)
def test_what_is_missing_is_named(name, match):
    model = build(f"tests.models.test_language:{name}")
    with pytest.raises(SpecError, match=match):
        check_split(model, split(model))


def test_a_head_that_is_quantised_or_adapted_is_refused():
    class Packed(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden) * 2

    model = Own(VOCAB)
    model.out = Packed(8, VOCAB)
    with pytest.raises(SpecError, match="Packed; expected a plain"):
        split(model)


def test_a_model_that_sees_later_tokens_is_refused():
    model = Own(VOCAB)
    model.base_model.causal = False
    with pytest.raises(SpecError, match=r"a later token changes .*the model must be causal"):
        check_split(model, split(model))


def test_a_backbone_without_its_head_is_refused():
    with pytest.raises(SpecError, match="GPT2Model: no head"):
        split(make("gpt2").transformer)


# ---- specs


@pytest.mark.parametrize("spec", BUILTIN)
def test_fresh_weights_follow_the_seed(spec):
    def weights(seed):
        torch.manual_seed(seed)
        return list(build(spec).state_dict().values())

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("gtp2", r"unknown name 'gtp2'; did you mean gpt2\? \(others are written hf:NAME_OR_PATH"),
        ("lama?width=8", "unknown name 'lama'; did you mean llama"),
        ("gpt2?widht=8", "cannot be built for 61 tokens .*widht"),
        ("llama?width=10&heads=4", "4 heads do not divide width 10"),
        ("llama?width=8&heads=4&kv_heads=3", "3 kv_heads"),
        ("hf:", "no model name"),
        ("hf:/no/such/folder", "no such folder: /no/such/folder; expected one that save_pretrained wrote"),
        (
            "hf:gpt2?trust_remote_code=true",
            "trust_remote_code is not an argument here: softcache runs no code",
        ),
        ("hf-config:gpt2?trust_remote_code=true", "trust_remote_code is not an argument"),
        ("hf:gpt2?use_safetensors=false", "use_safetensors is not an argument"),
        ("hf:gpt2?attn_implementation=someone/kernel", "someone/kernel'; expected one of eager, sdpa"),
        ("no.such.module:thing", "No module named 'no'"),
        ("tests.models.test_language:missing", "has no attribute 'missing'"),
        ("tests.models.test_language:not_a_model", "expected a torch.nn.Module; found str"),
    ],
)
def test_a_wrong_spec_names_what_is_wrong(spec, match):
    with pytest.raises(SpecError, match=match):
        build(spec)


def test_a_name_that_cannot_be_fetched_is_one_clear_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        SpecError, match=r"model 'hf:nobody/nothing': cannot be built .*check the name"
    ) as error:
        build("hf:nobody/nothing")
    assert "\n" not in str(error.value)


def test_pickled_weights_are_refused(tmp_path):
    model = make("llama")
    model.config.save_pretrained(tmp_path)
    with pytest.raises(SpecError, match=r"no \*.safetensors in the folder; found no weights"):
        build(f"hf:{tmp_path}")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(SpecError, match=r"found pytorch_model.bin; pickled weights can run code"):
        build(f"hf:{tmp_path}")


def test_a_checkpoint_without_its_head_is_refused(tmp_path):
    """transformers would fill the head with random numbers and warn."""
    make("llama", tie_word_embeddings=False).model.save_pretrained(tmp_path)
    with pytest.raises(SpecError, match=r"lacks 1 weights that the model needs \(lm_head.weight\)"):
        build(f"hf:{tmp_path}")


def test_a_model_too_small_for_the_source_is_refused(tmp_path):
    make("llama").save_pretrained(tmp_path)
    with pytest.raises(SpecError, match="its head has 61 rows; the source has 62 tokens"):
        build(f"hf:{tmp_path}", vocab_size=62)
    with pytest.raises(SpecError, match="takes rows of at most 16 tokens; found rows of 17"):
        build(f"hf:{tmp_path}", context=17)
    parts = split(build(f"hf:{tmp_path}", vocab_size=50))
    check_context(parts, 16, "teacher")
    with pytest.raises(SpecError, match="student: takes rows of at most 16 tokens; found rows of 40"):
        check_context(parts, 40, "student")


def test_fresh_weights_from_a_configuration(tmp_path):
    make("gemma2", pad_token_id=60, dtype="bfloat16").config.save_pretrained(tmp_path)
    model = build(f"hf-config:{tmp_path}?num_hidden_layers=1", vocab_size=31)
    parts = split(model)
    check_split(model, parts)
    assert (parts.vocab_size, parts.weight.dtype, len(model.model.layers)) == (31, torch.float32, 1)
    with pytest.raises(SpecError, match="the configuration has no num_hiden_layers"):
        build(f"hf-config:{tmp_path}?num_hiden_layers=1")


def test_the_tokenizer_beside_a_model(tmp_path):
    make("gpt2").save_pretrained(tmp_path)
    assert tokenizer_of(f"hf:{tmp_path}") is None
    assert tokenizer_of("gpt2?width=8") is None
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path)
    assert tokenizer_of(f"hf:{tmp_path}").get_vocab() == {"a": 0, "b": 1, "?": 2}
    assert tokenizer_of(f"hf-config:{tmp_path}").get_vocab() == {"a": 0, "b": 1, "?": 2}


def test_the_tokenizer_beside_a_model_is_that_of_its_subfolder_and_revision(tmp_path, monkeypatch):
    """Another revision's would be compared with the source's, whose ids are of this one's tokens."""
    from tokenizers import Tokenizer, models

    for folder, names in (("", "ab?"), ("one", "ba?")):
        words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="?"))
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
        tokenizer.save_pretrained(tmp_path / folder)
    spec = f"hf:{tmp_path}?subfolder=one"
    make("gpt2").save_pretrained(tmp_path / "one")
    build(spec)
    assert tokenizer_of(spec).get_vocab() == {"b": 0, "a": 1, "?": 2}
    (tmp_path / "one/tokenizer.json").unlink()
    assert tokenizer_of(spec).get_vocab() == {"a": 0, "b": 1, "?": 2}
    asked = []

    def load(*name, trust_remote_code, **how):
        asked.append((*name, how))
        if "subfolder" in how:
            raise OSError("no tokenizer there")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", load)
    tokenizer_of("hf:them/model?revision=v2&subfolder=one")
    how = {"revision": "v2"}
    assert asked == [("them/model", how | {"subfolder": "one"}), ("them/model", how)]


@pytest.mark.parametrize(("ids", "shown"), [([[1, 2, 0]], False), ([[1, 2, 3]], True)])
def test_the_advice_about_padding_is_not_shown(ids, shown):
    """It does not apply: padding comes after the tokens. Other warnings of transformers stay."""
    transformers_library()
    logger, kept = logging.getLogger("transformers.modeling_utils"), []
    handler = logging.Handler()
    handler.emit = kept.append
    logger.addHandler(handler)
    try:
        if shown:
            logger.warning("weights are missing")
        else:
            model = build_language_model("gpt2?width=8&depth=1&heads=2", vocab_size=5, context=4)
            model.config.pad_token_id = 0
            type(logger).warning_once.cache_clear()
            model.warn_if_padding_and_no_attention_mask(torch.tensor(ids), None)
    finally:
        logger.removeHandler(handler)
    assert bool(kept) == shown


@pytest.mark.parametrize(
    ("own", "is_refused"),
    [("modeling_mine.MineForCausalLM", True), ("them/repo--modeling.LLaMA_ForCausalLM", False)],
)
def test_a_checkpoint_that_is_run_by_a_class_of_its_own_is_refused(tmp_path, own, is_refused):
    """transformers would run its weights as the class of its model_type: another model's labels, without a word."""
    make("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": own}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for opened in (build, partial(Checkpoint, vocab_size=VOCAB, context=CONTEXT)):
        if is_refused:
            with pytest.raises(SpecError, match=r"its class is MineForCausalLM, .*found LlamaForCausalLM"):
                opened(f"hf:{tmp_path}")
        else:
            opened(f"hf:{tmp_path}")
    if is_refused:
        with pytest.raises(SpecError, match="its class is MineForCausalLM"):
            build(f"hf-config:{tmp_path}")


@pytest.mark.parametrize("is_merged", [False, True])
def test_a_folder_with_an_adapter_is_refused_also_next_to_the_model_that_has_it(tmp_path, is_merged):
    """transformers would put it onto the merged weights again."""
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(make("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path)
    if is_merged:
        adapted.merge_and_unload().save_pretrained(tmp_path)
    for opened in (build, partial(Checkpoint, vocab_size=VOCAB, context=CONTEXT)):
        with pytest.raises(SpecError, match=r"has an adapter of peft.*merge_and_unload"):
            opened(f"hf:{tmp_path}")
    if is_merged:
        (tmp_path / "adapter_config.json").unlink()
        (tmp_path / "adapter_model.safetensors").unlink()
        build(f"hf:{tmp_path}")


def test_a_configuration_that_leaves_out_weights_of_a_layer_is_refused(tmp_path):
    """transformers would drop the biases and warn; weights of a part for training, and a tied head's copy, are not needed."""
    model = make("llama", attention_bias=True, tie_word_embeddings=True)
    weights = {**model.state_dict(), "v_head.summary.weight": torch.zeros(1, 4)}
    save_file(
        {name: value.clone() for name, value in weights.items()},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    model.config.save_pretrained(tmp_path)
    build(f"hf:{tmp_path}")
    model.config.attention_bias = False
    model.config.save_pretrained(tmp_path)
    with pytest.raises(
        SpecError, match=r"leaves out 8 weights .* \(model.layers.0.self_attn.k_proj.bias, .*attention_bias"
    ):
        build(f"hf:{tmp_path}")
