"""What is tried on four pairs of different lengths before labels are made with an encoder-decoder model.

Its parts must give the model's own logits, a pair the same alone as in a batch, no token may see a later one, and the
source must matter.
"""

from __future__ import annotations

from typing import Any

import torch

from softcache.errors import SpecError
from softcache.models.language.backbone_head import tensor_in
from softcache.models.language.encoder_decoder_parts import PairParts, split_source_target

__all__ = ["check_pairs"]

LENGTHS = ((5, 2), (1, 6), (3, 3), (2, 4))
"""Tokens of both sides of the pairs that are tried."""


def check_pairs(model: Any, parts: PairParts, rounding: Any) -> None:
    """Raises SpecError where the parts are not the model; the model must be in evaluation mode, without gradients.

    Args:
        rounding: gives the difference to allow between two ways to the same values.
    """
    name = type(model).__name__
    tokens_BL, segments_BL = _probe(parts)
    target = segments_BL == 1
    hidden_BLD = parts.hidden(tokens_BL, segments_BL)
    found = parts.logits(hidden_BLD[target])
    source_BS, mask_BS, given_BT, starts_B = split_source_target(tokens_BL, segments_BL)
    output = model(input_ids=source_BS, attention_mask=mask_BS, decoder_input_ids=given_BT, use_cache=False)
    lengths_B = target.sum(1)
    steps_T = torch.arange(given_BT.shape[1], device=given_BT.device)
    expected = tensor_in(output, "logits")[steps_T < lengths_B[:, None]]
    if expected.shape != found.shape:
        raise SpecError(
            f"model {name}: its logits have shape {tuple(expected.shape)}, those of its head {tuple(found.shape)}"
        )
    allowed = max(rounding(expected), rounding(hidden_BLD) if hidden_BLD.dtype != torch.float32 else 0)
    difference = (expected.float() - found).abs().max().item()
    if not difference <= allowed:
        raise SpecError(
            f"model {name}: something happens between hidden state and logits that softcache does not know: its logits "
            f"and those of its parts differ by {difference:.3g} (rounding allows {allowed:.1g}); labels would be wrong; "
            "use another architecture"
        )
    alone = 0.0
    for row, length in enumerate((starts_B + lengths_B).tolist()):
        one = parts.hidden(tokens_BL[row : row + 1, :length], segments_BL[row : row + 1, :length])[0]
        alone = max(alone, (one - hidden_BLD[row, :length])[target[row, :length]].abs().max().item())
    last = torch.arange(tokens_BL.shape[1], device=tokens_BL.device) == (starts_B + lengths_B - 1)[:, None]
    other_BL = torch.where(last, (tokens_BL + 1) % parts.vocab_size, tokens_BL)
    leak = (parts.hidden(other_BL, segments_BL) - hidden_BLD)[target & ~last].abs().max().item()
    if not max(alone, leak) <= rounding(hidden_BLD):
        raise SpecError(
            f"model {name}: a later token changes the hidden states before it by {leak:.3g}, and a batch those of a pair "
            f"by {alone:.3g}; expected a causal decoder behind padding masks, deterministic in evaluation mode"
        )
    moved_BL = torch.where(segments_BL == 0, (tokens_BL + 1) % parts.vocab_size, tokens_BL)
    if torch.equal(parts.hidden(moved_BL, segments_BL)[target], hidden_BLD[target]):
        raise SpecError(
            f"model {name}: the source changes nothing; expected a decoder that attends to the encoder"
        )


def _probe(parts: PairParts) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(source + target for source, target in LENGTHS)
    index = torch.arange(len(LENGTHS) * longest, device=parts.weight.device).view(len(LENGTHS), longest)
    segments = torch.full_like(index, 2)
    for row, (source, target) in enumerate(LENGTHS):
        segments[row, :source] = 0
        segments[row, source : source + target] = 1
    return (5 * index + 3) % parts.vocab_size, segments
