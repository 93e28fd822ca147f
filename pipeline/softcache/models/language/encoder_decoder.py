"""From a spec to an encoder-decoder model.

    t5 | marian [?width=…&depth=…&heads=…&mlp=…]    built in, fresh weights, embeddings shared and tied
    hf:NAME_OR_PATH[?dtype=…&attn_implementation=…]  from_pretrained, safetensors only
    package.module:factory[?arg=…]                   your own; called with your arguments, plus vocab_size, context
                                                     and tokens (`PairTokens`) where its signature takes them

The decoder starts with the token that the source's tables have (`PairTokens.start`); a model that starts with
another one is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from softcache.errors import MissingExtraError, SpecError
from softcache.models.language.causal_lm import (
    check_size,
    from_factory,
    pretrained,
    transformers_library,
    with_checkpointing,
)
from softcache.models.language.encoder_decoder_parts import is_encoder_decoder
from softcache.models.spec import ModelSpec, parse_spec, unknown_name

__all__ = ["PairTokens", "build_translation_model"]


@dataclass(frozen=True)
class PairTokens:
    """The tokens that a decoder needs to know.

    Attributes:
        pad: fills batches.
        start: what the decoder is given first.
        end: what ends both sides.
    """

    pad: int
    start: int
    end: int


def build_translation_model(spec: str, *, vocab_size: int, context: int, tokens: PairTokens) -> nn.Module:
    """Returns an encoder-decoder model in evaluation mode for `hf:`, else freshly initialised.

    Args:
        spec: see the module docstring.
        vocab_size: V, shared by both sides.
        context: tokens of the longest side.
        tokens: of the source's tokenizer.

    Raises:
        SpecError: unknown name, arguments that the model refuses, no encoder-decoder model, one that is too small for the
            vocabulary or the longest side, or one whose decoder starts with another token.
        MissingExtraError: transformers is not installed.
    """
    parsed = parse_spec(spec)
    scheme, _, name = parsed.name.partition(":")
    build: Callable[..., Any] = partial(_own, tokens=tokens)
    if parsed.family == "builtin":
        build = partial(_builtin, tokens=tokens)
    elif scheme == "hf":
        parsed, build = replace(parsed, name=name), partial(pretrained, auto="AutoModelForSeq2SeqLM")
    try:
        model = build(spec, parsed, vocab_size, context)
    except (SpecError, MissingExtraError):
        raise
    except Exception as error:
        # A third-party constructor may raise anything; the user needs to know which spec it was.
        raise SpecError(
            f"model {spec!r}: cannot be built for {vocab_size} tokens and sides of {context}: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:400]}; check the name, and the arguments after '?'"
        ) from error
    if not is_encoder_decoder(model):
        raise SpecError(
            f"model {spec!r}: a {type(model).__name__} has no encoder and decoder; expected one for pairs of texts, such as "
            "t5, marian or hf:NAME of one; a causal language model would not see the source"
        )
    check_size(spec, model, vocab_size, context)
    start = _decoder_start(model, tokens)
    if start != tokens.start:
        raise SpecError(
            f"model {spec!r}: its decoder starts with token {start}; expected {tokens.start}, the tokenizer's padding, with "
            "which the source's samples start; set decoder_start_token_id in its config.json if it was trained so"
        )
    return model


def _decoder_start(model: Any, tokens: PairTokens) -> int | None:
    """Returns the token that the model's own shift of labels puts first, or else the one that its configuration names.

    Configurations may name another one than the model is trained with (mBART: the last of the labels), or none (T5Gemma).
    """
    if not hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return getattr(model.config, "decoder_start_token_id", tokens.start)
    try:
        return int(model.prepare_decoder_input_ids_from_labels(torch.tensor([[tokens.end]]))[0, 0])
    except Exception:  # it misses a setting: transformers raises many kinds of errors
        return getattr(model.config, "decoder_start_token_id", None)


def _t5(vocab_size: int, context: int, tokens: PairTokens, *, width: int = 128, depth: int = 3,
        heads: int = 4, mlp: int | None = None) -> Any:  # fmt: skip
    if width % heads:
        raise ValueError(f"{heads} heads do not divide width {width}")
    return transformers_library().T5Config(
        vocab_size=vocab_size,
        d_model=width,
        d_kv=width // heads,
        d_ff=mlp or 4 * width,
        num_layers=depth,
        num_heads=heads,
        dropout_rate=0.0,
        pad_token_id=tokens.pad,
        eos_token_id=tokens.end,
        decoder_start_token_id=tokens.start,
    )


def _marian(vocab_size: int, context: int, tokens: PairTokens, *, width: int = 128, depth: int = 3,
            heads: int = 4, mlp: int | None = None) -> Any:  # fmt: skip
    sides = {f"{side}_{key}": value for side in ("encoder", "decoder")
             for key, value in (("layers", depth), ("attention_heads", heads), ("ffn_dim", mlp or 4 * width))}  # fmt: skip
    return transformers_library().MarianConfig(
        vocab_size=vocab_size,
        max_position_embeddings=context,
        d_model=width,
        **sides,
        dropout=0.0,
        scale_embedding=True,
        activation_function="swish",
        pad_token_id=tokens.pad,
        bos_token_id=None,
        eos_token_id=tokens.end,
        forced_eos_token_id=None,
        decoder_start_token_id=tokens.start,
    )


BUILTIN: dict[str, Callable[..., Any]] = {"t5": _t5, "marian": _marian}


def _builtin(spec: str, parsed: ModelSpec, vocab_size: int, context: int, *, tokens: PairTokens) -> nn.Module:
    if parsed.name not in BUILTIN:
        others = "hf:NAME_OR_PATH or module:factory"
        raise unknown_name(f"model {spec!r}", parsed.name, BUILTIN, others=others)
    args = dict(parsed.args)
    checkpointing = args.pop("gradient_checkpointing", False)
    config = BUILTIN[parsed.name](vocab_size, context, tokens, **args)
    model = transformers_library().AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32)
    return with_checkpointing(model, checkpointing)


def _own(spec: str, parsed: ModelSpec, vocab_size: int, context: int, *, tokens: PairTokens) -> nn.Module:
    return from_factory(spec, parsed, vocab_size, context, tokens=tokens)
