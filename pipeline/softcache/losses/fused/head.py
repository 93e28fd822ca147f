"""A language model's head, a chunk of positions at a time: hidden states to logits, and the softcap back.

Shape suffixes: `P` positions, `D` width of the hidden state, `V` classes.

The logits of a chunk, the square of its bounded logits (for a softcap) and its half-precision copy lie in buffers
that the next chunk writes over, so that the memory is that of one chunk and is asked for once.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from softcache.errors import LabelError
from softcache.runtime.linear import matmul_float32

__all__ = ["Head"]

# Of a chunk of logits. Time over that of dense cross-entropy at 2^21, 22, 23, 24 and 25, one thread, D = 256:
# 1.20, 0.97, 0.61, 0.64, 0.82 for V = 131072 and 0.89, 0.80, 0.85, 0.88, - for V = 32768. Thin chunks make
# slow products, thick ones leave the cache.
_CHUNK_ELEMENTS = 2**23
# On a GPU every chunk reads the head's weight, and reads and writes its gradient.
_CUDA_CHUNK_ELEMENTS = 2**26


class Head:
    """A head and the buffers of one chunk. A chunk's logits overwrite those of the chunk before.

    Attributes:
        keeps_squares: whether `logits` keeps what `through_softcap` needs.
    """

    def __init__(
        self,
        hidden_PD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        softcap: float | None,
        logit_scale: float,
        chunk_positions: int | None,
    ) -> None:
        _check_head(hidden_PD, weight_VD, bias_V, softcap, chunk_positions)
        self.tensors = (hidden_PD, weight_VD, bias_V)
        # Half-precision inputs are multiplied with a float32 accumulator: on CUDA as they are, elsewhere as float32.
        self._rounded = _product_dtype(hidden_PD, weight_VD)
        self.dtype = torch.float64 if self._rounded == torch.float64 else torch.float32
        self.product_dtype = self._rounded if hidden_PD.is_cuda else self.dtype  # of the matrix products
        self.num_classes = weight_VD.shape[0]
        self.scale, self.softcap, self.keeps_squares = logit_scale, softcap, True
        elements = _CUDA_CHUNK_ELEMENTS if hidden_PD.is_cuda else _CHUNK_ELEMENTS
        self._chunk = chunk_positions or max(1, elements // max(1, self.num_classes))
        self.weight_VD = weight_VD.detach().to(self._rounded).to(self.product_dtype)
        self._bias_V = None if bias_V is None else bias_V.detach().to(self.dtype)
        self._buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, num_rows: int, dtype: torch.dtype | None = None) -> Tensor:
        """[num_rows, V] uninitialised memory; the first call of a name is for the longest chunk."""
        if name not in self._buffers:
            shape, device = (num_rows, self.num_classes), self.weight_VD.device
            self._buffers[name] = torch.empty(shape, dtype=dtype or self.dtype, device=device)
        return self._buffers[name][:num_rows]

    def chunks(self, hidden_PD: Tensor, size: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Chunks of rows in the products' dtype, of `size` rows or as many as the settings give."""
        size = size or self._chunk
        for start in range(0, len(hidden_PD), size):
            part = slice(start, min(start + size, len(hidden_PD)))
            yield part, hidden_PD[part].to(self._rounded).to(self.product_dtype)

    def logits(self, hidden_PD: Tensor) -> Tensor:
        """A chunk's logits [P, V], in the buffer "logits"."""
        num_rows, scale = len(hidden_PD), self.scale
        logits_PV = self.buffer("logits", num_rows)
        if self.product_dtype == self.dtype:
            bias_V = logits_PV if self._bias_V is None else self._bias_V  # at beta = 0 it is not read
            beta = 0.0 if self._bias_V is None else scale
            torch.addmm(bias_V, hidden_PD, self.weight_VD.T, beta=beta, alpha=scale, out=logits_PV)
        else:
            matmul_float32(hidden_PD, self.weight_VD.T, out=logits_PV)
            if self._bias_V is not None:
                logits_PV.add_(self._bias_V)
            if scale != 1.0:
                logits_PV.mul_(scale)
        if self.softcap is not None:
            bounded_PV = logits_PV.div_(self.softcap).tanh_()
            if self.keeps_squares:
                torch.mul(bounded_PV, bounded_PV, out=self.buffer("squared", num_rows))
            logits_PV.mul_(self.softcap)
        return logits_PV

    def through_softcap(self, gradient_PV: Tensor) -> Tensor:
        """Turns, in place, the gradient of a chunk's logits into that of the logits before the softcap.

        Where the squares of these were not kept, it is that already.
        """
        if self.softcap is None or not self.keeps_squares:
            return gradient_PV
        squared_PV = self.buffer("squared", len(gradient_PV))
        return gradient_PV.addcmul_(gradient_PV, squared_PV, value=-1.0)  # d tanh = 1 - tanh^2

    def gradient_buffer(self, logits_PV: Tensor) -> Tensor:
        """Where a chunk's gradient is written: over its logits, or in the products' dtype where no bias needs it wide."""
        if self.product_dtype == self.dtype or self._bias_V is not None:
            return logits_PV
        return self.buffer("narrow", len(logits_PV), self.product_dtype)

    def narrow(self, gradient_PV: Tensor) -> Tensor:
        """The gradient in the products' dtype."""
        if self.product_dtype == gradient_PV.dtype:
            return gradient_PV
        return self.buffer("narrow", len(gradient_PV), self.product_dtype).copy_(gradient_PV)


def _check_head(
    hidden_PD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    chunk_positions: int | None,
) -> None:
    if hidden_PD.ndim != 2 or weight_VD.ndim != 2 or hidden_PD.shape[1] != weight_VD.shape[1]:
        raise LabelError(
            f"head: expected hidden states [P, D] and a weight [V, D]; found {list(hidden_PD.shape)} and "
            f"{list(weight_VD.shape)}; flatten batch and positions, and pass lm_head.weight as it is"
        )
    if bias_V is not None and bias_V.shape != weight_VD.shape[:1]:
        raise LabelError(
            f"head: expected a bias {list(weight_VD.shape[:1])}, one number per row of the weight; "
            f"found {list(bias_V.shape)}; pass lm_head.bias"
        )
    if softcap is not None and not softcap > 0.0:
        raise LabelError(f"head.softcap: expected a number above 0; found {softcap}; None is no softcap")
    if chunk_positions is not None and chunk_positions < 1:
        raise LabelError(f"chunk_positions: expected at least 1; found {chunk_positions}; None picks one")


def _product_dtype(hidden_PD: Tensor, weight_VD: Tensor) -> torch.dtype:
    """Of the matrix products: the inputs', or autocast's (which leaves float64 alone)."""
    kind = hidden_PD.device.type
    if torch.is_autocast_enabled(kind) and torch.float64 not in (hidden_PD.dtype, weight_VD.dtype):
        return torch.get_autocast_dtype(kind)
    if not hidden_PD.is_floating_point() or hidden_PD.dtype != weight_VD.dtype:
        raise LabelError(
            f"head: expected hidden states and weight of one floating-point dtype; found {hidden_PD.dtype} "
            f"and {weight_VD.dtype}; cast one, or use torch.autocast"
        )
    return hidden_PD.dtype
