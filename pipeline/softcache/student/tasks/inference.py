"""What a finished model is as a function of one input, and how a batch of the data is asked of it.

A task defines what its model's users send and get (`Task.serve`); exporting, quantising and measuring
(`softcache.runs.export`) know
nothing of images or tokens. A new kind of task needs a class with these names, and nothing else.

Shape suffixes: `N` rows of the input, `L` tokens of one, `P` label rows, `V` classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn

from softcache.data.bytes import PADDING
from softcache.data.images import ImageBatch
from softcache.data.tokens import TokenBatch
from softcache.models.language.backbone_head import accepts_argument, tensor_in

__all__ = ["ByteServing", "ImageServing", "Request", "Serving", "TokenServing"]


@dataclass(frozen=True)
class Request:
    """A batch of the data as a served model is asked for it.

    Attributes:
        inputs: the model's one input [N, ...].
        rows: [P] int64, which of the flattened logits [N * …, V] are label rows; None: all of them.
        targets: [P] int64, the ground truth of each.
    """

    inputs: torch.Tensor
    rows: torch.Tensor | None
    targets: torch.Tensor

    def logits_of(self, output: torch.Tensor) -> torch.Tensor:
        """Returns float32 logits [P, V] of what the model gave."""
        flat = output.float().flatten(0, -2)
        return flat if self.rows is None else flat[self.rows]


class Serving(Protocol):
    """A model as its users call it.

    Attributes:
        module: inputs -> logits [..., V], in evaluation mode, float32, on the CPU.
        input_name, contract: the input's name in a graph, and in words what it must be.
        dynamic: axis of the input -> its name and its largest size (None: any).
        quantization: int8 with activations calibrated ("static") or measured on the fly ("dynamic").
    """

    @property
    def module(self) -> nn.Module: ...
    @property
    def input_name(self) -> str: ...
    @property
    def contract(self) -> str: ...
    @property
    def dynamic(self) -> dict[int, tuple[str, int | None]]: ...
    @property
    def quantization(self) -> Literal["static", "dynamic"]: ...

    def ask(self, batch: Any) -> Request:
        """Returns a batch of the data as inputs, label rows and targets."""
        ...


class _Images(nn.Module):
    def __init__(self, normalize: nn.Module, model: nn.Module) -> None:
        super().__init__()
        self.normalize, self.model = normalize, model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(self.normalize(images))
        return logits


class ImageServing:
    """A classifier of images as the views give them: normalisation is part of the model."""

    input_name = "images"
    dynamic: dict[int, tuple[str, int | None]] = {0: ("batch", None)}  # noqa: RUF012

    def __init__(self, model: nn.Module, normalize: nn.Module, input_shape: tuple[int, ...]) -> None:
        self.module = _Images(normalize, model).float().cpu().eval()
        self.input_shape = input_shape

    @property
    def contract(self) -> str:
        shape = ", ".join(map(str, self.input_shape))
        return f"images of shape [batch, {shape}], as the config's views give them (uint8, 0 to 255); normalised inside"

    @property
    def quantization(self) -> Literal["static", "dynamic"]:
        """Attention loses too much with fixed ranges of activations, convolutions gain from them."""
        attends = any("attention" in type(part).__name__.lower() for part in self.module.modules())
        return "dynamic" if attends else "static"

    def ask(self, batch: ImageBatch) -> Request:
        assert isinstance(batch.targets, torch.Tensor)  # the plain view is of single images
        return Request(batch.images, None, batch.targets)


class ByteServing(ImageServing):
    """A classifier of encoded files' bytes, all of one length: what is shorter is padded, and the padding is not seen."""

    input_name = "bytes"

    def __init__(self, model: nn.Module, normalize: nn.Module, max_bytes: int) -> None:
        super().__init__(model, normalize, (max_bytes,))
        self._max_bytes = max_bytes

    @property
    def contract(self) -> str:
        return (
            f"bytes of shape [batch, {self._max_bytes}], int16: the bytes of a file, 0 to 255, and {PADDING} behind its "
            "end; encoded as the config's [student.source] does"
        )

    @property
    def quantization(self) -> Literal["static", "dynamic"]:
        """Such students attend over their bytes."""
        return "dynamic"

    def ask(self, batch: ImageBatch) -> Request:
        assert isinstance(batch.targets, torch.Tensor)
        missing = self._max_bytes - batch.images.shape[1]
        padded_BL = nn.functional.pad(batch.images, (0, missing), value=PADDING)
        return Request(padded_BL, None, batch.targets)


class _Tokens(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        more = {"use_cache": False} if accepts_argument(self.model, "use_cache") else {}
        logits: torch.Tensor = tensor_in(self.model(input_ids, **more), "logits")
        return logits


class TokenServing:
    """A causal language model of one text per row, padded on the right, with nothing kept between calls."""

    input_name = "input_ids"
    quantization: Literal["static", "dynamic"] = "dynamic"

    def __init__(self, model: nn.Module, *, context: int, cross_documents: bool) -> None:
        self.module = _Tokens(model).float().cpu().eval()
        self._context, self._cross_documents = context, cross_documents
        self.dynamic: dict[int, tuple[str, int | None]] = {0: ("batch", None), 1: ("length", context)}

    @property
    def contract(self) -> str:
        return (
            f"input_ids of shape [batch, length], int64, length at most {self._context}; one text per row, padded on the "
            "right with anything (a causal model does not see it)"
        )

    def ask(self, batch: TokenBatch) -> Request:
        """Returns each document as a row of its own, because the model knows no segments; windows as in training."""
        tokens_BL, length = batch.tokens, batch.tokens.shape[1]
        offset_BL = torch.arange(length).expand_as(tokens_BL)
        starts_BL = offset_BL % self._context == 0
        if not self._cross_documents:
            starts_BL[:, 1:] |= batch.segments[:, 1:] != batch.segments[:, :-1]
        begin_BL = torch.where(starts_BL, offset_BL, 0).cummax(1).values
        piece = starts_BL.flatten().long().cumsum(0) - 1
        within = (offset_BL - begin_BL).flatten()
        used, row_of = piece[batch.rows].unique(return_inverse=True)
        number = torch.full((int(piece[-1]) + 1,), -1).scatter(0, used, torch.arange(len(used)))[piece]
        longest = int(within[batch.rows].max()) + 1
        kept = (number >= 0) & (within < longest)
        inputs_NL = torch.zeros(len(used), longest, dtype=torch.int64)
        inputs_NL[number[kept], within[kept]] = tokens_BL.flatten()[kept]
        return Request(inputs_NL, row_of * longest + within[batch.rows], batch.targets)
