"""What is tried on a model before labels are made with it: documents apart, logits equal, rows not too long.

The probe is two rows of 8 tokens, two documents in each: run packed and one document at a time, and as whole rows,
through the parts and through the model itself. To split a model costs some ten such passes.

Shape legend: B rows, L tokens of a row, D width of the hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from softcache.errors import SpecError
from softcache.models.language.adapters import without_wrapper
from softcache.models.language.backbone_head import (
    BackboneHead,
    CausalParts,
    accepts_argument,
    plain_logits,
    tensor_in,
)
from softcache.models.language.encoder_decoder_parts import PairParts, is_encoder_decoder, split_source_target

__all__ = [
    "check_context",
    "check_loss",
    "check_max_length",
    "check_pairs",
    "check_split",
    "isolates_documents",
]

NUM_PROBE_TOKENS = 8
LARGE_LOGIT = 64.0
"""Size of the logits that show a soft cap: those in use cap at 15 to 50."""


def check_split(model: nn.Module, parts: BackboneHead) -> None:
    """Runs 8 tokens through the model and through its parts: the guard against silently wrong labels.

    Raises:
        SpecError: the logits differ by more than rounding (the architecture does something between hidden
            state and logits that is not a linear head, a scale and a soft cap), a token sees a later one, or
            a document in a packed row gives other hidden states than the same document alone.
    """
    name = type(model).__name__
    with _evaluating(model):
        if isinstance(parts, PairParts):
            check_pairs(model, parts)
            return
        assert isinstance(parts, CausalParts)
        tokens_BL, _ = _probe(parts)
        _check_logits(
            model,
            parts,
            lambda: parts.hidden(tokens_BL, None).flatten(0, 1),
            lambda: plain_logits(model, tokens_BL).flatten(0, 1),
        )
        hidden_BLD = parts.hidden(tokens_BL, None)
        leak, leaked_share = _leak(parts, tokens_BL, hidden_BLD)
        difference, allowed = _difference_alone(parts)
        if not (max(leak, difference) <= allowed and leaked_share <= _eps(hidden_BLD) / 2):
            raise SpecError(
                f"model {name}: a later token changes the hidden states before it by {leak:.3g}, and packing "
                f"those of a document by {difference:.3g} (rounding allows {allowed:.1g}); the model must be "
                f"causal, and deterministic in evaluation mode{_why_not_causal(model)}"
            )


def _leak(parts: CausalParts, tokens_BL: torch.Tensor, hidden_BLD: torch.Tensor) -> tuple[float, float]:
    """Returns what later tokens change in the hidden states before them.

    That is the largest difference when the last token changes, and, when all tokens but the first quarter do, the root mean
    square of the differences over that of the states. The second shows an encoder in half precision, whose states have
    a few large values, to which the rounding of the first is allowed.
    """
    length = tokens_BL.shape[1]
    index_L = torch.arange(length, device=tokens_BL.device)
    other_BL = (tokens_BL + 1 + index_L) % parts.vocab_size
    leaks = []
    for kept in (length - 1, max(1, length // 4)):
        changed_BL = torch.where(index_L < kept, tokens_BL, other_BL)
        before, after = (x[:, :kept].float() for x in (hidden_BLD, parts.hidden(changed_BL, None)))
        share = (after - before).square().mean() / before.square().mean().clamp(min=1e-30)
        leaks.append(((after - before).abs().max().item(), share.sqrt().item()))
    return leaks[0][0], leaks[1][1]


def _check_logits(
    model: nn.Module, parts: Any, hidden: Callable[[], torch.Tensor], logits: Callable[[], torch.Tensor]
) -> None:
    """Compares the model's logits with those of its parts, as they are and with the head's output made large.

    Fresh weights give logits near zero, where a soft cap shows in no digit.

    Args:
        hidden: gives the hidden states [P, D] of the parts on a few tokens.
        logits: gives the model's own logits [P, V] on the same ones.
    """
    name = type(model).__name__
    try:
        hidden_PD, expected = hidden(), logits()
    except (SpecError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # A model's own code may raise anything; what the user needs is which model, and that it is not the data.
        raise SpecError(
            f"model {name}: its forward fails on a few tokens: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}; expected a language model that runs on token ids alone; "
            "check its configuration"
        ) from error
    raw = replace(parts, logit_scale=1.0, softcap=None).logits(hidden_PD)
    if expected.shape != raw.shape:
        raise SpecError(
            f"model {name}: its logits have shape {tuple(expected.shape)}, those of its head "
            f"{tuple(raw.shape)}; the model does more than its head"
        )
    more = _layers_around_head(model, parts)
    _check_equal_logits(expected, parts.finish(raw), hidden_PD, name, more)
    largest = raw.masked_fill(raw.isinf(), 0.0).abs().max().item()
    adds_bias = getattr(model, "final_logits_bias", None) is not None  # after the head
    if not isinstance(parts.head, nn.Module) or adds_bias or not 0 < largest < LARGE_LOGIT:
        return
    factor, outputs = LARGE_LOGIT / largest, []

    def enlarge(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        outputs.append(output * factor)
        return outputs[-1]

    hook = parts.head.register_forward_hook(enlarge)
    try:
        expected = logits()
    finally:
        hook.remove()
    if outputs:  # else the model multiplies by the head's weight itself
        _check_equal_logits(expected, parts.finish(raw * factor), hidden_PD, name, more)


def _check_equal_logits(
    expected: torch.Tensor, found: torch.Tensor, hidden_PD: torch.Tensor, name: str, more: str
) -> None:
    if torch.equal(expected == -torch.inf, found == -torch.inf):  # masked classes are legal
        expected, found = (x.masked_fill(found == -torch.inf, 0.0) for x in (expected, found))
    # The model's own logits carry the rounding of its dtype; ours are float32 after the product.
    allowed = max(_rounding(expected), _rounding(hidden_PD) if hidden_PD.dtype != torch.float32 else 0)
    # Mamba casts the rounded product to float32.
    allowed = max(allowed, _eps(hidden_PD) * expected.abs().max().item())
    difference = (expected.float() - found).abs().max().item()
    if not difference <= allowed:
        raise SpecError(
            f"model {name}: something happens between hidden state and logits that softcache does not "
            f"know: its logits and those of its parts differ by {difference:.3g} (rounding allows "
            f"{allowed:.1g}){more}; labels would be wrong; expected a linear head, a scale and a soft cap; use another "
            "architecture, or wrap this one in a module whose head is linear"
        )


def _layers_around_head(model: nn.Module, parts: Any) -> str:
    """Returns the end of a message that names the module that the head is the last layer of; empty where it has none."""
    paths = [path for path, module in model.named_modules() if module is parts.head and "." in path]
    if not paths:
        return ""
    path = paths[0].rpartition(".")[0]
    return f": its head, {path} ({type(model.get_submodule(path)).__name__}), is more than one linear layer"


def _why_not_causal(model: Any) -> str:
    """Returns the likely reason, as the end of a message; empty where none is known."""
    if getattr(model, "is_loaded_in_8bit", False):
        return (
            "; LLM.int8 looks for outliers in a whole batch, so that a row depends on the others: add "
            "llm_int8_threshold=0.0, or load the model in 4 bits (load_in_4bit=true)"
        )
    if getattr(getattr(model, "config", None), "is_decoder", None) is False:
        return "; its configuration has is_decoder = false, as of an encoder, which sees the whole text"
    return ""


ADDED_LOSSES = {
    "output_router_logits": "the balance of its experts' load",
    "z_loss_coefficient": "a penalty on large logits",
}
"""Settings of transformers' configurations that add to a model's loss, and what they add."""

LOSS_ROUNDING = 2e-5


def check_loss(model: nn.Module) -> None:
    """Compares the loss of a transformers model with the cross-entropy of its logits, on a few tokens.

    Raises:
        SpecError: its forward adds a loss of its own, which training through hidden states would leave out.
    """
    model = without_wrapper(model)
    if not any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__):
        return
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    known = [key for key in ADDED_LOSSES if getattr(config, key, None)]
    try:
        added = _added_loss(model)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a model that has no loss adds none, but for what its settings ask
        added = float("nan") if known else 0.0
    if abs(added) <= LOSS_ROUNDING:
        return
    what = "; ".join(f"{key} = {getattr(config, key)}: {ADDED_LOSSES[key]}" for key in known)
    remedy = " and ".join(f"{key}={'false' if key.startswith('output') else 0.0}" for key in known)
    raise SpecError(
        f"student {type(model).__name__}: its forward adds {added:.3g} to the cross-entropy of its logits "
        f"({what or 'no setting that softcache knows'}); its loss here is that of [loss] alone, which would leave that out; "
        f"set {remedy or 'what adds it to zero'} in its configuration, or in the spec after '?'"
    )


def _added_loss(model: Any) -> float:
    """Returns the model's loss minus the cross-entropy of its logits.

    Labels are the next tokens; encoder-decoders, and transformers' decoders of some of them, do not shift them.
    """
    device = model.get_output_embeddings().weight.device
    tokens_BL = (5 * torch.arange(2 * NUM_PROBE_TOKENS, device=device).view(2, -1) + 3) % 97
    tokens_BL = tokens_BL % len(model.get_output_embeddings().weight)
    with _evaluating(model):
        output = model(input_ids=tokens_BL, labels=tokens_BL, use_cache=False)
    if getattr(output, "loss", None) is None:
        return 0.0
    logits_BVL = output.logits.float().transpose(1, 2)
    same = nn.functional.cross_entropy(logits_BVL, tokens_BL)
    shifted = nn.functional.cross_entropy(logits_BVL[..., :-1], tokens_BL[:, 1:])
    after_shift, unshifted = ((output.loss.float() - each).item() for each in (shifted, same))
    is_unshifted = is_encoder_decoder(model) or abs(unshifted) <= LOSS_ROUNDING
    return unshifted if is_unshifted else after_shift


def isolates_documents(parts: CausalParts) -> bool:
    """Whether the second document is blind to the first, to the last bit, and runs as it does alone."""
    if not accepts_argument(parts.backbone, "position_ids"):
        return False
    with _evaluating(parts.backbone):
        try:
            tokens_BL, segments_BL = _probe(parts)
            other_BL = torch.where(segments_BL == 0, (tokens_BL + 1) % parts.vocab_size, tokens_BL)
            second_BL = segments_BL == 1
            before = parts.hidden(tokens_BL, segments_BL)[second_BL]
            difference, allowed = _difference_alone(parts)
            after = parts.hidden(other_BL, segments_BL)[second_BL]
            return torch.equal(before, after) and difference <= allowed
        except Exception:  # whatever refuses restarted positions gets one row per document
            return False


def _difference_alone(parts: CausalParts) -> tuple[float, float]:
    """Returns (largest difference between packed documents and each one alone, the rounding to allow)."""
    tokens_BL, segments_BL = _probe(parts)
    packed_BLD = parts.hidden(tokens_BL, segments_BL)
    worst = 0.0
    for tokens_L, segments_L, hidden_LD in zip(tokens_BL, segments_BL, packed_BLD, strict=True):
        for segment in segments_L.unique():
            alone_LD = parts.hidden(tokens_L[None, segments_L == segment], None)[0]
            worst = max(worst, (hidden_LD[segments_L == segment] - alone_LD).abs().max().item())
    return worst, _rounding(packed_BLD)


def _rounding(values: torch.Tensor) -> float:
    return _eps(values) * max(values.abs().max().item(), 1e-3)


def _eps(values: torch.Tensor) -> float:
    """Returns the relative rounding to allow: of the dtype of the values, or that which autocast computed them in."""
    device = values.device.type
    dtypes = [
        values.dtype,
        *([torch.get_autocast_dtype(device)] if torch.is_autocast_enabled(device) else []),
    ]
    return max(1e-5, *(8 * torch.finfo(dtype).eps for dtype in dtypes))


def _probe(parts: CausalParts) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of two documents each: 2 + 6 and 6 + 2 tokens, fewer where the context is shorter."""
    length = min(NUM_PROBE_TOKENS, parts.context or NUM_PROBE_TOKENS)
    index = torch.arange(2 * length, device=parts.weight.device).view(2, length)
    cuts = torch.tensor([[max(1, length // 4)], [length - length // 4]], device=index.device)
    return (5 * index + 3) % parts.vocab_size, (index % length >= cuts).long()


@contextmanager
def _evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every submodule gets its own mode back.

    Weights that an outer autocast made here have no gradients, and torch 2.10 would go on using them.
    """
    modes = [(module, module.training) for root in modules for module in root.modules()]
    try:
        for root in modules:
            root.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        torch.clear_autocast_cache()


def check_context(parts: BackboneHead, length: int, what: str) -> None:
    """Raises SpecError where rows of `length` tokens exceed the model's positions.

    Args:
        parts: the model.
        length: L, tokens in the longest row.
        what: whose model it is, e.g. "student gpt2?depth=2".
    """
    check_max_length(what, parts.context, length)


def check_max_length(what: str, longest: int | None, length: int) -> None:
    """Raises SpecError where rows of `length` tokens are longer than `longest`; None is no limit."""
    if longest is not None and length > longest:
        raise SpecError(
            f"{what}: takes rows of at most {longest} tokens; found rows of {length}; "
            "shorten the samples (source.seq_len, of pairs source.max_tokens), or take a model with more positions"
        )


PAIR_LENGTHS = ((5, 2), (1, 6), (3, 3), (2, 4))
"""(source, target) tokens of the probe pairs."""


def check_pairs(model: Any, parts: PairParts) -> None:
    """Raises SpecError where the parts are not the model; the model must be in evaluation mode, without gradients."""
    name = type(model).__name__
    tokens_BL, segments_BL = _probe_pairs(parts, getattr(model.config, "decoder_start_token_id", None))
    target = segments_BL == 1
    lengths_B = target.sum(1)
    source_BS, mask_BS, given_BT, starts_B = split_source_target(tokens_BL, segments_BL)
    steps_T = torch.arange(given_BT.shape[1], device=given_BT.device)
    given = {"input_ids": source_BS, "attention_mask": mask_BS, "decoder_input_ids": given_BT}
    _check_logits(
        model,
        parts,
        lambda: parts.hidden(tokens_BL, segments_BL)[target],
        lambda: tensor_in(model(**given, use_cache=False), "logits")[steps_T < lengths_B[:, None]],
    )
    hidden_BLD = parts.hidden(tokens_BL, segments_BL)
    alone = 0.0
    for row, length in enumerate((starts_B + lengths_B).tolist()):
        one = parts.hidden(tokens_BL[row : row + 1, :length], segments_BL[row : row + 1, :length])[0]
        alone = max(alone, (one - hidden_BLD[row, :length])[target[row, :length]].abs().max().item())
    last = torch.arange(tokens_BL.shape[1], device=tokens_BL.device) == (starts_B + lengths_B - 1)[:, None]
    other_BL = torch.where(last, (tokens_BL + 1) % parts.vocab_size, tokens_BL)
    leak = (parts.hidden(other_BL, segments_BL) - hidden_BLD)[target & ~last].abs().max().item()
    if not max(alone, leak) <= _rounding(hidden_BLD):
        raise SpecError(
            f"model {name}: a later token changes the hidden states before it by {leak:.3g}, and a batch those of a pair "
            f"by {alone:.3g}; expected a causal decoder behind padding masks, deterministic in evaluation mode"
        )
    moved_BL = torch.where(segments_BL == 0, (tokens_BL + 1) % parts.vocab_size, tokens_BL)
    if torch.equal(parts.hidden(moved_BL, segments_BL)[target], hidden_BLD[target]):
        raise SpecError(
            f"model {name}: the source changes nothing; expected a decoder that attends to the encoder"
        )


def _probe_pairs(parts: PairParts, start: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns pairs whose targets begin with the token `start`, which some decoders mask where it is the padding."""
    longest = max(source + target for source, target in PAIR_LENGTHS)
    index = torch.arange(len(PAIR_LENGTHS) * longest, device=parts.weight.device).view(
        len(PAIR_LENGTHS), longest
    )
    segments = torch.full_like(index, 2)
    for row, (source, target) in enumerate(PAIR_LENGTHS):
        segments[row, :source] = 0
        segments[row, source : source + target] = 1
    tokens = (5 * index + 3) % parts.vocab_size
    if start is not None:
        for row, (source, _) in enumerate(PAIR_LENGTHS):
            tokens[row, source] = start
    return tokens, segments
