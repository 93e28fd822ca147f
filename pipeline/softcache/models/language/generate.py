"""Batched greedy and beam search by transformers' `generate`, deterministic, longest sources first.

A batch holds sources of about one length, so that little is padding; the results come back in the order asked for. The
search samples nothing. A target has one token before its end at least, and no more than the source's own targets may have;
what did not end by then is cut there, and ends.

What was found is scored once more, teacher-forced: `log_prob` is the sum over the target's tokens and its end (nats) at
T = 1, the same for greedy and beam search, whatever length penalty the search itself had.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field

from softcache.data.tokens import TokenBatch, TokenData
from softcache.models.language import BackboneHead, PairTokens, split_source_target
from softcache.settings import Settings

__all__ = ["GenerateSettings", "GeneratedSequence", "plain_generate", "translate"]


class GenerateSettings(Settings):
    """[generate]: how `softcache teacher-generate` searches, and how students are scored.

    `score_beams` is the width of the search at the end of a student's training, 1 for greedy, 0 for no scores. `part_pairs`
    is how many pairs a part of the written source has: what a killed run does again at most.

    Attributes:
        beams: width of the search; 1: greedy.
        length_penalty: exponent of the length by which the score of a sequence is divided.
        batch_size: sequences that are searched at once.
    """

    beams: int = Field(4, ge=1)
    length_penalty: float = Field(1.0, ge=0)
    batch_size: int = Field(64, ge=1)
    part_pairs: int = Field(512, ge=1)
    score_beams: int = Field(1, ge=0)


class GeneratedSequence(NamedTuple):
    """What a model wrote for one pair.

    Attributes:
        tokens: [T] int64, without start, end and padding.
        log_prob: of the tokens and the end, the sum in nats.
        length: how many tokens that is of.
    """

    tokens: np.ndarray
    log_prob: float
    length: int


@torch.inference_mode()
def translate(
    model: Any,
    parts: BackboneHead,
    data: TokenData,
    samples: np.ndarray,
    *,
    tokens: PairTokens,
    max_tokens: int,
    beams: int = 1,
    length_penalty: float = 1.0,
    batch_size: int = 64,
) -> list[GeneratedSequence]:
    """Returns what the model writes for each of the samples, in their order.

    Args:
        model: in evaluation mode; `parts` are its own.
        samples: [N] int64, of `data`.
        max_tokens: the longest target, its end included.
    """
    found: list[GeneratedSequence | None] = [None] * len(samples)
    for chosen, batch in _by_length(data, samples, batch_size):
        batch = batch.to(parts.weight.device)
        source_BS, mask_BS, _, _ = split_source_target(batch.tokens, batch.segments)
        ids_BT = plain_generate(
            model,
            input_ids=source_BS,
            attention_mask=mask_BS,
            generation_config=_config(tokens, max_tokens, beams, length_penalty, parts.vocab_size, data),
        )[:, 1:]
        targets = [_until(ids, tokens)[: max_tokens - 1] for ids in ids_BT.cpu().numpy()]
        for number, target, log_prob in zip(
            chosen, targets, _log_probs(parts, batch, targets, tokens), strict=True
        ):
            found[number] = GeneratedSequence(target, log_prob, len(target) + 1)
    return [one for one in found if one is not None]


def plain_generate(model: Any, **how: Any) -> torch.Tensor:
    """What `generate` finds by our settings alone.

    transformers fills what they leave open from the checkpoint's own generation_config.json (a repetition penalty, banned
    words), which no digest of ours covers.
    """
    from transformers import GenerationConfig

    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        return model.generate(**how)
    finally:
        model.generation_config = own


def _by_length(
    data: TokenData, samples: np.ndarray, batch_size: int
) -> Iterator[tuple[list[int], TokenBatch]]:
    """Yields (places in `samples`, batch), longest sources first."""
    lengths = [int((data.source.sample(number).segments == 0).sum()) for number in samples.tolist()]
    order = np.argsort(-np.array(lengths), kind="stable")
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        yield chosen.tolist(), data.load(samples[chosen], 0, fingerprints=False)


def _config(
    tokens: PairTokens, max_tokens: int, beams: int, length_penalty: float, num_classes: int, data: TokenData
) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        num_beams=beams,
        do_sample=False,
        length_penalty=length_penalty if beams > 1 else None,
        max_new_tokens=max_tokens,
        min_new_tokens=2,  # a token and the end
        pad_token_id=tokens.pad,
        eos_token_id=tokens.end,
        decoder_start_token_id=tokens.start,
        # Padding is no word; nor are the rows of a padded head, which no tokenizer can read.
        suppress_tokens=[tokens.pad, *range(data.source.vocab_size, num_classes)],
    )


def _until(ids: np.ndarray, tokens: PairTokens) -> np.ndarray:
    """The tokens before the end, of a row that may have been cut off, and is padded behind."""
    ends = np.flatnonzero(ids == tokens.end)
    kept = ids[: ends[0]] if len(ends) else ids
    return kept[kept != tokens.pad]


def _log_probs(
    parts: BackboneHead, batch: TokenBatch, targets: list[np.ndarray], tokens: PairTokens
) -> list[float]:
    """The log-probability of each target and its end."""
    source_BS, mask_BS, _, _ = split_source_target(batch.tokens, batch.segments)
    rows, segments = [], []
    for source, mask, target in zip(source_BS.cpu().numpy(), mask_BS.cpu().numpy(), targets, strict=True):
        before = source[mask == 1]
        rows.append(np.concatenate([before, [tokens.start], target, [tokens.end]]))
        segments.append(np.repeat([0, 1], [len(before), len(target) + 2]))
    longest = max(map(len, rows))
    tokens_BL = np.stack([np.pad(row, (0, longest - len(row))) for row in rows])
    segments_BL = np.stack([np.pad(row, (0, longest - len(row)), constant_values=2) for row in segments])
    given, parted = (torch.from_numpy(x).to(parts.weight.device) for x in (tokens_BL, segments_BL))
    hidden_BLD = parts.hidden(given, parted)
    results = []
    for row in range(len(rows)):
        there = (parted[row, :-1] == 1) & (parted[row, 1:] == 1)
        log_probs_TV = parts.logits(hidden_BLD[row, :-1][there]).double().log_softmax(-1)
        said_T = given[row, 1:][there]
        results.append(float(log_probs_TV.gather(1, said_T[:, None]).sum()))
    return results
