"""A language model as a backbone and a head, and how packed rows run through it.

Packed rows: a document must not see its neighbours, and its positions start at 0. In transformers 5.23
restarted `position_ids` do that for most architectures, sliding windows included (an explicit 4D mask
would overwrite those), but not for all: OPT, BioGPT, XGLM, GPT-OSS and the recurrent ones let the
documents leak into each other, without a word. So `split` tries it on 8 tokens, and where restarted
positions do not hold, each document runs as a row of its own, which is right for any causal model.

Shape legend: B rows, L tokens of a row, P flat positions, D width of the hidden state, V vocabulary,
S documents.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import nn

from softcache.errors import SpecError
from softcache.models.language.adapters import AdaptedHead
from softcache.models.language.placement import input_device
from softcache.runtime.linear import linear_float32

__all__ = [
    "BackboneHead",
    "CausalParts",
    "LMHeadMixin",
    "accepts_argument",
    "plain_logits",
    "tensor_in",
]


class BackboneHead(Protocol):
    """What a teacher or a student needs of a model in parts, whatever runs inside its backbone."""

    @property
    def weight(self) -> torch.Tensor: ...
    @property
    def bias(self) -> torch.Tensor | None: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def context(self) -> int | None: ...
    @property
    def logit_scale(self) -> float: ...
    @property
    def softcap(self) -> float | None: ...
    @property
    def bodies(self) -> tuple[nn.Module, ...]: ...

    def logits(self, hidden_PD: torch.Tensor) -> torch.Tensor: ...
    def hidden(
        self, tokens_BL: torch.Tensor, segments_BL: torch.Tensor | None, *, cross_documents: bool = False
    ) -> torch.Tensor: ...


class LMHeadMixin:
    """What all models in parts have in common: a linear head, a scale, a soft cap."""

    head: nn.Linear | AdaptedHead
    logit_scale: float
    softcap: float | None

    @property
    def weight(self) -> torch.Tensor:
        """The head's own weight [V, D]."""
        return self.head.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The head's own bias [V], or None."""
        return self.head.bias

    @property
    def vocab_size(self) -> int:
        """Rows of the head; may exceed the tokenizer's vocabulary."""
        return len(self.head.weight)

    def logits(self, hidden_PD: torch.Tensor) -> torch.Tensor:
        """Returns float32 logits [P, V] of hidden states [P, D], scaled and capped as the model does."""
        return self.finish(linear_float32(hidden_PD, self.weight, self.bias))

    def finish(self, logits: torch.Tensor) -> torch.Tensor:
        """Returns the head's float32 output scaled and capped as the model does."""
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


@dataclass(frozen=True, eq=False)
class CausalParts(LMHeadMixin):
    """A language model seen as a backbone and a head. It owns nothing: the tensors are the model's.

    Not a module, so that a wrapper may keep it next to the model without registering a parameter twice:
    `self.model, self.parts = model, split(model)`, and a `forward` that calls `self.parts.hidden` runs
    under DDP as usual. A deep copy of the model alone wants a `split` of its own.

    Attributes:
        backbone: tokens -> last hidden state, after the final norm.
        head: the plain linear layer to the vocabulary.
        packing: how documents of a packed row are kept apart: by restarted "positions", or as "rows".
        context: the longest row, or None where there is no limit.
        logit_scale: what the head's output is multiplied by (Cohere; Granite divides).
        softcap: c in `c tanh(logits / c)` (Gemma), or None.
        length_threshold: documents longer than this run apart from others, because the model embeds positions otherwise as
            soon as one row of a batch is longer (LongRoPE); or None.
        hidden_divisor: what the backbone's output is divided by, in its own dtype, before the head (Inkling, MiniCPM3).
        agree: returns the largest of a number over all processes, where those gather weights from each other and so run
            equally many passes; None: each runs its own.
    """

    backbone: nn.Module
    head: nn.Linear | AdaptedHead
    packing: Literal["positions", "rows"]
    context: int | None
    logit_scale: float = 1.0
    softcap: float | None = None
    length_threshold: int | None = None
    hidden_divisor: float = 1.0
    agree: Callable[[int], int] | None = None

    @property
    def bodies(self) -> tuple[nn.Module, ...]:
        """The modules that `hidden` runs."""
        return (self.backbone,)

    @property
    def has_varlen_attention(self) -> bool:
        """Whether attention has a kernel for documents of different lengths in one row."""
        name = getattr(getattr(self.backbone, "config", None), "_attn_implementation", None)
        return "flash" in (name or "")

    def hidden(
        self, tokens_BL: torch.Tensor, segments_BL: torch.Tensor | None, *, cross_documents: bool = False
    ) -> torch.Tensor:
        """Returns the hidden states [B, L, D] that the head takes, after the final norm.

        Args:
            tokens_BL: int64 token ids.
            segments_BL: number of the document that each token belongs to, non-decreasing along a row;
                None: one document per row. Padding at the right end is harmless in a causal model. It
                may be a segment of its own, or carry the number of the last document, and then a row of
                one document needs no mask at all.
            cross_documents: attend over the whole row, positions 0..L-1, as if it were one document.
        """
        if segments_BL is None or cross_documents:
            if cross_documents and self._is_long(tokens_BL.shape[1]):
                raise SpecError(
                    f"model {type(self.backbone).__name__}: embeds positions otherwise in rows of more than "
                    f"{self.length_threshold} tokens (LongRoPE), so that labels would depend on a batch's padding; "
                    f"found {tokens_BL.shape[1]} tokens; set source.cross_documents = false, or source.seq_len to that"
                )
            return self._run(tokens_BL, None)
        starts_BL = _starts(segments_BL)
        by_rows = self.packing == "rows" or self._has_both_lengths(segments_BL)
        documents = _Documents.of(starts_BL) if by_rows else None
        passes = [] if documents is None else self._passes(documents, tokens_BL)
        spare, count = 0, max(1, len(passes))
        if self.agree is not None and (self.packing == "rows" or self.length_threshold is not None):
            spare = self.agree(count) - count
        if documents is not None and passes:
            hidden_BLD = self._hidden_by_rows(tokens_BL, documents, passes)
        else:
            hidden_BLD = self._hidden_at_once(tokens_BL, None if by_rows else _positions(starts_BL))
        for _ in range(spare):  # for the other processes, which gather weights from this one
            hidden_BLD = hidden_BLD + 0 * self._run(tokens_BL[:1, :1], None).sum()
        return hidden_BLD

    def _hidden_at_once(self, tokens_BL: torch.Tensor, positions_BL: torch.Tensor | None) -> torch.Tensor:
        if positions_BL is None:
            return self._run(tokens_BL, None)
        if self.has_varlen_attention:
            # transformers' varlen path knows documents in a batch of one row only, else they leak.
            flat_PD = self._run(tokens_BL.reshape(1, -1), positions_BL.reshape(1, -1))
            return flat_PD.view(*tokens_BL.shape, -1)
        return self._run(tokens_BL, positions_BL)

    def _run(self, tokens_BL: torch.Tensor, positions_BL: torch.Tensor | None) -> torch.Tensor:
        kwargs: dict[str, Any] = {}
        if accepts_argument(self.backbone, "use_cache"):
            kwargs["use_cache"] = False  # with a cache, transformers ignores restarted positions
        if positions_BL is not None:
            kwargs["position_ids"] = positions_BL
        first = input_device(self.backbone)  # of a model on several devices; None on one
        if first is not None:
            kwargs = {k: v.to(first) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        hidden = tensor_in(
            self.backbone(tokens_BL if first is None else tokens_BL.to(first), **kwargs), "last_hidden_state"
        )
        if first is not None and isinstance(hidden, torch.Tensor):
            hidden = hidden.to(tokens_BL.device)
        expected = (*tokens_BL.shape, self.weight.shape[1])
        if not isinstance(hidden, torch.Tensor) or tuple(hidden.shape) != expected:
            found = tuple(hidden.shape) if isinstance(hidden, torch.Tensor) else type(hidden).__name__
            raise SpecError(
                f"model {type(self.backbone).__name__}: expected hidden states of shape {expected} (rows, "
                f"tokens, the head's input); found {found}; base_model must end where the head begins"
            )
        if self.hidden_divisor != 1.0:
            hidden = hidden / self.hidden_divisor
        # Models that end in float32 (Mamba) round the state to the dtype of their head, as its product needs.
        is_narrower = self.weight.dtype in (torch.bfloat16, torch.float16) and hidden.dtype == torch.float32
        if is_narrower and not torch.is_autocast_enabled(hidden.device.type):
            return hidden.to(self.weight.dtype)
        return hidden

    def _is_long(self, length: int) -> bool:
        return self.length_threshold is not None and length > self.length_threshold

    def _has_both_lengths(self, segments_BL: torch.Tensor) -> bool:
        """Whether some documents are longer than the threshold and others are not."""
        if not self._is_long(segments_BL.shape[1]):
            return False
        starts_S = _starts(segments_BL).flatten().nonzero().squeeze(1)
        lengths_S = torch.diff(starts_S, append=starts_S.new_tensor([segments_BL.numel()]))
        return self._num_long(lengths_S) not in (0, len(lengths_S))

    def _num_long(self, lengths_S: torch.Tensor) -> int:
        return 0 if self.length_threshold is None else int((lengths_S > self.length_threshold).sum())

    def _passes(self, documents: _Documents, tokens_BL: torch.Tensor) -> list[slice]:
        """Which documents run together, longest first, at most B x L tokens per pass; empty: the batch is one pass."""
        starts_S, lengths_S = documents
        if len(starts_S) == len(tokens_BL):  # rows of one document each, of one length
            return []
        passes, first = [], 0
        while first < len(starts_S):
            longest = int(lengths_S[first])
            rows = slice(first, min(len(starts_S), first + max(1, tokens_BL.numel() // longest)))
            if self._is_long(longest):  # the shorter ones start another pass
                rows = slice(first, min(rows.stop, self._num_long(lengths_S)))
            passes.append(rows)
            first = rows.stop
        return passes

    def _hidden_by_rows(
        self, tokens_BL: torch.Tensor, documents: _Documents, passes: list[slice]
    ) -> torch.Tensor:
        """Each document as a row of its own.

        Behind a document's end lie the tokens of the next one: later ones, which it cannot see.
        """
        (starts_S, lengths_S), hidden, where = documents, [], []
        for rows in passes:
            longest = int(lengths_S[rows.start])
            offsets_L = torch.arange(longest, device=tokens_BL.device)
            index_SL = starts_S[rows, None] + offsets_L
            kept_SL = offsets_L < lengths_S[rows, None]
            tokens_SL = tokens_BL.flatten()[index_SL.clamp(max=tokens_BL.numel() - 1)]
            hidden.append(self._run(tokens_SL, None)[kept_SL])
            where.append(index_SL[kept_SL])
        return torch.cat(hidden)[torch.cat(where).argsort()].view(*tokens_BL.shape, -1)


class _Documents(NamedTuple):
    """Where the documents of a flattened batch begin, and how long they are, longest first: [S] each."""

    starts_S: torch.Tensor
    lengths_S: torch.Tensor

    @classmethod
    def of(cls, starts_BL: torch.Tensor) -> _Documents:
        starts_S = starts_BL.flatten().nonzero().squeeze(1)
        lengths_S = torch.diff(starts_S, append=starts_S.new_tensor([starts_BL.numel()]))
        lengths_S, by_length_S = lengths_S.sort(descending=True)
        return cls(starts_S[by_length_S], lengths_S)


def _starts(segments_BL: torch.Tensor) -> torch.Tensor:
    starts_BL = torch.ones_like(segments_BL, dtype=torch.bool)
    starts_BL[:, 1:] = segments_BL[:, 1:] != segments_BL[:, :-1]
    return starts_BL


def _positions(starts_BL: torch.Tensor) -> torch.Tensor:
    index_L = torch.arange(starts_BL.shape[1], device=starts_BL.device)
    return index_L - torch.where(starts_BL, index_L, 0).cummax(1).values


def tensor_in(output: Any, name: str) -> Any:
    """Returns what a model gave: the first of a tuple, the field of that name, or the tensor itself."""
    return output[0] if isinstance(output, tuple) else getattr(output, name, output)


def plain_logits(model: nn.Module, tokens_BL: torch.Tensor) -> torch.Tensor:
    """Returns the logits [B, L, V] that the model's own forward pass gives, in its own dtype."""
    kwargs = {"use_cache": False} if accepts_argument(model, "use_cache") else {}
    logits: torch.Tensor = tensor_in(model(tokens_BL, **kwargs), "logits")
    return logits


def accepts_argument(module: nn.Module, argument: str) -> bool:
    """Whether `forward` names this argument."""
    return argument in inspect.signature(module.forward).parameters
