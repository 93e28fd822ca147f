"""Logits that look like a teacher's, in what the size of its labels depends on; V and the seed make them.

Text: log-frequencies fall as a power of the class number (tokenizers number their pieces so), give or take, and every
position adds its own normal noise, of its own width, and a lead for the first guess. Images: normal noise and a lead,
classes alike. Constants of text are set so that Megatron-LM's layout takes on bfloat16 logits at V = 131,072 about the
187 bytes that were measured of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["image_logits", "text_logits"]

_CHUNK_ELEMENTS = 2**24


def text_logits(num_rows: int, num_classes: int, *, bfloat16: bool, seed: int = 0) -> Iterator[Tensor]:
    """Yields parts [p, V] float32 of the logits of `num_rows` positions, rounded to bfloat16 if asked."""
    random = torch.Generator().manual_seed(seed)
    number_V = torch.arange(1, num_classes + 1)
    prior_V = -0.9 * (number_V + 20.0).log() + 0.7 * torch.randn(num_classes, generator=random)
    size = max(1, _CHUNK_ELEMENTS // num_classes)
    for start in range(0, num_rows, size):
        rows = min(size, num_rows - start)
        width_P1 = 2.2 * (0.4 * torch.randn(rows, 1, generator=random)).exp()
        logits_PV = torch.randn(rows, num_classes, generator=random).mul_(width_P1).add_(prior_V).add_(4.0)
        lead_P1 = 8.0 * torch.rand(rows, 1, generator=random).square()
        logits_PV.scatter_add_(1, logits_PV.argmax(dim=1, keepdim=True), lead_P1)
        yield logits_PV.bfloat16().float() if bfloat16 else logits_PV


def image_logits(num_rows: int, num_classes: int, *, seed: int = 0) -> Iterator[Tensor]:
    """Yields the logits [P, V] float32 of an image classifier, sure of most images and not of all."""
    random = torch.Generator().manual_seed(seed)
    logits_PV = torch.randn(num_rows, num_classes, generator=random) * 1.3
    lead_P1 = 9.0 * torch.rand(num_rows, 1, generator=random).sqrt()
    guess_P1 = torch.randint(num_classes, (num_rows, 1), generator=random)
    yield logits_PV.scatter_add_(1, guess_P1, lead_P1)
