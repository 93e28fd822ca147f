"""From a spec to a language model, causal or of encoder and decoder, split into backbone and head.

    causal_lm.py                                                   a spec to a model, and the tokenizer beside it
    splitting.py                                                   a model to its parts
    backbone_head.py                                               the parts, and packed rows, whose documents do not see
    each other
    probes.py                                                      what is tried on 8 tokens before labels are made; the
    longest row
    encoder_decoder.py, encoder_decoder_parts.py, pair_probes.py   the same for encoder-decoder models and pairs of texts

The logits of one batch are the largest tensor of a run (16 rows of 1024 positions over 152k classes:
10 GB in float32), so nobody here makes them: `split` gives the backbone, run once per batch, and the
head, run on as many positions at a time as the caller can afford.
"""

from softcache.models.language.backbone_head import BackboneHead, CausalParts
from softcache.models.language.causal_lm import build_language_model, tokenizer_of
from softcache.models.language.encoder_decoder import PairTokens, build_translation_model
from softcache.models.language.encoder_decoder_parts import PairParts, split_source_target
from softcache.models.language.probes import check_context, check_split
from softcache.models.language.splitting import split

__all__ = [
    "BackboneHead",
    "CausalParts",
    "PairParts",
    "PairTokens",
    "build_language_model",
    "build_translation_model",
    "check_context",
    "check_split",
    "split",
    "split_source_target",
    "tokenizer_of",
]
