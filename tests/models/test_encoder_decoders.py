"""Encoder-decoders of transformers in a padded batch against a plain forward of each pair alone, and where their decoders start."""

import pytest
import torch
import transformers

from softcache.errors import SpecError
from softcache.models.language import PairTokens, build_translation_model, check_split, split

VOCAB = 97
TOKENS = PairTokens(pad=0, start=0, end=1)
COMMON = {
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
LAYERS = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
BART = {f"{side}_{name}": number for side in ("encoder", "decoder") for name, number in LAYERS.items()}
BART |= {"d_model": 32, "max_position_embeddings": 128}
GEMMA = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 2,
         "eos_token_id": 1, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
GLOBAL = {"encoder_attention_type": "transient-global", "local_radius": 3, "global_block_size": 4}
EXPERTS = {
    "num_experts": 4,
    "expert_capacity": 4,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
}
RIGHT = {
    "umt5": T5,
    "umt5, untied": T5 | {"tie_word_embeddings": False},
    "longt5": T5 | GLOBAL,
    "switch_transformers": T5 | EXPERTS,
    "switch_transformers, untied": T5 | EXPERTS | {"tie_word_embeddings": False},
    "bart": BART,
    "m2m_100": BART,
    "pegasus": BART,
    "pegasus_x": BART | {"block_size": 4, "num_global_tokens": 2},
    "blenderbot": BART,
}
LENGTHS = ((5, 3), (37, 21), (3, 40), (16, 16))


def make_model(name):
    torch.manual_seed(0)
    if name == "t5gemma":
        decoder = GEMMA | {"cross_attention_hidden_size": 32}
        config = transformers.T5GemmaConfig(encoder=GEMMA, decoder=decoder, vocab_size=VOCAB)
    else:
        more = RIGHT.get(name, BART)
        config = transformers.AutoConfig.for_model(name.partition(",")[0], **COMMON, **more)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    return model


def own(vocab_size, name):
    """The factory of specs: `tests.models.test_encoder_decoders:own?name=…`."""
    return make_model(name)


def build(name):
    spec = f"{__name__}:own?name={name}"
    return build_translation_model(spec, vocab_size=VOCAB, context=64, tokens=TOKENS)


@pytest.mark.parametrize("name", RIGHT)
@torch.no_grad()
def test_a_padded_batch_gives_the_logits_of_each_pair_alone(name):
    model = make_model(name)
    parts = split(model)
    check_split(model, parts)
    pairs = [(torch.randint(3, VOCAB, (s,)), torch.randint(3, VOCAB, (t,))) for s, t in LENGTHS]
    tokens = torch.zeros(len(pairs), max(map(sum, LENGTHS)), dtype=torch.int64)
    segments = torch.full_like(tokens, 2)
    for row, (source, target) in enumerate(pairs):
        target[0] = 0
        both = torch.cat([source, target])
        tokens[row, : len(both)] = both
        segments[row, : len(both)] = torch.arange(len(both)) >= len(source)
    hidden = parts.hidden(tokens, segments)
    for row, (source, target) in enumerate(pairs):
        expected = model(input_ids=source[None], decoder_input_ids=target[None], use_cache=False).logits[0]
        found = parts.logits(hidden[row, segments[row] == 1])
        torch.testing.assert_close(found.log_softmax(-1), expected.log_softmax(-1), atol=5e-5, rtol=0)


@pytest.mark.parametrize(("name", "start"), [("t5gemma", 2), ("mbart", 1)])
def test_a_decoder_starts_as_the_models_own_shift_of_labels_does(name, start):
    """T5Gemma's configuration names no start, mBART's another one than it is trained with."""
    with pytest.raises(SpecError, match=f"its decoder starts with token {start}; expected 0"):
        build(name)
    build("bart")


def test_a_decoder_that_masks_its_start_is_refused():
    """T5Gemma masks padding: a first step that sees nothing attends to all steps alike, as many as a batch has."""
    model = make_model("t5gemma")
    check_split(model, split(model))
    model.config.decoder_start_token_id = 0
    ids = {"input_ids": torch.tensor([[5, 6, 7]]), "use_cache": False}
    first, other = (
        model(**ids, decoder_input_ids=torch.tensor([[0, 5, last]])).logits[0, 0] for last in (6, 7)
    )
    if torch.equal(first, other):
        pytest.skip("this version of transformers lets such a step attend to itself")
    with pytest.raises(SpecError, match="a later token changes the hidden states before it"):
        check_split(model, split(model))
