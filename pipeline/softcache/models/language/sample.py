"""Responses that a causal language model samples, with its log-probability of each token of them.

Tokens are drawn by transformers' `generate` from the whole distribution at a temperature, with nothing of the checkpoint's
own generation_config.json; a model without `generate` runs its whole prefix for every token. What was drawn is scored once
more, teacher-forced, by the pass that trains students: `log_probs` are those of the distribution that was drawn from.

Some architectures see the padding before a shorter prompt (RWKV, RecurrentGemma, the decoders of BART, Marian and Whisper),
some go wrong on a cache of keys. Two short prompts show it, and prompts then run by length, or without `generate`.

Shape suffixes: B prompts, L positions, T tokens of one response, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from pydantic import Field

from softcache.models.language.backbone_head import BackboneHead
from softcache.models.language.generate import plain_generate
from softcache.settings import Settings

__all__ = ["RolloutSettings", "SampledResponse", "sample_responses"]


LEAST_DIFFERENCE = 5e-3
"""Of logits, as a share of their spread, that is rounding; a model that sees its padding differs by a tenth and more."""


class RolloutSettings(Settings):
    """[rollouts]: how `softcache teacher-generate` samples responses to the prompts of a text.

    `policy` is who samples: the folder of a finished student's run, or a model's spec, with `policy_weights` where it has
    none of its own; left out, the teacher itself, whose responses are what a student is fine-tuned on first. `sft_teacher`
    is the teacher that a policy given by its spec was fine-tuned on, by spec or weights digest, or "none".

    A prompt is what precedes the first learned token; of a text without prompts, its first `prompt_tokens`. A response ends
    with the token that ends a text (end-of-text, or [SEP] of BERT's) or one of `stop_tokens`, or after `max_tokens`. At
    temperature 1, log-probabilities are those of the policy itself. `part_prompts` is what a killed run does again at most.

    Attributes:
        num_samples: responses to each prompt.
        temperature: of the softmax that tokens are drawn from.
        seed: of the draws.
        batch_size: responses that are sampled at once.
    """

    policy: str | None = Field(None, min_length=1)
    policy_weights: str | None = Field(None, min_length=1)
    sft_teacher: str | None = Field(None, min_length=1)
    max_tokens: int = Field(128, ge=1)
    prompt_tokens: int = Field(16, ge=1)
    num_samples: int = Field(1, ge=1)
    temperature: float = Field(1.0, gt=0)
    stop_tokens: tuple[str, ...] = Field((), strict=False)
    seed: int = Field(0, ge=0)
    batch_size: int = Field(64, ge=1)
    part_prompts: int = Field(512, ge=1)


class SampledResponse(NamedTuple):
    """What a model sampled after one prompt.

    Attributes:
        tokens: [T] int64, the end token included where one was drawn.
        log_probs: [T] float64, of the distribution that was drawn from, in nats.
        is_finished: whether it ended by itself.
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    is_finished: bool


@torch.inference_mode()
def sample_responses(
    model: Any,
    parts: BackboneHead,
    prompts: Sequence[np.ndarray],
    *,
    max_tokens: Sequence[int],
    end_tokens: Collection[int],
    vocab_size: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[SampledResponse]:
    """Returns a response to each prompt, drawn by `seed`.

    Args:
        model: in evaluation mode; `parts` are its own.
        prompts: of at least one token each.
        max_tokens: of each response, at least one.
        end_tokens: ids that end a response.
        vocab_size: ids from there on, of a padded head, are never drawn.
    """
    device = parts.weight.device
    longest = max(map(len, prompts))
    padding = min(end_tokens, default=0)
    ids_BL = torch.full((len(prompts), longest), padding, dtype=torch.int64)
    mask_BL = torch.zeros_like(ids_BL)
    for row, prompt in enumerate(prompts):
        ids_BL[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask_BL[row, longest - len(prompt) :] = 1
    how = _Drawing(max(max_tokens), padding, temperature, sorted(end_tokens), vocab_size)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        draw = _choose_draw(model, parts, is_padded=not bool(mask_BL.all()))
        torch.manual_seed(seed)  # after a trial of the model, which may draw
        drawn_BT = draw(model, parts, ids_BL.to(device), mask_BL.to(device), how)
    responses, finished = [], []
    for row, drawn in enumerate(drawn_BT.cpu().numpy()):
        ends = np.flatnonzero(np.isin(drawn, list(end_tokens)))
        length = min(int(ends[0]) + 1 if len(ends) else len(drawn), max_tokens[row])
        responses.append(drawn[:length])
        finished.append(bool(len(ends)) and int(ends[0]) < length)
    log_probs = _log_probs(parts, prompts, responses, temperature=temperature, vocab_size=vocab_size)
    return [
        SampledResponse(tokens, scores, is_finished)
        for tokens, scores, is_finished in zip(responses, log_probs, finished, strict=True)
    ]


class _Drawing(NamedTuple):
    """How tokens are drawn: until an end token, or `max_tokens`; a row that ended is padded."""

    max_tokens: int
    padding: int
    temperature: float
    end_tokens: list[int]
    vocab_size: int


_Draw = Callable[[Any, BackboneHead, torch.Tensor, torch.Tensor, _Drawing], torch.Tensor]


def _choose_draw(model: Any, parts: BackboneHead, *, is_padded: bool) -> _Draw:
    """Returns the fastest way to draw from the model's own distribution."""
    if hasattr(model, "generate"):
        if is_padded and _generates_from(model, parts, (4, 2)):
            return _draw
        if _generates_from(model, parts, (4, 4)):
            return _draw_by_length if is_padded else _draw
    return _draw_plainly


_found: WeakKeyDictionary[Any, dict[tuple[int, int], bool]] = WeakKeyDictionary()


def _generates_from(model: Any, parts: BackboneHead, lengths: tuple[int, int]) -> bool:
    """Whether `generate` gives the logits of the parts, for prompts of these lengths in one batch; tried once a model."""
    found = _found.setdefault(model, {})
    if lengths not in found:
        found[lengths] = _try_generate(model, parts, lengths)
    return found[lengths]


def _try_generate(model: Any, parts: BackboneHead, lengths: tuple[int, int]) -> bool:
    from transformers import GenerationConfig

    device, longest = parts.weight.device, max(lengths)
    ids_BL = (
        5 * torch.arange(len(lengths) * longest, device=device).view(-1, longest) + 3
    ) % parts.vocab_size
    mask_BL = torch.arange(longest, device=device) >= longest - torch.tensor(lengths, device=device)[:, None]
    config = GenerationConfig(
        max_new_tokens=2,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    try:
        given = {"input_ids": ids_BL, "attention_mask": mask_BL.long()}
        output: Any = plain_generate(model, **given, generation_config=config)
        found = torch.stack(output.logits, 1).float()
        rows = [ids_L[longest - n :] for ids_L, n in zip(output.sequences, lengths, strict=True)]
        expected = torch.stack([parts.logits(parts.hidden(row[None], None)[0, -3:-1]) for row in rows])
    except torch.OutOfMemoryError:
        raise
    except Exception:  # what a model's own code raises here it would raise of the prompts
        return False
    share = (found - expected).square().mean() / expected.var(-1).mean().clamp(min=1e-30)
    return share.sqrt().item() <= max(16 * torch.finfo(parts.weight.dtype).eps, LEAST_DIFFERENCE)


def _draw_by_length(
    model: Any, parts: BackboneHead, ids_BL: torch.Tensor, mask_BL: torch.Tensor, how: _Drawing
) -> torch.Tensor:
    """Tokens [B, T] by `generate`, prompts of one length at a time."""
    lengths_B = mask_BL.sum(1)
    drawn_BT = ids_BL.new_full((len(ids_BL), how.max_tokens), how.padding)
    for length in lengths_B.unique().tolist():
        rows = lengths_B == length
        found = _draw(model, parts, ids_BL[rows, -length:], mask_BL[rows, -length:], how)
        drawn_BT[rows, : found.shape[1]] = found
    return drawn_BT


def _draw(
    model: Any, parts: BackboneHead, ids_BL: torch.Tensor, mask_BL: torch.Tensor, how: _Drawing
) -> torch.Tensor:
    """Tokens [B, T] by transformers' `generate`, padded behind an end."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=True,
        temperature=how.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=how.max_tokens,
        pad_token_id=how.padding,
        eos_token_id=how.end_tokens or None,
        suppress_tokens=list(range(how.vocab_size, parts.vocab_size)) or None,
    )
    return plain_generate(model, input_ids=ids_BL, attention_mask=mask_BL, generation_config=config)[
        :, ids_BL.shape[1] :
    ]


def _draw_plainly(
    model: Any, parts: BackboneHead, ids_BL: torch.Tensor, mask_BL: torch.Tensor, how: _Drawing
) -> torch.Tensor:
    """Tokens [B, T] of a model without `generate`; the prefix runs anew for each of them."""
    drawn: list[list[int]] = []
    for ids_L, mask_L in zip(ids_BL, mask_BL, strict=True):
        prefix = ids_L[mask_L == 1]
        start = len(prefix)
        while len(prefix) - start < how.max_tokens:
            logits_V = parts.logits(parts.hidden(prefix[None], None)[0, -1:])[0, : how.vocab_size]
            token = torch.multinomial((logits_V / how.temperature).softmax(0), 1)
            prefix = torch.cat([prefix, token])
            if int(token) in how.end_tokens:
                break
        drawn.append(prefix[start:].tolist())
    longest = max(map(len, drawn))
    return torch.tensor([row + [how.padding] * (longest - len(row)) for row in drawn])


def _log_probs(
    parts: BackboneHead,
    prompts: Sequence[np.ndarray],
    responses: Sequence[np.ndarray],
    *,
    temperature: float,
    vocab_size: int,
) -> list[np.ndarray]:
    """The log-probability of each token of each response."""
    device = parts.weight.device
    rows = [np.concatenate(pair) for pair in zip(prompts, responses, strict=True)]
    tokens_BL = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for number, row in enumerate(rows):
        tokens_BL[number, : len(row)] = row
    hidden_BLD = parts.hidden(torch.from_numpy(tokens_BL).to(device), None)
    found = []
    for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        hidden_TD = hidden_BLD[number, len(prompt) - 1 : len(rows[number]) - 1]
        logits_TV = parts.logits(hidden_TD)[:, :vocab_size].double()
        log_probs_TV = (logits_TV / temperature).log_softmax(-1)
        targets_T1 = torch.from_numpy(response.astype(np.int64)).to(device)[:, None]
        found.append(log_probs_TV.gather(1, targets_T1)[:, 0].cpu().numpy())
    return found
