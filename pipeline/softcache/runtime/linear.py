"""A linear layer of half-precision inputs whose output keeps the float32 accumulator.

A matrix product sums in float32 whatever its inputs are; PyTorch then rounds the sum to the inputs' dtype. In bfloat16 the
logits 20.0 and 20.05 become one number, and labels made of them are off by hundredths of a nat. On CUDA the product is
asked for in float32 (`torch.mm(..., out_dtype=...)`); elsewhere the rounded inputs are multiplied in float32, which
gives the same sums, block by block so that no float32 copy of a vocabulary's weights is held.

Shape suffixes: `P` positions, `D` width of the input, `V` classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["linear_float32", "matmul_float32"]

# Weights cast at a time: 32 MiB in float32.
BLOCK_ELEMENTS = 2**23


def linear_float32(inputs_PD: Tensor, weight_VD: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """Returns `inputs @ weight.T + bias`, float32 for half-precision inputs.

    Args:
        inputs_PD: [P, D] floating point; under autocast it and the weight are rounded to autocast's dtype first.
        weight_VD: [V, D].
        bias_V: [V], added in float32; or None.

    Returns:
        [P, V] float32, or float64 for float64 inputs; differentiable in all of them.
    """
    kind = inputs_PD.device.type
    dtype = torch.promote_types(inputs_PD.dtype, weight_VD.dtype)
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        if dtype in (torch.float32, torch.float64):
            bias_V = None if bias_V is None else bias_V.to(dtype)
            return torch.nn.functional.linear(inputs_PD.to(dtype), weight_VD.to(dtype), bias_V)
        product_PV = _Product.apply(inputs_PD.to(dtype), weight_VD.to(dtype))
        return product_PV if bias_V is None else product_PV + bias_V.float()


def matmul_float32(left: Tensor, right: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Returns the product of two matrices of one half-precision dtype, with its float32 accumulator."""
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    if out is None:
        out = left.new_empty(len(left), right.shape[1], dtype=torch.float32)
    wide = left.float()
    block = max(1, BLOCK_ELEMENTS // max(1, right.shape[0]))
    for start in range(0, right.shape[1], block):
        torch.mm(wide, right[:, start : start + block].float(), out=out[:, start : start + block])
    return out


class _Product(torch.autograd.Function):
    """`inputs @ weight.T` of half-precision tensors; gradients in their dtypes, as of `torch.mm`."""

    @staticmethod
    def forward(ctx: Any, inputs_PD: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(inputs_PD, weight_VD)
        return matmul_float32(inputs_PD, weight_VD.T)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        inputs_PD, weight_VD = ctx.saved_tensors
        gradient_PV = gradients[0].to(inputs_PD.dtype)
        of_inputs = matmul_float32(gradient_PV, weight_VD) if ctx.needs_input_grad[0] else None
        of_weight = matmul_float32(gradient_PV.T, inputs_PD) if ctx.needs_input_grad[1] else None
        return (
            None if of_inputs is None else of_inputs.to(inputs_PD.dtype),
            None if of_weight is None else of_weight.to(weight_VD.dtype),
        )
