"""Small configurations of transformers' causal language models, and their labels against a plain forward.

Each has fewer than a million parameters, 2 layers unless its kinds of layers need more, and weights drawn wide enough
that attention, experts and states matter. `tests/models/test_architectures.py` compares the labels of all of them;
`python -m benchmarks.architectures` writes the table of docs/architectures.md.

Shape suffixes: B rows, L positions, P rows of labels, V vocabulary, D width of the hidden state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from softcache.data.tokens import TokenBatch
from softcache.labels.sparsify import Dense
from softcache.teacher.language import LanguageTeacher

VOCAB, CONTEXT = 101, 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DOCUMENTS = ((3, 4, 9), (16,), (7, 2, 5), (1, 12))
"""Tokens of the documents of each row; shorter rows are padded."""
ALONE = (1, 3, 4)
"""The documents that are also labeled in a batch of their own: of 4, 16 and 7 tokens."""


@dataclass(frozen=True)
class Architecture:
    """A model of transformers, small.

    Attributes:
        model_type: its name in transformers.
        features: what it tries.
        config: what its configuration has besides `SIZES`.
        variant: the name of a configuration, where a model type has several.
        refused: what the message must match, of a model whose labels would be wrong.
        refused_bfloat16: the same, where only bfloat16 is refused.
    """

    model_type: str
    features: str
    config: dict[str, Any] = field(default_factory=dict)
    variant: str = ""
    refused: str | None = None
    refused_bfloat16: str | None = None

    def refusal(self, dtype: torch.dtype) -> str | None:
        """Returns what the message of a refusal must match, or None where the labels hold."""
        return self.refused or (self.refused_bfloat16 if dtype == torch.bfloat16 else None)

    @property
    def name(self) -> str:
        return f"{self.model_type}, {self.variant}" if self.variant else self.model_type


def _moe(**more: Any) -> dict[str, Any]:
    return {"num_experts_per_tok": 2, "moe_intermediate_size": 24} | more


LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.0, 1.0, 1.0],
        "long_factor": [2.0, 4.0, 6.0, 8.0],
        "original_max_position_embeddings": 6,
    },
    "original_max_position_embeddings": 6,
}
MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
INDEXER = {
    "index_n_heads": 16,
    "index_head_dim": 8,
    "index_topk": 4,
}  # few heads give ties, which shapes break
DECODER = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_layers": 1,
           "encoder_attention_heads": 4, "encoder_ffn_dim": 48}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_d_state": 4, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_n_groups": 1}
WINDOW = {"sliding_window": 4}
MIXED = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}

A = Architecture
ARCHITECTURES = (
    A("gpt2", "learned positions, tied head"),
    A("gpt2", "padded head (128 rows, 101 tokens)", {"vocab_size": 128}, "padded head"),
    A("gpt_neo", "local attention", {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4}),
    A("gpt_neox", "partial rotary, parallel blocks, untied head"),
    A("gpt_bigcode", "one key head for all"),
    A("gptj", "rotary, head with a bias", {"rotary_dim": 4}),
    A("codegen", "rotary, head with a bias", {"rotary_dim": 4}),
    A("openai-gpt", "norm after the block"),
    A("ctrl", "sinusoids, head with a bias", {"dff": 48, "n_positions": 64}),
    A("opt", "learned positions with an offset, tied head", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    A("bloom", "ALiBi, tied head"),
    A("mpt", "ALiBi, tied head", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": CONTEXT}),
    A("falcon", "one key head for all, parallel blocks, tied head"),
    A("falcon", "ALiBi", {"alibi": True, "multi_query": False}, "ALiBi"),
    A("biogpt", "scaled embeddings, learned positions, tied head"),
    A("xglm", "sinusoids, tied head", {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}),
    A("phi", "partial rotary, head with a bias"),
    A("phi3", "fused projections"),
    A("phi3", "LongRoPE (long above 6 tokens)", LONGROPE, "LongRoPE"),
    A("stablelm", "partial rotary, layer norm"),
    A("persimmon", "norms of queries and keys"),
    A("starcoder2", "biases, sliding window, tied head", WINDOW),
    A("nemotron", "squared ReLU, layer norm 1 + p"),
    A("llama", "grouped heads"),
    A("llama", "tied head", {"tie_word_embeddings": True}, "tied head"),
    A("llama", "padded head (128 rows, 101 tokens)", {"vocab_size": 128}, "padded head"),
    A("llama", "Llama 3 scaling of rotary angles", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8}}, "llama3 rope"),
    A("llama", "YaRN", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}}, "YaRN"),
    A("llama4_text", "chunked attention, layers without positions, mixture of experts",
      {"intermediate_size_mlp": 48, "num_local_experts": 4, "head_dim": 8, "attention_chunk_size": 4, "no_rope_layers": [1, 0],
       "layer_types": ["chunked_attention", "full_attention"]}),
    A("mistral", "sliding window", WINDOW),
    A("ministral3", "attention scaled with the position"),
    A("mistral3", "text of a model with images", {}),
    A("mixtral", "mixture of experts", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    A("qwen2", "sliding window in the last layer, biases", {"use_sliding_window": True, "max_window_layers": 1} | WINDOW),
    A("qwen2_moe", "mixture of experts with a shared one", _moe(num_experts=4, shared_expert_intermediate_size=24)),
    A("qwen3", "norms of queries and keys", {"head_dim": 8}),
    A("qwen3_moe", "mixture of experts", _moe(num_experts=4, head_dim=8)),
    A("qwen3_next", "gated delta net, mixture of experts", _moe(num_experts=4, shared_expert_intermediate_size=24, head_dim=8) | LINEAR | HYBRID),
    A("qwen3_5_text", "gated delta net", {"head_dim": 8} | LINEAR | HYBRID),
    A("gemma", "scaled embeddings, tied head", {"head_dim": 8}),
    A("gemma2", "soft cap, sliding window, tied head", {"head_dim": 8, "final_logit_softcapping": 5.0} | WINDOW),
    A("gemma3_text", "sliding window, two rotary bases", {"head_dim": 8} | MIXED),
    A("gemma3n_text", "soft cap, per-layer embeddings, shared keys",
      {"head_dim": 8, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
       "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.0] * 4, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB,
       "laurel_rank": 4, "final_logit_softcapping": 5.0} | WINDOW),
    A("gemma4_text", "per-layer embeddings, sliding window",
      {"head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 0} | MIXED),
    A("vaultgemma", "soft cap, tied head", {"head_dim": 8, "final_logit_softcapping": 5.0} | WINDOW),
    A("recurrent_gemma", "recurrent blocks, soft cap, tied head",
      {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 4, "logits_soft_cap": 5.0}),
    A("cohere", "logit scale, parallel blocks, tied head", {"logit_scale": 0.3}),
    A("cohere2", "logit scale, sliding window, full attention without positions", {"logit_scale": 0.3} | MIXED),
    A("granite", "logits divided, multipliers", {"logits_scaling": 6.0, "embedding_multiplier": 4.0, "residual_multiplier": 0.5}),
    A("granitemoe", "logits divided, mixture of experts", {"logits_scaling": 6.0, "num_local_experts": 4, "num_experts_per_tok": 2}),
    A("granitemoeshared", "logits divided, mixture with a shared expert",
      {"logits_scaling": 6.0, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24}),
    A("granitemoehybrid", "state space and attention, logits divided, mixture of experts",
      {"logits_scaling": 6.0, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24, "layer_types": ["mamba", "attention"]} | MAMBA),
    A("glm", "partial rotary", {"head_dim": 8}),
    A("glm4", "norms after the blocks", {"head_dim": 8}),
    A("glm4_moe", "mixture of experts by groups", _moe(n_routed_experts=4, n_group=1, topk_group=1, head_dim=8, first_k_dense_replace=1)),
    A("olmo", "norms without weights, clipped projections", {"clip_qkv": 1.0}),
    A("olmo2", "norms after the blocks"),
    A("olmo3", "sliding window", MIXED),
    A("olmoe", "mixture of experts", {"num_experts": 4, "num_experts_per_tok": 2}),
    A("exaone4", "sliding window, full attention without positions", MIXED),
    A("ernie4_5", "grouped heads"),
    A("ernie4_5_moe", "mixture of experts", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24}),
    A("smollm3", "layers without positions", {"no_rope_layers": [1, 0]}),
    A("helium", "grouped heads", {"head_dim": 8}),
    A("seed_oss", "biases", {"head_dim": 8}),
    A("arcee", "squared ReLU"),
    A("apertus", "xIELU, norms of queries and keys"),
    A("bitnet", "norms inside the blocks"),
    A("diffllama", "differential attention"),
    A("nanochat", "soft cap, norms without weights", {"final_logit_softcapping": 5.0}),
    A("gpt_oss", "attention sinks, sliding window, mixture of experts", {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2} | WINDOW),
    A("deepseek_v2", "latent attention, mixture of experts", _moe(n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1, num_key_value_heads=4, topk_method="greedy") | MLA),
    A("deepseek_v3", "latent attention, mixture of experts", _moe(n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1, num_key_value_heads=4) | MLA),
    A("deepseek_v32", "latent attention, keys chosen by an indexer, mixture of experts",
      _moe(n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1, num_key_value_heads=4) | MLA | INDEXER),
    A("glm_moe_dsa", "latent attention, keys chosen by an indexer, mixture of experts",
      _moe(n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1, num_key_value_heads=4) | MLA | INDEXER),
    A("deepseek_v4", "compressed keys, hyper-connections, mixture of experts",
      _moe(head_dim=8, n_routed_experts=4, n_shared_experts=1, q_lora_rank=16, qk_rope_head_dim=4, index_n_heads=2, index_head_dim=8)),
    A("kimi_linear", "delta attention, latent attention, mixture of experts",
      _moe(num_experts=4, n_group=1, topk_group=1, num_key_value_heads=4, head_dim=8, linear_head_dim=8, linear_num_heads=4) | MLA),
    A("hunyuan_v1_dense", "norms of queries and keys", {"head_dim": 8}),
    A("lfm2_moe", "short convolutions and attention, mixture of experts",
      _moe(num_experts=4, layer_types=["conv", "full_attention"], num_dense_layers=1)),
    A("minicpm3", "latent attention, hidden state divided before the head", {"dim_model_base": 10} | MLA | {"num_key_value_heads": 4}),
    A("dbrx", "mixture of experts, clipped projections",
      {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": CONTEXT,
       "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}, "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}}),
    A("phimoe", "mixture of experts, head with a bias", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    A("jetmoe", "mixture of experts in attention", {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8}),
    A("minimax", "lightning attention, mixture of experts", {"num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 4}),
    A("mamba", "state space, tied head", {"state_size": 4}),
    A("mamba2", "state space", {"state_size": 4, "num_heads": 4, "head_dim": 16, "expand": 2, "n_groups": 1, "chunk_size": 4}),
    A("falcon_mamba", "state space", {"state_size": 4}),
    A("falcon_h1", "state space and attention side by side, logits multiplied",
      {"mamba_d_ssm": 64, "lm_head_multiplier": 0.3, "head_dim": 8, "mamba_chunk_size": 4} | MAMBA),
    A("bamba", "state space and attention", {"attn_layer_indices": [1], "mamba_chunk_size": 4} | MAMBA),
    A("jamba", "state space and attention, mixture of experts", {"num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
                 "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}),
    A("zamba2", "state space with shared attention", {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"], "mamba_d_state": 4, "mamba_ngroups": 1, "n_mamba_heads": 4, "chunk_size": 4,
                "num_mem_blocks": 1, "attention_head_dim": 16, "use_mem_rope": True, "adapter_rank": 4}),
    A("nemotron_h", "state space, attention, MLP by turns", {"layers_block_type": ["mamba", "attention", "mlp"], "num_hidden_layers": 3, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 4,
                  "n_groups": 1, "chunk_size": 4, "head_dim": 8}),
    A("lfm2", "short convolutions and attention", {"full_attn_idxs": [1]}),
    A("rwkv", "recurrent", {"context_length": CONTEXT, "attention_hidden_size": 32}),
    A("xlstm", "recurrent, soft cap", {"num_heads": 4, "num_blocks": 2, "chunk_size": 4, "output_logit_soft_cap": 5.0},
      refused_bfloat16="its forward fails on a few tokens: RuntimeError: expected scalar type Float"),
    A("inkling_text", "hidden state divided before the head, relative positions, sliding window, mixture of experts",
      _moe(head_dim=8, swa_head_dim=8, swa_num_attention_heads=4, swa_num_key_value_heads=2, sliding_window_size=4, d_rel=4, rel_extent=16,
           n_routed_experts=4, n_shared_experts=1, logits_mup_width_multiplier=6.0, mlp_layer_types=["dense", "sparse"])),
    A("bart", "decoder of an encoder-decoder, tied head", DECODER),
    A("marian", "decoder of an encoder-decoder", DECODER),
    A("whisper", "decoder of a speech model", DECODER),
    A("bert", "encoder", refused="more than one linear layer"),
    A("roberta", "encoder", refused="more than one linear layer"),
    A("electra", "encoder", refused="expected hidden states of shape"),
    A("modernbert-decoder", "decoder whose head has two layers", refused="expected a linear head, a scale and a soft cap"),
    A("bert-generation", "encoder with a linear head", refused="its configuration has is_decoder = false"),
    A("xlm", "encoder", refused="the model must be causal"),
)  # fmt: skip


def make_model(architecture: Architecture, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Returns the model in evaluation mode, the same weights at each call and of each dtype."""
    torch.manual_seed(0)
    config = _config(architecture)
    mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    auto = "AutoModelForCausalLM" if type(config) in mapping else "AutoModelForImageTextToText"
    model = getattr(transformers, auto).from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(torch.bfloat16).to(dtype)


def _config(architecture: Architecture) -> Any:
    sizes = SIZES | architecture.config
    if architecture.model_type != "mistral3":
        return transformers.AutoConfig.for_model(architecture.model_type, **sizes)
    vision = {"model_type": "pixtral", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"intermediate_size": 32, "image_size": 28, "patch_size": 14, "head_dim": 16}
    text = sizes | {"model_type": "mistral", "head_dim": 8}
    return transformers.Mistral3Config(text_config=text, vision_config=vision)


def make_documents() -> list[list[torch.Tensor]]:
    """Returns the tokens of the documents of each row."""
    generator = torch.Generator().manual_seed(0)
    return [[torch.randint(3, VOCAB, (n,), generator=generator) for n in row] for row in DOCUMENTS]


def pack(packed: list[list[torch.Tensor]]) -> TokenBatch:
    """Returns rows of documents as one batch; every token of a document but its last has a label."""
    lengths = [sum(map(len, row)) for row in packed]
    tokens = torch.zeros(len(packed), max(lengths), dtype=torch.int64)
    segments = torch.zeros_like(tokens)
    has_label = torch.zeros_like(tokens, dtype=torch.bool)
    for number, row in enumerate(packed):
        ends = torch.tensor([len(document) for document in row]).cumsum(0)
        tokens[number, : lengths[number]] = torch.cat(row)
        segments[number] = torch.searchsorted(ends, torch.arange(tokens.shape[1]), right=True)
        has_label[number, : lengths[number]] = True
        has_label[number, ends - 1] = False
    rows = has_label.flatten().nonzero().squeeze(1)
    return TokenBatch(
        tokens=tokens,
        segments=segments,
        rows=rows,
        targets=tokens.flatten()[rows + 1],
        lengths=np.array(lengths),
        row_counts=has_label.sum(1).numpy(),
        samples=np.arange(len(packed)),
        view=0,
        fingerprints=np.zeros(len(packed), np.uint64),
    )


@torch.no_grad()
def plain_log_probs(
    model: nn.Module, documents: list[torch.Tensor], *, accumulator: bool = True
) -> torch.Tensor:
    """Returns log-probabilities [P, V] of a plain forward of each document alone, by transformers' own model.

    Args:
        accumulator: the head's product keeps its float32 accumulator, all else is the model's; or the model's own
            rounding.
    """
    with _float32_head(model) if accumulator else nullcontext():
        logits = [model(document[None], use_cache=False).logits[0] for document in documents]
    return torch.cat([x[:-1].float().log_softmax(-1) for x in logits])


@contextmanager
def _float32_head(model: nn.Module) -> Iterator[None]:
    def forward(hidden: torch.Tensor) -> torch.Tensor:
        bias = None if head.bias is None else head.bias.float()
        return nn.functional.linear(hidden.float(), head.weight.float(), bias)

    head: Any = model.get_output_embeddings()
    head.forward = forward
    try:
        yield
    finally:
        del head.forward


@dataclass(frozen=True)
class Comparison:
    """Labels of one model against a plain forward of each document: the largest differences of a log-probability.

    Attributes:
        packing: how the documents of a row run: by restarted "positions", or as "rows".
        packed: of packed and padded rows, the head's product of both in float32.
        alone: of batches of one document, which give half-precision kernels the shapes of the plain forward.
        rounded: of packed rows, to the model's own logits, which half precision rounds; where it is asked for.
        noise: how far the plain forward is from that of the same weights in float32: what half precision costs.
    """

    packing: str
    packed: float
    alone: float = 0.0
    rounded: float = 0.0
    noise: float = 0.0


def compare(architecture: Architecture, dtype: torch.dtype, *, with_rounded: bool = False) -> Comparison:
    """Returns how far the labels that softcache captures are from a plain forward; of float32, `packed` alone.

    Raises:
        SpecError: softcache refuses the model.
    """
    model, packed = make_model(architecture, dtype), make_documents()
    documents = [document for row in packed for document in row]
    common: dict[str, Any] = {"spec": "x", "device": torch.device("cpu"), "dtype": "float32"}
    teacher = LanguageTeacher(model, chunk_positions=7, **common)

    def largest(found: torch.Tensor, expected: torch.Tensor) -> float:
        return (found - expected).abs().max().item()

    labels = _labels(teacher, pack(packed))
    exact = _exact_log_probs(architecture.name)
    if dtype == torch.float32:
        return Comparison(teacher.parts.packing, packed=largest(labels, exact))
    plain = plain_log_probs(model, documents)
    each = plain.split([len(document) - 1 for document in documents])
    alone = [largest(_labels(teacher, pack([[documents[n]]])), each[n]) for n in ALONE]
    rounded = largest(labels, plain_log_probs(model, documents, accumulator=False)) if with_rounded else 0.0
    return Comparison(
        teacher.parts.packing,
        packed=largest(labels, plain),
        alone=max(alone),
        rounded=rounded,
        noise=largest(plain, exact),
    )


@cache
def _exact_log_probs(name: str) -> torch.Tensor:
    architecture = next(each for each in ARCHITECTURES if each.name == name)
    return plain_log_probs(make_model(architecture), [x for row in make_documents() for x in row])


def _labels(teacher: LanguageTeacher, batch: TokenBatch) -> torch.Tensor:
    """Returns the log-probabilities [P, V] that softcache captures."""
    record, faults = teacher.label(batch, Dense())
    assert not faults.any()
    log_probs = torch.empty(batch.num_rows, teacher.num_classes)
    return log_probs.scatter_(1, record.ids.long(), record.log_probs)
