"""Language models from a spec, causal or encoder-decoder, split into backbone and head.

    causal_lm.py               a model from its spec, and its tokenizer
    splitting.py               a model's backbone and head
    backbone_head.py           the parts, and attention that isolates the documents of packed rows
    probes.py                  checks on a few tokens before labels are made; the maximum length
    encoder_decoder.py, encoder_decoder_parts.py   the same for encoder-decoder models and pairs of texts
    adapters.py, lora.py       models with adapters of peft seen through; students with LoRA
    generate.py                beam search

The logits of one batch are the largest tensor of a run (16 rows of 1024 positions over 152k classes: 10 GB in float32),
so no function here computes them all: `split` returns the backbone, run once per batch, and the head, run on as many
positions at a time as the caller can afford.
"""

from softcache.models.language.backbone_head import BackboneHead, CausalParts, plain_logits
from softcache.models.language.causal_lm import build_language_model, tokenizer_of
from softcache.models.language.encoder_decoder import PairTokens, build_translation_model
from softcache.models.language.encoder_decoder_parts import PairParts, split_source_target
from softcache.models.language.probes import check_context, check_loss, check_split
from softcache.models.language.splitting import split

__all__ = [
    "BackboneHead",
    "CausalParts",
    "PairParts",
    "PairTokens",
    "build_language_model",
    "build_translation_model",
    "check_context",
    "check_loss",
    "check_split",
    "plain_logits",
    "split",
    "split_source_target",
    "tokenizer_of",
]
