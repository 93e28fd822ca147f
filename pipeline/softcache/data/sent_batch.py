"""How a loader process sends a batch: a small one through the pipe, a large one through torch's shared memory.

torch gives each tensor, however small, a file of shared memory of its own, whose descriptor is asked for over a socket.
NumPy's arrays are pickled with what is around them, and copied: several times the rate for images of 8x8
(docs/benchmarks.md).
"""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any, NamedTuple

__all__ = ["SentBatch"]


_LARGEST = 2**19
"""Bytes of tensors above which a batch goes through shared memory."""


class SentBatch:
    """A base of batches: in a loader process they are pickled so, elsewhere as any object."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        from torch.utils.data import get_worker_info

        if get_worker_info() is None or _tensor_bytes(vars(self)) > _LARGEST:
            return super().__reduce_ex__(protocol)
        return _received, (_Object(type(self), _packed(vars(self))),)


class _Array(NamedTuple):
    """A tensor's numbers."""

    values: Any


class _Object(NamedTuple):
    """An object of softcache's and its attributes."""

    kind: type
    attributes: dict[str, Any]


def _is_own(value: Any) -> bool:
    """Whether a value is an object that may have tensors among its attributes, such as labels."""
    return (
        is_dataclass(value) and type(value).__module__.startswith("softcache.") and hasattr(value, "__dict__")
    )


def _tensor_bytes(value: Any) -> int:
    import torch

    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_tensor_bytes, value.values()))
    if isinstance(value, list):
        return sum(map(_tensor_bytes, value))
    return _tensor_bytes(vars(value)) if _is_own(value) else 0


def _packed(value: Any) -> Any:
    import torch

    if type(value) is torch.Tensor and value.dtype != torch.bfloat16 and not value.requires_grad:
        return _Array(value.numpy())
    if isinstance(value, dict):
        return {name: _packed(one) for name, one in value.items()}
    if isinstance(value, list):
        return list(map(_packed, value))
    return _Object(type(value), _packed(vars(value))) if _is_own(value) else value


def _received(value: Any) -> Any:
    import torch

    if isinstance(value, _Array):
        return torch.from_numpy(value.values)
    if isinstance(value, _Object):
        out: Any = object.__new__(value.kind)
        vars(out).update(_received(value.attributes))
        return out
    if isinstance(value, dict):
        return {name: _received(one) for name, one in value.items()}
    return list(map(_received, value)) if isinstance(value, list) else value
