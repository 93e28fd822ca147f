"""What every record does to its arrays: rows of them, as torch, as NumPy. torch is imported only where it is there."""

from __future__ import annotations

from typing import Any

from array_api_compat import is_numpy_array, is_torch_array

__all__ = ["Array", "as_numpy", "as_pinned", "as_torch", "row_index", "rows"]

Array = Any  # a NumPy array or a torch tensor


def row_index(indices: Any, like: Array) -> Any:
    """Returns what `rows` takes: `indices` (a slice, a list, integers or booleans) for arrays of the kind of `like`."""
    if isinstance(indices, slice) or not is_torch_array(like):
        return indices
    import torch

    index = torch.as_tensor(indices, device=like.device)
    return index if index.dtype == torch.bool else index.to(torch.int64)


def rows(x: Array, index: Any) -> Array:
    """Returns rows of an array; a slice shares memory."""
    if isinstance(index, slice) or not is_torch_array(x):
        return x[index]
    import torch

    # torch cannot gather uint16 and uint32, so those travel as signed bits.
    signed = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}.get(x.dtype)
    return x[index] if signed is None else x.view(signed)[index].view(x.dtype)


def as_torch(x: Array, device: Any = None, *, non_blocking: bool = False) -> Array:
    """Returns a tensor, on the CPU over the same memory; what is read-only is copied, because writing to a tensor over
    it would crash the process."""
    import torch

    if is_numpy_array(x):
        x = torch.from_numpy(x if x.flags.writeable else x.copy())
    return x if device is None else x.to(device, non_blocking=non_blocking)


def as_pinned(x: Array) -> Array:
    """Returns a tensor in page-locked memory, its numbers next to each other: those of a column of a table would keep the
    memory of the whole table, and be copied once more, waiting, on their way to a GPU."""
    return as_torch(x).contiguous().pin_memory()


def as_numpy(x: Array) -> Array:
    """Returns a NumPy array, detached; on the CPU over the same memory. bfloat16 becomes float32."""
    if is_numpy_array(x):
        return x
    x = x.detach().cpu()
    return (x.float() if str(x.dtype) == "torch.bfloat16" else x).numpy()
