"""A small classifier of files that reads their bytes, in the manner of ByteFormer (Horton et al. 2023, arXiv 2306.00238).

    bytes -> embedding, with its place -> strided convolution, `stride` bytes become one token
          -> `depth` pre-norm transformer blocks -> mean over the file's own tokens -> logits

ByteFormer's shifted windows and token merging are left out: files here are short. What stands behind a file's end is masked
everywhere, so that logits do not depend on the other files of a batch.

Shape suffixes: B batch, L bytes, T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import nn

from softcache.errors import SpecError

__all__ = ["ByteClassifier"]

PADDING = 256


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens_BTD: torch.Tensor, seen_B11T: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(tokens_BTD)).chunk(3, dim=-1)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen_B11T)
        tokens_BTD = tokens_BTD + self.out(mixed.transpose(1, 2).flatten(2))
        return tokens_BTD + self.mlp(self.norm2(tokens_BTD))


class ByteClassifier(nn.Module):
    """Logits [B, V] of files [B, L], bytes as whole numbers with 256 behind a file's end.

    Args:
        num_classes: V.
        max_bytes: the longest file that it reads; each place has an embedding of its own.
        width: D; a multiple of `heads`.
        depth: transformer blocks.
        stride: bytes per token; the convolution sees twice as many.
    """

    def __init__(
        self,
        num_classes: int,
        max_bytes: int,
        *,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        stride: int = 4,
    ) -> None:
        super().__init__()
        self.max_bytes, self.stride = max_bytes, stride
        self.embedding = nn.Embedding(PADDING + 1, width, padding_idx=PADDING)
        self.place = nn.Parameter(0.02 * torch.randn(max_bytes, width))
        self.conv = nn.Conv1d(width, width, 2 * stride, stride)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def forward(self, bytes_BL: torch.Tensor) -> torch.Tensor:
        length = bytes_BL.shape[1]
        if length > self.max_bytes:
            raise SpecError(
                f"student bytes: a file of {length} bytes, but it was built for at most {self.max_bytes}; set "
                "student.source.max_bytes, or train a student on files as long"
            )
        seen_BL = bytes_BL != PADDING
        embedded_BLD = (self.embedding(bytes_BL) + self.place[:length]) * seen_BL.unsqueeze(-1)
        # Whole steps, and one more so that the last window is whole too.
        missing = -length % self.stride + self.stride
        tokens_BTD = self.conv(nn.functional.pad(embedded_BLD.transpose(1, 2), (0, missing))).transpose(1, 2)
        seen_BT = seen_BL[:, :: self.stride]  # a token is a file's own if its first byte is
        mask_B11T = seen_BT[:, None, None, :]
        for block in self.blocks:
            tokens_BTD = block(tokens_BTD, mask_B11T)
        weights_BT1 = seen_BT.unsqueeze(-1).to(tokens_BTD.dtype)
        pooled_BD = (self.norm(tokens_BTD) * weights_BT1).sum(1) / weights_BT1.sum(1).clamp_min(1)
        return self.head(pooled_BD)
