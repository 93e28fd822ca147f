"""From a spec to a language model, causal or of encoder and decoder, split into backbone and head.

    building.py    a spec to a model, and the tokenizer beside it
    splitting.py   a model to its parts
    parts.py       the parts, and packed rows, whose documents do not see each other
    checks.py      what is tried on 8 tokens before labels are made; the longest row
    translating.py, pairs.py, pair_checks.py   the same for encoder-decoder models and pairs of texts

The logits of one batch are the largest tensor of a run (16 rows of 1024 positions over 152k classes:
10 GB in float32), so nobody here makes them: `split` gives the backbone, run once per batch, and the
head, run on as many positions at a time as the caller can afford.
"""

from pipeline.language.building import build_language_model, tokenizer_of
from pipeline.language.checks import check_context, check_split
from pipeline.language.pairs import PairParts, sides
from pipeline.language.parts import CausalParts, Parts
from pipeline.language.splitting import split
from pipeline.language.translating import PairTokens, build_translation_model

__all__ = [
    "CausalParts",
    "PairParts",
    "PairTokens",
    "Parts",
    "build_language_model",
    "build_translation_model",
    "check_context",
    "check_split",
    "sides",
    "split",
    "tokenizer_of",
]
