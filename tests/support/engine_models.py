"""Saved models and teachers of tests of engines: wide random weights, heads of 32, a padded vocabulary."""

import torch
import transformers

from softcache.labels.sparsify import Hybrid
from softcache.teacher.base import TeacherSettings
from softcache.teacher.engine_language import load_engine_teacher
from softcache.teacher.language import load_language_teacher

VOCAB, SEQ_LEN = 300, 32
SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), None),
}
GPT2 = {"vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64}
CONFIGS = {
    "llama": ("LlamaConfig", SIZES),
    "qwen2": ("Qwen2Config", SIZES | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", SIZES | {"tie_word_embeddings": True}),
    # transformers leaves its soft cap of attention out unless attention is "eager".
    "gemma2": (
        "Gemma2Config",
        SIZES | {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 32, "sliding_window": 16},
    ),
    "gpt2": ("GPT2Config", GPT2 | {"bos_token_id": None, "eos_token_id": None}),
    "cohere": ("CohereConfig", SIZES | {"logit_scale": 0.5}),
    "granite": ("GraniteConfig", SIZES | {"logits_scaling": 4.0}),
    "mixtral": ("MixtralConfig", SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


def save_model(folder, name, *, dtype=torch.float32, **changes):
    """Returns the folder of a saved model of an architecture, with weights in which attention matters."""
    kind, sizes = CONFIGS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, kind)(**sizes | changes), dtype=dtype
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder


def load_teacher(folder, engine="transformers", query="", **more):
    """Returns the teacher of a saved model, run by an engine."""
    load = load_language_teacher if engine == "transformers" else load_engine_teacher
    common = {
        "vocab_size": VOCAB,
        "seq_len": SEQ_LEN,
        "chunk_positions": 7,
        "cross_documents": False,
        "device": torch.device("cpu"),
        "dtype": "float32",
    }
    return load(TeacherSettings(model=f"hf:{folder}{query}", engine=engine), **common | more)


def label(teacher, batch):
    """Returns the batch's labels: kept and drawn classes, tails at three temperatures, statistics, ground truth."""
    labels, faults_P = teacher.label(batch, Hybrid(k=8, num_samples=4, temperatures=(1.0, 2.0, 4.0)))
    assert not faults_P.any()
    return labels


def largest_difference(labels, others):
    """Returns the largest difference of two records of the same classes, nats."""
    assert torch.equal(labels.ids, others.ids)
    pairs = [
        (getattr(labels, name), getattr(others, name))
        for name in ("log_probs", "log_tail", "stats", "target_log_prob", "log_threshold")
    ]
    return max((one - other).abs().max().item() for one, other in pairs)
