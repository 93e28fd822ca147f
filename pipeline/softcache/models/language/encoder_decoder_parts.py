"""An encoder-decoder model as a backbone (encoder and decoder) and a head.

A pair is one row of two segments: segment 0 is what the encoder reads, segment 1 what the decoder is given, its start
token first; what follows is padding. So a batch of pairs is a batch of tokens like any other, and cache, reader and the
losses through the head need not know of it. The encoder sees its own side only, behind a padding mask, which cross-attention
gets too; padding of the decoder lies behind all that it predicts, which a causal model cannot see.

What lies between the decoder's state and the logits is looked for in the model: T5 with tied embeddings scales by
d_model ** -0.5, Marian and BART add `final_logits_bias`. `check_pairs` compares with the model's own logits.

Shape legend: B pairs, L tokens of both sides, S of the encoder, T of the decoder, P flat positions, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from softcache.errors import SpecError
from softcache.models.language.backbone_head import LMHeadMixin, tensor_in

__all__ = ["PairParts", "is_encoder_decoder", "split_pairs", "split_source_target"]

SCALED_IF_TIED = ("switch_transformers", "umt5")
"""Model types of T5's family whose configuration does not name its scale of tied embeddings."""


@dataclass(frozen=True, eq=False)
class PairParts(LMHeadMixin):
    """An encoder-decoder model seen as a backbone and a head. It owns nothing, as `CausalParts`.

    Attributes:
        model: the whole model; its encoder and decoder are the backbone.
        head: the plain linear layer to the vocabulary.
        context: always None; the sides are checked when a model is built.
        logit_scale: what the head's output is multiplied by.
        softcap: c in `c tanh(logits / c)` (T5Gemma), or None.
    """

    model: Any
    head: nn.Linear
    context: int | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def bias(self) -> torch.Tensor | None:
        """The head's bias and the model's `final_logits_bias` [V] together, or None where there is neither."""
        added = getattr(self.model, "final_logits_bias", None)
        if added is None:
            return self.head.bias
        return added.view(-1) if self.head.bias is None else self.head.bias + added.view(-1)

    @property
    def bodies(self) -> tuple[nn.Module, ...]:
        """The modules that `hidden` runs."""
        return self.model.get_encoder(), self.model.get_decoder()

    def hidden(
        self, tokens_BL: torch.Tensor, segments_BL: torch.Tensor | None, *, cross_documents: bool = False
    ) -> torch.Tensor:
        """Returns the decoder's hidden states [B, L, D], each where its token lies; those of the source mean nothing.

        Raises:
            SpecError: the rows are no pairs: a side is empty.
        """
        if segments_BL is None or cross_documents:
            raise SpecError(
                f"model {type(self.model).__name__}: rows without two sides; expected pairs (source.modality = "
                '"translation"); found one text per row'
            )
        source_BS, mask_BS, target_BT, starts_B = split_source_target(tokens_BL, segments_BL)
        memory = self.model.get_encoder()(input_ids=source_BS, attention_mask=mask_BS)
        output = self.model.get_decoder()(
            input_ids=target_BT,
            encoder_hidden_states=tensor_in(memory, "last_hidden_state"),
            encoder_attention_mask=mask_BS,
            use_cache=False,
        )
        hidden_BTD = tensor_in(output, "last_hidden_state")
        step_BL = torch.arange(tokens_BL.shape[1], device=tokens_BL.device) - starts_B[:, None]
        index_BL = step_BL.clamp(0, target_BT.shape[1] - 1)
        return hidden_BTD.gather(1, index_BL[..., None].expand(-1, -1, hidden_BTD.shape[2]))


def split_source_target(
    tokens_BL: torch.Tensor, segments_BL: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns what the encoder reads [B, S] and its mask, what the decoder is given [B, T], and where that starts [B].

    Both are padded on the right with token 0.

    Raises:
        SpecError: a side of a pair is empty.
    """
    starts_B, lengths_B = (segments_BL == 0).sum(1), (segments_BL == 1).sum(1)
    if not len(tokens_BL) or not bool((starts_B > 0).all() & (lengths_B > 0).all()):
        raise SpecError(
            "encoder-decoder model: a row with one side only; expected pairs of two segments each "
            '(source.modality = "translation"); a text is for a causal language model'
        )
    index_S = torch.arange(int(starts_B.max()), device=tokens_BL.device)
    mask_BS = index_S < starts_B[:, None]
    index_T = torch.arange(int(lengths_B.max()), device=tokens_BL.device)
    given_BT = index_T < lengths_B[:, None]
    where_BT = (starts_B[:, None] + index_T).clamp(max=tokens_BL.shape[1] - 1)
    source_BS = tokens_BL[:, : len(index_S)].masked_fill(~mask_BS, 0)
    return source_BS, mask_BS.long(), tokens_BL.gather(1, where_BT).masked_fill(~given_BT, 0), starts_B


def is_encoder_decoder(model: Any) -> bool:
    """Whether a model's configuration is of an encoder-decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def split_pairs(model: Any, head: nn.Linear, softcap: float | None = None) -> PairParts:
    """Returns the parts of an encoder-decoder model whose head is known.

    Raises:
        SpecError: it has no encoder or no decoder of its own.
    """
    for name in ("get_encoder", "get_decoder"):
        if not isinstance(getattr(model, name, lambda: None)(), nn.Module):
            raise SpecError(
                f"model {type(model).__name__}: {name}() gives no module; expected an encoder-decoder model "
                "(AutoModelForSeq2SeqLM)"
            )
    scaled = getattr(model.config, "scale_decoder_outputs", False)
    if model.config.model_type in SCALED_IF_TIED:
        scaled = model.config.tie_word_embeddings
    return PairParts(model, head, logit_scale=model.config.d_model**-0.5 if scaled else 1.0, softcap=softcap)
